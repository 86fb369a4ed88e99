"""The numbers of a sweep, from its records alone: means over seeds, images needed for a given FID, a Markdown table."""

import dataclasses
import math
import statistics
from typing import Any

Point = tuple[float, float]  # kimg, FID


@dataclasses.dataclass
class Trace:
    """What one run measured. points, seconds: (kimg, FID) and (kimg, seconds of training) of its trained snapshots.

    Trials that a run has dropped count, in kimg and in seconds, as if they came before its beginning.
    """

    points: list[Point]
    seconds: list[Point]
    total_kimg: float
    failure: dict[str, Any] | None = None

    @property
    def is_finished(self) -> bool:
        return bool(self.points) and round(1000 * self.points[-1][0]) >= int(self.total_kimg * 1000)


@dataclasses.dataclass
class Curve:
    """Mean over the seeds of a setting at each kimg that all of them have, with the lowest and highest."""

    kimg: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seconds: list[float]  # mean over the seeds


def fid_metric(records: list[dict[str, Any]]) -> str | None:
    """The first FID among the metrics."""
    names = (name for record in records for name in record.get("metrics", {}))
    return next((name for name in names if name.startswith("fid")), None)


def traces(records: list[dict[str, Any]], setting: str, metric: str | None) -> list[Trace]:
    """The runs of a setting, by seed. FIDs that aren't finite are left out."""
    found = {}
    for record in records:
        if record["setting"] != setting:
            continue
        trace = found.setdefault(record["seed"], Trace([], [], math.inf))
        if "failure" in record:
            trace.failure = record["failure"]
            continue
        dropped_kimg, dropped_seconds = record.get("dropped_kimg", 0.0), record.get("dropped_seconds", 0.0)
        trace.total_kimg = record["total_kimg"] + dropped_kimg
        fid, kimg = record["metrics"].get(metric, {}).get("fid"), record["kimg"] + dropped_kimg
        if record["kimg"] > 0 and fid is not None:
            trace.points.append((kimg, fid))
        if record["kimg"] > 0 and record["seconds"] is not None:
            trace.seconds.append((kimg, record["seconds"] + dropped_seconds))
    return [found[seed] for seed in sorted(found)]


def curve(runs: list[Trace]) -> Curve:
    """The curve of the finished runs, or of unfinished ones if none is finished."""
    runs = [run for run in runs if run.is_finished] or [run for run in runs if run.points]
    fids, seconds = [dict(run.points) for run in runs], [dict(run.seconds) for run in runs]
    shared = sorted(set.intersection(*map(set, fids))) if fids else []
    values = [[fid[kimg] for fid in fids] for kimg in shared]
    times = [[time[kimg] for time in seconds if kimg in time] for kimg in shared]
    return Curve(
        kimg=shared,
        mean=[statistics.fmean(v) for v in values],
        low=[min(v) for v in values],
        high=[max(v) for v in values],
        seconds=[statistics.fmean(t) if t else math.nan for t in times],
    )


def kimg_to_reach(points: list[Point], level: float) -> float | None:
    """Where a curve first comes down to a FID, interpolated in log kimg and log FID; None if it never does.

    For a curve that begins below the level, this is its first point.
    """
    before = None
    for kimg, fid in points:
        if fid <= level:
            if before is None or fid == level or fid <= 0:
                return kimg
            share = math.log(before[1] / level) / math.log(before[1] / fid)
            return before[0] * (kimg / before[0]) ** share
        before = kimg, fid
    return None


def summarise(records: list[dict[str, Any]], settings: list[str]) -> list[dict[str, Any]]:
    """A row for each setting; the first is the baseline. Where there are no values, means are None."""
    metric = fid_metric(records)
    rows, level = [], None
    for setting in settings:
        runs = traces(records, setting, metric)
        finished = [run for run in runs if run.is_finished]
        line = curve(runs)
        points = list(zip(line.kimg, line.mean))
        rates = [run.seconds[-1][1] / run.seconds[-1][0] for run in runs if run.seconds]
        row = {
            "setting": setting,
            "finished": len(finished),
            "failed": [run.failure for run in runs if run.failure],
            "last": _mean_sd([run.points[-1][1] for run in finished]),
            "best": _mean_sd([min(fid for _, fid in run.points) for run in finished]),
            "sec_per_kimg": _mean_sd(rates)[0],
        }
        if not rows and finished:
            level = row["last"][0]
        row["level"] = level
        row["kimg_to_level"] = kimg_to_reach(points, level) if level is not None and finished else None
        rows.append(row)
    for row in rows:
        for name in ("kimg_to_level", "sec_per_kimg"):
            value, base = row[name], rows[0][name]
            row[f"{name}_ratio"] = value / base if value is not None and base else None
    return rows


def _mean_sd(values: list[float]) -> tuple[float | None, float | None]:
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def markdown(records: list[dict[str, Any]], settings: list[str], seeds: list[int]) -> str:
    """Both tables, and under them a line for each run that failed."""
    rows, metric = summarise(records, settings), fid_metric(records)
    level = rows[0]["level"]
    reached = f"kimg to {level:.2f}" if level is not None else "kimg to the baseline's"
    head = ["setting", "runs", f"{metric or 'FID'} at the end", "of the best snapshot", reached, "images, relative"]
    lines = [[*head, "sec/kimg, relative"]]
    for row in rows:
        runs = f"{row['finished']}" if row["finished"] == len(seeds) else f"{row['finished']} of {len(seeds)}"
        reached, relative = _number(row["kimg_to_level"]), _number(row["kimg_to_level_ratio"], 2)
        if level is not None and row["finished"] and row["kimg_to_level"] is None:
            reached = relative = "never"
        cells = [row["setting"], runs, _text(row["last"]), _text(row["best"]), reached, relative]
        lines.append([*cells, _number(row["sec_per_kimg_ratio"], 2)])
    text = f"{_table(lines)}\n{_table(fid_by_kimg(records, settings))}"
    failed = [f"- {row['setting']}: exit code {f['exit_code']}: {f['message']}" for row in rows for f in row["failed"]]
    return text + ("\nFailed:\n\n" + "\n".join(failed) + "\n" if failed else "")


def over_teachers(records: list[dict[str, Any]], teachers: dict[str, dict[str, str]]) -> str:
    """FID at the end by setting and teacher, which are as `Plan.teachers` has them; empty where no run is finished."""
    metric = fid_metric(records)
    settings = list(dict.fromkeys(setting for own in teachers.values() for setting in own))
    rows = [[f"{metric or 'FID'} at the end", *teachers]]
    for setting in settings:
        runs = [traces(records, own[setting], metric) for own in teachers.values()]
        ends = [_mean_sd([run.points[-1][1] for run in of if run.is_finished]) for of in runs]
        rows.append([setting, *map(_text, ends)])
    return _table(rows)


def fid_by_kimg(records: list[dict[str, Any]], settings: list[str]) -> list[list[str]]:
    """Cells: FID wherever a run of the first setting was measured, and where each seed ended; the head comes first.

    Settings without any FID have no row. Interrupted runs count as far as they got, but have no end.
    """
    metric = fid_metric(records)
    of = {setting: [run for run in traces(records, setting, metric) if run.points] for setting in settings}
    of = {setting: runs for setting, runs in of.items() if runs}
    shown = sorted({kimg for run in next(iter(of.values()), []) for kimg, _ in run.points})
    rows = [["setting", *(f"{kimg:.3g} kimg" for kimg in shown), "ends, by seed"]]
    for setting, runs in of.items():
        values = [[fid for run in runs for at, fid in run.points if at == kimg] for kimg in shown]
        ends = ", ".join(_number(run.points[-1][1]) for run in runs if run.is_finished)
        rows.append([setting, *(_text(_mean_sd(v), 1) for v in values), ends])
    return rows


def _table(rows: list[list[str]]) -> str:
    """In Markdown; the first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _text(mean_sd: tuple[float | None, float | None], digits: int = 2) -> str:
    mean, sd = mean_sd
    return _number(mean, digits) + (f" ± {sd:.{digits}f}" if sd is not None else "")


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
