"""Runs of other sweeps, earlier or on other machines, read from their results (NAME.jsonl)."""

import functools
import json
from pathlib import Path
from typing import Any

import click

from dnnlib import UserError
from sid.monitor.records import read_records

from .folders import FREE
from .plan import Plan, Run, command_line, recorded_options
from .table import fid_metric, traces

RUN = {"setting": str, "options": dict, "common": dict, "seed": int}
NUMBER = int | float
MEASURED = {"kimg": NUMBER, "total_kimg": NUMBER, "seconds": NUMBER | None, "metrics": dict}


def runs_elsewhere(plan: Plan, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{name: records} of the runs of `plan` that have results in `folder`, complete or not.

    Errors: UserError when there are none, they are damaged, or a run has other options there.
    """
    files = sorted(folder.glob("*.jsonl"), key=lambda path: path.stem != plan.stem)  # its own first
    if not files:
        raise UserError(f"--records={folder}: no results (*.jsonl) of a sweep; name the --outdir of one")
    results = [record for file in files for record in _measurements(file)]
    found = {run.name: _of(run, results, folder) for run in plan.runs}
    return {name: records for name, records in found.items() if records}


def _measurements(file: Path) -> list[dict[str, Any]]:
    records = read_records(file)
    if not all(map(_is_sound, records)):
        raise UserError(f"{file}: not the results of a sweep; leave it out of --records={file.parent}")
    return [record for record in records if "failure" not in record]


def _is_sound(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    kinds = RUN if "failure" in record else {**RUN, **MEASURED}
    if not all(name in record and isinstance(record[name], kind) for name, kind in kinds.items()):
        return False
    metrics = record.get("metrics", {}).values()
    return all(isinstance(of, dict) and all(isinstance(v, NUMBER | None) for v in of.values()) for of in metrics)


def _of(run: Run, results: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The records of one run, by kimg."""
    by_kimg: dict[float, dict[str, Any]] = {}
    for record in results:
        if (record["setting"], record["seed"]) != (run.setting, run.seed):
            continue
        there = _recorded(json.dumps([record["common"], record["options"], run.seed]))
        for name, wanted in run.recorded.items():
            if name not in FREE and there[name] != wanted:
                raise UserError(
                    f"--records={folder}: setting {run.setting} has {name} = {json.dumps(there[name])} there, here"
                    f" {json.dumps(wanted)}: give the setting another name"
                )
        by_kimg.setdefault(record["kimg"], record)  # the results of several files repeat a run that they share
    return [by_kimg[kimg] for kimg in sorted(by_kimg)]


@functools.cache
def _recorded(command: str) -> dict[str, Any]:
    """`recorded_options` of [common options, a setting's own, seed] in JSON. Errors: UserError if invalid."""
    try:
        return recorded_options(command_line(*json.loads(command)))
    except click.ClickException as error:
        raise UserError(f"--records: options that sid_train.py no longer accepts: {error.format_message()}") from None


def is_finished(run: list[dict[str, Any]]) -> bool:
    """Whether the records of one run reach its end."""
    return any(trace.is_finished for trace in traces(run, run[0]["setting"], fid_metric(run)))
