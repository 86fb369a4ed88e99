"""Writes what a sweep found: NAME.jsonl with the records, NAME.md with the table, two plots."""

import io
import json
from pathlib import Path
from typing import Any, BinaryIO

from dnnlib import write_atomically

from .folders import run_records
from .plan import Plan
from .table import Curve, curve, fid_metric, markdown, over_teachers, traces

INCHES, DOTS_PER_INCH, COLOURS = (8, 4.5), 100, 128
LABELLED = "2357"  # first digits of the minor ticks that are labelled on a long axis
LONG = 5  # highest value over lowest value of a long axis
STYLES = ("-", "--", ":", "-.")  # in combination with ten colours


def write_results(plan: Plan, outdir: Path, elsewhere: dict[str, list[dict[str, Any]]] | None = None) -> str:
    """Writes all files from the run folders of `plan`, replacing older ones; returns the tables.

    elsewhere: as `runs_elsewhere` gives it, for runs without a folder.
    Errors: UserError when a folder holds another run, or damaged records.
    """
    found = {run.name: run_records(run, outdir / run.name) for run in plan.runs}
    records = [record for name, own in found.items() for record in own or (elsewhere or {}).get(name, [])]
    table = tables(plan, records)
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    for name, text in ((f"{plan.stem}.jsonl", lines), (f"{plan.stem}.md", f"# {plan.title}\n\n{table}")):
        with write_atomically(outdir / name) as file:
            file.write(text.encode())
    for teacher, settings in plan.teachers.items():
        _plot_all(plan, f"{plan.stem}-{teacher}" if teacher else plan.stem, settings, records, outdir)
    return table


def tables(plan: Plan, records: list[dict[str, Any]]) -> str:
    """The tables of each teacher; if the file names teachers, they follow one with the FID at the end over all."""
    if list(plan.teachers) == [""]:
        return markdown(records, plan.settings, plan.seeds)
    of_teachers = [
        f"\n## {teacher}\n\n{markdown(records, list(settings.values()), plan.seeds)}"
        for teacher, settings in plan.teachers.items()
        if any(record["setting"] in settings.values() for record in records)
    ]
    return over_teachers(records, plan.teachers) + "".join(of_teachers)


def _plot_all(plan: Plan, stem: str, settings: dict[str, str], records: list[dict[str, Any]], outdir: Path) -> None:
    metric = fid_metric(records)
    curves = {setting: curve(traces(records, name, metric)) for setting, name in settings.items()}
    curves = {setting: line for setting, line in curves.items() if line.kimg}
    if metric is None or not curves:
        return
    try:
        import matplotlib.figure  # noqa: F401  # pyright: ignore[reportMissingImports]  an optional package
    except ImportError:
        print("No plots: they need matplotlib; pip install '.[plots]'", flush=True)
        return
    for axis in ("kimg", "seconds"):
        with write_atomically(outdir / f"{stem}-{axis}.png") as file:
            plot(curves, axis, metric, plan.title, file)


def plot(curves: dict[str, Curve], axis: str, metric: str, title: str, file: BinaryIO) -> None:
    """FID against 'kimg' or 'seconds', both logarithmic: the mean over seeds, and a band from lowest to highest."""
    import PIL.Image

    # Not pyplot, which needs a display and keeps global state.
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    for i, (setting, line) in enumerate(curves.items()):
        x, look = getattr(line, axis), {"color": f"C{i % 10}"}
        axes.plot(x, line.mean, label=setting, linestyle=STYLES[i // 10 % len(STYLES)], marker=".", **look)
        axes.fill_between(x, line.low, line.high, alpha=0.15, linewidth=0, **look)
    axes.set(xscale="log", yscale="log", xlabel=axis if axis == "kimg" else "seconds of training", ylabel=metric)
    axes.set_title(title, fontsize="medium")
    for ticks in (axes.xaxis, axes.yaxis):
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_formatter(lambda x, _, ticks=ticks: _label(x, *ticks.get_view_interval()))
    axes.tick_params(which="both", labelsize="small")
    axes.grid(which="both", alpha=0.2)
    figure.legend(loc="outside right upper", fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    picture = PIL.Image.open(drawn).convert("RGB").quantize(COLOURS, dither=PIL.Image.Dither.NONE)
    picture.save(file, format="png", optimize=True)  # small, and the same bytes from the same records


def _label(x: float, low: float, high: float) -> str:
    return f"{x:g}" if high < LONG * low or f"{x:e}"[0] in LABELLED else ""
