"""FID before and after a distillation, from a run's records."""

from pathlib import Path

import torch

from dnnlib import UserError
from edm.snapshot_metrics import recorded_fid

from ..monitor.records import read_records


def summarise(
    run_dir: Path, teacher: torch.nn.Module, source: str, transfer: str | None = None, steps: int = 1
) -> list[tuple[str, int, float]]:
    """Rows (network, evaluations per image, FID) from a run's records and the teacher's.

    source: the teacher's file. transfer: the network that the generator started from, if it isn't the teacher.
    steps: of the generator.
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
    goal = recorded_fid(teacher, source, metric, records[0].get("detector_sha256"))
    if goal is not None:
        rows.append(("teacher", goal.evaluations, goal.value))
    if records[0]["kimg"] == 0:
        before = "generator before (--transfer)" if transfer else "teacher = generator before"
        rows.append((before, steps, records[0]["value"]))
    rows.append((f"generator after {records[-1]['kimg']:g} kimg", steps, records[-1]["value"]))
    return rows
