"""The start of a generator, chosen by measuring the teacher: `--init_sigma=auto`."""

import copy
import math

from training.denoiser import DenoiserModule, noise_range, only_sigma
from training.moments import Moments
from training.steps import INIT_SIGMA

from .teacher_distance import TeacherDistance

# The usual start stays unless it is so many times as far from the teacher as the best (docs/ablations.md). From white
# noise, generators that started at the best level were no better on four teachers where it was 1.1 to 2 times as far.
# With the moments of images, they were, from 1.5 times on.
CLEARLY_WHITE, CLEARLY_MOMENTS = 3.0, 1.4
CANDIDATES = (1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0, 40.0)


def measure_starts(
    teacher: DenoiserModule, distance: TeacherDistance, moments: Moments | None = None
) -> dict[float, float]:
    """{noise level: energy distance of the teacher's one-step images from its own samples}, lowest level first.

    moments: of the noise that the generator starts from, on any device; None: plain noise.
    """
    low, high = noise_range(teacher)
    there = moments and copy.deepcopy(moments).to(next(teacher.parameters()).device)
    return {
        level: distance.of_pixels(teacher, sampler="one-step", init_sigma=level, moments=there)
        for level in CANDIDATES
        if low <= level <= high
    }


def choose_start(
    teacher: DenoiserModule, distance: TeacherDistance | None, moments: Moments | None = None
) -> tuple[float, dict[str, float]]:
    """(noise level, measured distances for the record): the usual 2.5, or the level whose images are clearly closer.

    moments: as of `measure_starts`. A teacher that knows one noise level starts there; it has no samples to measure
    against, so `distance` is None.
    """
    only = only_sigma(teacher)
    if only is not None:
        return only, {}
    assert distance is not None
    measured = measure_starts(teacher, distance, moments)
    if not measured:  # a narrow range that holds none of the candidates
        return math.sqrt(math.prod(noise_range(teacher))), {}
    best = min(measured, key=measured.__getitem__)
    usual = measured.get(INIT_SIGMA, math.inf)
    clearly = CLEARLY_WHITE if moments is None else CLEARLY_MOMENTS
    level = INIT_SIGMA if usual <= clearly * max(measured[best], 0.0) else best
    return level, {f"{level:g}": round(d, 4) for level, d in measured.items()}
