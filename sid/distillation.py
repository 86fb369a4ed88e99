"""One iteration of Score identity Distillation: psi learns to denoise what theta makes, theta follows L2 - alpha L1."""

import dataclasses
from pathlib import Path

import torch

from dnnlib import UserError
from torch_utils import distributed, misc
from torch_utils.training_stats import Collector
from torch_utils.updates import ema_beta, lr_factor, update_ema
from training.augment import EDM_MULTIPLIERS, AugmentPipe

from .config import AUGMENT, DistillationConfig
from .loss import SiDLoss
from .state import DistillationState

FAKE_SCORE_PHASE, GENERATOR_PHASE = 1, 2  # keep the random draws of the two phases apart


class Distillation:
    """One iteration of SiD at a time (arXiv:2404.04057, Algorithm 1), on any number of processes.

    teacher: phi, a denoiser (training/networks.py says what that is); any class will do. It is moved to `device`, set
             to eval mode and frozen.
    start:   another denoiser whose weights theta starts from.
    resume:  a training state to go on from.
    Errors: UserError when options don't fit the teacher, the processes or the state.
    """

    def __init__(
        self,
        teacher: torch.nn.Module,
        config: DistillationConfig,
        device: torch.device,
        start: torch.nn.Module | None = None,
        resume: Path | None = None,
    ):
        if config.augment is None:
            config = dataclasses.replace(config, augment=AUGMENT if getattr(teacher, "augment_dim", 0) else 0.0)
        self.config = config
        self.device = device
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.loss = SiDLoss(alpha=config.alpha, tmax=config.tmax)
        self.augment_pipe = AugmentPipe(p=config.augment, **EDM_MULTIPLIERS) if config.augment else None
        if self.augment_pipe and getattr(teacher, "augment_dim", 0) != self.augment_pipe.augment_dim:
            raise UserError(f"--augment={config.augment:g}: the teacher takes no augmentation labels; use --augment=0")
        self.batch_gpu, self.rounds = misc.split_batch(config.batch, config.batch_gpu, distributed.world_size())
        self.state = DistillationState(teacher, config, device, start)
        if resume is not None:
            self.state.load(resume)
        self.collector = Collector()

    def generate(self, labels: torch.Tensor | None) -> torch.Tensor:
        """x_g = f_theta(init_sigma z; init_sigma), [batch_gpu, C, H, W]."""
        net, sigma = self.state.generator, self.config.init_sigma
        z = torch.randn([self.batch_gpu, net.img_channels, net.img_resolution, net.img_resolution], device=self.device)
        return net(sigma * z, torch.full([self.batch_gpu, 1, 1, 1], sigma, device=self.device), labels)

    def iteration(self) -> None:
        """Updates psi, then theta, then theta's moving average, each on `batch` images."""
        state, config = self.state, self.config
        factor = lr_factor(state.nimg, config.total_kimg * 1000, config.lr_rampup_kimg * 1000, config.lr_decay)
        self.fake_score_phase(factor)
        self.generator_phase(factor)
        beta = ema_beta(config.batch, state.nimg, config.ema_halflife_kimg * 1000, config.ema_rampup_ratio)
        update_ema(state.ema, state.generator, beta)
        state.nimg += config.batch

    def fake_score_phase(self, factor: float) -> None:
        state = self.state
        state.generator.eval()
        state.fake_score.train()
        for labels in self._rounds(FAKE_SCORE_PHASE):
            with torch.no_grad():
                images = self.generate(labels)
            loss = self.loss.fake_score_loss(state.fake_score, images, labels, self.augment_pipe)
            self.collector.report("Loss/fake_score", loss)
            (loss.sum() * (self.config.ls / self.config.batch)).backward()
        norm = state.fake_score_updater.step(state.nimg, factor)
        self.collector.report("Gradient/fake_score_norm", norm, self.device)

    def generator_phase(self, factor: float) -> None:
        state = self.state
        state.generator.train()
        state.fake_score.eval()
        with state.fake_score_updater.frozen():
            for labels in self._rounds(GENERATOR_PHASE):
                images = self.generate(labels)
                loss = self.loss.generator_loss(
                    self.teacher, state.fake_score, images, labels, report=self.collector.report
                )
                self.collector.report("Loss/generator", loss)
                (loss.sum() * (self.config.lsg / self.config.batch)).backward()
        norm = state.generator_updater.step(state.nimg, factor)
        self.collector.report("Gradient/generator_norm", norm, self.device)

    def _rounds(self, phase: int):
        """Seeds each round by its place in the global batch, then gives its class labels [batch_gpu, label_dim]."""
        net = self.state.generator
        for r in range(self.rounds):
            first_image = self.state.nimg + (r * distributed.world_size() + distributed.rank()) * self.batch_gpu
            misc.seed_at(self.config.seed, phase, first_image)
            if net.label_dim:
                classes = torch.randint(net.label_dim, [self.batch_gpu], device=self.device)
                yield torch.nn.functional.one_hot(classes, net.label_dim).to(torch.float32)
            else:
                yield None
