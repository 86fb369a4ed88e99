"""The memory estimate against what autograd keeps in a real step, and the batch chosen from it."""

import dataclasses

import pytest
import torch
from conftest import slow_ones
from tiny import CPU, Spy, tiny_config, tiny_teacher

from dnnlib import UserError
from sid import memory
from sid.inputs import Inputs
from sid.prepare import prepare

GUIDED = {"guidance": "long-short=2"}
RESOLVED = {"precision": "fp32", "augment": 0, "dropout": None}
LOW_RANK = {"precision": "bf16", "lora_rank": 2}


def kept_bytes(step) -> int:
    """The most that autograd holds for later backward passes while `step` runs, in bytes, weights excluded."""
    alive, peak = {}, 0

    class Handle:
        def __init__(self, tensor):
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            count, size = alive.get(self.key, (0, tensor.untyped_storage().nbytes()))
            alive[self.key] = (count + 1, size)
            nonlocal peak
            peak = max(peak, sum(size for _, size in alive.values()))

        def __del__(self):
            count, size = alive.pop(self.key)
            if count > 1:
                alive[self.key] = (count - 1, size)

    def pack(tensor):
        return tensor if isinstance(tensor, torch.nn.Parameter) else Handle(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: getattr(kept, "tensor", kept)):
        step()
    return peak


def wide_spy(width=64):
    """So wide that the network keeps more than the loss around it."""
    net = Spy(3)
    net.hidden, net.level = torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.Linear(4, width)
    net.out = torch.nn.Sequential(torch.nn.BatchNorm2d(width), torch.nn.SiLU(), torch.nn.Conv2d(width, 3, 3, padding=1))
    return net


MODES = [{}, {"chunk": 2}, {"checkpoint": True}, {"precision": "bf16"}, GUIDED]
MODES += [{"lora_rank": 2}, {"lora_rank": 2, "checkpoint": True}, {"lora_rank": 2, "precision": "bf16"}]
MODES += [{"lora_rank": 2, **GUIDED}, {"score_gradient": "off"}, {"objective": "dmd"}, {"share_images": True}]
MODES += [{"share_noise": True, **mode} for mode in ({}, {"chunk": 2, "score_gradient": "off"}, {"lora_rank": 2})]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("make", [tiny_teacher, wide_spy], ids=["ours", "foreign"])
def test_activations_are_those_that_a_step_keeps(make, mode):
    if make is wide_spy and "checkpoint" in mode:
        pytest.skip("it has no blocks that recompute, and --checkpoint=1 is refused")
    config = tiny_config(**{**RESOLVED, **mode}, batch_gpu=8)
    teacher = make()
    expected = memory.estimate(teacher, config, 8)
    distillation = prepare(Inputs(teacher), config, CPU)
    phases = {
        "fake_score_phase": expected.fake_score_activations,
        "generator_phase": expected.generator_activations,
    }
    if config.share_images or config.share_noise:
        phases = {"shared_phase": max(phases.values())}
    for phase, size in phases.items():
        measured = kept_bytes(lambda phase=phase: getattr(distillation, phase)(1.0)) / memory.GB
        assert measured == pytest.approx(size, rel=0.15)


def test_weights_gradients_and_moments():
    teacher = tiny_teacher()
    size = sum(p.numel() for p in teacher.parameters()) * 4 / memory.GB
    found = memory.estimate(teacher, tiny_config(**RESOLVED), 2)
    assert found.weights == pytest.approx(4 * size)
    assert found.gradients == pytest.approx(size)
    assert found.moments == pytest.approx(2 * size)
    assert memory.estimate(teacher, tiny_config(**RESOLVED, g_beta1=0.9), 2).moments == pytest.approx(3 * size)
    assert memory.estimate(teacher, tiny_config(**RESOLVED, adam_state="bf16"), 2).moments == pytest.approx(size)
    vectors = sum(p.numel() for p in teacher.parameters() if p.ndim < 2) * 4 / memory.GB
    assert memory.estimate(teacher, tiny_config(**RESOLVED, optimizer="muon"), 2).moments == pytest.approx(2 * vectors)
    assert next(teacher.parameters()).device.type == "cpu"


@pytest.mark.parametrize("mode", slow_ones([{}, {"chunk": 2}, LOW_RANK], LOW_RANK), ids=str)
def test_two_estimates_give_those_of_all_batches(mode, monkeypatch):
    teacher, config = tiny_teacher(), tiny_config(**{**RESOLVED, **mode})
    divisors = [n for n in (1, 2, 3, 4, 6, 8, 12, 24) if n % (config.chunk or 1) == 0]
    exact = {n: memory.estimate(teacher, config, n).peak for n in divisors}
    asked, original = [], memory.estimate
    monkeypatch.setattr(memory, "estimate", lambda *args: asked.append(args[2]) or original(*args))
    fitting = memory.Fitting(teacher, config, 24, CPU)
    assert len(asked) == 2
    for n, peak in exact.items():
        assert fitting.estimate(n).peak == pytest.approx(peak, rel=1e-12)
        assert fitting.largest(peak * 1.0001 / memory.USABLE) == (n, pytest.approx(peak))
        assert fitting.largest(peak * 0.9999 / memory.USABLE) != (n, pytest.approx(peak))
    assert fitting.largest(0) == (config.chunk or 1, None)
    assert fitting.largest(1e9, 8) == (8, pytest.approx(exact[8]))


def test_the_largest_batch_that_fits(monkeypatch):
    teacher, config = tiny_teacher(), tiny_config(**RESOLVED)
    need = {n: memory.estimate(teacher, config, n).peak * memory.GB / memory.USABLE for n in (4, 12)}

    def chosen(free, **changes):
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
        return memory.fitting_batch_gpu(teacher, dataclasses.replace(config, **changes), 12, CPU)[0]

    assert [chosen(need[n] * 1.001) for n in (4, 12)] == [4, 12]
    assert chosen(0) == 1
    assert chosen(need[12] * 2, chunk=4) == 12
    assert chosen(0, chunk=4) == 4
    with pytest.raises(UserError, match="--chunk=5 must divide the 12 images"):
        chosen(0, chunk=5)
