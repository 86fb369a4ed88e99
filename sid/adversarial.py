"""SiD with an adversarial loss (SiDA, arXiv:2410.14919): psi's encoder tells real images from generated ones.

The discriminator has no parameters of its own. Its logits are the mean over channels of what psi's last encoder block
gives, one per position, in the very pass that gives f_psi. Functions on tensors come first, then the loss around the
networks and the real images that it draws.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import softplus

from dnnlib import UserError
from training.dataset import ImageFolderDataset

from .config import DistillationConfig, parse_guidance
from .guidance import drop_labels, guided
from .loss import SiDLoss

LOGIT_LIMIT = 10.0  # of the generator's logits, published value
SHARE = 0.5  # of each of theta's two losses


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(BCE(real, 1) + BCE(fake, 0)) / 2 of logits [N, h, w], mean over positions, [N]."""
    return (softplus(-real) + softplus(fake)).mean(dim=[1, 2]) / 2


def adversarial_loss(fake: torch.Tensor) -> torch.Tensor:
    """BCE(fake, 1) of limited logits [N, h, w], mean over images and positions: one scalar."""
    return softplus(-fake.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)).mean()


def accuracy(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Share of the positions whose logit has the right sign, [N]; 0.5 is chance."""
    return ((real > 0).float() + (fake < 0).float()).mean(dim=[1, 2]) / 2


def last_encoder_block(net: torch.nn.Module) -> torch.nn.Module:
    """Of a denoiser around a U-Net of training/networks.py. Errors: UserError when `net` is none."""
    encoder = getattr(getattr(net, "model", None), "enc", None)
    if not isinstance(encoder, torch.nn.ModuleDict) or not len(encoder):
        raise UserError(f"--gan: {type(net).__name__} has no encoder net.model.enc to tell images by; leave --gan out")
    return list(encoder.values())[-1]


@contextlib.contextmanager
def logits_of(net: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the logits [N, h, w] of every call of a denoiser while open; what it returns is the same."""
    collected: list[torch.Tensor] = []

    def collect(module: torch.nn.Module, args: tuple, features: torch.Tensor) -> None:  # features: [N, channels, h, w]
        collected.append(features.mean(dim=1, dtype=torch.promote_types(features.dtype, torch.float32)))

    handle = last_encoder_block(net).register_forward_hook(collect)
    try:
        yield collected
    finally:
        handle.remove()


class RealImages:
    """Real images at random. Which ones is a draw of torch's default generator, so it follows `misc.seed_at`.

    dataset:    square images; with labels if `label_dim` isn't 0
    label_dim:  of the networks; classes that the data set lacks get columns of zeros
    Errors: DatasetError, also from `draw`, when a file is broken.
    """

    def __init__(self, dataset: ImageFolderDataset, label_dim: int, device: torch.device):
        self._dataset, self._label_dim, self._device = dataset, label_dim, device

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(images [n, C, H, W] float32 in [-1, 1], one-hot labels [n, label_dim] or None), with replacement."""
        indices = torch.randint(len(self._dataset), [n]).tolist()
        images, labels = zip(*(self._dataset[index] for index in indices))
        x = self._on_device(images).to(torch.float32) / 127.5 - 1
        if not self._label_dim:
            return x, None
        labels = self._on_device(labels)
        return x, torch.nn.functional.pad(labels, [0, self._label_dim - labels.shape[1]])

    def _on_device(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        batch = torch.as_tensor(np.stack(arrays))
        if self._device.type == "cuda":
            batch = batch.pin_memory()  # else the host would wait for the GPU
        return batch.to(self._device, non_blocking=True)


class SiDALoss(SiDLoss):
    """Both losses of SiDA. The networks must be the modules themselves, not compiled: their encoders are listened to.

    reals        real images, `draw` as RealImages has it
    lsd          weight of the discriminator's loss relative to psi's
    lsg_gan      weight of the adversarial loss relative to theta's
    adversarial  whether theta's loss has that part; may be changed at any time
    options      those of SiDLoss
    """

    def __init__(self, reals: RealImages, lsd: float = 1.0, lsg_gan: float = 1e-4, **options):
        super().__init__(**options)
        self.reals, self.lsd, self.lsg_gan = reals, lsd, lsg_gan
        self.adversarial = True
        self._logits: list[torch.Tensor] = []  # of psi's calls in theta's loss

    def fake_score_loss(
        self, fake_score, images, labels=None, augment_pipe=None, report: Callable | None = None
    ) -> torch.Tensor:
        """SiD's loss of psi, per pixel, plus lsd lambda(sigma) times the discriminator's, shared out over the pixels.

        Real images get the noise levels and the noise of the generated ones beside them, and augmentations of their
        own from the same pipe. The draws begin with those of SiD.
        """
        augment = augment_pipe or (lambda x: (x, None))
        sigma = self._draw_sigma(self.fake_sigma_schedule, images)
        labels = drop_labels(labels, self.guidance.label_dropout)
        y, augment_labels = augment(images.detach())
        noise = torch.randn_like(y) * sigma
        with logits_of(fake_score) as logits:
            net = guided(fake_score, self.guidance.fake_score_step)
            denoised = net(y + noise, sigma, labels, augment_labels=augment_labels)
            real, labels = self.reals.draw(len(images))
            labels = drop_labels(labels, self.guidance.label_dropout)
            real, augment_labels = augment(real)
            fake_score(real + noise, sigma, labels, augment_labels=augment_labels)
        of_fake, of_real = logits[0], logits[-1]  # guidance asks with labels first
        told_apart = discriminator_loss(of_real, of_fake)
        if report is not None:
            report("Loss/discriminator", told_apart)
            report("Health/logit_real", of_real.mean(dim=[1, 2]))
            report("Health/logit_fake", of_fake.mean(dim=[1, 2]))
            report("Health/discriminator_accuracy", accuracy(of_real, of_fake))
        per_pixel = self.lsd * told_apart.reshape(-1, 1, 1, 1) / y[0].numel()
        return self.denoising.weight(sigma) * ((denoised - y) ** 2 + per_pixel)

    def generator_loss(
        self, teacher, fake_score, images, labels=None, noise=None, report: Callable | None = None
    ) -> torch.Tensor:
        """Half of SiD's loss plus, weighted likewise, half of lsg_gan times the adversarial loss at every pixel."""
        with logits_of(fake_score) as self._logits:
            loss = super().generator_loss(teacher, fake_score, images, labels, noise, report)
        if report is not None and self.adversarial:
            report("Loss/adversarial", adversarial_loss(self._logits[0]))
        return loss

    def _terms(self, x_g, x_t, f_phi, f_psi) -> torch.Tensor:
        terms = SHARE * super()._terms(x_g, x_t, f_phi, f_psi)
        if not self.adversarial:
            return terms
        return terms + SHARE * self.lsg_gan * adversarial_loss(self._logits[0])


def make_loss(config: DistillationConfig, teacher: torch.nn.Module, reals: RealImages | None) -> SiDLoss:
    """The losses of a config. Errors: UserError when --gan has no real images or a network that it can't work with."""
    names = ("alpha", "tmax", "objective", "weighting", "huber", "sigma_schedule", "fake_sigma_schedule")
    options = {name: getattr(config, name) for name in names}
    options["guidance"] = parse_guidance(config.guidance)
    if not config.gan:
        return SiDLoss(**options)
    if reals is None:
        raise UserError("--gan learns from real images; name them with --data")
    last_encoder_block(teacher)
    return SiDALoss(reals, config.lsd / config.ls, config.lsg_gan / config.lsg, **options)
