"""What a run's folder holds, for its page. Nothing in the folder can make it fail; it works without torch."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnnlib import UserError, open_plain
from torch_utils.records import MAX_BYTES, METRIC_FILE, is_figure, parse_line

from ..monitor.clusters import is_sound
from ..monitor.diagnosis import diagnose
from ..monitor.records import (
    DISTANCES_FILE,
    OPTIONS_FILE,
    STATS_FILE,
    MeasuredFid,
    is_training,
    read_options,
    read_returns,
    teacher_fid,
)
from ..monitor.rules import Finding

MAX_RECORDS = 100_000  # of a file; of more, every second one is left out, as often as necessary
MAX_NAMES = 100  # of figures in a record
MAX_METRICS = 8
TRIAL_RESULTS = "trials/results.json"  # of sid.trials, which loads torch; a test compares
PROMPTS_FILE = "prompts.json"  # of the first images of every snapshot (sid.report.pictures)
MAX_PROMPTS, MAX_PROMPT_CHARACTERS = 16, 500
SILENT_SEC = 600  # a run that has written nothing for so long, or for three ticks, isn't running

Figures = list[dict[str, float]]  # records, by kimg


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run recorded: options as plain values; ticks, distances and metrics as figures by name, oldest first.

    Distances may also have counts of images (`clusters`).
    """

    run_dir: Path
    options: dict[str, Any]
    ticks: Figures
    distances: list[dict[str, Any]]
    metrics: dict[str, Figures]
    trials: dict[str, dict[str, Any]]
    returns: list[dict[str, Any]]
    prompts: list[str]
    is_running: bool

    @property
    def is_training(self) -> bool:
        """Whether edm.train trains a network here, as opposed to a distillation."""
        return is_training(self.options)

    @property
    def kimg(self) -> float:
        """How far the run has come."""
        return self.ticks[-1]["Progress/kimg"] if self.ticks else 0.0

    @property
    def total_kimg(self) -> float | None:
        """The length of the run, if it is recorded."""
        total = self.options.get("total_kimg")
        return float(total) if is_figure(total) and total > 0 else None

    @property
    def state(self) -> str:
        """finished, running or stopped."""
        if self.total_kimg is not None and int(self.kimg * 1000) >= int(self.total_kimg * 1000):
            return "finished"
        return "running" if self.is_running else "stopped"

    @property
    def fid(self) -> MeasuredFid | None:
        """The first FID that the run measures."""
        name = next((name for name in self.metrics if name.startswith("fid")), None)
        if name is None:
            return None
        return MeasuredFid(name, self.metrics[name], teacher_fid(self.options))

    def findings(self) -> list[Finding]:
        """What the doctor says (`sid.doctor`)."""
        try:
            return diagnose(self.ticks, read_options(self.run_dir), self.distances, self.fid)
        except UserError as error:
            return [Finding("unknown", f"the run can't be judged: {error.message}", False)]
        except (ArithmeticError, ValueError) as error:
            return [Finding("unknown", f"no distillation has such figures ({error})", False)]


def read_run(run_dir: Path, is_running: bool | None = None) -> RunRecord:
    """Reads a run's folder, leaving out what is damaged.

    is_running: whether the run goes on; None: judged by when it last wrote something.
    """
    ticks = read_figures(run_dir / STATS_FILE, "Progress/kimg")
    metrics = {}
    for path in sorted(run_dir.glob("metric-*.jsonl")) if run_dir.is_dir() else []:
        name = METRIC_FILE.fullmatch(path.name)
        if name and len(metrics) < MAX_METRICS and (records := read_figures(path, "kimg", "value")):
            metrics[name[1]] = records
    return RunRecord(
        run_dir,
        _read_object(run_dir / OPTIONS_FILE),
        ticks,
        read_figures(run_dir / DISTANCES_FILE, "kimg", "value", also=_clusters),
        metrics,
        {n: r for n, r in _read_object(run_dir / TRIAL_RESULTS).items() if isinstance(r, dict)},
        read_returns(run_dir),
        _prompts(run_dir),
        time.time() < silent_from(run_dir, ticks) if is_running is None else is_running,
    )


def read_figures(
    path: Path, kimg: str, *needed: str, also: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: {}
) -> list[dict[str, Any]]:
    """The figures in the records of a file, sorted by `kimg`; of records with equal kimg, the last one.

    Damaged lines are left out, and so are values that aren't finite unless they are `needed`: those become NaN.
    also: what else to keep of a record.
    """
    found: dict[float, dict[str, Any]] = {}
    stride = 1
    try:
        with open_plain(path, MAX_BYTES) as file:
            for number, line in enumerate(file):
                if number % stride or not line.endswith(b"\n"):
                    continue
                record = parse_line(line.decode("utf-8", "replace"))
                if not isinstance(record, dict) or not is_figure(record.get(kimg)) or record[kimg] < 0:
                    continue
                figures = {n: v for n, v in list(record.items())[:MAX_NAMES] if is_figure(v)}
                if all(isinstance(record.get(name), int | float) for name in needed):
                    found[record[kimg]] = (
                        figures | {name: figures.get(name, math.nan) for name in needed} | also(record)
                    )
                if len(found) > MAX_RECORDS:
                    found, stride = dict(list(found.items())[::2]), 2 * stride
    except OSError:
        return []
    return [found[key] for key in sorted(found)]


def _clusters(record: dict[str, Any]) -> dict[str, Any]:
    return {"clusters": record["clusters"]} if is_sound(record.get("clusters")) else {}


def _prompts(run_dir: Path) -> list[str]:
    """The prompts of the first images; long ones are cut off."""
    found = _read_object(run_dir / PROMPTS_FILE).get("prompts")
    texts = [text for text in found if isinstance(text, str)] if isinstance(found, list) else []
    return [text[:MAX_PROMPT_CHARACTERS] for text in texts[:MAX_PROMPTS]]


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        with open_plain(path, 1 << 20) as file:
            found = json.loads(file.read().decode("utf-8", "replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def silent_from(run_dir: Path, ticks: Figures) -> float:
    """The time (of time.time) from which a run that has written nothing more isn't running."""
    tick_sec = ticks[-1].get("Timing/sec_per_tick", 0.0) if ticks else 0.0
    written = 0.0
    for name in (STATS_FILE, "log.txt", OPTIONS_FILE):
        try:
            written = max(written, (run_dir / name).stat().st_mtime)
        except OSError:
            continue
    return written + max(SILENT_SEC, 3 * tick_sec)
