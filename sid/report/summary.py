"""FID before and after a distillation, from a run's records."""

from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from edm.snapshot_metrics import MultiStepFid, recorded_fid
from torch_utils.records import is_figure

from ..monitor.records import read_records, teacher_fid


def summarise(
    run_dir: Path, teacher: torch.nn.Module, options: dict[str, Any], guided: bool = False
) -> list[tuple[str, int, float]]:
    """Rows (network, evaluations per image, FID) from a run's records and the teacher's.

    options: as the run recorded them. guided: whether the teacher was guided.
    Empty when the run measured no FID. Errors: UserError when its records are damaged or hold nothing yet.
    """
    files = sorted(run_dir.glob("metric-fid*.jsonl"))
    if not files:
        return []
    records = read_records(files[0], "kimg", "value")
    if not records:
        raise UserError(f"{files[0]}: holds no record; wait for the first snapshot of the run")
    rows = []
    metric = files[0].stem.removeprefix("metric-")
    steps = options.get("steps", 1)
    goal = _goal(options)
    if goal is None and not guided:
        detector, reference = (records[0].get(f"{name}_sha256") for name in ("detector", "reference"))
        goal = recorded_fid(teacher, options["edm_model"], metric, detector, reference)
    if goal is not None:
        rows.append(("guided teacher" if guided else "teacher", goal.evaluations, goal.value))
    if records[0]["kimg"] == 0:
        before = "generator before (--transfer)" if options.get("transfer") else "teacher = generator before"
        rows.append((before, steps, records[0]["value"]))
    rows.append((f"generator after {records[-1]['kimg']:g} kimg", steps, records[-1]["value"]))
    return rows


def _goal(options: dict[str, Any]) -> MultiStepFid | None:
    """The teacher's FID that the run knew."""
    value = teacher_fid(options)
    evaluations = None if value is None else options["teacher_fid"].get("evaluations")
    return MultiStepFid(value, int(evaluations)) if value is not None and is_figure(evaluations) else None
