"""The curves on a run's page, as plain values for uPlot, with few enough points for a small page."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from .run_record import Figures, RunRecord

MAX_VALUES = 5000  # of a chart, x included; from longer records, each stretch keeps its extremes
MAX_BANDS = 8  # of noise levels
BAND = r"Health/divergence_sigma([0-9.e+]+(?:-[0-9.e+]+)?)"
LOGARITHMIC_FROM = 10.0  # highest over lowest value
FROM_ZERO = ("speed", "memory")  # names of charts


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves with a common axis. kimg: [N]. series: {label: values [N], None where there is none}.

    goal: (label, value) of a straight line to compare with. note: what the figures are and which direction is good.
    is_from_zero: whether the axis begins at 0, so that small changes look small.
    """

    name: str
    title: str
    note: str
    kimg: list[float]
    series: dict[str, list[float | None]]
    goal: tuple[str, float] | None = None
    is_from_zero: bool = False

    @property
    def is_logarithmic(self) -> bool:
        """Whether the values are positive and span an order of magnitude."""
        values = [v for column in self.series.values() for v in column if v is not None]
        values += [self.goal[1]] if self.goal else []
        return bool(values) and min(values) > 0 and max(values) / min(values) > LOGARITHMIC_FROM

    def plain(self) -> dict[str, Any]:
        """For JSON: thinned out, with five digits."""
        keep = thinned(list(self.series.values()), len(self.kimg))
        columns = {label: [_rounded(column[i]) for i in keep] for label, column in self.series.items()}
        return {
            "name": self.name,
            "log": self.is_logarithmic and not self.is_from_zero,
            "zero": self.is_from_zero,
            "kimg": [self.kimg[i] for i in keep],
            "labels": list(columns),
            "values": list(columns.values()),
            "goal": self.goal and {"label": self.goal[0], "value": _rounded(self.goal[1])},
        }


About = tuple[str, str, str, dict[str, str]]  # name, title, note, {figure of a tick: label}

SPEED: About = ("speed", "Speed", "Images per second", {"Timing/img_per_sec": "img/s"})
MEMORY: About = (
    "memory",
    "Memory",
    "GB of process 0",
    {"Resources/gpu_mem_GB": "GPU, highest so far", "Resources/cpu_mem_GB": "CPU"},
)
TRAINING_CHARTS: list[About] = [  # of edm.train
    ("loss", "Loss", "Weighted error of the denoised training images; lower is better", {"Loss/loss": "loss"}),
    ("rate", "Learning rate", "At the end of each tick", {"Rate/lr": "lr"}),
    ("norms", "Gradient norm", "Mean over the updates of a tick", {"Gradient/norm": "network"}),
    SPEED,
    MEMORY,
]
TICK_CHARTS: list[About] = [  # of a distillation
    (
        "health",
        "Ratios of the run's health",
        "The first two are near 1 when the fake score keeps up; diversity falls when the generator collapses",
        {
            "Health/fake_score_ratio": "fake score's loss / teacher's",
            "Health/l2_per_l1": "L2 / L1",
            "Health/diversity": "diversity / the start's",
            "Health/ema_distance": "distance of the average",
        },
    ),
    ("fake-score", "Loss of the fake score", "On the generator's images", {"Loss/fake_score": "fake score"}),
    ("generator", "Loss of the generator", "Near 0 says little: read the divergence", {"Loss/generator": "generator"}),
    (
        "adversarial",
        "Adversarial losses",
        "0.69 where the discriminator guesses",
        {"Loss/discriminator": "discriminator", "Loss/adversarial": "generator"},
    ),
    (
        "accuracy",
        "Accuracy of the discriminator",
        "Share of positions; half is chance",
        {"Health/discriminator_accuracy": "accuracy"},
    ),
    (
        "norms",
        "Gradient norms",
        "Means over the updates of a tick",
        {"Gradient/generator_norm": "generator", "Gradient/fake_score_norm": "fake score"},
    ),
    (
        "worst-class",
        "Worst class",
        "Divergence of its images over the median class's; near 1 when no class is behind",
        {"Health/worst_class_divergence": "worst / median"},
    ),
    (
        "skipped",
        "Updates that were skipped",
        "Since the start",
        {
            "Health/generator_skipped": "generator, not finite",
            "Health/fake_score_skipped": "fake score, not finite",
            "Health/generator_spikes": "generator, spikes",
            "Health/fake_score_spikes": "fake score, spikes",
        },
    ),
    SPEED,
    MEMORY,
]


def charts(record: RunRecord) -> list[Chart]:
    """All charts for which the run has recorded something."""
    found = [*_metric_charts(record), *([] if record.is_training else _distance_charts(record))]
    abouts = TRAINING_CHARTS if record.is_training else TICK_CHARTS
    found += [_chart(*about[:3], record.ticks, about[3]) for about in abouts]
    return [chart for chart in found if chart is not None]


def _metric_charts(record: RunRecord) -> list[Chart | None]:
    found, fid = [], record.fid
    label = "network" if record.is_training else "generator"
    for name, records in record.metrics.items():
        teacher = fid.teacher if fid is not None and fid.name == name else None
        goal = None if teacher is None else ("teacher", teacher)
        note = "Fréchet distance of generated from real images; lower is better" if name.startswith("fid") else ""
        found.append(_chart(f"metric-{name}", name, note, records, {"value": label}, "kimg", goal))
    return found


def _distance_charts(record: RunRecord) -> list[Chart | None]:
    note = "Energy distance from the teacher's own samples; 0 is as close as other samples of the teacher are"
    parts = {"value": "distance", "pixels": "of pixels", "detail": "of fine detail"}
    distance = _chart("distance", "Distance from the teacher", note, record.distances, parts, "kimg")
    figures = {"Health/teacher_distance": "of thumbnails"}
    note = "Energy distance from the teacher's own samples, of few images at every tick"
    ticks = _chart("tick-distance", "Distance from the teacher, between snapshots", note, record.ticks, figures)
    note = "Fréchet distance in the teacher's own features, over that of two sets of its own samples"
    goal, parts = ("teacher", 1.0), {"features": "generator"}
    features = _chart("features", "Distance in the teacher's features", note, record.distances, parts, "kimg", goal)
    note = "Share of the teacher's images in clusters of its samples that the generator's images hardly fall into"
    lost = _chart("lost", "Lost kinds of images", note, record.distances, {"lost_share": "lost"}, "kimg")
    note = "Between teacher and fake score on generated images; rises at first, while the fake score learns"
    figures = {"Health/divergence": "all noise levels", **_bands(record.ticks)}
    divergence = _chart("divergence", "Divergence from the teacher", note, record.ticks, figures)
    return [distance, features, ticks, lost, divergence]


def _bands(ticks: Figures) -> dict[str, str]:
    """{figure: label} of the divergences in bands of noise levels, the lowest first."""
    names = {name: m[1] for record in ticks[-1:] for name in record if (m := re.fullmatch(BAND, name))}
    return {name: f"σ {band.replace('-', ' to ')}" for name, band in list(names.items())[:MAX_BANDS]}


def _chart(
    name: str,
    title: str,
    note: str,
    records: Figures,
    figures: dict[str, str],
    kimg: str = "Progress/kimg",
    goal: tuple[str, float] | None = None,
) -> Chart | None:
    """None if no record has any of the figures, or all are zero, such as GPU memory on a CPU."""
    series = {}
    for figure, label in figures.items():
        values = [record.get(figure) for record in records]
        finite = [None if v is None or not math.isfinite(v) else v for v in values]
        if any(finite):
            series[label] = finite
    if not series:
        return None
    missing = sum(not math.isfinite(record.get(figure, 0.0)) for figure in figures for record in records)
    if missing:
        note += f"; {missing} values that aren't finite are left out"
    some = [i for i in range(len(records)) if any(column[i] is not None for column in series.values())]
    columns = {label: [column[i] for i in some] for label, column in series.items()}
    return Chart(name, title, note, [records[i][kimg] for i in some], columns, goal, name in FROM_ZERO)


def thinned(columns: Sequence[Sequence[float | None]], length: int) -> list[int]:
    """Which of `length` points to keep, at most about MAX_VALUES values: the ends, and each stretch's extremes."""
    if length * (len(columns) + 1) <= MAX_VALUES:
        return list(range(length))
    stretches = max(MAX_VALUES // (2 * len(columns) * (len(columns) + 1)), 1)
    keep = {0, length - 1}
    for k in range(stretches):
        places = range(k * length // stretches, (k + 1) * length // stretches)
        for column in columns:
            known = [(column[i], i) for i in places if column[i] is not None]
            if known:
                keep |= {min(known)[1], max(known)[1]}
    return sorted(keep)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
