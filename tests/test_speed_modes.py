"""Faster training steps, and steps that need less memory, have the gradients of the plain step."""

import functools
import json

import pytest
import torch
from tiny import NoReport, tiny_config, tiny_distillation, tiny_teacher
from torch._functorch import config as functorch_config
from torch.overrides import TorchFunctionMode

from edm import zoo
from sid.distillation import Distillation
from sid.inputs import Inputs
from sid.loss import SiDLoss
from sid.prepare import prepare
from sid.probe.gradients import compare, load
from sid.probe.gradients import gradients as found_gradients
from sid.schedules import Karras
from sid.training_loop import training_loop
from torch_utils import adam, precision
from torch_utils.adam import MomentumFreeAdam
from torch_utils.updates import GROWTH_INTERVAL, MAX_SKIPPED_UPDATES, DivergenceError, Updater
from training.networks import EDMPrecond


def gradients(distillation: Distillation) -> dict[str, torch.Tensor]:
    """The gradients that one iteration hands to the two optimisers, as one vector each."""
    found = {}
    for updater in (distillation.state.fake_score_updater, distillation.state.generator_updater):

        def step(factor, updater=updater, original=updater.step):
            found[updater.name] = torch.cat([p.grad.flatten() for p in updater.parameters])
            return original(factor)

        updater.step = step
    distillation.iteration()
    return found


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


@pytest.mark.parametrize(
    "mode",
    [
        {"chunk": 1},
        {"checkpoint": True},
        {"channels_last": True},
        {"chunk": 2, "checkpoint": True, "channels_last": True, "batch_gpu": 8},
    ],
    ids=str,
)
def test_the_gradients_are_those_of_the_plain_step(mode):
    dropout = 0.0 if "channels_last" in mode else None  # its mask is drawn in the order of memory
    size = {"batch_gpu": mode.get("batch_gpu", 2)}  # draws are seeded by micro-batch
    expected = gradients(tiny_distillation(dropout=dropout, **size))
    found = gradients(tiny_distillation(dropout=dropout, **{**size, **mode}))
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-5 * torch.linalg.norm(gradient)


class FromHost(TorchFunctionMode):
    """Fails where the host waits for a copy of its values to another device."""

    COPIES = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.to, torch.Tensor.type_as)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in self.COPIES and result.is_meta and not (kwargs or {}).get("non_blocking"):
            source = args[1] if func is torch.Tensor.new_tensor else args[0]
            assert getattr(source, "is_meta", False), f"{func.__name__}({source})"
        return result


UNET = {"model_channels": 8, "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9}
MULTIPLIERS = {"SongUNet": [1], "DhariwalUNet": [1, 2]}


@pytest.mark.parametrize(
    ("architecture", "mode"),
    [
        (
            "SongUNet",
            {
                "guidance": "long-short=1.5",
                "score_gradient": "from=0.008",
                "precision": "bf16",
                "chunk": 4,
                "checkpoint": True,
            },
        ),
        (
            "DhariwalUNet",
            {"share_noise": True, "augment": 0, "precision": "fp16", "channels_last": True, "spike_guard": 10.0},
        ),
        ("SongUNet", {"batch_gpu": 4, "share_images": True, "huber": 0.1, "adam_state": "bf16"}),
        ("SongUNet", {"objective": "dmd", "sigma_schedule": "lognormal", "fake_sigma_schedule": "karras"}),
    ],
    ids=str,
)
def test_an_iteration_waits_for_no_device(architecture, mode, monkeypatch):
    """Tensors on `meta` have no values, so code in which the host waits for one fails there."""
    monkeypatch.setattr(zoo, "network_hash", lambda net: "")  # once, at the start
    generator = torch.Generator
    on_host = {"__new__": lambda cls, device="cpu": generator()}  # there is none for this device
    monkeypatch.setattr(torch, "Generator", type("Generator", (), on_host))
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)  # PyTorch 2.4 asks every device for its module
    kwargs = {"model_type": architecture, "channel_mult": MULTIPLIERS[architecture], **UNET}
    teacher = EDMPrecond(8, 1, 3, **kwargs).to("meta")
    distillation = prepare(Inputs(teacher), tiny_config(**{"batch_gpu": 8, **mode}), torch.device("meta"))
    iterations = 2 if "score_gradient" in mode else 1
    with FromHost():
        for _ in range(iterations):
            distillation.iteration()
    assert distillation.state.nimg == 8 * iterations


def test_the_plain_step_is_one_backward_pass_through_all_three_networks():
    """Going back to x_g in chunks and then once through theta gives autograd's own gradient of the whole graph."""
    distillation = tiny_distillation(batch_gpu=4, chunk=2)
    distillation.iteration()  # psi is no copy of phi from here on
    state, config = distillation.state, distillation.config
    state.generator.train()
    state.fake_score.eval()
    for labels in distillation._rounds(2):
        images = distillation.generate(labels)
        noise = distillation.loss.draw_noise(images)
        loss = distillation.loss.generator_loss(distillation.teacher, state.fake_score, images, labels, noise)
        (loss.sum() * (config.lsg / config.batch)).backward()
    trainable = [p for p in state.generator.parameters() if p.requires_grad]
    expected = torch.cat([p.grad.flatten() for p in trainable])
    state.generator_updater.optimizer.zero_grad()
    state.fake_score_updater.optimizer.zero_grad()
    for labels in distillation._rounds(2):
        distillation._backward_generator(distillation.generate(labels), labels)
    found = torch.cat([p.grad.flatten() for p in trainable])
    assert torch.linalg.norm(found - expected) <= 1e-5 * torch.linalg.norm(expected)
    assert all(p.grad is None for p in state.fake_score.parameters())


def test_shared_images_reach_both_networks():
    """Without dropout psi's gradient is the plain step's; theta sees the same images and psi before its update."""
    torch.manual_seed(0)
    teacher = EDMPrecond(8, 1, 0, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, dropout=0)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    plain = tiny_distillation(teacher, augment=0)
    shared = tiny_distillation(teacher, augment=0, share_images=True)
    seen = []
    original = shared.loss.generator_loss

    def listening(*args, **stage):
        seen.append(args[2].detach().clone())
        return original(*args, **stage)

    shared.loss.generator_loss = listening
    a, b = gradients(plain), gradients(shared)
    assert torch.allclose(a["fake score"], b["fake score"])
    made = []
    shared = tiny_distillation(teacher, augment=0)
    for labels in shared._rounds(1):
        made.append(shared.generate(labels).detach())
    assert torch.allclose(torch.cat(seen), torch.cat(made), atol=1e-6)
    assert cosine(a["generator"], b["generator"]) < 0.999  # other images than the plain step's


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"chunk": 1, "checkpoint": True, "sigma_schedule": "lognormal"},  # that of the fake score, too
        {"score_gradient": "off"},
        {"objective": "dmd", "chunk": 1},
        {"lora_rank": 2},
    ],
    ids=str,
)
def test_shared_noise_gives_each_network_the_gradient_of_its_own_loss(mode):
    """Against autograd through both losses one after the other, each with its own pass through psi."""
    mode = {"share_noise": True, "augment": None, **mode}
    distillation = tiny_distillation(**mode)
    distillation.iteration()  # psi is no copy of phi from here on
    found = gradients(distillation)
    twin = tiny_distillation(**mode)
    twin.iteration()
    state, config, loss = twin.state, twin.config, twin.loss
    state.generator.train()
    state.fake_score.eval()
    for labels in twin._rounds(1):
        images = twin.generate(labels)
        sigma, n, of_generator, of_fake_score = loss.draw_shared_noise(images)
        y = images.detach()
        weight = of_fake_score * (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        denoising = weight * (state.fake_score(y + sigma * n, sigma, labels) - y) ** 2
        (denoising.sum() * (config.ls / config.batch)).backward()
        passes = config.score_gradient.passes(state.nimg)
        with state.fake_score_updater.frozen():
            networks = twin.teacher, state.fake_score
            value = loss.generator_loss(*networks, images, labels, (sigma, n), score_gradient=passes)
            ((of_generator * value).sum() * (config.lsg / config.batch)).backward()
    for updater in (state.fake_score_updater, state.generator_updater):
        expected = torch.cat([p.grad.flatten() for p in updater.parameters if p.grad is not None])
        assert torch.linalg.norm(found[updater.name] - expected) <= 1e-5 * torch.linalg.norm(expected)
        assert expected.norm() > 0


def test_half_precision_gradients_point_where_those_of_fp32_do_at_every_noise_level():
    torch.manual_seed(0)
    kwargs = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0}
    teacher = EDMPrecond(16, 1, model_type="SongUNet", **kwargs)
    fake_score = EDMPrecond(16, 1, model_type="SongUNet", **kwargs)
    for net in (teacher, fake_score):
        for parameter in net.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        net.eval().requires_grad_(False)
    images, n = 0.5 * torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16)
    for t in (0.05, 0.3, 0.5, 0.8):
        sigma = Karras().sigma(torch.full([2, 1, 1, 1], t))
        found = {}
        for name in ("fp32", "bf16", "fp16"):
            for net in (teacher, fake_score):
                assert precision.set_compute_dtype(net, precision.DTYPES[name])
            x = images.clone().requires_grad_()
            SiDLoss().generator_loss(teacher, fake_score, x, noise=(sigma, n)).sum().backward()
            found[name] = x.grad.flatten()
        assert cosine(found["fp32"], found["bf16"]) > 0.99
        assert cosine(found["fp32"], found["fp16"]) > 0.9999  # three more bits: docs/performance.md


def test_gradients_of_a_run_under_way(tmp_path, capsys):
    """`python -m sid.probe.gradients` on a real run folder: precision shows, and fp32 against itself is exact.

    At the same noise levels for every run, one with lognormal levels, which have no highest, too.
    """
    teacher, config = tiny_teacher(), tiny_config(sigma_schedule="lognormal")
    zoo.save_network(teacher, tmp_path / "teacher.safetensors")
    options = {**config.options(), "edm_model": str(tmp_path / "teacher.safetensors")}
    (tmp_path / "training_options.json").write_text(json.dumps(options))
    training_loop(prepare(Inputs(teacher), config, torch.device("cpu")), tmp_path, NoReport())
    compare(tmp_path, ["bf16"], 4, "cpu")
    rows = [[float(cell) for cell in line.split()] for line in capsys.readouterr().out.splitlines()[-6:]]
    assert [row[0] for row in rows] == [0.003, 0.085, 0.965, 2.515, 5.839, 24.408]
    assert all(0.9 < value < 1 for row in rows for value in row[1:])
    distillation = load(tmp_path, 4, torch.device("cpu"))
    a, b = (found_gradients(distillation, "fp32", 0.5, 4)[1] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_run_under_way_that_started_from_another_network(tmp_path):
    teacher, start = tiny_teacher(), tiny_teacher()
    for parameter in start.parameters():
        parameter.data += 0.1
    files = {"edm_model": str(tmp_path / "teacher.safetensors"), "transfer": str(tmp_path / "start.safetensors")}
    for net, path in zip((teacher, start), files.values()):
        zoo.save_network(net, path)
    config = tiny_config(lora_rank=2)  # whose states leave the frozen weights out
    (tmp_path / "training_options.json").write_text(json.dumps({**config.options(), **files}))
    trained = prepare(Inputs(teacher, start), config, torch.device("cpu"))
    training_loop(trained, tmp_path, NoReport())
    found = load(tmp_path, 4, torch.device("cpu"))
    pairs = zip(found.state.generator.state_dict().values(), trained.state.generator.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_bf16_trains_and_leaves_master_weights_in_float32():
    distillation = tiny_distillation(precision="bf16")
    distillation.iteration()
    for net in (distillation.state.generator, distillation.state.fake_score, distillation.state.ema):
        assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert distillation.state.ema.compute_dtype is None  # pictures and metrics are made in full precision


def test_a_failing_compiler_is_not_needed(capsys, monkeypatch):
    def broken(net, **options):
        def call(*args, **kwargs):
            raise torch._dynamo.exc.TorchDynamoException("no compiler here")

        return call

    plain = tiny_distillation()
    plain.iteration()
    monkeypatch.setattr(torch, "compile", broken)
    fallen_back = tiny_distillation(compile=True)
    fallen_back.iteration()
    assert "--compile: goes on without (no compiler here)" in capsys.readouterr().out
    for a, b in zip(plain.state.generator.parameters(), fallen_back.state.generator.parameters()):
        assert torch.equal(a, b)


class OneLayer(torch.nn.Module):
    """As little as possible to compile."""

    img_resolution, img_channels, label_dim = 8, 1, 0

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        sigma = sigma.reshape(-1, 1, 1, 1)
        return x / (1 + sigma**2) + sigma / (1 + sigma**2).sqrt() * self.layer(x / (1 + sigma**2).sqrt()).tanh()


def test_shared_noise_passes_back_twice_through_compiled_networks(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    frees_early = hasattr(functorch_config, "donated_buffer")
    if frees_early:
        monkeypatch.setattr(functorch_config, "donated_buffer", True)

    def found(**mode):
        torch.manual_seed(0)
        distillation = tiny_distillation(OneLayer(), share_noise=True, augment=0, **mode)
        generator = torch.Generator().manual_seed(0)
        for parameter in distillation.state.fake_score_updater.parameters:  # while psi is phi, theta's gradient is zero
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        return gradients(distillation)

    compiled = found(compile=True)
    if frees_early:
        assert not functorch_config.donated_buffer  # inductor refuses the second pass otherwise
    for name, gradient in found().items():
        assert torch.linalg.norm(compiled[name] - gradient) <= 1e-4 * torch.linalg.norm(gradient)


# --- loss scaling


def scaled_updater(loss_scaling=True):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    return net, Updater.of("network", net, 0.1, beta1=0, loss_scaling=loss_scaling)


def test_the_loss_scale_leaves_the_update_as_it_is():
    x = torch.randn(5, 3)
    (net, updater), (scaled, scaled_up) = scaled_updater(False), scaled_updater()
    scaled_up.loss_scale = torch.tensor(1024.0)
    updater.backward(net(x).square().sum())
    scaled_up.backward(scaled(x).square().sum())
    assert torch.allclose(updater.step(), scaled_up.step())
    assert torch.allclose(net.weight, scaled.weight)


def test_the_loss_scale_halves_with_an_overflow_and_grows_back():
    net, updater = scaled_updater()
    x = torch.randn(5, 3)
    for factor, scale in ((1.0, 1.0), (float("inf"), 0.5), (1.0, 0.5)):
        updater.backward(net(x).square().sum() * factor)
        updater.step()
        assert updater.loss_scale == scale
    for _ in range(GROWTH_INTERVAL - 1):
        updater._count(torch.zeros([]))
    assert updater.loss_scale == 1.0
    assert updater.skipped == 1
    restored = scaled_updater()[1]
    restored.load_state_dict(updater.state_dict())
    assert (restored.loss_scale, restored.skipped) == (1.0, 1)


OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
    "plain": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=False),
    "momentum-free": lambda parameters: MomentumFreeAdam(parameters, lr=0.1),
    "bf16 state": lambda parameters: MomentumFreeAdam(parameters, lr=0.1, rounding_seed=[0]),
}


@pytest.mark.parametrize("at_once", [{"cpu"}, set()], ids=["host", "device"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_update_changes_neither_weights_nor_moments(optimizer, at_once, monkeypatch):
    monkeypatch.setattr(adam, "AT_ONCE", at_once)
    net, _ = scaled_updater()
    updater = Updater("network", net.parameters(), OPTIMIZERS[optimizer](net.parameters()))
    updater.backward(net(torch.ones(1, 3)).sum())
    updater.step()
    before = [t.clone() for t in [*net.parameters(), *updater.optimizer.state[net.weight].values()]]
    for _ in range(MAX_SKIPPED_UPDATES):
        updater.check(0)
        updater.backward(net(torch.full([1, 3], torch.nan)).sum())
        updater.step()
    after = [*net.parameters(), *updater.optimizer.state[net.weight].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    with pytest.raises(DivergenceError):
        updater.check(0)


@pytest.mark.parametrize("at_once", [{"cpu"}, set()], ids=["host", "device"])
def test_adam_without_a_first_moment_is_adam(at_once, monkeypatch):
    monkeypatch.setattr(adam, "AT_ONCE", at_once)
    weights = {
        kind: [torch.randn(5, 3).double().requires_grad_(), torch.zeros(4).double().requires_grad_()]
        for kind in ("ours", "theirs")
    }
    for ours, theirs in zip(*weights.values()):
        theirs.data.copy_(ours.data)
    optimizers = [
        MomentumFreeAdam(weights["ours"], lr=0.03, beta2=0.999, eps=1e-4),
        torch.optim.Adam(weights["theirs"], lr=0.03, betas=(0.0, 0.999), eps=1e-4),
    ]
    for step in range(6):
        for ours, theirs in zip(*weights.values()):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        optimizers[0].found_inf = torch.zeros([]) if step % 2 else None
        for optimizer in optimizers:
            optimizer.step()
        if step == 2:  # a state can be saved, read and gone on from
            restored = MomentumFreeAdam(weights["ours"], lr=1.0)
            restored.load_state_dict(optimizers[0].state_dict())
            optimizers[0] = restored
    for ours, theirs in zip(*weights.values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert set(optimizers[0].state[weights["ours"][0]]) == {"updates", "exp_avg_sq"}
