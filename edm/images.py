"""PNG files and grids of uint8 images [N, C, H, W], C 1 or 3."""

import math
import os

import numpy as np
import PIL.Image
import torch

from dnnlib import write_atomically


def to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """One uint8 image [C, H, W]."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def make_grid(images: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """[N, C, H, W] -> one image [C, rows H, columns W], row by row; empty places are black."""
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = images.new_zeros(rows * columns, c, h, w)
    cells[:n] = images
    return cells.reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def save_grid(images: torch.Tensor, path: str | os.PathLike, columns: int | None = None, zoom: int = 1) -> None:
    """Writes a grid of images as PNG, each pixel `zoom` times as large."""
    image = to_pil(make_grid(images, columns))
    if zoom > 1:
        image = PIL.Image.fromarray(np.asarray(image).repeat(zoom, axis=0).repeat(zoom, axis=1))
    with write_atomically(path) as file:
        image.save(file, format="PNG")
