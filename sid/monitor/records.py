"""Reads the records in a run folder: options, statistics of the ticks, metrics. Any of them may be damaged."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dnnlib import UserError
from torch_utils import records
from torch_utils.records import is_figure, measured_value

from ..config import DistillationConfig
from .evidence import LATER_OPTIONS, MAY_BE_NONE, OPTIONS

OPTIONS_FILE = "training_options.json"  # torch_utils.run_folder.OPTIONS_FILE, which loads torch; a test compares
STATS_FILE = records.STATS_FILE
DISTANCES_FILE = "teacher-distance.jsonl"  # of each snapshot from the teacher's samples (sid.teacher_distance)
RETURNS_FILE = "returns.jsonl"  # to earlier states, with lower rates (sid.returns)
WANTED = "a run folder of sid_train.py"


def is_training(options: dict[str, Any]) -> bool:
    """Whether the options are those of edm.train, which trains a teacher."""
    return isinstance(options.get("network"), dict)


def read_any_options(run: str | Path, wanted: str) -> dict[str, Any]:
    """The recorded options of a run, of a distillation or of edm.train.

    wanted: the folder to name instead. Errors: UserError when the folder isn't a run.
    """
    path = Path(run) / OPTIONS_FILE
    if not Path(run).is_dir():
        raise UserError(f"{run}: is not a folder; name {wanted}")
    if not path.exists():
        raise UserError(f"{run}: has no {OPTIONS_FILE}; name {wanted}")
    try:
        options = json.loads(records.read_text(path, wanted))
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise UserError(f"{path}: is damaged: it doesn't hold options; restore it, or name {wanted}")
    return options


def read_run_options(run: str | Path) -> dict[str, Any]:
    """The recorded options of a distillation. Errors: UserError when the folder isn't a run of one."""
    options = read_any_options(run, WANTED)
    if is_training(options):
        raise UserError(f"{run}: is a run of edm.train, which trains a teacher; name {WANTED}")
    if not isinstance(options.get("edm_model", ""), str):
        raise UserError(f"{Path(run) / OPTIONS_FILE}: its edm_model is not the name of a network; restore the file")
    return options


def read_options(run_dir: Path) -> dict[str, Any]:
    """The options of a distillation that the rules need, with the learning rates that its returns have left.

    Errors: UserError when one is missing or damaged.
    """
    options = read_run_options(run_dir)
    options |= {rate: value for line in read_returns(run_dir) for rate, value in line.items() if rate in ("lr", "glr")}
    newer = {name: options.get(name, getattr(DistillationConfig, name)) for name in LATER_OPTIONS}
    found = {**{name: options.get(name) for name in OPTIONS}, **newer}
    wrong = [name for name, value in found.items() if not _is_sound(name, value)]
    if wrong:
        name = wrong[0]
        raise UserError(f"{run_dir / OPTIONS_FILE}: its {name} is missing or damaged; name {WANTED}")
    return found


def read_returns(run_dir: Path) -> list[dict[str, Any]]:
    """The returns of a run to earlier states: where to and where from, in kimg, and both learning rates since then."""
    return records.sound_records(run_dir / RETURNS_FILE, "kimg", "from_kimg", "lr", "glr")


def returns_text(returns: list[dict[str, Any]]) -> str | None:
    """A sentence about them; None if there are none."""
    if not returns:
        return None
    last, count = returns[-1], "once," if len(returns) == 1 else f"{len(returns)} times, last"
    way, rates = f"{last['from_kimg']:g} to {last['kimg']:g} kimg", f"--lr={last['lr']:g} --glr={last['glr']:g}"
    return f"the run went back {count} from {way}, and has {rates} since then: {last.get('why')}"


def read_records(path: Path, *needed: str) -> list[Any]:
    """`torch_utils.records.read_records` of a distillation. Errors: UserError naming the first damaged line."""
    return records.read_records(path, *needed, wanted=WANTED)


@dataclasses.dataclass(frozen=True)
class MeasuredFid:
    """The first FID that a run measures: records with kimg and value, oldest first; the teacher's figure if known."""

    name: str
    records: list[dict[str, Any]]
    teacher: float | None

    @property
    def last(self) -> float:
        return measured_value(self.records[-1])

    def __str__(self) -> str:
        """A sentence about its best and its last value."""
        best, last = min(self.records, key=measured_value), self.records[-1]
        text = f"{last['value']:.4g} at {last['kimg']:g} kimg"
        if best is not last:
            text = f"best {best['value']:.4g} at {best['kimg']:g} kimg, last {text}"
            text += ", never better than at the start" if best is self.records[0] else ""
        elif len(self.records) > 1:
            text += ", the best so far"
        return f"{self.name}: {text}" + ("" if self.teacher is None else f"; the teacher has {self.teacher:.4g}")


def read_fid(run_dir: Path) -> MeasuredFid | None:
    """The first FID of a run; None if it measured none. Errors: UserError when its records are damaged."""
    teacher = teacher_fid(read_run_options(run_dir))
    for path in sorted(run_dir.glob("metric-fid*.jsonl")):
        if measured := read_records(path, "kimg", "value"):
            name = path.stem.removeprefix("metric-")
            return MeasuredFid(name, measured, teacher)
    return None


def teacher_fid(options: dict[str, Any]) -> float | None:
    """The teacher's FID as a run recorded it; None if it knew none. options: as the run recorded them."""
    found = options.get("teacher_fid")
    value = found.get("value") if isinstance(found, dict) else None
    return value if is_figure(value) else None


def _is_sound(name: str, value: Any) -> bool:
    texts = ("objective", "weighting", "score_gradient", "lr_decay")
    if value is None:
        return name in MAY_BE_NONE
    if name in texts or name == "gan":
        return isinstance(value, bool if name == "gan" else str)
    return is_figure(value) and (name != "batch" or value >= 1)
