"""The diagnosis of a distillation, from the figures of its ticks and from what its images were compared with."""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .closeness import closeness, judge_distance, judge_fid, judge_ticks
from .clusters import judge_clusters
from .evidence import Records, Run, since_last_change
from .records import MeasuredFid
from .rules import PROBLEMS, STATES, Finding, first_finding, frozen, progress, unknown

MIN_TICKS = 6  # fewer are no evidence: the fake score starts as the teacher and needs time to reach the generator
WATCHED_TICKS = 60  # how far back the run's own warnings look


def diagnose(
    records: Records,
    options: dict[str, Any],
    distances: Sequence[dict[str, Any]] = (),
    fid: MeasuredFid | None = None,
) -> list[Finding]:
    """What is wrong with the run, or how it is doing if nothing is.

    records: of stats.jsonl, oldest first. options: from training_options.json, by the names in `evidence.OPTIONS` and
    `evidence.LATER_OPTIONS`. distances: of teacher-distance.jsonl, with kimg and value, the first of the start.
    fid: what the run measured.
    """
    far = judge_distance(distances) or judge_ticks(records)
    away = far or judge_fid(fid)
    lost = None if far else judge_clusters(distances)  # images far from the teacher are of no kind that it knows
    compared = [finding for finding in (away, lost) if finding is not None]
    phase, since = since_last_change(records, options)
    if len(phase) < MIN_TICKS:
        early = Finding("too-early", f"{len(phase)} ticks{since} are too few to judge; it takes {MIN_TICKS}", False)
        return compared or [early]
    run = Run(records, options)
    problems = compared + [finding for alternatives in PROBLEMS if (finding := first_finding(alternatives, run))]
    if away is not None:  # then figures of the loss, which only compare with the fake score, can't say that all is well
        return problems
    measured = closeness(distances, fid)
    if measured is None:
        return problems or [first_finding(STATES, run) or unknown(run)]
    # Where images have been compared with others, no figure of the fake score has to stand in for that.
    found = progress(run)
    return problems or [frozen(run) or dataclasses.replace(found, text=f"{found.text}; {measured}")]


class Watch:
    """Warns of problems in a running distillation that are certain, once each.

    options: the run's. distances: returns the records of the distance from the teacher's samples so far.
    """

    def __init__(self, options: dict[str, Any], distances: Callable[[], Sequence[dict[str, Any]]] = tuple):
        self._options, self._distances = options, distances
        self._records: deque[dict[str, float]] = deque(maxlen=WATCHED_TICKS)
        self._told: set[str] = set()

    def tick(self, nimg: int, collected: dict[str, dict[str, float]]) -> list[str]:
        """The new warnings. collected: the statistics, as for `TickLog.tick`."""
        means = {name: record["mean"] for name, record in collected.items()}
        self._records.append({"Progress/kimg": nimg / 1e3, **means})
        findings = diagnose(list(self._records), self._options, self._distances())
        new = [finding for finding in findings if finding.certain and finding.name not in self._told]
        self._told.update(finding.name for finding in new)
        return [f"warning: {finding.text}" for finding in new]
