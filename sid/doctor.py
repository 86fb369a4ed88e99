"""Says in plain words how a distillation fares, from what it recorded: python -m sid.doctor RUN_FOLDER"""

import json
from pathlib import Path
from typing import Any

import click

from dnnlib import Command, UserError

from .config import DistillationConfig
from .diagnosis import LATER_OPTIONS, MAY_BE_NONE, OPTIONS, diagnose


def read_records(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The JSON lines of `path`, each an object with the numbers `needed`; a last line that was cut off is left out.

    Errors: UserError when the file isn't there or holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        if not all(isinstance(record[name], int | float) for record in records for name in needed):
            raise ValueError("not numbers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not there or not readable; name a run folder of sid_train.py") from None
    return records


def read_options(path: Path) -> dict[str, Any]:
    """The options of a distillation. Errors: UserError when there are none."""
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        newer = {name: options.get(name, getattr(DistillationConfig, name)) for name in LATER_OPTIONS}
        found = {**{name: options[name] for name in OPTIONS}, **newer}
        if not all(_is_sound(name, value) for name, value in found.items()) or found["batch"] < 1:
            raise ValueError("not the options of a distillation")
        return found
    except (ValueError, OSError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not there or not that of a distillation; name a run folder of sid_train.py") from None


def _is_sound(name: str, value: Any) -> bool:
    texts = ("objective", "weighting", "score_gradient", "lr_decay")
    return isinstance(value, str if name in texts else int | float) or (value is None and name in MAY_BE_NONE)


def best_metric(run_dir: Path) -> str | None:
    """A sentence about the first FID that was measured: the best and the last."""
    for path in sorted(run_dir.glob("metric-fid*.jsonl")):
        records = read_records(path, "kimg", "value")
        if not records:
            continue
        best, last = min(records, key=lambda r: r["value"]), records[-1]
        name = path.stem.removeprefix("metric-")
        never = ", never better than at the start" if best is records[0] and len(records) > 1 else ""
        best, last = (f"{record['value']:.4g} at {record['kimg']:g} kimg" for record in (best, last))
        return f"{name}: best {best}, last {last}{never}"
    return None


@click.command(cls=Command)
@click.argument("run", type=click.Path(exists=True, file_okay=False))
def main(run: str) -> None:
    """Say what the distillation in the folder RUN suffers from, and which option would help."""
    run_dir = Path(run)
    options, stats = read_options(run_dir / "training_options.json"), run_dir / "stats.jsonl"
    records = read_records(stats, "Progress/kimg")
    if not all(isinstance(value, int | float) for record in records for value in record.values()):
        raise UserError(f"{stats}: not the statistics of a distillation; name a run folder of sid_train.py")
    for finding in diagnose(records, options):
        print(f"{finding.name}: {finding.text}")
    metric = best_metric(run_dir)
    if metric:
        print(metric)


if __name__ == "__main__":
    main()
