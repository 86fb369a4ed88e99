"""From turns to results: medians, spreads, ratios within a round, the table."""

import statistics
from typing import Any

from .modes import PUBLISHED

# Heading, path of the value in a row, factor.
COLUMNS = [
    ("img/sec", ("images_per_sec",), 1),
    ("x published", ("ratio_to_published",), 1),
    ("step sec", ("sec",), 1),
    ("generate", ("phases_sec", "generate"), 1),
    ("fake score", ("phases_sec", "fake_score"), 1),
    ("generator", ("phases_sec", "generator"), 1),
    ("updates", ("phases_sec", "updates"), 1),
    ("rest", ("phases_sec", "rest"), 1),
    ("peak GB", ("peak_GB",), 1),
    ("above start", ("above_start_GB",), 1),
    ("GFLOP/s", ("flops_per_sec",), 1e-9),
    ("% of peak", ("share_of_peak",), 100),
]


def spread(values: list[float]) -> dict[str, Any]:
    """{median, min, max, rounds}"""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def make_row(
    first: dict[str, Any],
    turns: list[dict[str, Any]],
    published: list[dict[str, Any]] | None = None,
    flops_per_image: float | None = None,
    peaks: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The numbers of one row. turns: one per round, as `worker.Runner.turn` gives them; published: that mode's turns.

    flops_per_image, peaks: operations that an image needs, and those per second of products of matrices, by precision.
    """
    images = first["images"]
    rates = [images / turn["sec"] for turn in turns]
    row = {**first, "steps": [turn["steps"] for turn in turns]}
    row["images_per_sec"] = spread(rates)
    row["sec"] = spread([turn["sec"] for turn in turns])
    row["phases_sec"] = {name: spread([turn["phases_sec"][name] for turn in turns]) for name in turns[0]["phases_sec"]}
    row["peak_GB"] = spread([turn["peak_GB"] for turn in turns])
    row["above_start_GB"] = spread([turn["peak_GB"] - first["baseline_GB"] for turn in turns])
    if published:
        pairs = zip(turns, published)
        row["ratio_to_published"] = spread([theirs["sec"] / ours["sec"] for ours, theirs in pairs])
    if flops_per_image and peaks:
        speeds = [rate * flops_per_image for rate in rates]
        row["flops_per_image"], row["flops_per_sec"] = flops_per_image, spread(speeds)
        peak = peaks.get(first["precision"], peaks["fp32"])
        row["share_of_peak"] = spread([speed / peak for speed in speeds])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """A line per row: medians with half the range in percent; '-' where there is no value."""
    shown = [["mode", *(heading for heading, _, _ in COLUMNS), "first sec"]]
    for row in rows:
        name = row["mode"] if row["what"] == "step" else row["what"]
        if "error" in row:
            shown.append([name, row["error"]])
        else:
            cells = [_cell(row, path, factor) for _, path, factor in COLUMNS]
            shown.append([name, *cells, f"{row['first_sec']:.3g}"])
    full = [line for line in shown if len(line) > 2]
    widths = [max(len(line[i]) for line in full) for i in range(len(shown[0]))]
    widths[0] = max(len(line[0]) for line in shown)
    return "\n".join("  ".join([line[0].ljust(widths[0]), *_right(line[1:], widths[1:])]) for line in shown)


def _right(cells: list[str], widths: list[int]) -> list[str]:
    return cells if len(cells) == 1 else [cell.rjust(width) for cell, width in zip(cells, widths)]


def _cell(row: dict[str, Any], path: tuple[str, ...], factor: float) -> str:
    value: Any = row
    for key in path:
        value = value.get(key, {})
    if not value:
        return "-"
    if path == ("ratio_to_published",) and row["mode"] == PUBLISHED:
        return "1"
    half = 50 * (value["max"] - value["min"]) / value["median"] if value["median"] else 0.0
    return f"{value['median'] * factor:.3g} ±{half:.0f}%"


def wrapper_table(wrappers: dict[str, list[tuple[float, float]]]) -> str:
    """A line per prediction: milliseconds of the network alone and inside its wrapper, and by how much that is longer.

    wrappers: as `wrapper.measure_wrappers` gives them. Ratios are taken within a round.
    """
    lines = [["wrapped as", "network ms", "wrapped ms", "longer by"]]
    for prediction, rounds in wrappers.items():
        alone, wrapped = (1000 * statistics.median(times) for times in zip(*rounds))
        extra = [100 * (inside / outside - 1) for outside, inside in rounds]
        half = (max(extra) - min(extra)) / 2
        lines.append([prediction, f"{alone:.3f}", f"{wrapped:.3f}", f"{statistics.median(extra):.1f} % ±{half:.1f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *_right(line[1:], widths[1:])]) for line in lines)


def profile_table(mode: str, phases: dict[str, dict[str, float]]) -> str:
    """Seconds of one step by phase and kind of operation, the largest kinds first, with their share of the step."""
    totals: dict[str, float] = {}
    for kinds in phases.values():
        for kind, seconds in kinds.items():
            totals[kind] = totals.get(kind, 0.0) + seconds
    step = sum(totals.values())
    lines = [[f"{mode}: one step", *phases, "sum", "share"]]
    for kind in sorted(totals, key=totals.__getitem__, reverse=True):
        cells = [f"{kinds.get(kind, 0.0):.4f}" for kinds in phases.values()]
        lines.append([kind, *cells, f"{totals[kind]:.4f}", f"{100 * totals[kind] / step:.1f}%"])
    sums = [f"{sum(kinds.values()):.4f}" for kinds in phases.values()]
    lines.append(["sum", *sums, f"{step:.4f}", ""])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *_right(line[1:], widths[1:])]) for line in lines)
