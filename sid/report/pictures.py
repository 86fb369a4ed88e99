"""Grids of images, and the comparison of a generator with its teacher."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import write_atomically
from edm.images import save_titled_grids
from edm.sampler import generate_all
from training.conditions import Prompts, conditions_of
from training.denoiser import DenoiserModule
from training.moments import start_of
from training.steps import ONE_STEP, Steps

from ..monitor.clusters import shares
from ..teacher_distance import SHOWN_IMAGES, Distance
from .embedded import PROMPTS_PICTURE
from .run_record import PROMPTS_FILE

GRID_COLUMNS, GRID_ROWS = 16, 8
COMPARISON_COLUMNS, COMPARISON_ROWS = 16, 2
CAPTIONED = 8  # images of prompts in a comparison, in one row, so that there is room for the prompts
COMPARED_PIXELS = 64  # width at which images are compared
TEACHER_STEPS = 18  # of Heun's sampler
TEACHER_EVALUATIONS = 2 * TEACHER_STEPS - 1


def sample(net: torch.nn.Module, num: int, **options: Any) -> torch.Tensor:
    """Images of the seeds 0 to num - 1, uint8 [num, C, H, W]. options: as `edm.sampler.generate_images` takes them."""
    return generate_all(net, range(num), **options)


def prompts_of(net: torch.nn.Module) -> list[str]:
    """The prompts of the images of the first CAPTIONED seeds; none where a network takes no prompts."""
    conditions = conditions_of(net)
    if not isinstance(conditions, Prompts):
        return []
    return [conditions.texts[number] for number in conditions.numbers_of_seeds(range(CAPTIONED))]


def save_prompted(images: torch.Tensor, samples: torch.Tensor | None, prompts: list[str], folder: Path) -> None:
    """Saves the first images, those of `prompts`, below the teacher's; the page has the prompts as text.

    images, samples: uint8 [N, C, H, W] of the generator and, if there are any, of the teacher, of equal seeds.
    Errors: OSError when a file can't be written.
    """
    bands = {} if samples is None else {"Teacher": samples[: len(prompts)]}
    save_titled_grids({**bands, "Generator": images[: len(prompts)]}, folder / PROMPTS_PICTURE, len(prompts))
    with write_atomically(folder / PROMPTS_FILE) as file:
        file.write(json.dumps({"prompts": prompts}).encode())


def compare(teacher: torch.nn.Module, generators: Sequence[DenoiserModule], path: Path, name: str = "Teacher") -> None:
    """Saves bands of the same seeds: teacher at 35 evaluations, teacher at as few as the first generator, generators.

    generators: record their steps. name: of the teacher, in the titles. Images of prompts have them below.
    Errors: OSError when `path` can't be written.
    """
    generator, *others = generators
    num, columns, captions = COMPARISON_COLUMNS * COMPARISON_ROWS, COMPARISON_COLUMNS, prompts_of(generator)
    if captions:
        num = columns = CAPTIONED
    steps = Steps.of(generator) or ONE_STEP
    evaluations = _evaluations(steps)
    as_generator = {"sampler": "few-step", "generator_steps": steps, "moments": start_of(generator)}
    bands = {
        f"{name}, {TEACHER_EVALUATIONS} evaluations per image": sample(teacher, num, steps=TEACHER_STEPS),
        f"{name}, {evaluations} per image": sample(teacher, num, **as_generator),
        f"Generator distilled from it, {evaluations} per image": sample(generator, num),
    }
    for other in others:
        bands[f"Another generator, {_evaluations(Steps.of(other) or ONE_STEP)} per image"] = sample(other, num)
    save_titled_grids(bands, path, columns, captions)


def _evaluations(steps: Steps) -> str:
    return "1 evaluation" if len(steps) == 1 else f"{len(steps)} evaluations"


def save_nearest(images: torch.Tensor, samples: torch.Tensor, path: Path) -> None:
    """Saves the first images above the teacher's sample nearest to each: do they look alike, and are they diverse?

    images, samples: uint8 [N, C, H, W] of the generator and of the teacher.
    Errors: OSError when `path` can't be written.
    """
    shown = images[: COMPARISON_COLUMNS * COMPARISON_ROWS]
    found = samples[nearest(shown, samples)]
    bands = {"Generator": shown, f"Nearest of {len(samples)} samples of the teacher, in pixels": found}
    save_titled_grids(bands, path, COMPARISON_COLUMNS)


def save_clusters(distance: Distance, path: Path) -> None:
    """Saves what the generator lacks most: for each such cluster some of the teacher's images above the generator's.

    Errors: OSError when `path` can't be written.
    """
    assert distance.clusters is not None
    bands = {}
    for share in shares(dataclasses.asdict(distance.clusters)):
        if share.cluster in distance.examples:
            words = f"{share.teacher:.1%} of the teacher's images (above), {share.generator:.1%} of the generator's"
            bands[f"Cluster {share.cluster}: {words}"] = distance.examples[share.cluster].flatten(0, 1)
    save_titled_grids(bands, path, SHOWN_IMAGES)


def nearest(images: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """For each image the index of the sample nearest to it: [N] of uint8 [N, C, H, W] and [M, C, H, W]."""

    def small(x: torch.Tensor) -> torch.Tensor:
        x = x.to("cpu", torch.float32)
        width = min(COMPARED_PIXELS, x.shape[-1])
        return torch.nn.functional.adaptive_avg_pool2d(x, width).flatten(1)

    return torch.cdist(small(images), small(samples)).argmin(dim=1)
