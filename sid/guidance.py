"""Classifier-free guidance of the score networks in a distillation (SiD-LSG, arXiv:2406.01561).

It doesn't import torch, so that command lines can check options at once.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dnnlib import UserError, format_number

if TYPE_CHECKING:
    import torch

    from training.conditions import Classes

LABEL_DROPOUT = 0.1  # SiD-LSG's value


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance weights kappa for each place where a score network is called; 1 means no guidance."""

    fake_score_step: float = 1.0  # kappa1: psi in its own loss
    fake_score: float = 1.0  # kappa2 = kappa3: psi in the generator's loss
    teacher: float = 1.0  # kappa4: phi in the generator's loss

    @property
    def label_dropout(self) -> float:
        """Probability that an image of psi's own phase loses its label, so that psi learns to do without."""
        return LABEL_DROPOUT if self.fake_score_step != 1 or self.fake_score != 1 else 0.0

    def __str__(self) -> str:
        if self == Guidance(teacher=self.teacher):
            return f"long={format_number(self.teacher)}"
        if self == Guidance(fake_score_step=self.fake_score_step):
            return f"short={format_number(self.fake_score_step)}"
        return f"long-short={format_number(self.teacher)}"


def parse_guidance(value: "str | Guidance | None") -> Guidance | None:
    """Parses long=K, short=K or long-short=K; None and a Guidance are returned unchanged.

    Errors: UserError naming --guidance.
    """
    if not isinstance(value, str):
        return value
    kind, _, text = value.partition("=")
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if kind == "long" and 1 < scale < math.inf:
        return Guidance(teacher=scale)
    if kind == "short" and 0 <= scale < 1:
        return Guidance(fake_score_step=scale)
    if kind == "long-short" and 1 < scale < math.inf:
        return Guidance(scale, scale, scale)
    raise UserError(f"--guidance={value}: give long=K or long-short=K with K > 1, or short=K with K < 1")


def guided(net: Callable, kappa: float, conditions: "Classes") -> Callable:
    """f_kappa = f_null + kappa (f_cond - f_null) for a denoiser; with kappa = 1 the denoiser itself.

    The network is called once with the images' conditions and then once with null conditions. Each call has as many
    images as without guidance, so --batch-gpu and --chunk keep their meaning.
    """
    if kappa == 1:
        return net

    def call(x: "torch.Tensor", sigma: "torch.Tensor", condition: "torch.Tensor", **kwargs) -> "torch.Tensor":
        conditional = net(x, sigma, condition, **kwargs)
        unconditional = net(x, sigma, conditions.null_like(condition), **kwargs)
        return unconditional + kappa * (conditional - unconditional)

    return call


def check_guidance(guidance: Guidance | None, teacher: "torch.nn.Module") -> str | None:
    """A warning if the teacher was never trained without labels, otherwise None.

    Errors: UserError for a teacher without classes, or without a way to be called without them.
    """
    if guidance is None:
        return None
    if not teacher.label_dim:
        raise UserError(f"--guidance={guidance}: the teacher has no classes to guide with; leave the option out")
    if getattr(teacher, "null_class", 0) is None:
        raise UserError(f"--guidance={guidance}: the teacher has no class that stands for none; leave the option out")
    if getattr(getattr(teacher, "model", None), "label_dropout", None) == 0:
        return (
            "--guidance calls the teacher without labels, which it was never trained for;"
            " edm.train --label-dropout=0.1 makes one that did"
        )
    return None
