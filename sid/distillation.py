"""One iteration of Score identity Distillation: psi learns to denoise theta's images, theta descends L2 - alpha L1."""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator

import torch

from dnnlib import UserError
from torch_utils import batches, distributed, precision, seeding
from torch_utils.training_stats import Collector
from torch_utils.updates import ema_beta, lr_factor, update_ema
from training.augment import EDM_MULTIPLIERS, AugmentPipe
from training.denoiser import DenoiserModule
from training.generator import Generator

from .config import DistillationConfig
from .loss import SiDLoss
from .state import DistillationState

FAKE_SCORE_PHASE, GENERATOR_PHASE = 1, 2  # give the two phases different random draws
STEP_PHASE = 6  # random stream of the trained steps


@dataclasses.dataclass
class Networks:
    """The networks as training calls them, possibly compiled, inside `autocast`."""

    teacher: Callable
    fake_score: Callable
    generator: Callable
    autocast_dtype: torch.dtype  # float32 where the networks keep their own precision
    guide: Callable | None = None  # the weaker network that guides the teacher


class Distillation:
    """One iteration of SiD at a time (arXiv:2404.04057, Algorithm 1); `sid.prepare.prepare` makes one.

    teacher     phi, frozen
    config      the settings, without open choices (`sid.config.resolve`)
    loss        both losses
    state       theta, psi, theta's moving average, the optimisers and counters
    networks    phi, psi and theta as training calls them
    batch_gpu   images per process and round
    peak_GB     the estimate of the memory that `batch_gpu` was chosen by, per process; None if there was none
    """

    def __init__(
        self,
        teacher: DenoiserModule,
        config: DistillationConfig,
        device: torch.device,
        loss: SiDLoss,
        state: DistillationState,
        networks: Networks,
        batch_gpu: int,
        peak_GB: float | None = None,
    ):
        self.peak_GB = peak_GB
        self.teacher, self.device, self.loss, self.state, self.networks = teacher, device, loss, state, networks
        self.batch_gpu, self.rounds = batches.split_batch(config.batch, batch_gpu, distributed.world_size())
        if config.chunk and self.batch_gpu % config.chunk:
            raise UserError(f"--chunk={config.chunk} must divide the {self.batch_gpu} images of --batch-gpu")
        self.config = dataclasses.replace(config, batch_gpu=self.batch_gpu)
        self.conditions = loss.conditions
        self.augment_pipe = AugmentPipe(p=config.augment, **EDM_MULTIPLIERS) if config.augment else None
        self.collector = Collector()

    def iteration(self) -> None:
        """Updates psi, `fake_score_updates` times, then theta, then its moving average, each on `batch` images."""
        state, config = self.state, self.config
        state.serve(self._step())
        factor = lr_factor(state.nimg, config.total_kimg * 1000, config.lr_rampup_kimg * 1000, config.lr_decay)
        factor *= state.rate_factor
        for repeat in range(1, config.fake_score_updates):
            self.fake_score_phase(factor, repeat)
        if config.trains_generator(state.nimg) and (config.share_images or config.share_noise):
            self.shared_phase(factor)
        else:
            self.fake_score_phase(factor)
            if config.trains_generator(state.nimg):
                self.generator_phase(factor)
        self.average()
        if self.device.type == "cpu":
            self.check()
        state.nimg += config.batch

    def fake_score_phase(self, factor: float, repeat: int = 0) -> None:
        """psi learns to denoise fresh images of theta. factor: of the learning rate. repeat: as in `_rounds`."""
        dropout, before = self.config.label_dropout, self.config.drop_labels == "before"
        self.state.generator.eval()
        for condition in self._rounds(FAKE_SCORE_PHASE, repeat):
            condition = self.conditions.drop(condition, dropout if before else 0)
            with torch.no_grad():
                x_g = self.generate(condition)
            condition = self.conditions.drop(condition, 0 if before else dropout)
            self._backward_fake_score(x_g, condition)
        self._update("fake_score", factor)

    def generator_phase(self, factor: float) -> None:
        """theta descends its loss on fresh images."""
        self.state.generator.train()
        for condition in self._rounds(GENERATOR_PHASE):
            self._backward_generator(self.generate(condition), condition)
        self._update("generator", factor)

    def shared_phase(self, factor: float) -> None:
        """Both phases on the same images, which saves generating them twice; theta's loss sees psi as it was."""
        self.state.generator.train()
        for condition in self._rounds(FAKE_SCORE_PHASE):
            self._backward_shared(self.generate(condition), condition)
        self._update("fake_score", factor)
        self._update("generator", factor)

    def average(self) -> None:
        """Updates theta's moving average."""
        state, config = self.state, self.config
        # Counting from the run's start would leave much of the frozen generator in the average long after it moves.
        seen = max(config.generator_images(state.nimg), 0)
        beta = ema_beta(config.batch, seen, config.ema_halflife_kimg * 1000, config.ema_rampup_ratio)
        update_ema(state.ema, state.generator, beta)

    def check(self) -> None:
        """Waits for the device. Errors: DivergenceError when gradients stay non-finite."""
        for updater in (self.state.fake_score_updater, self.state.generator_updater):
            updater.check(self.state.nimg)

    def generate(self, condition: torch.Tensor | None) -> torch.Tensor:
        """x_g, what theta's step of this iteration makes of fresh noise, [batch_gpu, C, H, W]."""
        generator = Generator(self.networks.generator, self.state.steps)
        z = generator.latents(self.batch_gpu, self.device)
        with self.autocast():
            return generator.sample(z, condition, step=self._step()).contiguous()

    def _step(self) -> int:
        """The step that this iteration trains, uniform (arXiv:2505.12674), the same in both phases and processes."""
        place = seeding.seed_from(self.config.seed, STEP_PHASE, self.state.nimg)
        return random.Random(place).randrange(len(self.state.steps))

    def image_gradient(self, images: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """The gradient of theta's loss with respect to its images, [N, C, H, W].

        The loss is a sum over images, so small chunks pass through phi and psi one after the other, and the activations
        of one are freed before the next. One backward pass through theta follows. This is exact and needs the memory
        of a single chunk.
        """
        self.state.fake_score.eval()
        x_g = images.detach().requires_grad_()
        noise = self.loss.draw_noise(x_g)
        with self.state.fake_score_updater.frozen():
            for chunk in self._chunks(len(x_g)):
                with self.autocast():
                    inputs = self._loss_inputs(x_g, condition, noise, chunk)
                    loss = self.loss.generator_loss(*inputs, **self._stage())
                self._backward_to(x_g, loss)
        assert x_g.grad is not None
        return x_g.grad

    def shared_gradient(self, images: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """As `image_gradient`; also adds psi's own gradient, from the same outputs of psi, to its weights."""
        self.state.fake_score.eval()
        x_g = images.detach().requires_grad_()
        noise = self.loss.draw_shared_noise(x_g)
        for chunk in self._chunks(len(x_g)):
            with self.autocast():
                inputs = self._loss_inputs(x_g, condition, noise, chunk)
                loss, denoising = self.loss.shared_losses(*inputs, **self._stage())
            self._backward_to(x_g, loss, keep=True)
            self._backward_denoising(denoising, only=self.state.fake_score_updater.parameters)
        assert x_g.grad is not None
        return x_g.grad

    def _backward_fake_score(self, images: torch.Tensor, condition: torch.Tensor | None) -> None:
        """Accumulates the gradient of psi's loss on `images` in psi."""
        self.state.fake_score.train()
        with self.autocast():
            loss = self.loss.fake_score_loss(
                self.networks.fake_score, images, condition, self.augment_pipe, self.collector.report
            )
        self._backward_denoising(loss)

    def _backward_generator(self, x_g: torch.Tensor, condition: torch.Tensor | None) -> None:
        """Accumulates the gradient of theta's loss in theta, through the graph of its images x_g."""
        x_g.backward(self.image_gradient(x_g, condition))

    def _backward_shared(self, x_g: torch.Tensor, condition: torch.Tensor | None) -> None:
        """Accumulates the gradients of both losses on the same images."""
        if self.config.share_noise:
            x_g.backward(self.shared_gradient(x_g, condition))
        else:
            self._backward_fake_score(x_g, self.conditions.drop(condition, self.config.label_dropout))
            self._backward_generator(x_g, condition)

    def _chunks(self, images: int) -> Iterator[slice]:
        size = self.config.chunk or images
        for start in range(0, images, size):
            yield slice(start, start + size)

    def _loss_inputs(
        self, x_g: torch.Tensor, condition: torch.Tensor | None, noise: tuple[torch.Tensor, ...], chunk: slice
    ) -> tuple:
        """The arguments of theta's losses for one chunk of the images."""
        labels = None if condition is None else condition[chunk]
        draws = tuple(draw[chunk] for draw in noise)
        return self.networks.teacher, self.networks.fake_score, x_g[chunk], labels, draws, self.collector.report

    def _stage(self) -> dict[str, bool]:
        """The arguments of theta's loss that depend on the progress of the training."""
        config, nimg = self.config, self.state.nimg
        stage = {"score_gradient": config.score_gradient.passes(nimg)}
        return {**stage, "adversarial": config.is_adversarial(nimg)} if config.gan else stage

    def _backward_to(self, x_g: torch.Tensor, loss: torch.Tensor, keep: bool = False) -> None:
        """Accumulates the gradient of theta's loss in x_g.grad. keep: keeps the graph for another loss."""
        self.collector.report("Loss/generator", loss)
        loss = loss.sum() * (self.config.lsg / self.config.batch)
        self.state.generator_updater.backward(loss, only=[x_g], keep=keep)

    def _backward_denoising(self, loss: torch.Tensor, only: Iterable[torch.Tensor] | None = None) -> None:
        self.collector.report("Loss/fake_score", loss)
        self.state.fake_score_updater.backward(loss.sum() * (self.config.ls / self.config.batch), only)

    def _update(self, name: str, factor: float) -> None:
        self.collector.report(f"Gradient/{name}_norm", getattr(self.state, f"{name}_updater").step(factor))

    def autocast(self) -> contextlib.AbstractContextManager:
        """The arithmetic in which the networks are called."""
        return precision.autocast(self.device, self.networks.autocast_dtype)

    def _rounds(self, phase: int, repeat: int = 0) -> Iterator[torch.Tensor | None]:
        """Seeds each round by its place in the global batch, then gives the conditions of its images.

        repeat: counts the updates of psi between two updates of theta.
        """
        for r in range(self.rounds):
            first_image = self.state.nimg + (r * distributed.world_size() + distributed.rank()) * self.batch_gpu
            seeding.seed_at(self.config.seed, phase, first_image, *([repeat] if repeat else []))
            yield self.draw_conditions(self.batch_gpu)

    def draw_conditions(self, n: int) -> torch.Tensor | None:
        """Conditions of n images on the run's device, from torch's default generator."""
        return self.conditions.draw(n, self.device)

    def fits(self) -> bool:
        """Whether one round of both phases fits into every process's memory, tried on a GPU with all losses."""
        if self.device.type != "cuda":
            return True
        fitting, nimg = torch.ones([], device=self.device), self.state.nimg
        self.state.nimg = int(self.config.total_kimg * 1000)  # when every part of the losses is active
        try:
            condition = next(self._rounds(FAKE_SCORE_PHASE))
            self._backward_shared(self.generate(condition), condition)
        except torch.cuda.OutOfMemoryError:
            fitting.zero_()
        self.state.nimg = nimg
        for updater in (self.state.fake_score_updater, self.state.generator_updater):
            updater.optimizer.zero_grad(set_to_none=True)
        self.collector = Collector()
        torch.cuda.empty_cache()
        return distributed.all_reduce_sum(fitting).item() == distributed.world_size()
