"""Judges how close a generator's images are to the teacher, by their distance from its samples and by FID.

Only some runs measure these. docs/method.md says where the thresholds come from.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from torch_utils.records import is_figure, measured_value

from .records import MeasuredFid
from .rules import LOST, Finding

NOTICED = 0.03  # of the distance: less is the noise of 256 images
FAR = 0.1  # no good generator of the bench was so far; those that failed were, most starts are (docs/ablations.md)
LEFT = 1 / 3  # of the start's distance: failed runs kept more, runs on a good way less (docs/method.md)
FAR_FEATURES = 3.0  # likewise of `features`; a generator may have less and still twice the teacher's FID
# Of the teacher's one evaluation of plain noise: where that has far more, so may a good generator.
LEFT_FEATURES, FEATURES_WHITE = 0.08, "features_white"
LEFT_ABOVE = 1 / 2  # of what the start's features have above 1; good generators keep 0.26 at most (docs/method.md)
DISTINCT = 1.5  # the start's features, or more; others are too close to 1 for that
TICK_DISTANCE, TICKS = "Health/teacher_distance", 5  # each of 16 images or more
GOOD = 2.0  # a generator's FID over its teacher's
OTHER_SETTINGS = "try --recipe=auto, or lower --lr and --glr if the run has that recipe already"
FALLING = f"go on while it falls; otherwise {OTHER_SETTINGS}"


def has_lost(value: float, lowest: float) -> bool:
    """Whether a distance is clearly above the lowest one before. NaN is no loss that can be measured."""
    return value > max(LOST * lowest, lowest + NOTICED)


def counted(value: float, kimg: float) -> float:
    """A snapshot's distance as later ones are compared with it, which for the start is FAR at least.

    The start of noise with the moments of images may be nearer, though its images aren't like the teacher's, and good
    runs go away from there at first.
    """
    return max(value, FAR) if kimg == 0 else value


def judge_distance(records: Sequence[dict[str, Any]]) -> Finding | None:
    """A finding when the snapshots went away from the teacher or are still far from it.

    records: of teacher-distance.jsonl, with kimg and value, the first of the start.
    """
    if len(records) < 2:
        return None
    start, last = records[0]["value"], records[-1]["value"]
    best = min(records, key=lambda record: counted(record["value"], record["kimg"]))
    if has_lost(last, counted(best["value"], best["kimg"])):
        where, remedy = _closer_before(best, best is records[0])
        text = f"its images are farther from the teacher's samples than {where}: distance {last:.3g} instead of"
        return Finding("away-from-teacher", f"{text} {best['value']:.3g} (start: {start:.3g}); {remedy}")
    from_start = records[0]["kimg"] == 0
    left = last / start if from_start and start > 0 else 0.0
    if last > FAR or (last > NOTICED and left > LEFT):
        usual = f"good generators have less than {FAR:g} and than a third of the start's"
        measured = f"distance {last:.3g} (start: {start:.3g}), where {usual}"
    else:
        measured = _far_features(records[-1].get("features"), records[0] if from_start else {})
    if measured is None:
        return None
    text = f"its images are still far from the teacher's samples: {measured}; {FALLING}"
    return Finding("far-from-teacher", text, certain=False)  # it may be on its way


def _far_features(features: Any, start: dict[str, Any]) -> str | None:
    """What shows that a generator's features are far from the teacher's; None if nothing does.

    start: the record of the run's start, empty if there is none.
    """
    if not is_figure(features):
        return None
    of_start = start.get("features")
    of_white = start.get(FEATURES_WHITE, of_start)
    far = max(FAR_FEATURES, LEFT_FEATURES * of_white if is_figure(of_white) else 0.0)
    if features > far:
        usual = f"other samples have 1 and good generators less than {far:.3g}"
        return f"{features:.3g} in its features, where {usual}"
    if is_figure(of_start) and of_start >= DISTINCT and features - 1 > LEFT_ABOVE * (of_start - 1):
        usual = "other samples have 1 and good generators left more than half the way behind"
        return f"{features:.3g} in its features (start: {of_start:.3g}), where {usual}"
    return None


def judge_ticks(records: Sequence[dict[str, float]]) -> Finding | None:
    """A finding when the images have gone far away from the teacher, which ticks show before the next snapshot does.

    records: of stats.jsonl. Each compares few images, so medians of a few ticks count.
    """
    values = [record[TICK_DISTANCE] for record in records if TICK_DISTANCE in record]
    medians = [statistics.median(values[i : i + TICKS]) for i in range(len(values) - TICKS + 1)]
    lowest = min(medians, default=math.inf)
    if not medians or not medians[-1] > max(LOST * lowest, lowest + FAR):
        return None
    text = f"its images went away from the teacher's samples: distance {medians[-1]:.3g} in the last {TICKS} ticks"
    remedy = "resume from an earlier state with lower --glr and --lr, or try --recipe=auto"
    return Finding("away-from-teacher", f"{text}, after {lowest:.3g} at best; {remedy}")


def judge_fid(fid: MeasuredFid | None) -> Finding | None:
    """A finding when the last FID is far above the teacher's or the best, or no better than at the start."""
    if fid is None:
        return None
    if fid.teacher is not None and fid.last > GOOD * fid.teacher:
        ratio = f"{fid.last / fid.teacher:.1f} times the teacher's {fid.teacher:.4g}"
        text = f"its {fid.name} of {fid.last:.4g} is {ratio}, where good generators have less than {GOOD:g} times"
        return Finding("far-from-teacher", f"{text}; {FALLING}", certain=False)
    records = fid.records
    # A start below the teacher's FID: the reference is of other images, such as with classes in other proportions.
    if fid.teacher is not None and records[0]["kimg"] == 0 and measured_value(records[0]) < fid.teacher:
        records = records[1:]
    best = min(records, key=measured_value, default=None)
    if best is None or len(fid.records) < 2:
        return None
    lowest, is_start = measured_value(best), best["kimg"] == 0
    if not (fid.last > LOST * lowest or is_start):
        return None
    where, remedy = _closer_before(best, is_start)
    if is_start and fid.teacher is None:
        remedy = f"--measure-teacher=1 tells whether the teacher's is as high; otherwise {remedy}"
    text = f"its {fid.name} of {fid.last:.4g} is higher than that of {where}, {lowest:.4g}; {remedy}"
    return Finding("away-from-teacher", text, certain=False)


def _closer_before(record: dict[str, Any], is_start: bool) -> tuple[str, str]:
    """(what a run's best figure belongs to, what to do about it). record: with its kimg."""
    if is_start:
        return "the start", OTHER_SETTINGS
    remedy = "take that snapshot, or resume from an earlier state with lower --glr and --lr"
    return f"the snapshot at {record['kimg']:g} kimg", remedy


def closeness(distances: Sequence[dict[str, Any]], fid: MeasuredFid | None) -> str | None:
    """What shows that the images are like the teacher's, where neither rule above has found otherwise; None if nothing.

    A distance that can't tell the start from the teacher's samples can tell nothing later; its features may.
    """
    is_blind = len(distances) < 2 or (distances[0]["kimg"] == 0 and not distances[0]["value"] > NOTICED)
    found = []
    if not is_blind:
        start, last = distances[0]["value"], distances[-1]["value"]
        found.append(f"distance from the teacher's samples {last:.3g} (start: {start:.3g})")
    features = distances[-1].get("features") if len(distances) > 1 else None
    if is_figure(features):
        found.append(f"{features:.3g} in its features (other samples: 1)")
    if fid is not None and fid.teacher is not None:
        found.append(f"{fid.name} {fid.last:.4g} (teacher: {fid.teacher:.4g})")
    return "; ".join(found) or None
