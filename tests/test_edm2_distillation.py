"""Distilling EDM2's networks: losses balanced by u(sigma), weights of unit size, and the modes that save memory."""

import copy

import pytest
import torch
from click.testing import CliRunner
from test_edm2 import small_network
from tiny import BATCH, CPU, assert_same_training, equal, save, smoothed, tiny_config, tiny_teacher, weights

import sid_train
from dnnlib import UserError
from edm import zoo
from sid import lora, memory
from sid.adversarial import SiDALoss
from sid.inputs import Inputs
from sid.loss import SiDLoss
from sid.prepare import prepare
from training.networks_edm2 import MPConv

EDM2 = {"augment": 0, "uncertainty": True, "fake_sigma_schedule": "lognormal=-0.4,1"}


def distillation(teacher=None, resume=None, **changes):
    return prepare(Inputs(teacher or small_network()), tiny_config(**{**EDM2, **changes}), CPU, resume)


def trained(iterations, smooth=True, **changes):
    made = distillation(**changes)
    made = smoothed(made) if smooth else made
    for _ in range(iterations):
        made.iteration()
    return made


class Reals:
    def draw(self, n):
        return torch.zeros(n, 3, 8, 8), torch.eye(2)[[0] * n]


@pytest.mark.parametrize("adversarial", [False, True])
def test_both_losses_are_balanced_by_the_learned_error(adversarial):
    phi, psi = small_network(), small_network()
    psi.unet.out_gain.data += 0.3
    images, labels = torch.randn(4, 3, 8, 8), torch.eye(2)[[0, 1, 1, 0]]
    losses = [SiDALoss(Reals()) if adversarial else SiDLoss() for _ in range(2)]
    losses[1] = SiDALoss(Reals(), uncertainty=True) if adversarial else SiDLoss(uncertainty=True)
    levels = []
    psi.register_forward_pre_hook(lambda net, args: levels.append(args[1]))

    def both(call):
        values = []
        for loss in losses:
            torch.manual_seed(3)
            values.append(call(loss))
        return values

    plain, balanced = both(lambda loss: loss.fake_score_loss(psi, images, labels))
    u = psi.logvar(levels[0])
    torch.testing.assert_close(balanced, plain / u.exp() + u)
    assert torch.autograd.grad(balanced.sum(), psi.logvar_linear.weight)[0].abs().max() > 0
    plain, balanced = both(lambda loss: loss.generator_loss(phi, psi, images, labels))
    u = psi.logvar(levels[-1])
    torch.testing.assert_close(balanced, plain / u.exp())
    assert torch.autograd.grad(balanced.sum(), psi.logvar_linear.weight, allow_unused=True) == (None,)
    if not adversarial:
        (_, plain), (theta, psis) = both(lambda loss: loss.shared_losses(phi, psi, images, labels))
        assert theta.shape == images.shape
        assert (psis - plain).abs().max() > 1e-3


def test_weights_have_unit_size_and_the_start_is_the_teacher():
    teacher = small_network().requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, MPConv):
            module.weight *= 0.5  # as averaging leaves published weights
    made = distillation(teacher)
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 3.0]), torch.eye(2)
    for net in (made.state.generator, made.state.ema):
        torch.testing.assert_close(net.eval()(x, sigma, labels), teacher(x, sigma, labels), rtol=2e-3, atol=2e-3)
    before = copy.deepcopy(made.state.fake_score.logvar_linear.weight)
    made.iteration()
    for net in (made.state.generator, made.state.fake_score):
        for module in net.modules():
            if isinstance(module, MPConv) and module is not net.logvar_linear:
                rms = module.weight.flatten(1).square().mean(dim=1).sqrt()
                assert (rms - 1).abs().max() < 1e-3
    assert not made.state.generator.logvar_linear.weight.requires_grad
    assert not torch.equal(made.state.fake_score.logvar_linear.weight, before)
    assert not distillation(uncertainty=False).state.fake_score.logvar_linear.weight.requires_grad


def test_modes_that_save_memory_train_the_same():
    start, expected = weights(distillation()), weights(trained(1))
    assert_same_training(weights(trained(1, chunk=2, checkpoint=True)), expected, start)


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"precision": "bf16"}, {"share_noise": True}], ids=str)
def test_other_modes_train(changes):
    start = weights(distillation(**changes))
    made = trained(1, smooth=False, **changes)
    end = weights(made)
    assert all(value.isfinite().all() for value in end.values())
    assert {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])} == {
        *("generator", "fake_score", "ema")
    }
    assert type(lora.merge(made.state.ema)).__name__ == "Precond"
    estimate = memory.estimate(small_network(), made.config, BATCH)
    assert 0 < estimate.peak < 1


def test_resuming_is_exact(tmp_path):
    made = trained(1, smooth=False)
    path = save(made, tmp_path)
    made.iteration()
    resumed = distillation(resume=path)
    resumed.iteration()
    assert equal(weights(resumed), weights(made))


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--uncertainty: EDMPrecond has no u\(sigma\)"):
        prepare(Inputs(tiny_teacher()), tiny_config(uncertainty=True), CPU)
    with pytest.raises(UserError, match=r"--augment=0\.1: the teacher takes no augmentation labels"):
        distillation(augment=0.1)
    teacher = str(tmp_path / "teacher.safetensors")
    zoo.save_network(small_network(), teacher)
    dry = [f"--edm_model={teacher}", "--uncertainty=1", "-n", "--batch=8", "--device=cpu", f"--outdir={tmp_path}"]
    assert "generator activations" in " ".join(CliRunner().invoke(sid_train.main, dry).output.split())
    assert "the teacher has edm2" in CliRunner().invoke(sid_train.main, [*dry, "--arch=adm"]).output
