"""Grids of images, and the comparison of a generator with its teacher."""

from pathlib import Path
from typing import Any

import torch

from edm import images as image_files
from edm.sampler import generate_all
from training.denoiser import DenoiserModule

GRID_COLUMNS, GRID_ROWS = 16, 8
COMPARISON_COLUMNS, COMPARISON_ROWS = 16, 2
TEACHER_STEPS = 18  # of Heun's sampler
TEACHER_EVALUATIONS = 2 * TEACHER_STEPS - 1


def sample(net: torch.nn.Module, num: int, **options: Any) -> torch.Tensor:
    """Images of the seeds 0 to num - 1, uint8 [num, C, H, W]. options: as `edm.sampler.generate_images` takes them."""
    return generate_all(net, range(num), **options)


def save_grid(images: torch.Tensor, path: Path, columns: int = GRID_COLUMNS) -> None:
    """Saves uint8 images [N, C, H, W] as one PNG, row by row. Errors: OSError when it can't be written."""
    image_files.save_grid(images, path, columns, image_files.visible_zoom(images, columns))


def compare(teacher: torch.nn.Module, generator: DenoiserModule, path: Path) -> None:
    """Saves three bands of the same seeds: teacher at 35 evaluations, teacher at one, generator at one.

    generator: records its `init_sigma`. Errors: OSError when `path` can't be written.
    """
    num = COMPARISON_COLUMNS * COMPARISON_ROWS
    init_sigma = generator.metadata["init_sigma"]
    bands = [
        sample(teacher, num, steps=TEACHER_STEPS),
        sample(teacher, num, steps=1, init_sigma=init_sigma),
        sample(generator, num),
    ]
    gap = torch.full_like(bands[0][:COMPARISON_COLUMNS], 255)
    save_grid(torch.cat([bands[0], gap, bands[1], gap, bands[2]]), path, COMPARISON_COLUMNS)
