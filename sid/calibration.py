"""Up to which noise level a teacher's answers tell anything, and tell it rightly: `--tmax=auto`.

An answer knows the share E<D - m, x - m> / E|x - m|^2 of the images' variance, where m is the mean image. At high
levels it knows hardly more than the class, because noise hides everything else, and training there teaches nothing.

The exact denoiser D(x + sigma n; sigma) answers the mean of the clean images that a noisy one may come from. Such a
mean varies by no more than it knows, E|D - m|^2 = E<D - m, x - m>. What a network's answers vary beyond that, their
excess, is error, and a generator that follows them learns it. A network that predicts the noise errs at high levels,
where its error counts sigma times in the image. A guided one overdoes contrast there.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from edm.sampler import draw_starts
from training.denoiser import DenoiserModule, known_sigma, noise_range, sigma_data

from .schedules import TMAX, Karras

MOST_EXCESS = 0.1  # of the images' variance
SURE = 2.0  # standard errors by which an excess must be above it
MOST_UNKNOWN = 0.9  # of what is unknown at the highest levels: from there on, noise hides what images differ by
HIGHEST = Karras().sigma_max  # at which EDM's sampler begins with noise alone
LOWEST = 2.0  # in units of the data's standard deviation: levels up to there are always used
SPACING = 1.5  # between levels that are measured
BATCH = 64


class Answers(NamedTuple):
    """What a network's answers at a noise level vary by, in shares of the images' variance.

    known: what they know of the images. excess: what they vary beyond that. error: the standard error of the excess.
    """

    known: float
    excess: float
    error: float

    @property
    def sure_excess(self) -> float:
        """What the excess is at least, but for chance."""
        return self.excess - SURE * self.error


def levels_to_measure(teacher: DenoiserModule) -> list[float]:
    """Noise levels at which a teacher is worth measuring, in ascending order; the last is the highest that it knows."""
    low, high = noise_range(teacher)
    top, level, levels = min(high, HIGHEST), LOWEST * sigma_data(teacher), []
    while level < top:
        levels.append(level)
        level *= SPACING
    return [level for level in [*levels, top] if level > low]


@torch.no_grad()
def measure_answers(
    teacher: Any, samples: torch.Tensor, seeds: Sequence[int], levels: Sequence[float]
) -> dict[float, Answers]:
    """{noise level: how a teacher answers its own samples with such noise}.

    samples: what it makes from these seeds, float32 [N, C, H, W].
    """
    device, mean = next(teacher.parameters()).device, samples.mean(dim=0)
    variance = (samples - mean).square().mean().item()
    parts = samples.split(BATCH) if levels else ()
    starts = range(0, len(samples), BATCH)
    conditions = [draw_starts(teacher, seeds[i : i + len(part)])[2] for i, part in zip(starts, parts)]
    generator, found = torch.Generator().manual_seed(len(samples)), {}
    for level in levels:
        known, excess = [], []
        for clean, condition in zip(parts, conditions):
            sigma = known_sigma(teacher, torch.full([len(clean), 1, 1, 1], level, device=device))
            noise = torch.randn(clean.shape, generator=generator).to(device)
            answer = teacher(clean.to(device) + sigma * noise, sigma, condition).to("cpu", torch.float32)
            known.append(((answer - mean) * (clean - mean)).flatten(1).mean(dim=1) / variance)
            excess.append(((answer - mean) * (answer - clean)).flatten(1).mean(dim=1) / variance)
        shares = torch.cat(excess)
        error = shares.std().item() / math.sqrt(len(shares))
        found[level] = Answers(torch.cat(known).mean().item(), shares.mean().item(), error)
    return found


def highest_level(answers: dict[float, Answers]) -> float:
    """The level, interpolated between those measured, from which on a teacher's answers tell nothing, or wrong.

    Infinite if there is no such level. answers: in ascending order of levels.
    """
    excess = {level: found.sure_excess / MOST_EXCESS for level, found in answers.items()}
    limit = _first_above_1(excess)
    if HIGHEST in answers and answers[HIGHEST].known < 1:  # a guided network may seem to know more than all
        # An erring one may seem to know more there than below.
        most = MOST_UNKNOWN * (1 - min(found.known for found in answers.values()))
        limit = min(limit, _first_above_1({level: (1 - found.known) / most for level, found in answers.items()}))
    return limit


def _first_above_1(values: dict[float, float]) -> float:
    """The key at which values first pass 1, interpolated on a logarithmic scale; infinite if they never do."""
    former: tuple[float, float] | None = None
    for level, value in values.items():
        if not value <= 1:  # NaN, too
            if former is None or math.isnan(value):
                return level if former is None else former[0]
            return former[0] * (level / former[0]) ** ((1 - former[1]) / (value - former[1]))
        former = level, value
    return math.inf


def choose_tmax(answers: dict[float, Answers]) -> tuple[float, dict[str, dict[str, float]]]:
    """(the time up to which a Karras schedule goes, what was measured, for the record).

    It is SiD's 800 where nothing speaks for another.
    """
    level = highest_level(answers)
    tmax = TMAX if level == math.inf else float(round(1000 * Karras().time(level)))
    return tmax, {
        f"{level:.3g}": {"known": round(found.known, 4), "excess": round(found.excess, 4)}
        for level, found in answers.items()
    }
