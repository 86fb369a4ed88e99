"""The spike guard against a plain median, on weights, and in runs: exact when resumed, equal on all processes."""

import json
import math
import random
import statistics

import pytest
import torch
from tiny import BATCH, CPU, NoReport, equal, on_two_processes, save, tiny_distillation, weights

from sid.training_loop import training_loop
from torch_utils import spike_guard
from torch_utils.adam import MomentumFreeAdam
from torch_utils.spike_guard import REMEMBERED, SpikeGuard
from torch_utils.updates import MAX_SKIPPED_UPDATES, Updater


def test_spikes_are_those_of_a_plain_median():
    rng, guard, remembered, expected = random.Random(0), SpikeGuard(3.0, CPU), [], 0
    for _ in range(6 * REMEMBERED):
        norm = rng.choice([math.nan, math.inf, *[rng.lognormvariate(0, 1)] * 18])
        norm = torch.tensor(norm, dtype=torch.float32).item()
        spike = len(remembered) >= REMEMBERED and norm > 3 * statistics.median_low(remembered[-REMEMBERED:])
        spike = spike and math.isfinite(norm)
        assert guard.check(torch.tensor(norm)).item() == spike
        expected += spike
        remembered += [norm] if math.isfinite(norm) else []
    assert guard.count == expected > 20


def test_a_norm_that_grows_for_good_is_taken_after_half_of_those_remembered():
    guard = SpikeGuard(10.0, CPU)
    norms = [1.0] * REMEMBERED + [100.0] * REMEMBERED
    found = [int(guard.check(torch.tensor(norm))) for norm in norms]
    assert found == [0] * REMEMBERED + [1] * (REMEMBERED // 2 + 1) + [0] * (REMEMBERED // 2 - 1)


OPTIMIZERS = {
    "momentum-free": lambda p: MomentumFreeAdam([p], lr=0.1),
    "fused": lambda p: torch.optim.Adam([p], lr=0.1, fused=True),
    "plain": lambda p: torch.optim.SGD([p], lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_spike_never_reaches_weights_nor_moments(monkeypatch, optimizer):
    """It doesn't halve the loss scale or count towards the end of the run either; only non-finite gradients do."""
    monkeypatch.setattr(spike_guard, "REMEMBERED", 2 * MAX_SKIPPED_UPDATES + 2)
    norms = [1.0, 2.0] * (MAX_SKIPPED_UPDATES + 1)
    found = {}
    for spikes in (0, MAX_SKIPPED_UPDATES):
        weight = torch.nn.Parameter(torch.ones(3))
        updater = Updater("network", [weight], OPTIMIZERS[optimizer](weight), loss_scaling=True, spike_guard=5.0)
        for norm in [*norms, *[1e3] * spikes, 1.5]:
            weight.grad = torch.tensor([0.0, norm, 0.0])
            updater.step()
        updater.check(0)
        assert (updater.spikes, updater.skipped, updater.loss_scale) == (spikes, 0, 1)
        moments = next(iter(updater.optimizer.state_dict()["state"].values()), {})
        found[spikes] = {"weight": weight.detach(), **moments}
    assert equal(*found.values())


def iterations(count, resume=None, **changes):
    distillation = tiny_distillation(resume=resume, **changes)
    for _ in range(count):
        distillation.iteration()
    return distillation


def spikes(distillation):
    return [distillation.state.fake_score_updater.spikes, distillation.state.generator_updater.spikes]


def test_off_and_far_away_it_changes_nothing():
    off, far = iterations(3), iterations(3, spike_guard=1e6)
    assert equal(weights(off), weights(far))
    states = [d.state.contents(d.config, {})["generator_updater"] for d in (off, far)]
    assert states[1].keys() - states[0].keys() == {"spike_guard"}


def test_a_resumed_run_is_bit_equal_and_reports_its_spikes(tmp_path, monkeypatch):
    monkeypatch.setattr(spike_guard, "REMEMBERED", 3)
    whole = iterations(4, spike_guard=1.05)
    path, before = save(whole, tmp_path), spikes(whole)
    for _ in range(4):
        whole.iteration()
    resumed = iterations(4, resume=path, spike_guard=1.05)
    assert equal(weights(resumed), weights(whole))
    assert spikes(resumed) == spikes(whole)
    assert min(b - a for a, b in zip(before, spikes(whole))) > 0  # some of them after the resume
    assert not equal(weights(whole), weights(iterations(8)))

    training_loop(tiny_distillation(total_kimg=8 * BATCH / 1e3, spike_guard=1.05), tmp_path, NoReport())
    last = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[-1])
    assert [last[f"Health/{name}_spikes"] for name in ("fake_score", "generator")] == spikes(whole)


def guarded():
    spike_guard.REMEMBERED = 3
    distillation = iterations(6, spike_guard=1.05)
    return weights(distillation), spikes(distillation)


def test_two_processes_decide_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(spike_guard, "REMEMBERED", 3)
    first, second = on_two_processes(guarded, tmp_path)
    assert equal(first[0], second[0])
    assert first[1] == second[1] == guarded()[1]
    assert sum(first[1]) > 0


def test_a_state_with_other_norms_is_refused(tmp_path, monkeypatch):
    part = iterations(1, spike_guard=2.0)
    path = save(part, tmp_path)
    monkeypatch.setattr(spike_guard, "REMEMBERED", 5)
    with pytest.raises(Exception, match="the spike guard remembers 5 norms"):
        tiny_distillation(resume=path, spike_guard=2.0)
    assert tiny_distillation(resume=path).state.nimg == BATCH  # without the guard its memory isn't asked for
