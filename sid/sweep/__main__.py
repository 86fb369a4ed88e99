"""Queues distillations, resumes after a break, reports: python -m sid.sweep docs/ablations/q1-objectives.toml"""

import dataclasses
import shlex
import sys
from collections.abc import Collection
from pathlib import Path

import click

from dnnlib import IntList, LongCommand, UserError, WholeRange, locked_folder
from sid.sweep.elsewhere import is_finished, runs_elsewhere
from sid.sweep.folders import STOPPED, status
from sid.sweep.plan import Plan, Run, load_plan
from sid.sweep.results import write_results
from sid.sweep.runner import describe, run_all


@click.command(cls=LongCommand, context_settings={"show_default": True})
@click.argument("file")
@click.option("--outdir", help="Folder for run folders and results; several sweeps may share it", default="sweeps")
@click.option("--nproc", help="Processes of each run", type=WholeRange(1), default=1)
@click.option("--only", help="Settings, teachers, or settings of teachers to run, separated by commas")
@click.option("--seeds", help="Seeds of FILE to run, separated by commas", type=IntList())
@click.option(
    "--records", help="Folder with results of other sweeps, whose finished runs are not repeated", metavar="DIR"
)
@click.option("--detector", help="Detector in FILE that you trust although it is a program (TorchScript)")
@click.option("--report", help="Run nothing; make records, table and plots from finished runs", is_flag=True)
@click.option("-n", "--dry-run", help="Print the status and command of each run; change nothing", is_flag=True)
def main(
    file: str,
    outdir: str,
    nproc: int,
    only: str | None,
    seeds: list[int] | None,
    records: str | None,
    detector: str | None,
    report: bool,
    dry_run: bool,
) -> None:
    """Run the distillations that FILE describes, one after the other, and make a table and plots of their FID.

    The same command continues after an interruption and repeats no finished run. Exit code 0: all finished;
    1: some failed; 75: stopped by a signal, run it again. docs/sweeps.md has the format of FILE.
    """
    plan, folder = load_plan(file, detector), Path(outdir)
    asked = choose(plan, only, seeds)
    elsewhere = {} if records is None else runs_elsewhere(plan, Path(records))
    chosen = without(asked, {name for name, run in elsewhere.items() if is_finished(run)}, folder)
    if records is not None:
        print(f"finished, by {records}: {len(asked) - len(chosen)} of {len(asked)} runs", flush=True)
    if dry_run:
        print(describe(chosen, folder, nproc))
        return
    if report and not records and not folder.is_dir():
        raise UserError(f"--outdir={outdir}: no such folder; name the --outdir of a sweep")
    exit_code = 0
    folder.mkdir(parents=True, exist_ok=True)
    if report:
        plan = dataclasses.replace(plan, runs=asked)
    else:
        with locked_folder(folder):
            for run in plan.runs:
                status(run, folder / run.name)  # refuses changed settings now, not after hours of running
            exit_code = run_all(chosen, folder, nproc)
    print(f"\n{write_results(plan, folder, elsewhere)}\n{folder / plan.stem}.md", flush=True)
    if exit_code == STOPPED:
        print(f"Stopped. To continue:\n{continue_command()}", flush=True)
    raise SystemExit(exit_code)


def choose(plan: Plan, only: str | None, seeds: list[int] | None) -> list[Run]:
    """The runs that --only names, of the seeds that --seeds names; all without them.

    only: settings, teachers, or both, which means those settings with those teachers; also one setting with one
        teacher, such as digits-sid.
    """
    known = set(plan.settings)
    named = known if only is None else set(only.split(","))
    teachers = named & plan.teachers.keys()
    settings = named & {setting for names in plan.teachers.values() for setting in names}
    unknown = sorted(named - known - teachers - settings)
    if unknown:
        raise UserError(f"--only={only}: no setting {unknown[0]!r} in FILE; it has {', '.join(sorted(known))}")
    chosen = named & known
    if teachers or settings:
        for teacher in teachers or plan.teachers:
            own = plan.teachers[teacher]
            chosen |= {own[setting] for setting in own if setting in settings or not settings}
    missing = sorted(set(seeds or []) - {run.seed for run in plan.runs})
    if missing:
        raise UserError(f"--seeds: no seed {missing[0]} in FILE; add it to its seeds")
    return [run for run in plan.runs if run.setting in chosen and (seeds is None or run.seed in seeds)]


def without(runs: list[Run], finished: Collection[str], folder: Path) -> list[Run]:
    """`runs` without the ones `finished` elsewhere, except runs that have begun here or that others here start from."""
    kept: list[Run] = []
    for run in reversed(runs):  # a run comes after its source
        needed = run.name in {other.source for other in kept}
        if run.name not in finished or needed or (folder / run.name).exists():
            kept.insert(0, run)
    return kept


def continue_command() -> str:
    return shlex.join(["python", "-m", "sid.sweep", *sys.argv[1:]])


if __name__ == "__main__":
    main()
