"""The teacher's weights stored in half precision: fewer bytes, and the same training bit for bit."""

import functools

import pytest
import torch
from tiny import CPU, Spy, equal, tiny_config, tiny_teacher, weights

from dnnlib import UserError
from sid import memory
from sid.inputs import Inputs
from sid.prepare import prepare
from torch_utils import precision

BF16 = torch.bfloat16


class Foreign(torch.nn.Module):
    """Layers that autocast serves, and every reason for a weight to stay as it is."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.up = torch.nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.dense = torch.nn.Linear(4, 8)
        self.kept = torch.nn.ModuleDict(
            {
                "norm": torch.nn.GroupNorm(2, 8),
                "in_full": torch.nn.Conv2d(8, 8, 1),
                "normalised": torch.nn.Conv2d(8, 8, 1),
                "used_twice": torch.nn.Conv2d(8, 8, 1),
                "never_used": torch.nn.Linear(8, 8),
            }
        )

    def forward(self, x):
        x = self.kept["norm"](self.up(self.conv(x)) + self.dense(x[:, 0, 0, :4])[:, :, None, None])
        weight = self.kept["normalised"].weight
        x = torch.nn.functional.conv2d(x, weight / weight.norm())
        x = self.kept["used_twice"](x) + self.kept["used_twice"].weight.mean()
        with torch.autocast("cpu", enabled=False):
            return self.kept["in_full"](x.float())


class AsksForItsDtype(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8)

    def forward(self, x):
        return self.norm(self.conv(x).to(self.conv.weight.dtype) + 1e-3)


class FailsAfterwards(AsksForItsDtype):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            scale = torch.eye(8) @ torch.ones(8, dtype=self.conv.weight.dtype)
        return self.conv(x) * scale[:, None, None]


def stored(net):
    """(names of what is kept in half precision, outputs before, outputs after)"""
    torch.manual_seed(0)
    net.eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)

    def call():
        with torch.no_grad(), torch.autocast("cpu", BF16):
            return net(x)

    before = call()
    precision.store_weights(net, BF16, call)
    return {name for name, p in net.named_parameters() if p.dtype == BF16}, before, call()


def test_weights_that_are_only_cast_are_kept_in_half_precision():
    names, before, after = stored(Foreign())
    assert names == {"conv.weight", "up.weight", "dense.weight"}
    assert torch.equal(before, after)


@pytest.mark.parametrize("make", [AsksForItsDtype, FailsAfterwards])
def test_a_network_that_would_notice_stays_as_it_is(make):
    names, before, after = stored(make())
    assert not names
    assert torch.equal(before, after)


def test_trainable_weights_stay():
    net = Foreign()
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", BF16):
        precision.store_weights(net, BF16, lambda: net(x))
    assert {p.dtype for p in net.parameters()} == {torch.float32}


MODES = [{}, {"chunk": 1}, {"channels_last": True, "guidance": "long-short=2"}]
TEACHERS = {"ours": tiny_teacher, "foreign": lambda: Spy(3)}
CASES = [("ours", mode) for mode in (*MODES, {"checkpoint": True})]
CASES += [("foreign", mode) for mode in MODES]


@pytest.mark.parametrize(("name", "mode"), CASES, ids=str)
def test_training_is_bit_equal(name, mode, monkeypatch):
    config = tiny_config(precision="bf16", augment=0, **mode)

    def trained():
        torch.manual_seed(0)
        teacher = TEACHERS[name]()
        distillation = prepare(Inputs(teacher), config, CPU)
        for _ in range(2):
            distillation.iteration()
        return teacher, weights(distillation)

    teacher, found = trained()
    monkeypatch.setattr(precision, "store_weights", lambda *args: None)
    in_full, expected = trained()
    assert equal(found, expected)
    large = sum(p.numel() for p in teacher.parameters() if p.dtype == BF16)
    assert large > 0.5 * sum(p.numel() for p in teacher.parameters())
    assert {p.dtype for p in in_full.parameters()} == {torch.float32}


def test_a_compiled_teacher_answers_bit_equally(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    x, sigma, labels = torch.randn([4, 1, 8, 8]), torch.full([4, 1, 1, 1], 0.7), torch.eye(3)[[0, 1, 2, 0]]

    def answer():
        distillation = prepare(Inputs(tiny_teacher()), tiny_config(precision="bf16", augment=0, compile=True), CPU)
        with torch.no_grad(), distillation.autocast():
            return distillation.networks.teacher(x, sigma, labels)

    found = answer()
    monkeypatch.setattr(precision, "store_weights", lambda *args: None)
    assert torch.equal(found, answer())


@pytest.mark.parametrize("make", [tiny_teacher, lambda: Spy(3)], ids=["ours", "foreign"])
def test_the_estimate_knows_what_is_stored(make):
    teacher, config = make(), tiny_config(precision="bf16", augment=0)
    size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    expected = memory.estimate(teacher, config, 2)
    prepare(Inputs(teacher), config, CPU)
    after = sum(p.numel() * p.element_size() for p in teacher.parameters())
    assert size / 2 <= after < 0.75 * size
    assert expected.weights * memory.GB == pytest.approx(3 * size + after)
    assert memory.estimate(teacher, config, 2) == expected  # of a teacher in use, too


def test_a_teacher_is_not_used_again_in_half_precision():
    """Its trained copies would start from the rounded weights and move in steps of their last bits."""
    teacher = tiny_teacher()
    prepare(Inputs(teacher), tiny_config(precision="bf16"), CPU)
    with pytest.raises(UserError, match="weights are in half precision"):
        prepare(Inputs(teacher), tiny_config(precision="bf16"), CPU)
