"""The steps of a generator, as values. Importing it doesn't load torch, for the command lines' sake."""

import dataclasses
import math
from typing import Any

INIT_SIGMA = 2.5  # start noise level of SiD's published one-step generators
MAX_STEPS = 8
STEPS_NOISES = ("fresh", "fixed", "ddim")
INIT_NOISES = ("white", "moments")  # that a generator starts from; the latter as in `training.moments`


@dataclasses.dataclass(frozen=True)
class Steps:
    """At which noise levels the evaluations of a generator start, and which noise takes its images there.

    levels: falling. The first evaluation sees noise alone; each further one sees the images of the one before, noised
            to its level. One step, as in SiD, is one level.
    noise:  fresh: newly drawn. fixed: the generator's first noise again. ddim: the noise that was in the input of the
            evaluation before, according to its answer.
    """

    levels: tuple[float, ...] = (INIT_SIGMA,)
    noise: str = "fresh"

    def __post_init__(self):
        if not 1 <= len(self.levels) <= MAX_STEPS:
            raise ValueError(f"a generator has 1 to {MAX_STEPS} steps, not {len(self.levels)}")
        if not self.levels[0] < math.inf or not all(a > b for a, b in zip(self.levels, (*self.levels[1:], 0))):
            raise ValueError(f"noise levels of steps are finite, above 0 and fall, unlike {list(self.levels)}")
        if self.noise not in STEPS_NOISES:
            raise ValueError(f"the noise of steps is one of {', '.join(STEPS_NOISES)}, not {self.noise!r}")

    def __len__(self) -> int:
        return len(self.levels)

    @classmethod
    def of(cls, net: Any) -> "Steps | None":
        """Those that a network's metadata record; None for a denoiser that is no generator."""
        return cls.recorded(getattr(net, "metadata", {}))

    @classmethod
    def recorded(cls, metadata: dict[str, Any]) -> "Steps | None":
        """The inverse of `record`. Errors: ArithmeticError, TypeError, ValueError when it isn't one."""
        if "init_sigma" not in metadata:
            return None
        levels = metadata.get("step_levels", [metadata["init_sigma"]])
        if type(levels) is not list or not all(type(level) in (int, float) for level in levels):
            raise TypeError("the noise levels of steps are a list of numbers")
        return cls(tuple(map(float, levels)), metadata.get("steps_noise", "fresh"))

    def record(self) -> dict[str, Any]:
        """Metadata of a generator's file. A single step has SiD's `init_sigma` alone."""
        first = {"init_sigma": self.levels[0]}
        return first if len(self) == 1 else {**first, "step_levels": list(self.levels), "steps_noise": self.noise}


ONE_STEP = Steps()
