"""All callers keep to a denoiser's contract: float32 [N, C, H, W] at documented noise levels."""

import numpy as np
import onnxruntime
import pytest
import torch
from tiny import CPU, tiny_config, tiny_distillation

from dnnlib import UserError
from edm import onnx_file, sampler, zoo
from edm.metrics.sources import NetworkSource
from sid import OneStepGenerator, memory
from sid.config import resolve
from sid.inputs import Inputs
from sid.monitor.measure import Health
from sid.prepare import prepare
from torch_utils import distributed, precision
from training.decoder import PixelDecoder

SHAPE = (3, 8, 8)


class StrictDenoiser(torch.nn.Module):
    """A denoiser that raises on whatever the contract doesn't allow and casts nothing itself.

    Under autocast its last layer answers in half precision.
    """

    img_resolution, img_channels, sigma_min, sigma_max = 8, 3, 0.002, 80.0

    def __init__(self, label_dim=0):
        super().__init__()
        self.label_dim = label_dim
        self.image = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.level = torch.nn.Linear(1, 8)
        self.label = torch.nn.Linear(max(label_dim, 1), 8)
        self.out = torch.nn.Conv2d(8, 3, 3, padding=1)
        self.register_buffer("levels", torch.linspace(0.001, 90, 4000))

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        n = len(x)
        _demand(x.dtype == torch.float32 and x.shape == (n, *SHAPE), "x", x)
        _demand(isinstance(sigma, torch.Tensor) and sigma.dtype == torch.float32, "sigma", sigma)
        _demand(sigma.shape in ((), (n,), (n, 1, 1, 1)), "sigma", sigma)
        features = self.image(x) + self.level(sigma.log().reshape(-1, 1))[:, :, None, None]
        if class_labels is not None:
            shape = (n, self.label_dim)
            _demand(class_labels.dtype == torch.float32 and class_labels.shape == shape, "class_labels", class_labels)
            features = features + self.label(class_labels)[:, :, None, None]
        return self.out(torch.nn.functional.silu(features))

    def round_sigma(self, sigma):
        """Demands float32: torch.cdist takes one type."""
        mode = "donot_use_mm_for_euclid_dist"  # which would be inexact
        distances = torch.cdist(sigma.reshape(-1, 1), self.levels[:, None], compute_mode=mode)
        return self.levels[distances.argmin(1)].reshape(sigma.shape)


def _demand(right, name, value):
    if not right:
        raise TypeError(f"{name}: {getattr(value, 'dtype', type(value))} {list(getattr(value, 'shape', []))}")


def strict_denoiser(label_dim=0):
    torch.manual_seed(0)
    return StrictDenoiser(label_dim)


SAMPLERS = {
    "heun": ("heun", {"num_steps": 3}),
    "heun-churn": ("heun", {"num_steps": 3, "S_churn": 30.0}),
    "one-step": ("one-step", {}),
    "one-step-int": ("one-step", {"init_sigma": 2}),
    **{
        f"{d}-{schedule}-{scaling}": (
            "ablation",
            {"num_steps": 3, "discretization": d, "schedule": schedule, "scaling": scaling},
        )
        for d in ("vp", "ve", "iddpm", "edm")
        for schedule, scaling in (("vp", "vp"), ("ve", "none"), ("linear", "none"))
    },
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("label_dim", [0, 4])
def test_samplers(name, label_dim):
    kind, options = SAMPLERS[name]
    images = sampler.sample(strict_denoiser(label_dim), [0, 1], kind, **options)
    assert images.dtype == (torch.float32 if kind == "one-step" else torch.float64)
    assert images.isfinite().all()


def test_samplers_take_latents_of_any_float_type():
    latents = torch.randn(2, *SHAPE, dtype=torch.float64)
    for take in (sampler.heun_sampler, sampler.ablation_sampler, sampler.one_step_sampler):
        assert take(strict_denoiser(), latents).shape == latents.shape


def test_rounding_is_the_networks():
    """The state starts at the level that the network rounds sigma_max to."""
    net = strict_denoiser()
    asked = []
    net.register_forward_pre_hook(lambda _net, args: asked.append(args[1]))
    sampler.heun_sampler(net, torch.ones(1, *SHAPE), num_steps=2)
    assert all(level.item() in net.levels.tolist() for level in asked)


def test_images_and_metrics():
    net = strict_denoiser(4)
    assert next(sampler.generate_images(net, [0, 1], steps=3)).dtype == torch.uint8
    ((_, images),) = NetworkSource(net, steps=3).batches(2, 2)
    assert images.shape == (2, *SHAPE)
    net.metadata = {"init_sigma": 2}  # as a file's JSON may hold it
    assert OneStepGenerator(net)(2).shape == (2, *SHAPE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_sigma": 2},
        {"chunk": 1, "fake_score_updates": 2},
        {"guidance": "long-short=2"},
        {"share_noise": True},
        {"sigma_schedule": "single=1", "init_sigma": 1, "fake_sigma_schedule": "single=1"},
        {"precision": "bf16"},
        {"precision": "bf16", "share_images": True, "chunk": 1},
    ],
    ids=str,
)
def test_a_distillation(changes):
    """Training, the measurements of every tick and the plan of its memory."""
    label_dim = 4 if "guidance" in changes else 0
    distillation = tiny_distillation(strict_denoiser(label_dim), augment=0, **changes)
    for _ in range(2):
        distillation.iteration()
    images = distillation.generate(distillation.draw_conditions(distillation.batch_gpu))
    assert images.dtype == torch.float32
    assert Health(distillation).measure()
    assert memory.estimate(distillation.teacher, distillation.config, 2).peak > 0


def test_half_precision_ends_at_the_network():
    """Losses are differences of answers, so the answers of a user's network under autocast are converted to float32."""
    distillation = tiny_distillation(strict_denoiser(), augment=0, precision="bf16")
    x = torch.randn(2, *SHAPE)
    for net in (distillation.teacher, distillation.state.fake_score, distillation.state.generator):
        with distillation.autocast():
            assert net(x, torch.ones(2)).dtype == torch.float32
    assert strict_denoiser()(x, torch.ones(2)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # what the network itself answers there
        assert strict_denoiser()(x, torch.ones(2)).dtype == torch.bfloat16


class StrictTypes(StrictDenoiser):
    """Demands the types only: a test of the shapes would fix the number of images in an ONNX model."""

    def forward(self, x, sigma, class_labels=None):
        _demand(x.dtype == sigma.dtype == torch.float32, "x", x)
        features = self.image(x) + self.level(sigma.log().reshape(-1, 1))[:, :, None, None]
        return self.out(torch.nn.functional.silu(features))


@pytest.mark.skipif(not onnx_file.can_trace(), reason="a PyTorch that can't write ONNX")
@pytest.mark.parametrize("metadata", [{}, {"init_sigma": 2}], ids=["denoiser", "generator"])
def test_onnx(tmp_path, metadata):
    net = StrictTypes().eval().requires_grad_(False)
    zoo.save_network(net, tmp_path / "net.onnx", **metadata)
    model = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(3, *SHAPE)
    if metadata:
        (found,) = model.run(None, {"z": x.numpy()})
        expected = PixelDecoder.to_images(net(2 * x, torch.full([3], 2.0)))
        assert np.abs(found.astype(int) - expected.numpy()).max() <= 1
    else:
        (found,) = model.run(None, {"x": x.numpy(), "sigma": np.ones(3, np.float32)})
        torch.testing.assert_close(torch.as_tensor(found), net(x, torch.ones(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not onnx_file.can_trace(), reason="a PyTorch that can't write ONNX")
def test_an_onnx_model_of_a_fixed_number_of_images_is_refused(tmp_path):
    net = strict_denoiser().eval().requires_grad_(False)
    with pytest.raises(UserError, match=r"StrictDenoiser.*number of images"):
        zoo.save_network(net, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


@pytest.fixture
def half_precision_flag():
    before = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    yield
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = before


def test_products_of_float16_are_summed_in_float32(half_precision_flag):
    """As published. The flag belongs to the process; a command sets it, and so does a distillation from Python."""
    for start in (lambda: distributed.init("cpu"), lambda: precision.set_up("fp32", CPU)):
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
        start()
        assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction is False


def test_checkpoint_says_what_it_cannot_do():
    message = "--checkpoint=1: StrictDenoiser has no blocks.*--chunk"
    with pytest.raises(UserError, match=message):
        tiny_distillation(strict_denoiser(), augment=0, checkpoint=True)
    config = resolve(tiny_config(checkpoint=True, augment=0), strict_denoiser(), CPU)
    with pytest.raises(UserError, match=message):  # --dry-run, which plans the memory only
        memory.estimate(strict_denoiser(), config, 2)


def test_checkpoint_leaves_a_method_of_that_name_alone():
    class WithMethod(StrictDenoiser):
        def checkpoint(self):
            return "a method"

    net = WithMethod()
    with pytest.raises(UserError, match="--checkpoint=1: WithMethod"):
        prepare(Inputs(net), tiny_config(checkpoint=True, augment=0), CPU)
    assert net.checkpoint() == "a method"


def test_an_own_network_of_blocks_that_can_is_checkpointed():
    class Block(torch.nn.Module):
        checkpoint = False

        def forward(self, x):
            return x

    class WithBlocks(StrictDenoiser):
        def __init__(self):
            super().__init__()
            self.block = Block()

    distillation = tiny_distillation(WithBlocks(), augment=0, checkpoint=True)
    networks = distillation.teacher, distillation.state.fake_score, distillation.state.generator
    assert all(net.block.checkpoint for net in networks)
