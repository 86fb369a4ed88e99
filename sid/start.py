"""The start of a generator, chosen by measuring the teacher: `--init_sigma=auto`."""

import math
from typing import Any

import torch

from edm.metrics.energy import energy_distance
from edm.sampler import generate_all
from training.denoiser import noise_range
from training.generator import INIT_SIGMA

# The usual start stays unless it is this many times as far from the teacher as the best. On four teachers where it
# was 1.1 to 2 times as far, a generator that started at the best level was no better (docs/ablations.md).
CLEARLY = 3.0
CANDIDATES = (1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0, 40.0)
NUM_IMAGES = 256
STEPS = 10  # of Heun's sampler, for the teacher's own samples
FIRST_SEED = 1 << 20  # of one-step images: other noise than the teacher's samples have


def teacher_samples(teacher: torch.nn.Module, batch: int = 64) -> torch.Tensor:
    """What a generator should make: the teacher's samples of fixed seeds, uint8 [NUM_IMAGES, C, H, W]."""
    return generate_all(teacher, range(NUM_IMAGES), batch=batch, sampler="heun", num_steps=STEPS)


def distance_from(samples: torch.Tensor, net: Any, **options: Any) -> float:
    """Energy distance of a network's images, made with `options`, from the teacher's samples, as many of each."""
    seeds = range(FIRST_SEED, FIRST_SEED + len(samples))
    return energy_distance(generate_all(net, seeds, **options), samples)


def measure_starts(teacher: torch.nn.Module, samples: torch.Tensor, batch: int = 64) -> dict[float, float]:
    """{noise level: energy distance of the teacher's one-step images from its own samples}, lowest level first."""
    low, high = noise_range(teacher)
    return {
        level: distance_from(samples, teacher, batch=batch, sampler="one-step", init_sigma=level)
        for level in CANDIDATES
        if low <= level <= high
    }


def choose_start(teacher: torch.nn.Module, samples: torch.Tensor) -> tuple[float, dict[str, float]]:
    """(noise level, measured distances for the record): the usual 2.5, or the level whose images are clearly closer.

    A teacher that knows one noise level starts there.
    """
    level = getattr(teacher, "metadata", {}).get("sigma")
    if level is not None:
        return level, {}
    measured = measure_starts(teacher, samples)
    if not measured:  # a narrow range that holds none of the candidates
        return math.sqrt(math.prod(noise_range(teacher))), {}
    best = min(measured, key=measured.__getitem__)
    usual = measured.get(INIT_SIGMA, math.inf)
    level = INIT_SIGMA if usual <= CLEARLY * max(measured[best], 0.0) else best
    return level, {f"{level:g}": round(d, 4) for level, d in measured.items()}
