"""Noise levels of a loss: how a schedule draws them, how they are distributed, and what options call them.

torch is imported only where it is needed, so that command lines can check options at once.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, TypeAlias

from dnnlib import UserError, format_number

if TYPE_CHECKING:
    import torch

P_MEAN, P_STD = -1.2, 1.2  # of ln sigma in EDM's training (arXiv:2206.00364, Table 1)
TMAX = 800.0  # SiD's value


@dataclasses.dataclass(frozen=True)
class Karras:
    """Time t is uniform on [0, tmax/1000]; sigma(t) runs from sigma_min at t = 0 to sigma_max at t = 1 (EDM, eq. 5)."""

    tmax: float = TMAX
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def sigma(self, t: "torch.Tensor") -> "torch.Tensor":
        """The noise level at time t in [0, 1]."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (high + (1 - t) * (low - high)) ** self.rho

    def draw(self, n: int, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """n noise levels, [n, 1, 1, 1]."""
        import torch

        return self.sigma(torch.rand([n, 1, 1, 1], device=device) * self.tmax / 1000)

    def quantile(self, q: "torch.Tensor") -> "torch.Tensor":
        """The level that a share q, in (0, 1), of the draws lies below; same shape as q."""
        return self.sigma(q * self.tmax / 1000)

    def density(self, sigma: "torch.Tensor") -> "torch.Tensor":
        """Probability density of ln sigma, same shape as sigma."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        u = sigma ** (1 / self.rho)  # uniform from low to where tmax ends
        width = (high - low) * self.tmax / 1000
        return u / (self.rho * width) * ((u >= low) & (u <= low + width))

    def __str__(self) -> str:
        return "karras"


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """ln sigma is normal with the given mean and standard deviation; the defaults are EDM's."""

    mean: float = P_MEAN
    std: float = P_STD

    def draw(self, n: int, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """n noise levels, [n, 1, 1, 1]."""
        import torch

        return (torch.randn([n, 1, 1, 1], device=device) * self.std + self.mean).exp()

    def quantile(self, q: "torch.Tensor") -> "torch.Tensor":
        """The level that a share q, in (0, 1), of the draws lies below; same shape as q."""
        import torch

        return (torch.special.ndtri(q) * self.std + self.mean).exp()

    def density(self, sigma: "torch.Tensor") -> "torch.Tensor":
        """Probability density of ln sigma, same shape as sigma."""
        z = (sigma.log() - self.mean) / self.std
        return (-(z**2) / 2).exp() / (self.std * math.sqrt(2 * math.pi))

    def __str__(self) -> str:
        return "lognormal" if self == LogNormal() else f"lognormal={format_number(self.mean)},{format_number(self.std)}"


@dataclasses.dataclass(frozen=True)
class Single:
    """Every image gets the same noise level."""

    level: float

    def draw(self, n: int, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """n noise levels, [n, 1, 1, 1]."""
        import torch

        return torch.full([n, 1, 1, 1], self.level, device=device)

    def quantile(self, q: "torch.Tensor") -> "torch.Tensor":
        """The one level, same shape as q."""
        import torch

        return torch.full_like(q, self.level)

    def density(self, sigma: "torch.Tensor") -> "torch.Tensor":
        """Errors: ValueError, since all draws are equal."""
        raise ValueError("a single noise level has no density")

    def __str__(self) -> str:
        return f"single={format_number(self.level)}"


Schedule: TypeAlias = Karras | LogNormal | Single


def parse_schedule(value: "str | Schedule", option: str, tmax: float = TMAX) -> Schedule:
    """Parses an option's text: karras, lognormal, lognormal=MEAN,STD or single=SIGMA.

    value: the text, or a schedule, which is returned unchanged except that Karras takes on `tmax`.
    Errors: UserError naming `option`.
    """
    if not isinstance(value, str):
        return dataclasses.replace(value, tmax=tmax) if isinstance(value, Karras) else value
    kind, equals, rest = value.partition("=")
    if not equals and kind in ("karras", "lognormal"):
        return Karras(tmax) if kind == "karras" else LogNormal()
    try:
        numbers = [float(number) for number in rest.split(",")]
    except ValueError:
        numbers = []
    if all(map(math.isfinite, numbers)) and numbers and numbers[-1] > 0:
        if kind == "lognormal" and len(numbers) == 2:
            return LogNormal(*numbers)
        if kind == "single" and len(numbers) == 1:
            return Single(*numbers)
    raise UserError(
        f"{option}={value}: give karras, lognormal[=MEAN,STD] of ln sigma, or single=SIGMA, such as single=0.5"
    )
