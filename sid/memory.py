"""Estimates the memory of a distillation before it starts, from shapes alone, and shrinks the teacher's share."""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dnnlib import UserError
from torch_utils import muon, precision
from torch_utils.live_memory import LiveMemory
from training.conditions import blank_condition, conditions_of
from training.denoiser import DenoiserModule
from training.moments import most_directions

from . import lora
from .config import DistillationConfig
from .guidance import Guidance
from .teacher_samples import NUM_IMAGES

GB = 1 << 30
USABLE = 0.8  # share of the free memory; libraries and fragmentation take the rest
EXAMPLE_SIGMAS = (0.1, 10.0)
CPU_BATCH = 32  # more images at once gain no speed on a CPU
GAN_BATCH = 32  # SiDA's published batch per GPU for CIFAR-10 and ImageNet, which is part of its loss


@dataclasses.dataclass
class Estimate:
    """GB per process by purpose, without what the libraries take."""

    weights: float  # theta, its average, psi and phi; with the moments of the noise that theta starts from
    gradients: float
    moments: float  # of the optimisers
    fake_score_activations: float  # what the fake score's phase keeps for its backward pass
    generator_activations: float  # what the generator's phase keeps for its backward passes

    @property
    def peak(self) -> float:
        """The higher of the two phases' peaks."""
        kept = self.weights + self.gradients + self.moments
        return kept + max(self.fake_score_activations, self.generator_activations)

    def between(self, other: "Estimate", share: float) -> "Estimate":
        """Interpolates to a batch that is `share` of the way to the other's: memory is affine in the images."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Estimate(*(small + share * (large - small) for small, large in pairs))

    def rounded(self) -> dict[str, float]:
        """All figures by name, to three digits."""
        figures = {**vars(self), "peak": self.peak}
        return {name: float(f"{value:.3g}") for name, value in figures.items()}


def estimate(
    teacher: DenoiserModule,
    config: DistillationConfig,
    batch_gpu: int,
    guide: DenoiserModule | None = None,
    device: torch.device | None = None,
) -> Estimate:
    """The memory of a distillation, from shapes alone.

    teacher: any denoiser; it isn't changed. batch_gpu: images per process and round. guide: the weaker network that
    guides the teacher. The precision must be resolved (not None). device: that it runs on; None: the teacher's.
    """
    assert config.precision is not None
    device = device or next(teacher.parameters()).device
    dtype = precision.DTYPES[config.precision]
    part = config.chunk or batch_gpu
    with _shapes_of(teacher, config, device) as net:
        phi = psi = _kept_activations(net, part, device, input_gradient=True)
        stored, recomputed = _bytes(net.parameters()), 0
        if config.lora_rank:  # psi also keeps the weights that it computes from phi's
            lora.adapt(net.requires_grad_(True), config.lora_rank)
            psi = _kept_activations(net.requires_grad_(False), part, device, input_gradient=True)
        train = _kept_activations(net.requires_grad_(True), batch_gpu, device)
        if config.checkpoint:
            recomputed = _recomputed_activations(net, batch_gpu, device)
        if config.share_noise:
            psi = _kept_activations(net, part, device, input_gradient=config.passes_scores)
        trained = _bytes(net.parameters())
        moments = trained if config.optimizer == "adam" else _bytes(muon.split(net)[1])
    if config.stores_half:  # phi's matrices
        with _shapes_of(teacher, config, device) as net:
            _store_casts(net, dtype, part, device)
            phi = _kept_activations(net, part, device, input_gradient=True)
            stored = _bytes(net.parameters())
    if guide is not None:
        with _shapes_of(guide, config, device) as net:
            if config.stores_half:
                _store_casts(net, dtype, part, device)
            phi += _kept_activations(net, part, device, input_gradient=True)
            stored += _bytes(net.parameters())
    starts = 2 * moments_bytes(teacher) if config.init_noise == "moments" else 0  # of theta and its average
    kappa = config.guidance or Guidance()  # a guided network is called twice
    fake_score = train * (1 + (kappa.fake_score_step != 1) + config.gan)  # the discriminator sees real images too
    through = psi * (1 + (kappa.fake_score != 1)) * (config.passes_scores or config.share_noise)
    through += phi * (1 + (kappa.teacher != 1)) * config.passes_scores
    shared = config.share_images or config.share_noise
    if config.share_noise:
        fake_score *= config.fake_score_updates > 1
    elif shared:
        fake_score += train
    return Estimate(
        weights=(3 * trained + stored + starts) / GB,
        gradients=trained * (2 if shared else 1) / GB,
        moments=moments * (3 if config.g_beta1 else 1 if config.adam_state == "bf16" else 2) / GB,
        fake_score_activations=(fake_score + recomputed * (fake_score > 0)) / GB,
        generator_activations=(train + through + recomputed) / GB,
    )


def moments_bytes(teacher: DenoiserModule) -> int:
    """Of the noise of a generator's start (`training.moments`), with as many directions as there may be."""
    size = teacher.img_channels * teacher.img_resolution**2
    return 4 * (size + min(size, NUM_IMAGES - 1, most_directions(size)) * (size + 1))


@contextlib.contextmanager
def _shapes_of(net: DenoiserModule, config: DistillationConfig, device: torch.device) -> Iterator[DenoiserModule]:
    """A frozen copy of a network without weights, set up as training does, in a mode that computes shapes only."""
    shapes = {id(p): torch.nn.Parameter(_in_full(p), p.requires_grad) for p in net.parameters()}
    net = copy.deepcopy(net, shapes).to("meta")  # no weight is copied
    assert config.precision is not None
    dtype = precision.DTYPES[config.precision]
    native = precision.set_compute_dtype(net, dtype)
    if config.checkpoint:
        precision.checkpoint_blocks(net)
    # Runs the device's own kernels without memory or arithmetic.
    with FakeTensorMode(allow_non_fake_inputs=True), precision.autocast(device, torch.float32 if native else dtype):
        yield net.to_empty(device=device).requires_grad_(False)


def _store_casts(net: DenoiserModule, dtype: torch.dtype, images: int, device: torch.device) -> None:
    """Stores those weights in `dtype` that the network only casts to it, as `store_teacher` does."""
    for parameter in precision.only_cast(net, dtype, lambda: _kept_activations(net, images, device)):
        parameter.data = parameter.data.to(dtype)


class Fitting:
    """Which divisors of `images` (per process and update) fit into memory as --batch-gpu, by estimates of two of them.

    Errors: UserError when --chunk doesn't divide `images`.
    """

    def __init__(
        self,
        teacher: DenoiserModule,
        config: DistillationConfig,
        images: int,
        device: torch.device,
        guide: DenoiserModule | None = None,
    ):
        if config.chunk and images % config.chunk:
            raise UserError(f"--chunk={config.chunk} must divide the {images} images per process")
        self._least, most = config.chunk or 1, min(images, GAN_BATCH if config.gan else images)
        self._divisors = [n for n in range(most, 0, -1) if images % n == 0 and n % self._least == 0]
        self._device = device
        self._estimate = lambda n: estimate(teacher, config, n, guide, device)
        self._ends = {n: self._estimate(n) for n in dict.fromkeys(self._divisors[-1:] + self._divisors[:1])}

    def estimate(self, n: int) -> Estimate:
        """What n images at once need."""
        least, most = min(self._ends, default=0), max(self._ends, default=0)
        if not least <= n <= most:
            return self._estimate(n)
        return self._ends[least].between(self._ends[most], (n - least) / max(most - least, 1))

    def largest(self, free: float, limit: int | None = None) -> tuple[int, float | None]:
        """The most images that fit into `free` GB, at least --chunk, or 1, with their peak; None if nothing fits.

        limit: no more than these, whatever the memory.
        """
        peaks = ((n, self.estimate(n).peak) for n in self._divisors if limit is None or n <= limit)
        return next(((n, peak) for n, peak in peaks if peak < USABLE * free), (self._least, None))

    def largest_here(self) -> tuple[int, float | None]:
        """As `largest`, of this device's free memory; no more than `CPU_BATCH` on a CPU."""
        if self._device.type == "cuda":
            return self.largest(torch.cuda.mem_get_info(self._device)[0] / GB)
        free = psutil.virtual_memory().available / GB / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return self.largest(free, CPU_BATCH if self._device.type == "cpu" else None)


def fitting_batch_gpu(
    teacher: DenoiserModule,
    config: DistillationConfig,
    images: int,
    device: torch.device,
    guide: DenoiserModule | None = None,
) -> tuple[int, float | None]:
    """The largest divisor of `images` (per process and update) whose estimate fits into the free memory.

    At least --chunk, or 1. With it comes the estimate of the peak in GB; None if nothing fits.
    Errors: UserError when --chunk doesn't divide `images`.
    """
    return Fitting(teacher, config, images, device, guide).largest_here()


def store_teacher(teacher: DenoiserModule, dtype: torch.dtype, autocast: Callable[[], AbstractContextManager]) -> None:
    """Stores as many of a frozen teacher's weights in `dtype` as leave its outputs for two noisy images equal.

    autocast: opens the context in which training calls the networks.
    """
    device = next(teacher.parameters()).device
    sigma = torch.tensor(EXAMPLE_SIGMAS).reshape(-1, 1, 1, 1)
    shape = [len(sigma), teacher.img_channels, teacher.img_resolution, teacher.img_resolution]
    x = sigma * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    condition = conditions_of(teacher).null(len(sigma), device)
    if teacher.label_dim:
        condition = torch.eye(len(sigma), teacher.label_dim, device=device)

    def call() -> torch.Tensor:
        with torch.no_grad(), autocast():
            return teacher(x.to(device), sigma.to(device), condition)

    precision.store_weights(teacher, dtype, call)


def _in_full(parameter: torch.Tensor) -> torch.Tensor:
    """An empty float32 tensor of its shape, since a teacher in use may be stored in half precision."""
    return torch.empty_like(parameter, dtype=torch.float32, device="meta")


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kept_activations(net: DenoiserModule, num: int, device: torch.device, input_gradient: bool = False) -> int:
    """Bytes that autograd keeps for the backward pass of one evaluation on `num` images, weights excluded."""
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage, held so that no two share an address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:  # nor a view of one, which linear layers keep
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net.train()(*_arguments(net, num, device, input_gradient))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _recomputed_activations(net: DenoiserModule, num: int, device: torch.device) -> int:
    """Bytes by which a backward pass on `num` images exceeds what it begins with, while it recomputes a block."""
    x, sigma, condition = _arguments(net, num, device, input_gradient=True)
    with LiveMemory() as memory:
        answer = net.train()(x, sigma, condition)
        before, memory.peak = memory.now, memory.now
        torch.autograd.grad(answer.sum(), x)
    return memory.peak - before


def _arguments(net: DenoiserModule, num: int, device: torch.device, input_gradient: bool) -> tuple:
    shape = [num, net.img_channels, net.img_resolution, net.img_resolution]
    x = torch.empty(shape, device=device, requires_grad=input_gradient)
    return x, torch.empty([num, 1, 1, 1], device=device), blank_condition(net, num, device)
