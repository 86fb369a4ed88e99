"""Low-rank updates: exact gradients, one frozen copy of the weights, small states, ordinary networks as results."""

import copy
import math

import pytest
import torch
from test_speed_modes import gradients
from tiny import (
    CPU,
    NoReport,
    Spy,
    assert_same_training,
    equal,
    on_two_processes,
    smoothed,
    tiny_config,
    tiny_distillation,
    tiny_teacher,
    weights,
)

from dnnlib import UserError
from edm import zoo
from sid import lora, memory
from sid.inputs import Inputs
from sid.prepare import prepare
from sid.training_loop import training_loop
from torch_utils import checkpoint

RANK = 2
ALL = 10**6  # a rank at which no matrix is worth factoring


def updates(net):
    return [module for module in net.modules() if isinstance(module, lora.LowRank)]


def adapted(net, rank=RANK, noise=0.3):
    """A trainable copy of `net` as updates of its weights, which have moved already."""
    copied = copy.deepcopy(net).requires_grad_(True)
    lora.adapt(copied, rank, net)
    for update in updates(copied):
        update.b.data += noise * torch.randn_like(update.b)
    return copied


def inputs():
    torch.manual_seed(1)
    return torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.5, 2.0, 9.0]), torch.eye(3)[[0, 1, 2, 0]]


# --- the mathematics


def test_a_large_enough_rank_is_ordinary_training():
    full, low = tiny_distillation(), tiny_distillation(lora_rank=ALL)
    for _ in range(2):
        full.iteration()
        low.iteration()
    assert equal(weights(low), weights(full))


def test_gradients_are_those_of_all_weights_seen_through_the_factors():
    """dL/dB = s G A^T and dL/dA = s B^T G; descending by B alone moves the weights along -s^2 G A^T A."""
    net = adapted(tiny_teacher().requires_grad_(False))
    plain = lora.merge(net).requires_grad_(True)
    assert len(updates(net)) > 5
    for one in (net, plain):
        one.eval()(*inputs(), augment_labels=torch.eye(4, 9)).square().sum().backward()
    names = {id(update): name for name, update in net.named_modules() if isinstance(update, lora.LowRank)}
    whole = dict(plain.named_parameters())
    before = {id(update): update().detach() for update in updates(net)}
    for update in updates(net):
        weight = whole[names[id(update)].removesuffix(lora.SUFFIX)]
        g = weight.grad.flatten(1)
        a, b, s = update.a.detach(), update.b.detach(), update.scale
        assert torch.allclose(update.b.grad, s * g @ a.T, rtol=1e-3, atol=1e-5 * g.abs().max())
        assert torch.allclose(update.a.grad, s * b.T @ g, rtol=1e-3, atol=1e-5 * g.abs().max())
        update.b.data -= 0.01 * update.b.grad
        moved, expected = (update().detach() - before[id(update)]).flatten(1), -0.01 * s**2 * g @ a.T @ a
        assert torch.linalg.norm(moved - expected) <= 1e-3 * torch.linalg.norm(expected) + 1e-5
        del whole[names[id(update)].removesuffix(lora.SUFFIX)]
    own = dict(net.named_parameters())
    assert len(whole) > 10  # vectors and small matrices: their gradients are the plain ones
    assert all(torch.allclose(own[name].grad, p.grad, rtol=1e-3, atol=1e-5) for name, p in whole.items())


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_a_step_of_adam_moves_weights_by_the_learning_rate(rank):
    """Signs of a product with Gaussian factors have a closed form: lr^2 (1 + 2/pi (r - 1)/in), mean square."""
    torch.manual_seed(0)
    rows, columns, lr = 200, 1000, 1e-3
    weight = torch.nn.Parameter(torch.zeros(rows, columns))
    update = lora.LowRank(weight, rank)
    optimizer = torch.optim.Adam(update.parameters(), lr=lr, betas=(0.0, 0.999))
    (update() * torch.randn(rows, columns)).sum().backward()
    optimizer.step()
    mean_square = (update() - weight).square().mean().item()
    expected = lr**2 * (1 + 2 / math.pi * (rank - 1) / columns)
    assert mean_square == pytest.approx(expected, rel=4 * math.sqrt(2 / (columns * rank)))


def test_half_precision_around_it_loses_no_small_update():
    net = adapted(Spy(), noise=1e-4)
    update = updates(net)[0]
    expected = update()
    with torch.autocast("cpu", torch.bfloat16):
        found = update()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, update.base)


# --- networks in, networks out


@pytest.mark.parametrize("make", [tiny_teacher, lambda: Spy(3)], ids=["ours", "foreign"])
def test_a_merged_network_is_an_ordinary_one(make):
    teacher = make().requires_grad_(False)
    teacher.metadata = {"name": "it"}
    assert lora.merge(teacher) is teacher
    untouched = lora.merge(adapted(teacher, noise=0))
    assert zoo.network_hash(untouched) == zoo.network_hash(teacher)

    net = adapted(teacher).eval()
    merged = lora.merge(net)
    x, sigma, labels = inputs()
    x = x.expand(-1, teacher.img_channels, -1, -1)
    assert torch.allclose(merged(x, sigma, labels), net(x, sigma, labels), atol=1e-6)
    assert not torch.allclose(merged(x, sigma, labels), teacher.eval()(x, sigma, labels), atol=1e-3)
    assert [type(module) for module in merged.modules()] == [type(module) for module in teacher.modules()]
    assert list(merged.state_dict()) == list(teacher.state_dict())
    assert merged.metadata == teacher.metadata
    assert not any(p.requires_grad for p in merged.parameters())
    others = {p.data_ptr() for one in (net, teacher) for p in one.parameters()}
    assert not others & {p.data_ptr() for p in merged.parameters()}


def test_shared_and_frozen_weights_and_those_of_the_root():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(20, 20), torch.nn.Linear(20, 20)
            self.second.weight = self.first.weight
            self.table = torch.nn.Parameter(torch.randn(20, 3, 10))
            self.fixed = torch.nn.Parameter(torch.randn(20, 20), requires_grad=False)

        def forward(self, x):
            return self.second(self.first(x)) @ self.fixed @ self.table.flatten(1)

    net, x = Tied(), torch.randn(5, 20)
    before = net(x)
    lora.adapt(net, RANK)
    assert torch.equal(net(x), before)
    assert len(updates(net)) == 2
    assert net.first.weight_update is net.second.weight_update
    net.first.weight_update.b.data += 1
    merged = lora.merge(net)
    assert torch.allclose(merged(x), net(x))
    assert merged.first.weight is merged.second.weight
    assert type(merged) is Tied
    assert torch.equal(merged.fixed, net.fixed)


def test_training_shares_the_teachers_weights_and_leaves_them_alone():
    teacher = tiny_teacher()
    before = zoo.network_hash(teacher)
    d = tiny_distillation(teacher, lora_rank=RANK)
    start = weights(d)
    for _ in range(3):
        d.iteration()
    assert zoo.network_hash(teacher) == before
    addresses = {p.data_ptr() for p in teacher.parameters()}
    networks = (d.state.generator, d.state.fake_score, d.state.ema, copy.deepcopy(d.state.ema))
    for net in networks:
        assert {update.base.data_ptr() for update in updates(net)} <= addresses
        assert len({update.base.data_ptr() for update in updates(net)}) == len(updates(net)) > 5
        assert not addresses & {p.data_ptr() for p in net.parameters()}
    after = weights(d)
    still = [name for name in start if torch.equal(start[name], after[name])]
    assert {name.split(".", 1)[1] for name in still} == {"model.map_augment.weight"}  # unused in theta, so frozen


def test_memory_in_closed_form():
    teacher = tiny_teacher(augment_dim=0)
    shapes = [(len(p), p[0].numel()) if p.ndim > 1 else (p.numel(), 1) for p in teacher.parameters()]
    whole = 4 * sum(rows * columns for rows, columns in shapes)
    for rank in (1, RANK, 8, ALL):
        trained = 4 * sum(min(rank * (r + c), r * c) if c > 1 else r for r, c in shapes)
        assert (trained == whole) == (rank == ALL)
        d = tiny_distillation(tiny_teacher(augment_dim=0), augment=0, lora_rank=rank)
        d.iteration()
        state, storages = d.state, {}
        for net in (d.teacher, state.generator, state.fake_score, state.ema):
            for tensor in [*net.parameters(), *(update.base for update in updates(net))]:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        assert sum(storages.values()) == whole + 3 * trained
        moments = [
            moment
            for updater in (state.fake_score_updater, state.generator_updater)
            for record in updater.optimizer.state.values()
            for name, moment in record.items()
            if name.startswith("exp_avg")
        ]
        assert sum(4 * m.numel() for m in moments) == 2 * trained  # one each: beta1 is 0
        found = memory.estimate(teacher, tiny_config(precision="fp32", augment=0, lora_rank=rank), 2)
        assert found.weights * memory.GB == pytest.approx(whole + 3 * trained)
        assert found.gradients * memory.GB == pytest.approx(trained)
        assert found.moments * memory.GB == pytest.approx(2 * trained)


# --- the rest of the training


@pytest.mark.parametrize("mode", [{"chunk": 1}, {"checkpoint": True}, {"channels_last": True}], ids=str)
def test_the_modes_of_a_step(mode):
    common = {"lora_rank": RANK, "dropout": 0.0}
    plain, other = tiny_distillation(**common), tiny_distillation(**common, **mode)
    expected, found = gradients(plain), gradients(other)
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-4 * torch.linalg.norm(gradient)
    assert all(p.is_contiguous() for p in lora.merge(other.state.ema).parameters())  # so files can hold them


def test_half_precision_leaves_the_shared_weights_as_they_are():
    teacher = tiny_teacher()
    before = zoo.network_hash(teacher)
    d = tiny_distillation(teacher, lora_rank=RANK, precision="bf16")
    d.iteration()
    assert zoo.network_hash(teacher) == before
    assert {p.dtype for net in d.state.networks.values() for p in net.parameters()} == {torch.float32}


def test_a_base_in_half_precision():
    """The matrices of all networks are one copy in bf16; the rest and the updates stay in float32."""
    teacher, mode = tiny_teacher(augment_dim=0), {"augment": 0, "precision": "bf16", "lora_rank": RANK}
    full = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    expected = memory.estimate(teacher, tiny_config(**mode, lora_base="half"), 2)
    before = memory.estimate(teacher, tiny_config(**mode), 2)
    d = tiny_distillation(teacher, **mode, lora_base="half")
    start = weights(d)
    for _ in range(2):
        d.iteration()
    stored = {id(p): p for p in teacher.parameters() if p.dtype == torch.bfloat16}
    networks = (d.state.generator, d.state.fake_score, d.state.ema, copy.deepcopy(d.state.ema))
    for net in networks:
        assert {id(update.base) for update in updates(net)} & stored.keys()
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert all(update().dtype == torch.float32 for update in updates(net))
    saved = sum(2 * p.numel() for p in stored.values())
    assert (before.weights - expected.weights) * memory.GB == pytest.approx(saved)
    assert saved > 0.7 * 2 * sum(p.numel() for p in teacher.parameters() if p.ndim > 1)
    assert expected.moments == before.moments

    for name, weight in lora.merge(d.state.ema).state_dict().items():
        assert weight.dtype == torch.float32
        rounded = full[name].to(torch.bfloat16).float() if teacher.state_dict()[name].dtype == torch.bfloat16 else None
        if rounded is not None and weight.ndim > 1:
            assert torch.linalg.matrix_rank((weight - rounded).flatten(1).double(), atol=1e-6) <= RANK
    after = weights(d)
    assert any(not torch.equal(after[name], start[name]) for name in start)
    with pytest.raises(UserError, match="--lora-base=half: the layers work in fp32; add --precision=bf16"):
        tiny_distillation(lora_rank=RANK, lora_base="half")


def test_another_start_has_its_base_in_half_precision(tmp_path):
    mode = {"lora_rank": RANK, "precision": "bf16", "lora_base": "half"}
    teacher, start = tiny_teacher(), tiny_teacher()
    for parameter in start.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    d = prepare(Inputs(teacher, start), tiny_config(**mode), CPU)
    stored = [
        {
            name
            for name, part in net.named_modules()
            if isinstance(part, lora.LowRank) and part.base.dtype == torch.bfloat16
        }
        for net in (d.state.generator, d.state.fake_score)
    ]
    assert stored[0] == stored[1] != set()
    assert not {id(part.base) for part in updates(d.state.generator)} & {id(p) for p in teacher.parameters()}
    path = save_after(d, 2, tmp_path)
    teacher = tiny_teacher()
    assert equal(weights(prepare(Inputs(teacher, start), tiny_config(**mode), CPU, path)), weights(d))


def run_iterations():
    distillation = smoothed(tiny_distillation(lora_rank=RANK))
    for _ in range(3):
        distillation.iteration()
    return weights(distillation)


def test_two_processes_train_as_one_does(tmp_path):
    first, second = on_two_processes(run_iterations, tmp_path)
    assert equal(first, second)
    assert_same_training(first, run_iterations(), weights(tiny_distillation(lora_rank=RANK)))


def save_after(distillation, iterations, folder):
    for _ in range(iterations):
        distillation.iteration()
    path = folder / "training-state-000000.pt"
    checkpoint.save_state(path, distillation.state.contents(distillation.config, {}))
    return path


def test_a_resumed_run_is_bit_equal_and_its_snapshots_are_ordinary_networks(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    uninterrupted = tiny_distillation(lora_rank=RANK)
    made = training_loop(uninterrupted, whole, NoReport())
    path = save_after(tiny_distillation(lora_rank=RANK), 2, parts)
    resumed = tiny_distillation(resume=path, lora_rank=RANK)
    training_loop(resumed, parts, NoReport())
    assert equal(weights(resumed), weights(uninterrupted))
    names = ["network-snapshot-000000.040.safetensors", "training-state-000000.040.pt"]
    files = [(folder / names[0]).read_bytes() for folder in (whole, parts)]
    assert files[0] == files[1]

    net = zoo.load_network(whole / names[0])
    assert zoo.network_hash(net) == zoo.network_hash(made)
    assert type(made) is type(net) is type(tiny_teacher())
    assert (net.metadata["lora_rank"], net.metadata["init_sigma"]) == (RANK, 2.5)
    x, sigma, labels = inputs()
    assert torch.allclose(net(x, sigma, labels), uninterrupted.state.ema(x, sigma, labels), atol=1e-6)

    state = checkpoint.load_state(whole / names[1])
    for part in ("generator", "fake_score", "ema"):
        held = sum(tensor.numel() for tensor in state[part].values())
        assert held == sum(p.numel() for p in getattr(uninterrupted.state, part).parameters())
        assert held < 0.4 * sum(p.numel() for p in net.parameters())


def test_a_generator_that_starts_from_other_weights(tmp_path):
    torch.manual_seed(7)
    teacher, start = tiny_teacher(), tiny_teacher()
    for parameter in start.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = tiny_config(lora_rank=RANK, channels_last=True)
    d = prepare(Inputs(teacher, start), config, CPU)
    assert zoo.network_hash(lora.merge(d.state.generator)) == zoo.network_hash(start)
    assert zoo.network_hash(lora.merge(d.state.fake_score)) == zoo.network_hash(teacher)
    path = save_after(d, 2, tmp_path)
    assert equal(weights(prepare(Inputs(teacher, start), config, CPU, path)), weights(d))
    for other in (None, tiny_teacher()):
        with pytest.raises(UserError, match="give the --transfer it was started with"):
            prepare(Inputs(teacher, other), config, CPU, path)


def test_a_state_goes_on_with_its_own_rank_only(tmp_path):
    low, full = tmp_path / "low", tmp_path / "full"
    low.mkdir()
    full.mkdir()
    paths = save_after(tiny_distillation(lora_rank=RANK), 1, low), save_after(tiny_distillation(), 1, full)
    for path, rank, message in (
        (paths[0], None, "has --lora-rank=2; give that"),
        (paths[0], 3, "has --lora-rank=2; give that"),
        (paths[1], RANK, "has no --lora-rank; leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_distillation(resume=path, lora_rank=rank)


def test_a_foreign_denoiser_trains(tmp_path):
    torch.manual_seed(0)
    d = prepare(Inputs(Spy(4)), tiny_config(augment=None, lora_rank=1, precision="bf16"), CPU)
    before = weights(d)
    made = training_loop(d, tmp_path, NoReport())
    after = weights(d)
    assert all(after[name].isfinite().all() and not torch.equal(before[name], after[name]) for name in before)
    loaded = zoo.load_network(tmp_path / "network-snapshot-000000.040.safetensors", classes={"Spy": lambda: Spy(4)})
    assert zoo.network_hash(loaded) == zoo.network_hash(made)
