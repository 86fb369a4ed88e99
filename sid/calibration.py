"""Up to which noise level to train, measured on a teacher's own samples: `--tmax=auto`.

Along a direction in which images have the standard deviation s, the exact denoiser knows s^2 / (s^2 + sigma^2) of their
variance. Above a sigma that hides even the direction in which they differ most (in photographs, their brightness),
little is left to learn.

The exact denoiser D(x + sigma n; sigma) answers the mean of the clean images that a noisy one may come from. Such a
mean varies around the mean image m by no more than it knows of the image, E|D - m|^2 = E<D - m, x - m>. What a
network's answers vary beyond that, their excess, is error, and a generator that follows them learns it. A network that
predicts the noise errs at high levels, where its error counts sigma times in the image. A guided one overdoes contrast
there.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from edm.sampler import draw_starts
from training.denoiser import DenoiserModule, known_sigma, noise_range, sigma_data

from .schedules import TMAX, Karras

HIDING = 2.0  # noise of so many standard deviations hides four fifths of what images differ by
LOWEST = 2.0  # in units of the data's standard deviation: levels up to there are always used
MOST_EXCESS = 0.1  # of the images' variance
SURE = 2.0  # standard errors by which an excess must be above it
SPACING = 1.5  # between levels at which the excess is measured
BATCH = 64


class Excess(NamedTuple):
    """By how much a network's answers at a noise level vary more than they know, as a share of the images' variance.

    error: the standard error of the share.
    """

    share: float
    error: float

    @property
    def lower_bound(self) -> float:
        """What the share is at least, as far as so few images can tell."""
        return self.share - SURE * self.error


class Calibration(NamedTuple):
    """What a teacher's samples tell about the noise levels up to which to train.

    hiding: the noise level that hides what they differ by. excess: by noise level, in ascending order.
    """

    hiding: float
    excess: dict[float, Excess]

    def highest_level(self) -> float:
        """The level up to which to train: the hiding one, or a lower one at which the excess is surely too large.

        It is interpolated between those measured.
        """
        former: tuple[float, float] | None = None
        for level, excess in self.excess.items():
            bound = excess.lower_bound
            if not bound <= MOST_EXCESS:  # NaN, too
                if former is None or math.isnan(bound):
                    return level if former is None else former[0]
                return former[0] * (level / former[0]) ** ((MOST_EXCESS - former[1]) / (bound - former[1]))
            former = level, bound
        return self.hiding

    def record(self) -> dict[str, Any]:
        """For the record of a run."""
        excess = {f"{level:.3g}": round(found.share, 4) for level, found in self.excess.items()}
        return {"hiding": self.hiding, "excess": excess}


def tmax_of(level: float) -> float:
    """The time, of 1000, up to which a Karras schedule goes whose highest noise level is `level`."""
    return float(round(1000 * Karras().time(level)))


def choose_tmax(calibration: Calibration | None) -> tuple[float, dict[str, Any] | None]:
    """(the time up to which a Karras schedule goes, what was measured, for the record). None: SiD's time."""
    if calibration is None:
        return TMAX, None
    return tmax_of(calibration.highest_level()), calibration.record()


def calibrate(teacher: DenoiserModule, samples: torch.Tensor, seeds: Sequence[int]) -> Calibration:
    """Measures a teacher. samples: what it makes from these seeds, float32 [N, C, H, W] on the CPU."""
    hiding = max(HIDING * largest_deviation(samples), LOWEST * sigma_data(teacher))
    hiding = min(hiding, Karras().sigma_max)
    return Calibration(hiding, measure_excess(teacher, samples, seeds, levels_to_measure(teacher, hiding)))


def largest_deviation(samples: torch.Tensor) -> float:
    """The standard deviation of images [N, C, H, W] along the direction in which they differ most.

    The direction is found on one half of them and judged on the other: in images of more pixels than there are images,
    the largest of all directions would otherwise be so by chance.
    """
    flat = samples.flatten(1)
    halves, variances = [half - half.mean(dim=0) for half in (flat[::2], flat[1::2])], []
    for one, other in (halves, halves[::-1]):
        weights = torch.linalg.eigh(one @ one.T).eigenvectors[:, -1]
        direction = torch.nn.functional.normalize(weights @ one, dim=0)
        variances.append((other @ direction).var().item())
    return math.sqrt(sum(variances) / len(variances))


def levels_to_measure(teacher: DenoiserModule, hiding: float) -> list[float]:
    """Noise levels at which a teacher is worth measuring, in ascending order, up to the `hiding` one if it knows it."""
    low, high = noise_range(teacher)
    top, level, levels = min(high, hiding), LOWEST * sigma_data(teacher), []
    while level < top:
        levels.append(level)
        level *= SPACING
    return [level for level in [*levels, top] if level > low]


@torch.no_grad()
def measure_excess(
    teacher: Any, samples: torch.Tensor, seeds: Sequence[int], levels: Sequence[float]
) -> dict[float, Excess]:
    """{noise level: by how much a teacher's answers to its own samples, with such noise, vary more than they know}.

    samples: what it makes from these seeds, float32 [N, C, H, W].
    """
    device, mean = next(teacher.parameters()).device, samples.mean(dim=0)
    variance = (samples - mean).square().mean().item()
    parts = samples.split(BATCH)
    starts = range(0, len(samples), BATCH)
    conditions = [draw_starts(teacher, seeds[i : i + len(part)])[2] for i, part in zip(starts, parts)]
    generator, found = torch.Generator().manual_seed(len(samples)), {}
    for level in levels:
        shares = []
        for clean, condition in zip(parts, conditions):
            sigma = known_sigma(teacher, torch.full([len(clean), 1, 1, 1], level, device=device))
            noise = torch.randn(clean.shape, generator=generator).to(device)
            answer = teacher(clean.to(device) + sigma * noise, sigma, condition).to("cpu", torch.float32)
            shares.append(((answer - mean) * (answer - clean)).flatten(1).mean(dim=1) / variance)
        share = torch.cat(shares)
        found[level] = Excess(share.mean().item(), share.std().item() / math.sqrt(len(share)))
    return found
