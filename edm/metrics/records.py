"""Records of metrics: summarised over trials, described in one line, appended to a file as JSON lines."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import dnnlib


def summarise(trials: Sequence[Sequence[dict]]) -> list[dict]:
    """Summarises the records of the same metrics over trials: each value's mean, standard deviation and minimum.

    A summary is the first trial's record with `seeds` from the first to the last trial's, `value` and `values` the
    means, and `trials`: {'num', 'std', 'min', 'values'}; std is the sample's (÷(n-1)), 0 for one trial.
    """
    joined = []
    for records in zip(*trials):
        by_name = {name: [record["values"][name] for record in records] for name in records[0]["values"]}
        means = {name: statistics.fmean(values) for name, values in by_name.items()}
        stds = {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in by_name.items()}
        minima = {name: min(values) for name, values in by_name.items()}
        record = {**records[0], "value": next(iter(means.values())), "values": means}
        if record["seeds"]:
            record["seeds"] = [records[0]["seeds"][0], records[-1]["seeds"][1]]
        joined.append({**record, "trials": {"num": len(records), "std": stds, "min": minima, "values": by_name}})
    return joined


def describe(record: dict) -> str:
    """One line: the metric, its values and what was measured; over several trials mean, standard deviation, minimum."""
    trials, parts = record.get("trials"), []
    if trials and trials["num"] == 1:
        trials = None
    for name, value in record["values"].items():
        spread = f" (sd {trials['std'][name]:.4g}, min {trials['min'][name]:.6g})" if trials else ""
        parts.append(f"{name} {value:.6g}{spread}")
    of = f"{record['num_images']} images"
    if trials:
        of = f"{trials['num']} x {of}"
    if record.get("seeds"):
        of += ", seeds {}-{}".format(*record["seeds"])
    if record.get("ranked_among", 1) > 1:
        of += f", ranked among {record['ranked_among']} prompts"
    if record.get("detector") is not None:
        of += f", detector {record['detector']}"
    return f"{record['metric']}: {', '.join(parts)}; {of}"


def check_appendable(path: str | os.PathLike | None) -> None:
    """Raises UserError naming --json if `append_records` could not write to `path`, if there is one."""
    if path is None:
        return
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise dnnlib.UserError(f"--json={path} can't be written; give another file")


def append_records(records: Sequence[dict], path: str | os.PathLike) -> None:
    """Appends one line of JSON per record to a file, whose folder is made if need be.

    Errors: UserError naming --json when the file can't be written.
    """
    lines = "".join(json.dumps(record) + "\n" for record in records)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise dnnlib.UserError(f"--json={path} can't be written: {error.strerror}; give another file") from None
