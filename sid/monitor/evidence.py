"""What the rules know of a distillation: the figures of its ticks, and its options."""

import statistics
from typing import Any

from ..config import parse_score_gradient
from ..objectives import OBJECTIVES

OPTIONS = ("objective", "alpha", "lr", "glr", "lr_decay", "fake_score_updates", "batch")
OPTIONS += ("ema_halflife_kimg", "ema_rampup_ratio")
# Older runs lack them.
LATER_OPTIONS = ("gan", "gan_freeze_kimg", "gan_start_kimg", "lsd", "lsg_gan")
LATER_OPTIONS += ("score_gradient", "spike_guard", "weighting")
MAY_BE_NONE = ("ema_rampup_ratio", "spike_guard", "weighting")
DESTRUCTIVE = [name for name, objective in OBJECTIVES.items() if objective.for_study]
MIN_TICKS_OF_TREND = 12  # until then the divergence grows because the fake score approaches the generator

Records = list[dict[str, float]]  # of ticks, oldest first


class Window:
    """The last third of a run's records, the third before for comparison, and all of them."""

    def __init__(self, records: Records):
        third = max(len(records) // 3, 1)
        self.all = records
        self._now, self._before = records[-third:], records[-2 * third : -third]
        self.kimg = self._now[-1]["Progress/kimg"]

    def median(self, name: str) -> float | None:
        return median(self._now, name)

    def most(self, name: str) -> float | None:
        """The most frequent value."""
        values = [record[name] for record in self._now if name in record]
        return statistics.mode(values) if values else None

    def growth(self, name: str) -> float | None:
        """The median of the last third over the median of the third before."""
        now, before = median(self._now, name), median(self._before, name)
        return now / before if now is not None and before else None

    def highest(self, name: str) -> float:
        return max((record[name] for record in self.all if name in record), default=0.0)

    def farthest(self, name: str, point: float) -> float:
        """The largest distance of the figure from `point` in the last third."""
        return max((abs(record[name] - point) for record in self._now if name in record), default=0.0)

    def share(self, name: str, limit: float) -> float:
        """Share of the ticks whose figure is above the limit, of all that have it."""
        values = [record[name] for record in self.all if name in record]
        return sum(value > limit for value in values) / len(values) if values else 0.0


class Run(Window):
    """A distillation since its loss last changed. whole: also what was before.

    options: from training_options.json, by the names in OPTIONS and LATER_OPTIONS.
    """

    def __init__(self, records: Records, options: dict[str, Any]):
        super().__init__(since_last_change(records, options)[0])
        self.whole, self.options = Window(records), options

    @property
    def is_early(self) -> bool:
        """Whether there are too few ticks to speak of a trend."""
        return len(self.all) < MIN_TICKS_OF_TREND

    @property
    def is_frozen(self) -> bool:
        """Whether only the fake score is trained, the generator not yet (--gan-freeze)."""
        return self.options["gan"] and self.kimg <= self.options["gan_freeze_kimg"]

    @property
    def passes_scores(self) -> bool:
        """Whether the generator's gradient currently passes through the score networks."""
        return parse_score_gradient(self.options["score_gradient"]).passes(int(self.kimg * 1000))

    @property
    def may_run_away(self) -> bool:
        """Whether alpha is above 1 and matters: without gradients through the scores, all alphas have one direction."""
        return self.passes_scores and self.options["objective"] == "sid" and self.options["alpha"] > 1

    @property
    def generator_kimg(self) -> float:
        """How long the generator has been trained."""
        return max(self.kimg - (self.options["gan_freeze_kimg"] if self.options["gan"] else 0), 0)

    @property
    def halflife_kimg(self) -> float:
        """The present half-life of the generator's average."""
        longest, ratio = self.options["ema_halflife_kimg"], self.options["ema_rampup_ratio"]
        return longest if ratio is None else min(longest, ratio * self.generator_kimg)

    def less_destructive(self, otherwise: str) -> str:
        """The remedy for a loss that is known to destroy the generator; `otherwise` for other losses."""
        if self.options["objective"] in DESTRUCTIVE:
            return f"--objective={self.options['objective']} does that; use sid"
        if self.options["weighting"] == "sigma":
            return f"use --weighting=omega instead of sigma, or {otherwise}"
        return otherwise


def since_last_change(records: Records, options: dict[str, Any]) -> tuple[Records, str]:
    """(the records since --gan last changed the generator's loss, words for it): only they are compared."""
    kimg = records[-1]["Progress/kimg"] if records else 0.0
    starts = [(options[f"gan_{name}_kimg"], f" since --gan-{name}") for name in ("freeze", "start") if options["gan"]]
    begin, words = max((start for start in starts if start[0] < kimg), default=(0.0, ""))
    return [record for record in records if record["Progress/kimg"] > begin], words


def median(records: Records, name: str) -> float | None:
    """The median of a figure over the records that have it; None if none has."""
    values = [record[name] for record in records if name in record]
    return statistics.median(values) if values else None
