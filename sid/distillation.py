"""One iteration of Score identity Distillation: psi learns to denoise what theta makes, theta follows L2 - alpha L1."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from dnnlib import UserError
from edm.classes import ClassDraws
from torch_utils import checkpoint, distributed, misc, precision
from torch_utils.training_stats import Collector
from torch_utils.updates import ema_beta, lr_factor, update_ema
from training.augment import EDM_MULTIPLIERS, AugmentPipe

from . import memory
from .adversarial import RealImages, make_loss
from .config import DistillationConfig, resolve
from .guidance import check_guidance
from .state import DistillationState

FAKE_SCORE_PHASE, GENERATOR_PHASE = 1, 2  # keep the random draws of the two phases apart


class Distillation:
    """One iteration of SiD at a time (arXiv:2404.04057, Algorithm 1), on any number of processes.

    teacher: phi, a denoiser (training/networks.py says what that is); any class will do. It is moved to `device`, set
             to eval mode and frozen; in half precision, weights that it only casts are kept in it from then on.
    start:   another denoiser whose weights theta starts from.
    resume:  a training state to go on from, or its path. check: as `DistillationState.load` has it.
    reals:   real images for the discriminator of `config.gan`.
    Errors: UserError when options don't fit the teacher, the processes or the state.
    """

    def __init__(
        self,
        teacher: torch.nn.Module,
        config: DistillationConfig,
        device: torch.device,
        start: torch.nn.Module | None = None,
        resume: checkpoint.StateFile | Path | None = None,
        reals: RealImages | None = None,
        check: Callable | None = None,
    ):
        self.config = config = resolve(config, teacher, device)
        self.device = device
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        check_guidance(config, teacher)
        self._classes = ClassDraws(teacher, device)
        self.loss = make_loss(config, teacher, reals)
        self.augment_pipe = AugmentPipe(p=config.augment, **EDM_MULTIPLIERS) if config.augment else None
        if self.augment_pipe and getattr(teacher, "augment_dim", 0) != self.augment_pipe.augment_dim:
            raise UserError(f"--augment={config.augment:g}: the teacher takes no augmentation labels; use --augment=0")
        self.state = DistillationState(teacher, config, device, start)
        self.collector = Collector()
        self._set_up_arithmetic()
        if resume is not None:
            self.state.load(resume, check)
        self._split_batch()

    def _set_up_arithmetic(self) -> None:
        """Precision, memory layout and compilation of the three networks; none of it is part of the state."""
        config, state = self.config, self.state
        networks = {"teacher": self.teacher, "fake_score": state.fake_score, "generator": state.generator}
        precision.set_up(config.precision, self.device)
        dtype = precision.DTYPES[config.precision]
        self._autocast_dtype = precision.compute_in(dtype, networks.values())
        for net in networks.values():
            if config.channels_last:  # of the weights: the activations follow
                net.to(memory_format=torch.channels_last)
            if config.checkpoint:
                precision.checkpoint_blocks(net)
        fixed = {"fake_score"} if config.gan else set()  # a compiled network can't be listened to
        compiled = networks.keys() - fixed if config.compile else set()
        if dtype != torch.float32 and not config.lora_rank:  # whose updates need the weights in full
            memory.store_teacher(self.teacher, dtype, self.autocast)
        self._calls = {
            name: precision.compiled(net, config.share_noise) if name in compiled else net
            for name, net in networks.items()
        }

    def _split_batch(self) -> None:
        """Images per process and round, and rounds: --batch-gpu, that of the resumed run, or the most that fits."""
        config, processes = self.config, distributed.world_size()
        batch_gpu = given = config.batch_gpu or self._former_batch_gpu()
        if batch_gpu is None:
            share = misc.split_batch(config.batch, None, processes)[0]
            batch_gpu = distributed.from_process_0(memory.fitting_batch_gpu(self.teacher, config, share, self.device))
        self.batch_gpu, self.rounds = misc.split_batch(config.batch, batch_gpu, processes)
        if config.chunk and self.batch_gpu % config.chunk:
            raise UserError(f"--chunk={config.chunk} must divide the {self.batch_gpu} images of --batch-gpu")
        while given is None and self.batch_gpu > 1 and not self._fits():
            smaller = [n for n in range(1, self.batch_gpu) if self.batch_gpu % n == n % (config.chunk or 1) == 0]
            if not smaller:
                break
            self.batch_gpu, self.rounds = misc.split_batch(config.batch, smaller[-1], processes)
        self.config = dataclasses.replace(config, batch_gpu=self.batch_gpu)

    def _former_batch_gpu(self) -> int | None:
        """That of the run in the loaded state, which its random draws depend on; None if it doesn't fit here."""
        former = self.state.setting.get("options", {}).get("batch_gpu")
        sound = type(former) is int and former > 0
        return former if sound and self.config.batch % (former * distributed.world_size()) == 0 else None

    def _fits(self) -> bool:
        """Whether both phases have memory enough for one round on every process, tried on a GPU as at the run's end."""
        if self.device.type != "cuda":
            return True
        fits, now = torch.ones([], device=self.device), self.state.nimg
        self.state.nimg = int(self.config.total_kimg * 1000)  # when every part of the losses is there
        try:
            labels = next(iter(self._rounds(FAKE_SCORE_PHASE)))
            self._backward_both(self.generate(labels), labels)
        except torch.cuda.OutOfMemoryError:
            fits.zero_()
        self.state.nimg = now
        for updater in (self.state.fake_score_updater, self.state.generator_updater):
            updater.optimizer.zero_grad(set_to_none=True)
        self.collector = Collector()
        torch.cuda.empty_cache()
        return distributed.all_reduce_sum(fits) == distributed.world_size()

    def generate(self, labels: torch.Tensor | None) -> torch.Tensor:
        """x_g = f_theta(init_sigma z; init_sigma), [batch_gpu, C, H, W]."""
        net, sigma = self.state.generator, self.config.init_sigma
        z = torch.randn([self.batch_gpu, net.img_channels, net.img_resolution, net.img_resolution], device=self.device)
        levels = torch.full([self.batch_gpu, 1, 1, 1], sigma, dtype=torch.float32, device=self.device)
        with self.autocast():
            return self._calls["generator"](sigma * z, levels, labels).contiguous()

    def iteration(self) -> None:
        """Updates psi, `fake_score_updates` times, then theta, then its moving average, each on `batch` images."""
        state, config = self.state, self.config
        factor = lr_factor(state.nimg, config.total_kimg * 1000, config.lr_rampup_kimg * 1000, config.lr_decay)
        for repeat in range(1, config.fake_score_updates):
            self.fake_score_phase(factor, repeat)
        if not config.trains_generator(state.nimg):
            self.fake_score_phase(factor)
        elif config.share_images or config.share_noise:
            self.shared_phase(factor)
        else:
            self.fake_score_phase(factor)
            self.generator_phase(factor)
        # Counted from the run's start, the ramp-up would keep much of the frozen generator long after it moves.
        seen = max(config.generator_images(state.nimg), 0)
        beta = ema_beta(config.batch, seen, config.ema_halflife_kimg * 1000, config.ema_rampup_ratio)
        update_ema(state.ema, state.generator, beta)
        if self.device.type == "cpu":
            self.check()
        state.nimg += config.batch

    def check(self) -> None:
        """Waits for the device. Errors: DivergenceError when gradients stay non-finite."""
        for updater in (self.state.fake_score_updater, self.state.generator_updater):
            updater.check(self.state.nimg)

    def fake_score_phase(self, factor: float, repeat: int = 0) -> None:
        self.state.generator.eval()
        for labels in self._rounds(FAKE_SCORE_PHASE, repeat):
            with torch.no_grad():
                images = self.generate(labels)
            self._backward_fake_score(images, labels)
        self._update("fake_score", factor)

    def generator_phase(self, factor: float) -> None:
        self.state.generator.train()
        for labels in self._rounds(GENERATOR_PHASE):
            self._backward_generator(self.generate(labels), labels)
        self._update("generator", factor)

    def shared_phase(self, factor: float) -> None:
        """Both phases on the same images, which saves generating them twice; theta follows psi before its update."""
        self.state.generator.train()
        for labels in self._rounds(FAKE_SCORE_PHASE):
            self._backward_both(self.generate(labels), labels)
        self._update("fake_score", factor)
        self._update("generator", factor)

    def _backward_both(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        if not self.config.share_noise:
            self._backward_fake_score(images, labels)
        self._backward_generator(images, labels, with_fake_score=self.config.share_noise)

    def _backward_fake_score(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Adds the gradient of psi's loss on `images` to psi's."""
        self.state.fake_score.train()
        inputs = (self._calls["fake_score"], images, labels, self.augment_pipe, self.collector.report)
        with self.autocast():
            loss = self.loss.fake_score_loss(*inputs)
        self._backward_denoising(loss)

    def _backward_generator(
        self, images: torch.Tensor, labels: torch.Tensor | None, with_fake_score: bool = False
    ) -> None:
        """Adds the gradient of theta's loss on `images` to theta's; if wanted, that of psi's loss on them to psi's.

        The losses split over images: theta's gradient by x_g comes from small chunks through phi and psi, whose
        activations are gone before one backward pass through theta. Exact, in the memory of one chunk.
        """
        state, config = self.state, self.config
        state.fake_score.eval()
        self.loss.score_gradient = config.has_score_gradient(state.nimg)
        self.loss.adversarial = config.is_adversarial(state.nimg)
        x_g = images.detach().requires_grad_()
        noise = (self.loss.draw_shared_noise if with_fake_score else self.loss.draw_noise)(x_g)
        networks = self._calls["teacher"], self._calls["fake_score"]
        with contextlib.nullcontext() if with_fake_score else state.fake_score_updater.frozen():
            size = config.chunk or len(x_g)
            for start in range(0, len(x_g), size):
                part = slice(start, start + size)
                some = labels[part] if labels is not None else None
                inputs = (*networks, x_g[part], some, tuple(draw[part] for draw in noise), self.collector.report)
                with self.autocast():
                    losses = (self.loss.shared_losses if with_fake_score else self.loss.generator_loss)(*inputs)
                loss, denoising = losses if with_fake_score else (losses, None)
                self.collector.report("Loss/generator", loss)
                loss = loss.sum() * (config.lsg / config.batch)
                state.generator_updater.backward(loss, only=[x_g], keep=with_fake_score)
                if with_fake_score:
                    self._backward_denoising(denoising, only=state.fake_score_updater.parameters)
        images.backward(x_g.grad)

    def _backward_denoising(self, loss: torch.Tensor, only: list[torch.Tensor] | None = None) -> None:
        self.collector.report("Loss/fake_score", loss)
        self.state.fake_score_updater.backward(loss.sum() * (self.config.ls / self.config.batch), only)

    def _update(self, name: str, factor: float) -> None:
        self.collector.report(f"Gradient/{name}_norm", getattr(self.state, f"{name}_updater").step(factor))

    def autocast(self):
        """The arithmetic in which the networks are called."""
        return precision.autocast(self.device, self._autocast_dtype)

    def _rounds(self, phase: int, repeat: int = 0):
        """Seeds each round by its place in the global batch, then gives its class labels [batch_gpu, label_dim].

        repeat: tells apart the updates that see the same images of the generator's count.
        """
        for r in range(self.rounds):
            first_image = self.state.nimg + (r * distributed.world_size() + distributed.rank()) * self.batch_gpu
            misc.seed_at(self.config.seed, phase, first_image, *([repeat] if repeat else []))
            yield self.draw_labels(self.batch_gpu)

    def draw_labels(self, n: int) -> torch.Tensor | None:
        """One-hot classes, drawn uniformly of those that the teacher knows, [n, label_dim]; None if it has none."""
        return self._classes.one_hot(lambda high: torch.randint(high, [n], device=self.device))
