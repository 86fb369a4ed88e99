"""Reads the records in a run folder: options, statistics of the ticks, metrics. Any of them may be damaged."""

import json
from pathlib import Path
from typing import Any

from dnnlib import UserError
from torch_utils import records
from torch_utils.records import is_figure, measured_value

from ..config import DistillationConfig
from .evidence import LATER_OPTIONS, MAY_BE_NONE, OPTIONS

OPTIONS_FILE = "training_options.json"  # torch_utils.run_folder.OPTIONS_FILE, which loads torch; a test compares
STATS_FILE = "stats.jsonl"
DISTANCES_FILE = "teacher-distance.jsonl"  # of each snapshot from the teacher's samples (sid.teacher_distance)
WANTED = "a run folder of sid_train.py"


def read_run_options(run: str | Path) -> dict[str, Any]:
    """The recorded options of a distillation. Errors: UserError when the folder isn't a run of one."""
    path = Path(run) / OPTIONS_FILE
    if not Path(run).is_dir():
        raise UserError(f"{run}: is not a folder; name {WANTED}")
    if not path.exists():
        raise UserError(f"{run}: has no {OPTIONS_FILE}; name {WANTED}")
    try:
        options = json.loads(records.read_text(path, WANTED))
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise UserError(f"{path}: is damaged: it doesn't hold options; restore it, or name {WANTED}")
    if isinstance(options.get("network"), dict):
        raise UserError(f"{run}: is a run of edm.train, which trains a teacher; name {WANTED}")
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
        raise UserError(f"{run_dir / OPTIONS_FILE}: its {name} is missing or damaged; name {WANTED}")
    return found


def read_records(path: Path, *needed: str) -> list[Any]:
    """`torch_utils.records.read_records` of a distillation. Errors: UserError naming the first damaged line."""
    return records.read_records(path, *needed, wanted=WANTED)


def best_metric(run_dir: Path) -> str | None:
    """A sentence about the first FID metric: its best and its last value. None if there is none."""
    for path in sorted(run_dir.glob("metric-fid*.jsonl")):
        measured = read_records(path, "kimg", "value")
        if not measured:
            continue
        best, last = min(measured, key=measured_value), measured[-1]
        name = path.stem.removeprefix("metric-")
        never = ", never better than at the start" if best is measured[0] and len(measured) > 1 else ""
        best, last = (f"{record['value']:.4g} at {record['kimg']:g} kimg" for record in (best, last))
        return f"{name}: best {best}, last {last}{never}"
    return None


def _is_sound(name: str, value: Any) -> bool:
    texts = ("objective", "weighting", "score_gradient", "lr_decay")
    if value is None:
        return name in MAY_BE_NONE
    if name in texts or name == "gan":
        return isinstance(value, bool if name == "gan" else str)
    return is_figure(value) and (name != "batch" or value >= 1)
