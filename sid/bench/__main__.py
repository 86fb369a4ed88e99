"""Measures the training step of a recipe, with random weights: python -m sid.bench --recipe=demo --device=cpu"""

import datetime
import json
from collections.abc import Callable
from typing import Any

import click

from dnnlib import Command, FiniteRange, UserError, WholeRange, check_new_file, write_atomically
from dnnlib.options import Idle
from sid.bench.modes import MODES, PUBLISHED, Mode, parse_modes
from sid.bench.recipes import RECIPES
from sid.bench.results import make_row, profile_table, table, wrapper_table
from sid.bench.worker import Worker, WorkerFailed

WHAT = ("step", "sampling", "metrics", "profile", "wrapper")
FORMAT = 1  # of the JSON file
PEAKS = "matmul_flops_per_sec"


def measures_none_of(*parts: str) -> Callable[[dict[str, Any]], bool]:
    """Tells by the values of all options whether --what has none of these."""
    return lambda options: not {*parts} & {*options["what"].split(",")}


CHECKS = (
    Idle(("modes",), "without step or profile in --what", measures_none_of("step", "profile")),
    Idle(
        ("eval_batch",),
        "without sampling, metrics or wrapper in --what",
        measures_none_of("sampling", "metrics", "wrapper"),
    ),
    Idle(("detector",), "without metrics in --what", measures_none_of("metrics")),
    Idle(("seconds",), "with --steps", lambda options: options["steps"] is not None),
)


@click.command(cls=Command, checks=CHECKS, context_settings={"show_default": True})
@click.option(
    "--recipe",
    help="Networks and settings of run_sid.sh; micro only tests the benchmark itself",
    type=click.Choice(list(RECIPES)),
    default="demo",
)
@click.option("--what", help=f"Some of {','.join(WHAT)}", default="step")
@click.option(
    "--modes",
    default=f"{PUBLISHED},fp32",
    help=f"{PUBLISHED}, {', '.join(MODES)}, or settings of DistillationConfig, joined by +",
)
@click.option("--rounds", help="How many turns each mode takes; they alternate", type=WholeRange(1), default=3)
@click.option("--seconds", help="Length of a turn, at least one step", type=FiniteRange(0, min_open=True), default=10.0)
@click.option("--steps", help="Steps of a turn, instead of --seconds", type=WholeRange(1))
@click.option("--batch", help="Images per step  [default: one GPU's share in the recipe]", type=WholeRange(1))
@click.option("--batch-gpu", help="Images at once  [default: the recipe's]", type=WholeRange(1))
@click.option("--eval-batch", help="Images at once in sampling, metrics and wrapper", type=WholeRange(1), default=64)
@click.option("--detector", help="For metrics  [default: the demo's for the demo, else a small one of random weights]")
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the first available]")
@click.option("--json", "json_file", help="New file for all results, with machine and versions")
def main(recipe: str, what: str, modes: str, rounds: int, seconds: float, steps: int | None, **options: Any) -> None:
    """Time and memory of the training step in several modes, side by side.

    Each mode has its own process; they take turns, so that other load on the machine affects all of them. Ratios are
    taken within a round. Numbers are medians over the rounds, followed by half the range.
    """
    path = options.pop("json_file")
    if path is not None:
        check_new_file(path, "--json")
    parts = what.split(",")
    if not set(parts) <= set(WHAT) or len(set(parts)) < len(parts):
        raise UserError(f"--what={what}: name some of {','.join(WHAT)}, each once")
    chosen = parse_modes(modes)
    common = {"recipe": recipe, **options}
    jobs = [{**common, "what": "step", "mode": mode} for mode in (chosen if "step" in parts else [])]
    jobs += [{**common, "what": part, "mode": Mode(part, {})} for part in parts if part in ("sampling", "metrics")]
    results = run(common, jobs, rounds, seconds, steps)
    results["profiles"] = profiles(common, chosen) if "profile" in parts else {}
    results["wrappers"] = wrappers(common, rounds, seconds, steps) if "wrapper" in parts else {}
    asked = {"what": what, "modes": modes, "rounds": rounds, "seconds": seconds, "steps": steps}
    report = {"format": FORMAT, "date": now(), "options": {**common, **asked}, **results}
    print(f"\n{headline(report)}")
    if report["rows"]:
        print(f"\n{table(report['rows'])}")
    for mode, phases in report["profiles"].items():
        print(f"\n{profile_table(mode, phases)}")
    if report["wrappers"]:
        print(f"\n{wrapper_table(report['wrappers'])}")
    if path is not None:
        with write_atomically(path) as file:
            file.write(json.dumps(report, indent=2).encode() + b"\n")
    if any("error" in row for row in report["rows"]):
        raise SystemExit(1)


def run(
    common: dict[str, Any], jobs: list[dict[str, Any]], rounds: int, seconds: float, steps: int | None
) -> dict[str, Any]:
    """Facts about the machine, and `rows`, one per job. Errors: UserError when an option is at fault."""
    mathematics: list[dict[str, Any]] = []
    for job in jobs:
        if job["what"] == "step" and job["mode"].mathematics() not in mathematics:
            mathematics.append(job["mode"].mathematics())
    print("Counting operations, measuring the machine ...", flush=True)
    machine = Worker({**common, "what": "machine", "mathematics": mathematics})
    machine.close()
    facts = machine.first
    counts = facts.pop("flops_per_image")

    workers: dict[int, Worker] = {}
    turns: dict[int, list[dict[str, Any]]] = {index: [] for index in range(len(jobs))}
    errors: dict[int, str] = {}
    try:
        for number in range(rounds + 1):  # in round 0 all start, one after the other
            for index, job in enumerate(jobs):
                if index in errors:
                    continue
                try:
                    if number == 0:
                        workers[index] = Worker(job)
                    else:
                        turns[index].append(workers[index].turn(seconds, steps))
                    show(job, number, workers[index].first, turns[index])
                except WorkerFailed as error:
                    errors[index] = str(error)
    finally:
        for worker in workers.values():
            worker.close()

    finished = {index: worker.first for index, worker in workers.items() if index not in errors}
    published = next((index for index in finished if jobs[index]["mode"].published), None)
    rows = []
    for index, job in enumerate(jobs):
        row = {"what": job["what"], "mode": job["mode"].name, "overrides": job["mode"].overrides}
        if index in errors:
            rows.append({**row, "error": errors[index]})
            continue
        extra = {}
        if job["what"] == "step":
            flops = counts[mathematics.index(job["mode"].mathematics())]
            extra = {
                "published": None if published is None else turns[published],
                "flops_per_image": flops,
                "peaks": facts[PEAKS],
            }
        rows.append({**row, **make_row(finished[index], turns[index], **extra)})
    return {**facts, "rows": rows}


def profiles(common: dict[str, Any], modes: list[Mode]) -> dict[str, dict[str, dict[str, float]]]:
    """{mode: {phase: {kind of operation: seconds}}} of one step each."""
    result = {}
    for mode in modes:
        worker = Worker({**common, "what": "profile", "mode": mode})
        worker.close()
        result[mode.name] = worker.first
    return result


def wrappers(
    common: dict[str, Any], rounds: int, seconds: float, steps: int | None
) -> dict[str, list[tuple[float, float]]]:
    """{prediction: (seconds of the network alone, seconds inside its wrapper) of each round}."""
    worker = Worker({**common, "what": "wrapper", "rounds": rounds, "seconds": seconds, "steps": steps})
    worker.close()
    return worker.first


def show(job: dict[str, Any], number: int, first: dict[str, Any], turns: list[dict[str, Any]]) -> None:
    """A line of progress."""
    name = job["mode"].name
    if number == 0:
        print(f"{name}: first step after {first['first_sec']:.2f} sec", flush=True)
    else:
        rate = first["images"] / turns[-1]["sec"]
        print(f"round {number} {name}: {rate:.4g} images/sec, peak {turns[-1]['peak_GB']:.2f} GB", flush=True)


def headline(report: dict[str, Any]) -> str:
    """Two lines: what ran where; the machine's peaks."""
    machine, options = report["machine"], report["options"]
    place = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    peaks = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in report[PEAKS].items())
    sizes = f"batch {report['batch']}, {report['batch_gpu']} at once"
    return f"{options['recipe']}, {sizes}; {place}, torch {report['versions']['torch']}\nmatmul GFLOP/s: {peaks}"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    main()
