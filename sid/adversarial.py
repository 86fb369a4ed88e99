"""SiD with an adversarial loss (SiDA, arXiv:2410.14919): psi's encoder separates real images from generated ones.

The discriminator has no parameters of its own. Its logits are the channel means of the output of psi's last encoder
block, one per position, from the same pass that gives f_psi. Functions on tensors come first, then the real images,
then the loss around the networks.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import softplus

from dnnlib import UserError
from training.conditions import conditions_of
from training.dataset import ImageFolderDataset
from training.decoder import clean_samples
from training.denoiser import known_sigma, sigma_data
from training.guidance import class_guided
from training.latent_dataset import LatentDataset

from .config import DistillationConfig
from .loss import SiDLoss, divergence
from .schedules import Schedule, Times

LOGIT_LIMIT = 10.0  # the generator's logits are clamped to it (SiDA's value)
SHARE = 0.5  # weight of each of theta's two losses


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(BCE(real, 1) + BCE(fake, 0)) / 2 of logits [N, h, w], averaged over images and positions to one number."""
    return (softplus(-real).mean() + softplus(fake).mean()) / 2


def adversarial_loss(fake: torch.Tensor) -> torch.Tensor:
    """BCE(fake, 1) of clamped logits [N, h, w], averaged over images and positions to one number."""
    return softplus(-fake.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)).mean()


def accuracy(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Share of positions whose logit has the right sign, [N]; 0.5 is chance."""
    return ((real > 0).float() + (fake < 0).float()).mean(dim=[1, 2]) / 2


def last_encoder_block(net: torch.nn.Module) -> torch.nn.Module:
    """The last encoder block of a denoiser built on a U-Net of EDM or EDM2. Errors: UserError for others."""
    encoder = getattr(getattr(net, "model", None) or getattr(net, "unet", None), "enc", None)
    if not isinstance(encoder, torch.nn.ModuleDict) or not len(encoder):
        raise UserError(
            f"--gan: {type(net).__name__} has no encoder net.model.enc to discriminate with; leave --gan out"
        )
    return list(encoder.values())[-1]


@contextlib.contextmanager
def logits_of(net: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the logits [N, h, w] of every call of a denoiser while open, without changing what the calls return."""
    collected: list[torch.Tensor] = []

    def collect(module: torch.nn.Module, args: tuple, features: torch.Tensor) -> None:  # features: [N, channels, h, w]
        collected.append(features.mean(dim=1, dtype=torch.promote_types(features.dtype, torch.float32)))

    handle = last_encoder_block(net).register_forward_hook(collect)
    try:
        yield collected
    finally:
        handle.remove()


class RealImages:
    """Draws real images at random from torch's default generator, so that `seeding.seed_at` determines them.

    dataset:    square images, or latents; with labels if `label_dim` isn't 0
    label_dim:  number of classes of the networks; classes that the data set lacks get columns of zeros
    Errors: DatasetError, also from `draw`, when a file can't be read.
    """

    def __init__(self, dataset: ImageFolderDataset | LatentDataset, label_dim: int, device: torch.device):
        self._dataset, self._label_dim, self._device = dataset, label_dim, device

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(images or latents, float32 [n, C, H, W], one-hot labels [n, label_dim] or None), with replacement."""
        indices = torch.randint(len(self._dataset), [n]).tolist()
        images, labels = zip(*(self._dataset[index] for index in indices))
        x = clean_samples(self._on_device(images))
        if not self._label_dim:
            return x, None
        labels = self._on_device(labels)
        return x, torch.nn.functional.pad(labels, [0, self._label_dim - labels.shape[1]])

    def _on_device(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        batch = torch.as_tensor(np.stack(arrays))
        if self._device.type == "cuda":
            batch = batch.pin_memory()  # otherwise the host would wait for the GPU
        return batch.to(self._device, non_blocking=True)


class SiDALoss(SiDLoss):
    """Both losses of SiDA. The networks must not be compiled, since hooks read the outputs of their encoders.

    reals        real images; has the method `RealImages.draw`
    lsd          weight of the discriminator's loss relative to psi's
    lsg_gan      weight of the adversarial loss relative to theta's
    options      arguments of SiDLoss

    Each binary cross-entropy is one mean over all images of a call, so their number (--batch-gpu) is part of the loss.
    """

    def __init__(self, reals: RealImages, lsd: float = 1.0, lsg_gan: float = 1e-4, **options):
        super().__init__(**options)
        self.reals, self.lsd, self.lsg_gan = reals, lsd, lsg_gan

    def fake_score_loss(
        self,
        fake_score: torch.nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_pipe: Callable | None = None,
        report: Callable | None = None,
    ) -> torch.Tensor:
        """psi's loss in SiD, per pixel, plus lsd lambda(sigma) times the discriminator's loss, spread over the pixels.

        The i-th real image gets the noise level and the noise of the i-th generated one, and its own augmentations
        from the same pipe. The first draws are the same as in SiD.
        """
        augment = augment_pipe or (lambda x: (x, None))
        sigma = known_sigma(fake_score, self.fake_sigma_schedule.draw(len(images), images.device))
        y, augment_labels = augment(images.detach())
        noise = torch.randn_like(y) * sigma
        with logits_of(fake_score) as logits:
            net = class_guided(fake_score, self.guidance.fake_score_step, self.conditions)
            denoised = net(y + noise, sigma, labels, augment_labels=augment_labels)
            real, labels = self.reals.draw(len(images))
            labels = self.conditions.drop(labels, self.guidance.label_dropout)
            real, augment_labels = augment(real)
            fake_score(real + noise, sigma, labels, augment_labels=augment_labels)
        of_fake, of_real = logits[0], logits[-1]  # guidance calls with labels first
        discrimination = discriminator_loss(of_real, of_fake)
        if report is not None:
            report("Loss/discriminator", discrimination)
            report("Health/logit_real", of_real.mean(dim=[1, 2]))
            report("Health/logit_fake", of_fake.mean(dim=[1, 2]))
            report("Health/discriminator_accuracy", accuracy(of_real, of_fake))
        per_pixel = self.lsd * discrimination / y[0].numel()
        return self.denoising.weighted(fake_score, (denoised - y) ** 2 + per_pixel, sigma)

    def generator_loss(
        self,
        teacher: Callable,
        fake_score: torch.nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        noise: tuple[torch.Tensor, ...] | None = None,
        report: Callable | None = None,
        score_gradient: bool | None = None,
        adversarial: bool = True,
    ) -> torch.Tensor:
        """Half of SiD's loss plus half of lsg_gan times the adversarial loss at every pixel, both weighted alike.

        adversarial: whether to add the second half.
        """
        sigma, n = noise or self.draw_noise(images)
        sigma = known_sigma(teacher, sigma)
        with logits_of(fake_score) as logits:
            x_t, f_phi, f_psi = self.denoised(teacher, fake_score, images, sigma, n, labels, score_gradient)
        if report is not None:
            report("Health/divergence", divergence(images, f_phi, f_psi), groups=self.conditions.groups(labels))
        terms = SHARE * self.terms(images, x_t, f_phi, f_psi)
        if adversarial:
            entropy = adversarial_loss(logits[0])
            terms = terms + SHARE * self.lsg_gan * entropy
            if report is not None:
                report("Loss/adversarial", entropy)
        return self.balanced(self.weighted(terms, sigma, images, f_phi), fake_score, sigma)


def noise_weight(sigma: torch.Tensor) -> torch.Tensor:
    """The weight with which the clean image's squared error is that of the noise; in the shape of sigma."""
    return sigma**-2


def make_loss(
    config: DistillationConfig, teacher: torch.nn.Module, reals: RealImages | None, guide: Callable | None = None
) -> SiDLoss:
    """The losses of a config. guide: the network of --guide, as training calls it.

    Errors: UserError when --gan has no real images, or an option doesn't work with the network.
    """
    if config.uncertainty and not hasattr(teacher, "logvar"):
        raise UserError(
            f"--uncertainty: {type(teacher).__name__} has no u(sigma), which EDM2's networks have; leave the option out"
        )
    loss: Callable[..., SiDLoss] = SiDLoss
    if config.gan:
        if reals is None:
            raise UserError("--gan learns from real images; name them with --data")
        last_encoder_block(teacher)
        loss = functools.partial(SiDALoss, reals, config.lsd / config.ls, config.lsg_gan / config.lsg)
    assert config.tmax is not None  # as `resolve` made sure
    return loss(
        alpha=config.alpha,
        tmax=config.tmax,
        sigma_data=sigma_data(teacher),
        objective=config.objective,
        weighting=config.weighting,
        huber=config.huber,
        sigma_schedule=schedule_of(teacher, config.sigma_schedule, "--sigma-schedule"),
        fake_sigma_schedule=schedule_of(teacher, config.fake_sigma_schedule, "--fake-sigma-schedule"),
        guidance=config.guidance,
        guide=guide,
        conditions=conditions_of(teacher),
        uncertainty=config.uncertainty,
        fake_score_weight=fake_score_weight(config, teacher),
    )


def schedule_of(teacher: torch.nn.Module, schedule: Schedule, option: str) -> Schedule:
    """A schedule in noise levels, where it was given in the teacher's times. Errors: UserError naming the option."""
    if not isinstance(schedule, Times):
        return schedule
    try:
        return schedule.of(teacher)
    except UserError as error:
        raise UserError(f"{option}={error.message}") from None


def fake_score_weight(config: DistillationConfig, teacher: torch.nn.Module) -> Callable | None:
    """The weight of psi's squared error by noise level; None for EDM's.

    Errors: UserError naming --fake-score-weighting when the teacher has no such weight.
    """
    if config.fake_score_weighting == "edm":
        return None
    own = getattr(teacher, "loss_weight", None)
    weight = own if config.fake_score_weighting == "prediction" else noise_weight
    if weight is None or config.uncertainty:
        raise UserError(
            f"--fake-score-weighting={config.fake_score_weighting}: is for teachers that predict noise, v or a flow,"
            f" and a {type(teacher).__name__} predicts the image, or learns its own weights; leave the option out"
        )
    return weight
