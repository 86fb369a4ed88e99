"""The mathematics of Score identity Distillation (SiD, arXiv:2404.04057). docs/method.md derives each line.

Denoisers predict the clean image: f_phi (teacher), f_psi (fake score network); x_g is what the generator made and
x_t = x_g + sigma n. The functions on tensors come first; `SiDLoss` draws noise and calls the networks around them.
"""

from collections.abc import Callable

import torch

from training.loss import EDMLoss

OMEGA_MIN = 1e-5  # clips the per-image weight, published value


def karras_sigma(t: torch.Tensor, sigma_min: float, sigma_max: float, rho: float) -> torch.Tensor:
    """Noise level at time t in [0, 1]: t = 0 is sigma_min, t = 1 is sigma_max (EDM eq. 5 in continuous time)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + (1 - t) * (low - high)) ** rho


def omega(x_g: torch.Tensor, f_phi: torch.Tensor) -> torch.Tensor:
    """Per-image weight: mean |x_g - f_phi|, [N, 1, 1, 1], without gradient."""
    return (x_g - f_phi).detach().abs().mean(dim=[1, 2, 3], keepdim=True).clamp(min=OMEGA_MIN)


def sid_loss(x_g: torch.Tensor, f_phi: torch.Tensor, f_psi: torch.Tensor, alpha: float) -> torch.Tensor:
    """L2 - alpha L1, weighted by 1/omega, per pixel [N, C, H, W] (SiD eq. 23, 24).

    L1 = (f_phi - f_psi)^2 and L2 = (f_phi - f_psi)(f_phi - x_g), up to a common factor.
    """
    difference = f_phi - f_psi
    return difference * ((f_phi - x_g) - alpha * difference) / omega(x_g, f_phi)


def divergence(x_g: torch.Tensor, f_phi: torch.Tensor, f_psi: torch.Tensor) -> torch.Tensor:
    """Per-image estimate of the weighted Fisher divergence, mean (f_phi - f_psi)^2 / omega, [N].

    Unlike the signed loss it falls as the generator learns, and it needs no data.
    """
    return ((f_phi - f_psi).square() / omega(x_g, f_phi)).detach().mean(dim=[1, 2, 3])


class SiDLoss:
    """Both losses of SiD around the networks; every draw comes from torch's default generator, in SPEC's order.

    alpha        weight of L1 in L2 - alpha L1: 1.2 for most data sets, 1.0 for AFHQ
    tmax         noise levels reach karras_sigma(tmax / 1000)
    sigma_min, sigma_max, rho    the noise schedule of the generator's loss
    P_mean, P_std, sigma_data    noise levels and weight of the fake score's loss, EDM's
    """

    def __init__(
        self,
        alpha: float = 1.2,
        tmax: float = 800,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        sigma_data: float = 0.5,
    ):
        self.alpha = alpha
        self.tmax = tmax
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self._denoising = EDMLoss(P_mean=P_mean, P_std=P_std, sigma_data=sigma_data)

    def draw_noise(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sigma [N, 1, 1, 1], n [N, C, H, W]) of theta's loss on `images` [N, C, H, W]."""
        u = torch.rand([images.shape[0], 1, 1, 1], device=images.device)
        sigma = karras_sigma(u * self.tmax / 1000, self.sigma_min, self.sigma_max, self.rho)
        return sigma, torch.randn_like(images)

    def generator_loss(
        self, teacher, fake_score, images, labels=None, noise=None, report: Callable | None = None
    ) -> torch.Tensor:
        """theta's loss on generated images x_g [N, C, H, W], per pixel; gradients reach x_g through both networks.

        noise: as `draw_noise` gives it; None draws it. report: called as report(name, values [N]) with what shows
        convergence, if given.
        """
        sigma, n = noise or self.draw_noise(images)
        x_t = images + sigma * n
        f_phi = teacher(x_t, sigma, labels)
        f_psi = fake_score(x_t, sigma, labels)
        if report is not None:
            report("Health/divergence", divergence(images, f_phi, f_psi))
        return sid_loss(images, f_phi, f_psi, self.alpha)

    def fake_score_loss(self, fake_score, images, labels=None, augment_pipe=None) -> torch.Tensor:
        """psi's denoising loss on generated images [N, C, H, W], per pixel; no gradient reaches the images."""
        return self._denoising(fake_score, images.detach(), labels, augment_pipe)
