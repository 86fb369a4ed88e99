"""Explains in plain words how a distillation is doing, from its records: python -m sid.doctor RUN_FOLDER"""

from pathlib import Path
from typing import Any

import click

from dnnlib import Command, UserError

from .config import DistillationConfig
from .monitor.records import OPTIONS_FILE, STATS_FILE, is_figure, measured_value, read_records, read_run_options
from .monitor.rules import LATER_OPTIONS, MAY_BE_NONE, OPTIONS, diagnose


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


def _is_sound(name: str, value: Any) -> bool:
    texts = ("objective", "weighting", "score_gradient", "lr_decay")
    if value is None:
        return name in MAY_BE_NONE
    if name in texts or name == "gan":
        return isinstance(value, bool if name == "gan" else str)
    return is_figure(value) and (name != "batch" or value >= 1)


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


@click.command(cls=Command)
@click.argument("run", type=click.Path(exists=True))
def main(run: str) -> None:
    """Say what is wrong with the distillation in the folder RUN, if anything, and which option would help."""
    run_dir = Path(run)
    options, stats = read_options(run_dir), run_dir / STATS_FILE
    records = read_records(stats, "Progress/kimg")
    for number, record in enumerate(records, start=1):
        wrong = [name for name, value in record.items() if not is_figure(value)]
        if wrong:
            raise UserError(f"{stats}: line {number}: its {wrong[0]} is not a number; remove the line")
    try:
        findings = diagnose(records, options)
    except ArithmeticError as error:
        raise UserError(f"{stats}: no distillation has such figures ({error}); restore the file") from None
    metric = best_metric(run_dir)
    for finding in findings:
        print(f"{finding.name}: {finding.text}")
    if metric:
        print(metric)


if __name__ == "__main__":
    main()
