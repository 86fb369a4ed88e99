"""Denoisers of the EDM family: four preconditioners around two U-Nets (arXiv:2206.00364, Table 1).

A denoiser is called as `net(x, sigma, class_labels=None, augment_labels=None)` and predicts the clean image:

    x               [N, C, H, W] float32, noisy image; clean images lie in [-1, 1]
    sigma           [N], [N, 1, 1, 1] or scalar, standard deviation of the noise
    class_labels    [N, label_dim] float32, usually one-hot; None is all zeros
    augment_labels  [N, augment_dim] float32, see training/augment.py; None is all zeros
    returns         [N, C, H, W] float32

Its `round_sigma(sigma)` takes float32 of any shape and gives the nearest noise levels that it knows, shaped likewise.

The U-Nets are in training/unets.py, their layers in training/layers.py. Parameter names and shapes are those of the
published EDM snapshots. Snapshots embed this file's source, with the source of those two in place of the imports, so
it imports nothing else but torch, numpy, the standard library and torch_utils.persistence.
"""

from __future__ import annotations  # EDM's tools may run the embedded source on an older Python

from typing import Any

import numpy as np
import torch

from torch_utils import persistence

from .layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    attention,
    inputs_in_float32,
)
from .unets import DhariwalUNet, SongUNet

__all__ = [
    "Conv2d",
    "DhariwalUNet",
    "EDMPrecond",
    "FourierEmbedding",
    "GroupNorm",
    "Linear",
    "PositionalEmbedding",
    "SongUNet",
    "UNetBlock",
    "VEPrecond",
    "VPPrecond",
    "attention",
    "iDDPMPrecond",
    "iddpm_sigmas",
]

# D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), arXiv:2206.00364 eq. (7).

_UNETS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class _Preconditioner(torch.nn.Module):
    """What the four preconditioners share; a subclass defines `coefficients`, `sigma_min` and `sigma_max`."""

    # Of the U-Net's layers; None means float16 with use_fp16 on a GPU, else float32.
    compute_dtype: torch.dtype | None = None

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        model_type: str,
        out_channels: int | None = None,
        **model_kwargs: Any,
    ):
        if model_type not in _UNETS:
            raise ValueError(f"model_type must be one of {', '.join(_UNETS)}, not {model_type!r}")
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.model = _UNETS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=out_channels or img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    @property
    def augment_dim(self) -> int:
        """Length of the augmentation labels, 0 if the network takes none."""
        return self.model.map_augment.in_features if self.model.map_augment is not None else 0

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_skip, c_out, c_in, c_noise) for sigma [N, 1, 1, 1]."""
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        x, sigma, class_labels = inputs_in_float32(x, sigma, class_labels, self.label_dim)
        dtype = torch.float16 if self.use_fp16 and x.device.type != "cpu" else torch.float32
        dtype = torch.float32 if force_fp32 else self.compute_dtype or dtype

        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        out = self.model(
            (c_in * x).to(dtype),
            c_noise.flatten(),
            class_labels=class_labels,
            augment_labels=augment_labels,
            **model_kwargs,
        )
        return c_skip * x + c_out * out[:, : self.img_channels].to(torch.float32)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The nearest noise levels that the network knows, in the shape of `sigma`."""
        return torch.as_tensor(sigma)


@persistence.persistent_class
class VPPrecond(_Preconditioner):
    """Variance preserving (DDPM, arXiv:2011.13456)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.M = M
        self.epsilon_t = epsilon_t
        self.sigma_min = float(self.sigma(epsilon_t))
        self.sigma_max = float(self.sigma(1.0))

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """The noise level at time t, in the shape of t."""
        t = torch.as_tensor(t)
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The time at which the noise level is sigma, in the shape of sigma."""
        sigma = torch.as_tensor(sigma)
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


@persistence.persistent_class
class VEPrecond(_Preconditioner):
    """Variance exploding (score matching with Langevin dynamics, arXiv:2011.13456)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        return 1, sigma, torch.ones_like(sigma), (0.5 * sigma).log()


def iddpm_sigmas(C_1: float, C_2: float, M: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The noise levels u_0 > ... > u_M = 0 of improved DDPM, [M + 1] (arXiv:2206.00364, Table 1)."""
    alpha_bar = (0.5 * np.pi * torch.arange(M + 1, dtype=dtype) / M / (C_2 + 1)).sin() ** 2
    u = torch.zeros(M + 1, dtype=dtype)
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (alpha_bar[j - 1] / alpha_bar[j]).clip(min=C_1) - 1).sqrt()
    return u


@persistence.persistent_class
class iDDPMPrecond(_Preconditioner):
    """Improved DDPM (arXiv:2102.09672): a discrete set of noise levels; the network's variance output is unused."""

    u: torch.Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ):
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, model_type, out_channels=img_channels * 2, **model_kwargs
        )
        self.C_1 = C_1
        self.C_2 = C_2
        self.M = M
        self.register_buffer("u", iddpm_sigmas(C_1, C_2, M))

    @property
    def sigma_min(self) -> float:
        return float(self.u[self.M - 1])

    @property
    def sigma_max(self) -> float:
        return float(self.u[0])

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        c_noise = self.M - 1 - self._nearest(sigma).to(torch.float32)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        sigma = torch.as_tensor(sigma)
        return self.u.to(sigma.device)[self._nearest(sigma)].to(sigma.dtype)

    def _nearest(self, sigma: torch.Tensor) -> torch.Tensor:
        """Index of the nearest noise level, same shape as sigma."""
        distance = (sigma.to(torch.float32).reshape(-1, 1) - self.u.to(sigma.device)).abs()
        return distance.argmin(1).reshape(sigma.shape)


@persistence.persistent_class
class EDMPrecond(_Preconditioner):
    """EDM's own preconditioning (arXiv:2206.00364)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return (self.sigma_data / total) ** 2, sigma * self.sigma_data / total, 1 / total, sigma.log() / 4
