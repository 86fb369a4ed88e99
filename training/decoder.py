"""Between what networks make and 8-bit images. Pictures, metrics and export decode; training never does."""

import torch


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
