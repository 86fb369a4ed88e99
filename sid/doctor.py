"""Explains in plain words how a distillation is doing, from its records: python -m sid.doctor RUN_FOLDER"""

from pathlib import Path

import click

from dnnlib import Command, UserError
from torch_utils.records import is_figure

from .monitor.diagnosis import diagnose
from .monitor.records import (
    DISTANCES_FILE,
    STATS_FILE,
    read_fid,
    read_options,
    read_records,
    read_returns,
    returns_text,
)

PAGE = "index.html"  # `report.page.PAGE_FILE`, which takes long to import


@click.command(cls=Command)
@click.argument("run", type=click.Path(exists=True))
def main(run: str) -> None:
    """Say what is wrong with the distillation in the folder RUN, if anything, and which option would help."""
    run_dir = Path(run)
    options, stats = read_options(run_dir), run_dir / STATS_FILE
    if not stats.exists() and (run_dir / "trials").is_dir():
        raise UserError(
            f"{run}: its trials aren't over yet, and it has no figures before; its page, {PAGE}, shows them"
        )
    records = read_records(stats, "Progress/kimg")
    for number, record in enumerate(records, start=1):
        wrong = [name for name, value in record.items() if not is_figure(value)]
        if wrong:
            raise UserError(f"{stats}: line {number}: its {wrong[0]} is not a number; remove the line")
    distances = run_dir / DISTANCES_FILE
    measured = read_records(distances, "kimg", "value") if distances.exists() else []
    fid = read_fid(run_dir)
    try:
        findings = diagnose(records, options, measured, fid)
    except ArithmeticError as error:
        raise UserError(f"{stats}: no distillation has such figures ({error}); restore the file") from None
    for finding in findings:
        print(f"{finding.name}: {finding.text}")
    for text in (returns_text(read_returns(run_dir)), fid):
        if text is not None:
            print(text)


if __name__ == "__main__":
    main()
