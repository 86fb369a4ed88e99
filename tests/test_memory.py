"""The memory estimate against what a real step takes, and the batch chosen from it."""

import dataclasses
import gc

import pytest
import torch
from conftest import slow_ones
from tiny import CPU, Spy, tiny_config, tiny_teacher

from dnnlib import UserError
from sid import lora, memory
from sid.inputs import Inputs
from sid.prepare import prepare
from torch_utils.live_memory import LiveMemory
from training.conditions import Prompts

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
        is_weight = isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter)
        return tensor if is_weight else Handle(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: getattr(kept, "tensor", kept)):
        step()
    return peak


def wide_spy(width=64):
    """So wide that the network keeps more than the loss around it."""
    net = Spy(3)
    net.hidden, net.level = torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.Linear(4, width)
    net.out = torch.nn.Sequential(torch.nn.BatchNorm2d(width), torch.nn.SiLU(), torch.nn.Conv2d(width, 3, 3, padding=1))
    return net


MODES = [{}, {"chunk": 2}, {"precision": "bf16"}, GUIDED]
MODES += [{"lora_rank": 2}, {"lora_rank": 2, "precision": "bf16"}, {**LOW_RANK, "lora_base": "half"}]
MODES += [{"lora_rank": 2, **GUIDED}, {"score_gradient": "off"}, {"objective": "dmd"}, {"share_images": True}]
MODES += [{"share_noise": True, **mode} for mode in ({}, {"chunk": 2, "score_gradient": "off"}, {"lora_rank": 2})]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("make", [tiny_teacher, wide_spy], ids=["ours", "foreign"])
def test_activations_are_those_that_a_step_keeps(make, mode):
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


def text_teacher(width):
    """A denoiser like Stable Diffusion's."""
    pytest.importorskip("diffusers")
    from edm.text_models import TextDenoiser

    model = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (width, 2 * width),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
    }
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
    torch.manual_seed(0)
    net = TextDenoiser(model, scheduler, length=16)
    net.prompts = Prompts(torch.randn(4, net.prompt_dim).numpy(), torch.zeros(net.prompt_dim), list("abcd"))
    return net


ONE_CARD = {"precision": "bf16", "lora_rank": 4, "lora_base": "half", "checkpoint": True}


@pytest.mark.parametrize("mode", slow_ones([{}, ONE_CARD, {"checkpoint": True}], {"checkpoint": True}), ids=str)
@pytest.mark.parametrize("width", [16, 32])
def test_the_plan_is_near_the_measured_peak(width, mode):
    """All tensors alive at one time in an iteration of two rounds, within 5 per cent."""
    config = tiny_config(**{**RESOLVED, **GUIDED, **mode}, batch=4, batch_gpu=2)
    teacher = text_teacher(width)
    expected = memory.estimate(teacher, config, 2).peak * memory.GB
    distillation = prepare(Inputs(teacher), config, CPU)
    distillation.iteration()  # makes the moments
    gc.collect()
    state = distillation.state
    networks = (distillation.teacher, state.generator, state.fake_score, state.ema)
    there = [tensor for net in networks for tensor in (*net.parameters(), *net.buffers())]
    there += [part.base for net in networks for part in net.modules() if isinstance(part, lora.LowRank)]
    for updater in (state.generator_updater, state.fake_score_updater):
        moments = [value for record in updater.optimizer.state.values() for value in record.values()]
        there += [moment for moment in moments if isinstance(moment, torch.Tensor)]
    with LiveMemory(there) as measured:
        distillation.iteration()
    assert measured.peak == pytest.approx(expected, rel=0.05)


def test_live_memory():
    x = torch.zeros(1000)
    with LiveMemory([x, x[1:]]) as memory_of_tensors:
        y = x + 1
        z = (x * 2)[::2]
        del y
        z = z + 1
    assert z.sum() == 500
    assert (memory_of_tensors.now, memory_of_tensors.peak) == (4 * 1500, 4 * 3000)


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
