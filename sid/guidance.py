"""Guidance of the score networks in a distillation: by classes or prompts (SiD-LSG, arXiv:2406.01561; zero- and
anti-CFG, arXiv:2505.12674) and by a weaker teacher (autoguidance, arXiv:2406.02507).

It doesn't import torch, so that command lines can check options at once.
"""

import dataclasses
import math
from typing import Any

from dnnlib import UserError, format_number

LABEL_DROPOUT = 0.1  # SiD-LSG's value


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance weights: kappa of the classes for each place where a score network is called, and the weight of phi over
    the weaker network --guide. 1 means no guidance.
    """

    fake_score_step: float = 1.0  # kappa1: psi in its own loss
    fake_score: float = 1.0  # kappa2 = kappa3: psi in the generator's loss
    teacher: float = 1.0  # kappa4: phi in the generator's loss
    over_guide: float | None = None  # phi over --guide, at every call of phi, before the classes; None without --guide

    @property
    def by_class(self) -> bool:
        """Whether any network is guided by its classes."""
        return any(kappa != 1 for kappa in (self.fake_score_step, self.fake_score, self.teacher))

    @property
    def label_dropout(self) -> float:
        """Probability that an image of psi's own phase loses its condition, so that psi learns to do without."""
        kappas = {self.fake_score_step, self.fake_score}
        return 0.0 if kappas in ({1.0}, {0.0}) else LABEL_DROPOUT  # without its condition alone, there's none to lose

    def __str__(self) -> str:
        weight = [] if self.over_guide is None else [format_number(self.over_guide)]
        kappas = self.fake_score_step, self.fake_score, self.teacher
        if weight and not self.by_class:
            return weight[0]
        psi, phi = format_number(self.fake_score_step), format_number(self.teacher)
        if kappas == (1, 1, self.teacher):
            text = f"long={phi}"
        elif kappas == (0, 0, 1):
            text = "zero"
        elif kappas == (self.fake_score_step, 1, 1) and 0 <= self.fake_score_step < 1:
            text = f"short={psi}"
        elif kappas == (self.teacher,) * 3 and self.teacher > 1:
            text = f"long-short={phi}"
        elif kappas == (self.fake_score_step, self.fake_score_step, 1) and self.fake_score_step < 0:
            text = f"anti={psi}"
        else:
            text = f"kappa={psi}:{format_number(self.fake_score)}:{phi}"
        return ",".join([*weight, text])


def parse_guidance(value: "str | Guidance | None") -> Guidance | None:
    """Parses W, long=K, short=K, long-short=K, zero, anti=K, kappa=K1:K2:K4, or W with one of these; None and a
    Guidance are returned unchanged.

    Errors: UserError naming --guidance.
    """
    if not isinstance(value, str):
        return value
    weight, kappas = None, None
    for part in value.split(","):
        kind, _, text = part.rpartition("=")
        numbers = _numbers(text, 3 if kind == "kappa" else 1)
        scale = numbers[0] if numbers else math.nan
        if part == "zero" and kappas is None:
            kappas = (0.0, 0.0, 1.0)
        elif kind == "" and "=" not in part and 1 <= scale < math.inf and weight is None:
            weight = scale
        elif kind == "long" and 1 < scale < math.inf and kappas is None:
            kappas = (1.0, 1.0, scale)
        elif kind == "short" and 0 <= scale < 1 and kappas is None:
            kappas = (scale, 1.0, 1.0)
        elif kind == "long-short" and 1 < scale < math.inf and kappas is None:
            kappas = (scale, scale, scale)
        elif kind == "anti" and scale < 0 and kappas is None:
            kappas = (scale, scale, 1.0)
        elif kind == "kappa" and numbers and kappas is None:
            kappas = (numbers[0], numbers[1], numbers[2])
        else:
            raise UserError(
                f"--guidance={value}: give long=K or long-short=K with K > 1, short=K with K < 1, zero, anti=K with"
                " K < 0, or kappa=K1:K2:K4; with --guide a weight of 1 or more, such as 1.7, alone or as 1.7,long=2"
            )
    return Guidance(*(kappas or (1.0, 1.0, 1.0)), over_guide=weight)


def _numbers(text: str, count: int) -> list[float] | None:
    """So many finite numbers, separated by colons; None if the text is anything else."""
    try:
        numbers = [float(number) for number in text.split(":")]
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def check_guidance(guidance: Guidance | None, teacher: Any, guide: Any = None) -> str | None:
    """A warning about guidance that may do nothing, or not what it should; None if there is no reason for one.

    guide: the network of --guide, if there is one.
    Errors: UserError when the teacher can't be guided so.
    """
    from training.guidance import check_class_guidance, check_guide

    check_weight(guidance, guide is not None)
    warnings = []
    if guidance is not None and (guidance.by_class or guidance.over_guide is None):
        warnings.append(check_class_guidance(teacher, f"--guidance={guidance}", "the teacher"))
    if guide is not None:
        warnings.append(check_guide(guide, teacher))
    return "; ".join(filter(None, warnings)) or None


def check_weight(guidance: Guidance | None, with_guide: bool) -> None:
    """Errors: UserError when there is a weight for a guide without a guide, or the other way round."""
    weight = None if guidance is None else guidance.over_guide
    if with_guide and weight is None:
        raise UserError("--guide: say how strongly the weaker network guides with --guidance=W, such as 1.7")
    if weight is not None and not with_guide:
        raise UserError(
            f"--guidance={guidance}: a weight alone is for --guide, a weaker network; name it, or guide by classes with"
            f" long={format_number(weight)}"
        )
