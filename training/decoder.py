"""Between what networks make and 8-bit images. Pictures, metrics and export decode; training never does."""

from collections.abc import Sequence
from typing import Any

import torch

from dnnlib import UserError
from torch_utils.precision import without_autocast

DECODED_AT_ONCE = 8  # images that a VAE encodes or decodes at once; its activations are large


class PixelDecoder:
    """For networks that make the images themselves, with values in [-1, 1]."""

    @staticmethod
    def to_images(x: torch.Tensor) -> torch.Tensor:
        """Samples [N, C, H, W] in [-1, 1] as uint8 images of the same shape; values beyond are clipped."""
        return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)

    @staticmethod
    def from_images(images: torch.Tensor) -> torch.Tensor:
        """uint8 images [N, C, H, W] as float32 samples in [-1, 1]."""
        return images.to(torch.float32) / 127.5 - 1

    def leave_device(self) -> None:
        """There is nothing that could be on one."""


class LatentDecoder:
    """For networks that make the latents of a VAE, z = (raw - shift) scale, where the VAE itself knows raw latents.

    vae: called as vae.decode(raw).sample and vae.encode(images).latent_dist, as AutoencoderKL of the diffusers library,
         or .latent, as AutoencoderDC, whose latents have no variance; float32 images in [-1, 1]. It computes in
         float32: VAEs are known to overflow in half precision.
    scale, shift: one number, or one for each of the channels of a latent.
    """

    def __init__(self, vae: Any, scale: float | Sequence[float], shift: float | Sequence[float] = 0.0):
        self.vae = vae
        self._scale, self._shift = (torch.tensor(value).reshape(1, -1, 1, 1) for value in (scale, shift))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] as float32 images [N, 1 or 3, H, W], mostly in [-1, 1], all at once."""
        return self.vae.decode(x / self._scale.to(x.device) + self._shift.to(x.device)).sample

    @torch.no_grad()
    def to_images(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] as uint8 images [N, 1 or 3, H, W] on the same device.

        Errors: UserError when the VAE makes NaN or infinity of finite latents.
        """
        self.vae.to(x.device)
        with without_autocast(x.device):
            images = torch.cat([self.decode(part) for part in x.to(torch.float32).split(DECODED_AT_ONCE)])
        if not images.isfinite().all():
            raise UserError("the VAE makes NaN or infinity of these latents: they are far from any that it has seen")
        return PixelDecoder.to_images(images)

    def leave_device(self) -> None:
        """Moves the VAE to the CPU, from wherever it has decoded or encoded, to make room there for training."""
        if next(self.vae.parameters()).device.type != "cpu":
            self.vae.to("cpu")

    def from_images(self, images: torch.Tensor) -> torch.Tensor:
        """The latents of uint8 images [N, 1 or 3, H, W]: the means [N, C, h, w] of what the VAE may make of them."""
        return self.encode(images)[:, 0]

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Means and standard deviations of the latents of uint8 images, float32 [N, 2, C, h, w] on the same device."""
        vae, parts = self.vae.to(images.device), []
        with without_autocast(images.device):
            for part in PixelDecoder.from_images(images).split(DECODED_AT_ONCE):
                encoded = vae.encode(part)
                if hasattr(encoded, "latent_dist"):
                    raw, std = encoded.latent_dist.mean, encoded.latent_dist.std
                else:
                    raw, std = encoded.latent, torch.zeros_like(encoded.latent)
                mean = (raw - self._shift.to(raw)) * self._scale.to(raw)
                parts.append(torch.stack([mean, std * self._scale.abs().to(raw)], dim=1))
        return torch.cat(parts)


def clean_samples(items: torch.Tensor) -> torch.Tensor:
    """What a denoiser is trained on, float32 [N, C, H, W], of items of a data set.

    items: uint8 images [N, C, H, W], or the means and standard deviations of latents, float32 [N, 2, C, H, W], of which
    a latent is drawn from torch's default generator.
    """
    if items.dtype == torch.uint8:
        return PixelDecoder.from_images(items)
    return items[:, 0] + items[:, 1] * torch.randn_like(items[:, 0])
