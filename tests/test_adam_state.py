"""Adam's second moment in bfloat16, stochastically rounded: unbiased, equal on every process, half the bytes."""

import pytest
import torch
from tiny import assert_same_training, equal, on_two_processes, save, smoothed, tiny_distillation, weights

from torch_utils.adam import MomentumFreeAdam, round_to_bfloat16

BETA2 = 0.999


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the rounding


@pytest.mark.parametrize("value", [1.0, 1 + 1e-4, 1 + 2**-7 - 1e-6, 3.3e-12, 7.7e9, 1.2e-39, 1e-45, 0.0])
def test_the_mean_is_exact(value):
    n = 40_000
    value = torch.tensor(value)
    rounded = round_to_bfloat16(value.repeat(n), draws())
    assert torch.equal(rounded, rounded.bfloat16().float())
    low = (value.view(torch.int32) & -65536).view(torch.float32).double()
    high = ((value.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    up = (value.double() - low) / (high - low)  # the probability of the upper neighbour
    assert set(rounded.double().unique().tolist()) <= {low.item(), high.item()}
    assert (rounded > low).double().mean() == pytest.approx(up.item(), abs=5 * (0.25 / n) ** 0.5 if up else 0)


def test_what_bfloat16_holds_stays():
    values = torch.randn(1000).square().bfloat16().float()
    assert torch.equal(round_to_bfloat16(values.clone(), draws()), values)


def test_memory_layout_changes_nothing():
    values = torch.rand(2, 3, 4, 5)
    last = values.clone(memory_format=torch.channels_last)
    assert torch.equal(round_to_bfloat16(values.clone(), draws()), round_to_bfloat16(last, draws()))


# --- the optimiser


def steps(gradients, start=0.0, **options):
    """(weight, second moment) after Adam has seen `gradients` [steps, n], with the second moment `start` before."""
    weight = torch.zeros(gradients.shape[1], requires_grad=True)
    optimizer = MomentumFreeAdam([weight], lr=1e-3, beta2=BETA2, **options)
    for i, gradient in enumerate(gradients):
        weight.grad = gradient.clone()
        optimizer.step()
        if i == 0:
            optimizer.state[weight]["exp_avg_sq"].fill_(start)
    return weight.detach(), optimizer.state[weight]["exp_avg_sq"]


def test_the_moment_decays_where_rounding_to_nearest_would_freeze_it():
    n, count = 4096, 1000
    _, moment = steps(torch.zeros(count + 1, n), start=1.0, rounding_seed=[0])
    assert moment.dtype == torch.bfloat16
    expected = BETA2**count
    # Each rounding has a variance of at most 0.001 times a step of bfloat16, 2^-8 below 1, and decays by 0.998 a step.
    deviation = (0.001 * 2**-8 / 0.002) ** 0.5
    assert moment.double().mean() == pytest.approx(expected, abs=5 * deviation / n**0.5)
    assert moment.double().std() < deviation
    assert (torch.tensor(1.0) * BETA2).bfloat16() == 1


def test_it_stays_unbiased_over_many_steps():
    torch.manual_seed(0)
    gradients = torch.randn(1500, 2048) * torch.logspace(-4, 2, 2048)
    expected_weights, expected = steps(gradients, rounding_seed=None)
    found_weights, found = steps(gradients, rounding_seed=[3])
    ratio = found.double() / expected.double()
    assert ratio.std() < 0.06
    assert ratio.mean() == pytest.approx(1, abs=5 * 0.06 / 2048**0.5)
    difference = (found_weights - expected_weights).norm() / expected_weights.norm()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("before", [None, [0]])
@pytest.mark.parametrize("after", [None, [0]])
def test_states_of_either_precision_are_taken(before, after):
    weights = [torch.randn(64, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
    saved = MomentumFreeAdam(weights, lr=0.1, rounding_seed=before)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        saved.step()
    state = saved.state_dict()
    restored = MomentumFreeAdam(weights, lr=0.1, rounding_seed=after)
    restored.load_state_dict(state)
    dtype = torch.bfloat16 if after else torch.float32
    for weight in weights:
        expected, found = (optimizer.state[weight]["exp_avg_sq"] for optimizer in (saved, restored))
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))
    assert ("calls" in restored.state_dict()["param_groups"][0]) == bool(after)
    assert restored.state_dict()["param_groups"][0].get("calls", 0) == (3 if before and after else 0)


# --- a distillation


def run(iterations=12, resume=None, **changes):
    distillation = tiny_distillation(resume=resume, **{"adam_state": "bf16", **changes})
    for _ in range(iterations):
        distillation.iteration()
    return distillation


def moments(distillation):
    updaters = {"generator": distillation.state.generator_updater, "fake score": distillation.state.fake_score_updater}
    return {
        f"{name} {i}": moment["exp_avg_sq"]
        for name, updater in updaters.items()
        for i, moment in enumerate(updater.optimizer.state.values())
    }


def test_training_stays_close_to_that_in_full():
    start, half, full = weights(tiny_distillation()), run(), run(adam_state="fp32")
    assert {m.dtype for m in moments(half).values()} == {torch.bfloat16}
    assert {m.dtype for m in moments(full).values()} == {torch.float32}
    expected = weights(full)
    for name, value in weights(half).items():
        parts = value - expected[name], expected[name] - start[name]
        if name.endswith("qkv.bias"):  # keys' biases follow rounding errors
            parts = [part.reshape(-1, 3)[:, [0, 2]] for part in parts]
        assert parts[0].norm() <= 0.01 * parts[1].norm() + 1e-6, name


def test_a_resumed_run_is_bit_equal(tmp_path):
    changes = {"fake_score_updates": 2}
    unbroken = run(2, **changes)
    path = save(unbroken, tmp_path)
    for _ in range(3):
        unbroken.iteration()
    resumed = run(3, resume=path, **changes)
    assert equal(weights(resumed), weights(unbroken))
    assert equal(moments(resumed), moments(unbroken))
    other_seed = run(3, resume=path, **changes, seed=6)
    assert not equal(moments(other_seed), moments(unbroken))


def outcome():
    distillation = smoothed(tiny_distillation(adam_state="bf16"))
    for _ in range(3):
        distillation.iteration()
    return weights(distillation), moments(distillation)


def test_two_processes_train_as_one_does(tmp_path):
    first, second = on_two_processes(outcome, tmp_path)
    assert equal(first[0], second[0])
    assert equal(first[1], second[1])
    assert_same_training(first[0], outcome()[0], weights(tiny_distillation()))
