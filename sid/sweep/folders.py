"""The progress and records of a run, read from its folder alone, so that results can always be rebuilt."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnnlib import UserError, kimg_name, write_atomically
from sid.config import MEASURED
from sid.monitor.records import OPTIONS_FILE, STATS_FILE, read_records

from .plan import Run, recorded_options

FAILURE_FILE = "failure.json"
REFUSED, DIVERGED, STOPPED = 2, 3, 75  # exit codes of sid_train.py: docs/reliability.md
# Options that don't change a result, and values that only the run itself knows.
FREE = {"outdir", "nosubdir", "desc", "resume", "override", "dry_run", "state_ticks", "save_minutes", "keep_states"}
FREE |= {"measure_teacher", "log", "timeout", "cache", "workers", "real_images", "given"}


def status(run: Run, folder: Path) -> str:
    """'new', 'begun', 'finished', 'diverged' (and would again) or 'failed'.

    Errors: UserError when the folder holds a run with other options, or its records are damaged.
    """
    failure = read_failure(folder)
    options = read_run_options(folder)
    if options is not None:
        check_unchanged(run, folder, options)
        if is_finished(folder, options):
            return "finished"
    if failure:
        return "diverged" if failure["exit_code"] == DIVERGED else "failed"
    return "new" if options is None else "begun"


def check_unchanged(run: Run, folder: Path, options: dict[str, Any]) -> None:
    """Errors: UserError naming an option in which the run in `folder` differs from the one asked for."""
    there = {**recorded_options(()), **options}  # a run from before an option existed used its default
    free = FREE | chosen_by_run(run.recorded)
    for name, wanted in run.recorded.items():
        found = there[name]
        if name == "metrics":  # recorded as a list, and resolved where not given, as is data_stat
            found = wanted if wanted is None else ",".join(found or [])
            wanted = wanted and ",".join(part.strip() for part in wanted.split(","))
        if name in ("edm_model", "transfer") and found and wanted and Path(found).parent == Path(wanted):
            found = wanted  # a run folder stands for one of its snapshots
        if name == "transfer" and run.source and found:
            found = wanted if Path(found).parent.name == run.source else found
        if name not in free and found != wanted and not (name == "data_stat" and wanted is None):
            raise UserError(
                f"{folder} has {name} = {json.dumps(found)}, setting {run.setting} asks for {json.dumps(wanted)}:"
                f" give the setting another name, or remove the folder"
            )


def chosen_by_run(recorded: dict[str, Any]) -> set[str]:
    """The options that a run chooses by itself: those that it measures, and what trials decide or take up."""
    measured = {name for name in MEASURED if recorded[name] is None}
    if not recorded["trials"]:
        return measured
    from sid.trials import RATES  # loads torch

    return measured | {"total_kimg", *(set(RATES) - set(recorded["given"]))}


def is_finished(folder: Path, options: dict[str, Any]) -> bool:
    """Whether the last tick was at the end and every metric has been measured there."""
    stats = read_stats(folder)
    last = stats[-1]["Progress/kimg"] if stats else -1
    measured = read_metrics(folder, options["metrics"])
    return round(1000 * last) >= int(options["total_kimg"] * 1000) and all(last in of for of in measured.values())


def last_snapshot(folder: Path) -> Path | None:
    """Where the run in `folder` left its generator; None if it isn't finished.

    As torch_utils.checkpoint.snapshot_path, which loads torch, has it; a test compares.
    """
    options = read_run_options(folder)
    if options is None or not is_finished(folder, options):
        return None
    nimg = round(1000 * read_stats(folder)[-1]["Progress/kimg"])
    return folder / f"network-snapshot-{kimg_name(nimg, options['batch'])}.safetensors"


def read_run_options(folder: Path) -> dict[str, Any] | None:
    """training_options.json; None if the run hasn't begun. Errors: UserError when it is damaged."""

    def checked(options: Any) -> dict[str, Any]:
        if isinstance(options["metrics"], list) and options["total_kimg"] > 0 and options["processes"] > 0:
            return options
        raise ValueError

    remedy = f"not a distillation's; remove the folder {folder} to start the run again"
    return _read_json(folder / OPTIONS_FILE, checked, remedy)


def read_stats(folder: Path) -> list[dict[str, Any]]:
    path = folder / STATS_FILE
    return read_records(path, "Progress/kimg", "Timing/img_per_sec") if path.exists() else []


def read_metrics(folder: Path, names: list[str]) -> dict[str, dict[float, dict[str, Any]]]:
    """{metric: {kimg: its record}}."""
    paths = {name: folder / f"metric-{name}.jsonl" for name in names}
    found = {name: read_records(path, "kimg", "value") if path.exists() else [] for name, path in paths.items()}
    return {name: {record["kimg"]: record for record in records} for name, records in found.items()}


def read_failure(folder: Path) -> dict[str, Any] | None:
    """exit_code and message of the last attempt, if it failed."""

    def checked(failure: Any) -> dict[str, Any]:
        return {"exit_code": int(failure["exit_code"]), "message": str(failure["message"])}

    return _read_json(folder / FAILURE_FILE, checked, "damaged; remove it to try the run again")


def _read_json(path: Path, checked: Callable[[Any], dict[str, Any]], remedy: str) -> dict[str, Any] | None:
    """What `checked` makes of a file; None without one. Errors: UserError with the remedy."""
    if not path.exists():
        return None
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{path}: {remedy}") from None


def write_failure(folder: Path, exit_code: int, message: str) -> None:
    with write_atomically(folder / FAILURE_FILE) as file:
        file.write((json.dumps({"exit_code": exit_code, "message": message}) + "\n").encode())


def run_records(run: Run, folder: Path) -> list[dict[str, Any]]:
    """One record per snapshot that was measured, by kimg; one more with the failure if the run failed."""
    options, state = read_run_options(folder), status(run, folder)
    what = {"setting": run.setting, "options": run.options, "common": run.common, "seed": run.seed}
    records = []
    if options is not None:
        measured = read_metrics(folder, options["metrics"])
        seconds = training_seconds(read_stats(folder))
        dropped_kimg, dropped_seconds = dropped_trials(folder) if options.get("trials") else (0.0, 0.0)
        for kimg in sorted({kimg for of in measured.values() for kimg in of}):
            here = {name: of[kimg] for name, of in measured.items() if kimg in of}
            any_record = next(iter(here.values()))
            records.append(
                {
                    **what,
                    "kimg": kimg,
                    "total_kimg": options["total_kimg"],
                    "seconds": seconds.get(kimg),
                    "dropped_kimg": dropped_kimg,
                    "dropped_seconds": dropped_seconds,
                    "metrics": {name: _finite(record.get("values", {})) for name, record in here.items()},
                    "network_sha256": any_record.get("network_sha256"),
                    "device": any_record.get("device"),
                    "processes": options["processes"],
                    "versions": any_record.get("versions", {}),
                }
            )
    if state in ("diverged", "failed"):
        records.append({**what, "failure": read_failure(folder)})
    return records


def training_seconds(stats: list[dict[str, Any]]) -> dict[float, float]:
    """{kimg: seconds of training so far, without pictures and metrics}, at 0 and at every tick.

    From the rate of each tick: its seconds lack what was done before, when a run was stopped within it.
    """
    total, before, found = 0.0, 0.0, {0.0: 0.0}
    for record in stats:
        kimg, rate = record["Progress/kimg"], record["Timing/img_per_sec"]
        total += 1000 * (kimg - before) / rate if rate > 0 else 0.0
        before = kimg
        found[kimg] = total
    return found


def dropped_trials(folder: Path) -> tuple[float, float]:
    """(kimg, seconds of training) of the trials of a run that didn't go on.

    Errors: UserError when their record is damaged.
    """
    from sid.trials import RESULTS_FILE, TRIALS  # loads torch

    def checked(results: Any) -> dict[str, Any]:
        return {name: float(result["kimg"]) for name, result in results.items() if not result["best"]}

    file = folder / TRIALS / RESULTS_FILE
    trials = _read_json(file, checked, f"damaged; remove the folder {folder} to start the run again") or {}
    ends = [training_seconds(read_stats(folder / TRIALS / name)) for name in trials]
    return sum(trials.values()), sum(max(seconds.values()) for seconds in ends)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
