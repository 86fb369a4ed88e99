"""Noise levels of a loss: how a schedule draws them, how they are distributed, and what options call them.

torch is imported only where it is needed, so that command lines can check options at once.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from dnnlib import UserError, format_number

if TYPE_CHECKING:
    import torch

Time = TypeVar("Time", float, "torch.Tensor")
P_MEAN, P_STD = -1.2, 1.2  # of ln sigma in EDM's training (arXiv:2206.00364, Table 1)
TMAX = 800.0  # SiD's value


@dataclasses.dataclass(frozen=True)
class Karras:
    """Time t is uniform on [0, tmax/1000]; sigma(t) runs from sigma_min at t = 0 to sigma_max at t = 1 (EDM, eq. 5)."""

    tmax: float = TMAX
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def sigma(self, t: Time) -> Time:
        """The noise level at time t in [0, 1]."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (high + (1 - t) * (low - high)) ** self.rho

    def time(self, sigma: float) -> float:
        """The time in [0, 1] whose noise level is `sigma`."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (sigma ** (1 / self.rho) - low) / (high - low)

    @property
    def highest(self) -> float:
        """The highest noise level that is drawn."""
        return self.sigma(self.tmax / 1000)

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


@dataclasses.dataclass(frozen=True)
class Times:
    """The teacher's own time is uniform: whole times from `low` to below `high` of a diffusion, t of a flow.

    times: the teacher's (`training.parameterisations`), set by `of`; nothing can be drawn before.
    """

    low: float
    high: float
    times: Any = dataclasses.field(default=None, compare=False)

    def of(self, teacher: Any) -> "Times":
        """This schedule for a teacher. Errors: UserError when it has no times, or not these."""
        times = getattr(teacher, "times", None)
        if times is None:
            raise UserError(f"times={self.text}: the teacher of --edm_model has no times of its own; give karras")
        last = times.scale if times.is_flow else times.last + 1
        if not 0 <= self.low < self.high <= last:
            raise UserError(f"times={self.text}: the teacher's times go from 0 to {last:g}")
        return dataclasses.replace(self, times=times)

    def draw(self, n: int, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """n noise levels, [n, 1, 1, 1]."""
        import torch

        if self.times.is_flow:
            t = torch.rand([n, 1, 1, 1], device=device) * (self.high - self.low) + self.low
            return self.times.sigma(t)
        t = torch.randint(math.ceil(self.low), math.ceil(self.high), [n, 1, 1, 1], device=device)
        return self.times.sigma(t.double()).float()

    def quantile(self, q: "torch.Tensor") -> "torch.Tensor":
        """The level that a share q, in (0, 1), of the draws lies below; same shape as q."""
        t = self.low + q.double() * (self.high - self.low)
        reverses = self.times.is_flow and self.times.is_reversed
        return self.times.sigma(self.low + self.high - t if reverses else t).to(q.dtype)

    def density(self, sigma: "torch.Tensor") -> "torch.Tensor":
        """Probability density of ln sigma, same shape as sigma; that of times between whole ones is interpolated."""
        import torch

        step = 1e-3
        around = [sigma.double() * math.exp(sign * step / 2) for sign in (-1, 1)]
        low, high = (self.times.time(level.flatten()).reshape(sigma.shape) for level in around)
        t = self.times.time(sigma.double().flatten()).reshape(sigma.shape)
        first = self.low if self.times.is_flow else self.low - 0.5
        inside = (t >= first) & (t <= self.high)
        return torch.where(inside, (high - low).abs() / (step * (self.high - self.low)), 0).to(sigma.dtype)

    @property
    def text(self) -> str:
        return f"{format_number(self.low)},{format_number(self.high)}"

    def __str__(self) -> str:
        return f"times={self.text}"


Schedule: TypeAlias = Karras | LogNormal | Single | Times


def parse_schedule(value: "str | Schedule", option: str, tmax: float = TMAX) -> Schedule:
    """Parses an option's text: karras, lognormal, lognormal=MEAN,STD, single=SIGMA or times=FROM,TO.

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
        if kind == "times" and len(numbers) == 2 and 0 <= numbers[0] < numbers[1]:
            return Times(*numbers)
    raise UserError(
        f"{option}={value}: give karras, lognormal[=MEAN,STD] of ln sigma, single=SIGMA, such as single=0.5, or"
        " times=FROM,TO of the teacher's own"
    )
