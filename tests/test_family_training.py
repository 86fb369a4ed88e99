"""Options of the family in training: more updates of psi, late score gradients, a single noise level."""

import pytest
import torch
from test_bad_input import NETWORK
from tiny import BATCH, BATCH_GPU, CPU, Spy, equal, tiny_config, tiny_distillation, weights

from dnnlib import UserError
from edm import train_options
from sid.distillation import FAKE_SCORE_PHASE, GENERATOR_PHASE
from sid.inputs import Inputs, check_noise_levels
from sid.objectives import OBJECTIVES
from sid.prepare import prepare
from training.loss import EDMLoss
from training.networks import EDMPrecond


def trained(iterations=2, **changes):
    distillation = tiny_distillation(**changes)
    for _ in range(iterations):
        distillation.iteration()
    return weights(distillation)


def test_the_defaults_are_sid():
    given = {"objective": "sid", "weighting": "omega", "score_gradient": "from=0", "fake_score_updates": 1}
    assert equal(trained(**given, sigma_schedule="karras", fake_sigma_schedule="lognormal"), trained())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(objective):
    start, end = (
        weights(tiny_distillation()),
        trained(1, objective=objective, huber=0.1 if objective == "sid" else None),
    )
    assert all(value.isfinite().all() for value in end.values())
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"generator", "fake_score", "ema"}


def test_score_gradients_that_come_later():
    """Until then the run equals one without score gradients; from then on it doesn't."""
    later, without = (tiny_distillation(score_gradient=s) for s in (f"from={2 * BATCH / 1000}", "off"))
    for expected in (True, True, False):
        for distillation in (later, without):
            distillation.iteration()
        assert equal(weights(later), weights(without)) == expected


def test_fake_score_updates():
    """N updates of psi, each with its own draws (the last with the draws of N = 1), then one update of theta."""
    runs = {n: prepare(Inputs(Spy(3)), tiny_config(augment=0, fake_score_updates=n), CPU) for n in (1, 3)}
    rounds, levels = BATCH // BATCH_GPU, {}
    for n, distillation in runs.items():
        drawn = levels[n] = []
        hooks = [
            net.register_forward_pre_hook(lambda net, args, drawn=drawn, name=name: drawn.append((name, args[1])))
            for name, net in (("theta", distillation.state.generator), ("psi", distillation.state.fake_score))
        ]
        distillation.iteration()
        for hook in hooks:
            hook.remove()
    pair = ["theta", "psi"]
    assert [name for name, _ in levels[3]] == pair * (4 * rounds)
    seen = {n: [sigma for name, sigma in levels[n] if name == "psi"] for n in runs}
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[3][2 * rounds :]))
    assert len({tuple(sigma.flatten().tolist()) for sigma in seen[3]}) == 4 * rounds
    phases = [list(runs[3]._rounds(FAKE_SCORE_PHASE, repeat)) for repeat in range(3)]
    phases.append(list(runs[3]._rounds(GENERATOR_PHASE)))
    assert len({tuple(torch.cat(labels).argmax(1).tolist()) for labels in phases}) == 4


def test_one_noise_level_from_teacher_to_generator():
    options = {"arch": "ddpmpp", "precond": "vp", "sigma": 0.37, "p_mean": None, "p_std": None}
    _, name, arguments = train_options.network_and_loss(options)
    assert name == "EDMLoss"
    loss = EDMLoss(**arguments)
    torch.testing.assert_close(loss.draw_sigma(torch.zeros(5, 1, 2, 2)), torch.full([5, 1, 1, 1], 0.37))
    teacher = EDMPrecond(8, 1, **NETWORK)
    teacher.metadata = {"sigma": 0.37}
    single = {"sigma_schedule": "single=0.37", "fake_sigma_schedule": "single=0.37", "augment": 0}
    check_noise_levels(teacher, tiny_config(**single, init_sigma=0.37))
    with pytest.raises(UserError, match=r"give --fake-sigma-schedule=single=0\.37$"):
        check_noise_levels(teacher, tiny_config(**{**single, "fake_sigma_schedule": "lognormal"}, init_sigma=0.37))
    with pytest.raises(UserError, match=r"give --init_sigma=0\.37$"):
        check_noise_levels(teacher, tiny_config(**single))
    distillation, levels = prepare(Inputs(teacher), tiny_config(**single, init_sigma=0.37), CPU), set()
    teacher.register_forward_pre_hook(lambda net, args: levels.update(args[1].flatten().tolist()))
    distillation.state.fake_score.register_forward_pre_hook(lambda net, args: levels.update(args[1].flatten().tolist()))
    distillation.iteration()
    assert levels == {torch.tensor(0.37).item()}
