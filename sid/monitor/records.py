"""Reads the records in a run folder: options, statistics of the ticks, metrics. Any of them may be damaged."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib import UserError
from dnnlib.util import MAX_NUMBER

from ..config import DistillationConfig
from .rules import LATER_OPTIONS, MAY_BE_NONE, OPTIONS

OPTIONS_FILE = "training_options.json"  # torch_utils.run_folder.OPTIONS_FILE, which loads torch; a test compares
STATS_FILE = "stats.jsonl"
DISTANCES_FILE = "teacher-distance.jsonl"  # energy distance of each snapshot from the teacher's samples
MAX_BYTES = 256 << 20
WANTED = "name a run folder of sid_train.py"


def read_run_options(run: str | Path) -> dict[str, Any]:
    """The recorded options of a distillation. Errors: UserError when the folder isn't a run of one."""
    path = Path(run) / OPTIONS_FILE
    if not Path(run).is_dir():
        raise UserError(f"{run}: is not a folder; {WANTED}")
    if not path.exists():
        raise UserError(f"{run}: has no {OPTIONS_FILE}; {WANTED}")
    try:
        options = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise UserError(f"{path}: is damaged: it doesn't hold options; restore it, or {WANTED}")
    if isinstance(options.get("network"), dict):
        raise UserError(f"{run}: is a run of edm.train, which trains a teacher; {WANTED}")
    if not isinstance(options.get("edm_model", ""), str):
        raise UserError(f"{path}: its edm_model is not the name of a network; restore the file")
    return options


def read_options(run_dir: Path) -> dict[str, Any]:
    """The options of a distillation that the rules need. Errors: UserError when one is missing or damaged."""
    options = read_run_options(run_dir)
    newer = {name: options.get(name, getattr(DistillationConfig, name)) for name in LATER_OPTIONS}
    found = {**{name: options.get(name) for name in OPTIONS}, **newer}
    wrong = [name for name, value in found.items() if not _is_sound(name, value)]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{run_dir / OPTIONS_FILE}: its {name} is missing or damaged; name a run folder of sid_train.py"
        )
    return found


def read_records(path: Path, *needed: str) -> list[Any]:
    """The JSON lines of `path`, each an object with the numbers `needed`; a last line that was cut off is left out.

    Errors: UserError naming the file, and the first line that is damaged.
    """
    records = []
    for number, record in _lines(path):
        if record is None or not _has_numbers(record, needed):
            what = f" with the numbers {', '.join(needed)}" if needed else ""
            raise UserError(f"{path}: line {number} is damaged, not a record{what}; remove it, or restore the file")
        records.append(record)
    return records


def sound_records(path: Path, *needed: str) -> list[dict[str, Any]]:
    """As `read_records`, but skips damaged lines; empty if there is no such file."""
    if not path.is_file():
        return []
    return [record for _, record in _lines(path) if isinstance(record, dict) and _has_numbers(record, needed)]


def best_metric(run_dir: Path) -> str | None:
    """A sentence about the first FID metric: its best and its last value. None if there is none."""
    for path in sorted(run_dir.glob("metric-fid*.jsonl")):
        records = read_records(path, "kimg", "value")
        if not records:
            continue
        best, last = min(records, key=measured_value), records[-1]
        name = path.stem.removeprefix("metric-")
        never = ", never better than at the start" if best is records[0] and len(records) > 1 else ""
        best, last = (f"{record['value']:.4g} at {record['kimg']:g} kimg" for record in (best, last))
        return f"{name}: best {best}, last {last}{never}"
    return None


def is_figure(value: Any) -> bool:
    """Whether `value` is a number small enough to compute with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def measured_value(record: dict[str, Any]) -> float:
    """The value of a metric's record, for finding the lowest: NaN counts as infinite."""
    return math.inf if math.isnan(record["value"]) else record["value"]


def _is_sound(name: str, value: Any) -> bool:
    texts = ("objective", "weighting", "score_gradient", "lr_decay")
    if value is None:
        return name in MAY_BE_NONE
    if name in texts or name == "gan":
        return isinstance(value, bool if name == "gan" else str)
    return is_figure(value) and (name != "batch" or value >= 1)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, parsed content or None if damaged) of each complete line."""
    for number, line in enumerate(_read_text(path).split("\n")[:-1], start=1):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            yield number, None


def _has_numbers(record: Any, needed: tuple[str, ...]) -> bool:
    if not needed:
        return True
    return isinstance(record, dict) and all(_is_needed(name, record.get(name)) for name in needed)


def _is_needed(name: str, value: Any) -> bool:
    """Counts of images must be finite; measured values may be infinite or NaN."""
    if name.endswith("kimg"):
        return is_figure(value) and value >= 0
    return isinstance(value, float) or is_figure(value)


def _read_text(path: Path) -> str:
    """Errors: UserError when the file can't be read or is too large."""
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise UserError(f"{path}: is not a plain file; remove it, or restore the file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MB, so it can't be a run's; {WANTED}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; {WANTED} that has finished a tick") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it isn't text in UTF-8"
        raise UserError(f"{path}: can't be read ({reason}); restore the file") from None
