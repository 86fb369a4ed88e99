"""Denoising losses that train diffusion models (arXiv:2206.00364, Table 1; EDM2). Per-pixel, [N, C, H, W].

Snapshots embed this file's source, so it imports nothing but torch, numpy, the standard library and
torch_utils.persistence. Random numbers are drawn in this order: noise level [N, 1, 1, 1], augmentation, noise.
"""

from __future__ import annotations  # EDM's tools may run the embedded source on an older Python

from collections.abc import Callable
from typing import Any

import torch

from torch_utils import persistence


def squared_error(
    net: Callable[..., torch.Tensor],
    images: torch.Tensor,
    sigma: torch.Tensor,
    labels: torch.Tensor | None,
    augment_pipe: Callable[..., Any] | None,
) -> torch.Tensor:
    """(D(y + sigma n; sigma) - y)^2, where y are the augmented images."""
    y, augment_labels = augment_pipe(images) if augment_pipe is not None else (images, None)
    noise = torch.randn_like(y) * sigma
    return (net(y + noise, sigma, labels, augment_labels=augment_labels) - y) ** 2


@persistence.persistent_class
class VPLoss:
    """Variance preserving: t uniform on [epsilon_t, 1], weight 1/sigma^2."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5):
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.epsilon_t = epsilon_t

    def __call__(
        self,
        net: Callable[..., torch.Tensor],
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_pipe: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        t = 1 + torch.rand([images.shape[0], 1, 1, 1], device=images.device) * (self.epsilon_t - 1)
        sigma = ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()
        return 1 / sigma**2 * squared_error(net, images, sigma, labels, augment_pipe)


@persistence.persistent_class
class VELoss:
    """Variance exploding: sigma log-uniform on [sigma_min, sigma_max], weight 1/sigma^2."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0):
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def __call__(
        self,
        net: Callable[..., torch.Tensor],
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_pipe: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        u = torch.rand([images.shape[0], 1, 1, 1], device=images.device)
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** u
        return 1 / sigma**2 * squared_error(net, images, sigma, labels, augment_pipe)


@persistence.persistent_class
class EDMLoss:
    """EDM: sigma log-normal, weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5):
        self.P_mean = P_mean
        self.P_std = P_std
        self.sigma_data = sigma_data

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """The weight of the squared error at noise levels sigma, in their shape."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def draw_sigma(self, images: torch.Tensor) -> torch.Tensor:
        """Random noise levels [N, 1, 1, 1] for images [N, C, H, W]."""
        return (torch.randn([images.shape[0], 1, 1, 1], device=images.device) * self.P_std + self.P_mean).exp()

    def weighted(self, net: Any, error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The loss for squared errors [N, C, H, W] of a denoiser at noise levels sigma [N, 1, 1, 1]."""
        return self.weight(sigma) * error

    def __call__(
        self,
        net: Callable[..., torch.Tensor],
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_pipe: Callable[..., Any] | None = None,
        sigma: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss per pixel, [N, C, H, W]. sigma: the noise levels [N, 1, 1, 1]; None draws them."""
        sigma = self.draw_sigma(images) if sigma is None else sigma
        return self.weighted(net, squared_error(net, images, sigma, labels, augment_pipe), sigma)


class PredictionLoss(EDMLoss):
    """The squared error of what a network predicts: noise, v, a flow's velocity or the image.

    weight: gives the weight of the clean image's squared error at noise levels (`WrappedDenoiser.loss_weight`).
    """

    def __init__(self, weight: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self._weight = weight

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        return self._weight(sigma)


@persistence.persistent_class
class EDM2Loss(EDMLoss):
    """EDM2 (arXiv:2312.02696): EDM's loss divided by e^u, plus u, where the network learns u(sigma), `net.logvar`.

    At the optimum e^u is the mean weighted error at sigma, so that all noise levels have gradients of one size.
    """

    def __init__(self, P_mean: float = -0.4, P_std: float = 1.0, sigma_data: float = 0.5):
        super().__init__(P_mean, P_std, sigma_data)

    def weighted(self, net: Any, error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        logvar = net.logvar(sigma)
        return self.weight(sigma) / logvar.exp() * error + logvar
