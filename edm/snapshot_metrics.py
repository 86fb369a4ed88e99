"""Metrics of the snapshots of a training, of a teacher or of a generator, recorded in its run folder."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edm.metrics.evaluate import Evaluator
from edm.metrics.sources import NetworkSource
from edm.zoo import network_hash
from torch_utils import distributed
from torch_utils.records import is_figure, measured_value, sound_records
from torch_utils.run_lines import path_text
from torch_utils.training_stats import append_line
from training.steps import Steps

FID_PROTOCOL = ("num_images", "seeds", "detector", "detector_sha256", "reference", "reference_sha256")
EVALUATIONS = "evaluations_"  # in a network's metadata: FID at so many evaluations per image


@dataclasses.dataclass(frozen=True)
class MultiStepFid:
    """FID of a network that is sampled with several evaluations per image."""

    value: float
    evaluations: int


class SnapshotMetrics:
    """Measures snapshots and appends the results to `metric-<name>.jsonl` in the run folder.

    A snapshot is recognised by the hash of its weights, so a resumed run measures none twice, and completes one that
    an earlier part of the run measured only in part. Damaged lines are skipped.

    steps: how many steps of Heun's sampler make an image; None: as the network's metadata says, one for a generator.
    """

    def __init__(self, run_dir: Path, evaluator: Evaluator, steps: int | None = None):
        self._run_dir, self._evaluator, self._steps = run_dir, evaluator, steps

    def measure(self, net: torch.nn.Module, nimg: int) -> dict[str, float]:
        """Measures the snapshot after `nimg` images. Every process must call it, with equal weights.

        Returns the new values by short names, on process 0, the first FID as `FID`.
        Errors: UserError on every process when the images fit no metric.
        """
        sha256 = network_hash(net)
        missing = distributed.from_process_0(self._missing(sha256))
        if not missing:
            return {}
        records = self._evaluator(NetworkSource(net, steps=self._steps, name="ema", sha256=sha256))
        if distributed.rank() != 0:
            return {}
        found = {}
        for record in records:
            if record["metric"] in missing:
                found |= self._named(record)
                line = json.dumps({"kimg": nimg / 1e3, **record})
                append_line(_metric_file(self._run_dir, record["metric"]), line)
        return found

    def _named(self, record: dict[str, Any]) -> dict[str, float]:
        """The values of a record by names for a line that is printed, without their deviations."""
        metric = record["metric"]
        if metric == first_fid(self._evaluator):
            return {"FID": record["value"]}
        values = {name: value for name, value in record["values"].items() if not name.endswith("_std")}
        return {metric: record["value"]} if len(values) == 1 else {f"{metric} {n}": v for n, v in values.items()}

    def _missing(self, sha256: str) -> list[str]:
        """The metrics that are not yet recorded for the weights with this hash."""
        names = [metric.name for metric in self._evaluator.metrics]
        known = {name: {record.get("network_sha256") for record in read_metrics(self._run_dir, name)} for name in names}
        return [name for name in names if sha256 not in known[name]]


def recorded_fid(
    net: Any, source: str | os.PathLike, metric: str, detector_sha256: str | None, reference_sha256: str | None
) -> MultiStepFid | None:
    """A teacher's FID as its file or the run that trained it recorded it; None if neither did, by this measure.

    net: the loaded network. source: its file. metric: such as fid5k. detector_sha256, reference_sha256: of the files of
    the detector and of the reference statistics to compare with; None for the latter: they aren't known.
    """
    found = getattr(net, "metadata", {}).get("fid")
    files = (detector_sha256, reference_sha256)
    if isinstance(found, dict) and found.get("metric") == metric and _compares_with(found, *files):
        values = {int(name.removeprefix(EVALUATIONS)): value for name, value in found.items() if _is_count(name)}
        several = {count: value for count, value in values.items() if count > 1 and is_figure(value)}
        if several:
            return MultiStepFid(several[max(several)], max(several))
    records = read_metrics(Path(source).parent, metric) if Path(source).is_file() else []
    sha256 = network_hash(net) if records else None
    for record in reversed(records):
        steps, is_own = record.get("steps"), record.get("network_sha256") == sha256
        if is_own and _compares_with(record, *files) and isinstance(steps, int) and steps > 1:
            return MultiStepFid(measured_value(record), 2 * steps - 1)
    return None


def _compares_with(record: dict[str, Any], detector_sha256: str | None, reference_sha256: str | None) -> bool:
    """Whether a record of FID is by this detector, and against these reference statistics as far as both are known."""
    references = {record.get("reference_sha256"), reference_sha256} - {None}
    return record.get("detector_sha256") == detector_sha256 and len(references) < 2


def fid_record(net: Any, run_dir: str | os.PathLike, metric: str) -> dict[str, Any] | None:
    """The FID that a run recorded for a network's weights, in the form that `recorded_fid` reads from metadata.

    metric: such as fid5k. Returns None if the run recorded none.
    """
    records = read_metrics(run_dir, metric)
    sha256 = network_hash(net) if records else None
    record = next((r for r in reversed(records) if r.get("network_sha256") == sha256), None)
    if record is None:
        return None
    return fid_metadata(record, net)


def fid_metadata(record: dict[str, Any], net: Any) -> dict[str, Any]:
    """A record of a FID metric in the form that `recorded_fid` reads from the metadata of the network `net`."""
    steps = record.get("steps")
    evaluations = 2 * steps - 1 if isinstance(steps, int) and steps > 1 else _evaluations_of(net)
    kept = {name: record[name] for name in FID_PROTOCOL if record.get(name) is not None}
    return {"metric": record["metric"], f"{EVALUATIONS}{evaluations}": measured_value(record), **kept}


def _evaluations_of(net: Any) -> int:
    steps = Steps.of(net)
    return 1 if steps is None else len(steps)


def _is_count(name: str) -> bool:
    return name.startswith(EVALUATIONS) and name.removeprefix(EVALUATIONS).isdecimal()


def read_metrics(run_dir: str | os.PathLike, name: str) -> list[dict[str, Any]]:
    """The records of `metric-<name>.jsonl`, oldest first, without damaged ones; none if there is no such file."""
    return sound_records(_metric_file(run_dir, name), "kimg", "value")


def first_fid(evaluator: Evaluator) -> str | None:
    """The name of the first FID among an evaluator's metrics."""
    return next((metric.name for metric in evaluator.metrics if metric.kind == "fid"), None)


def metrics_text(names: Sequence[str], reference: str | None) -> str:
    """What is measured, by name. reference: where the real images or their statistics come from."""
    text = ", ".join(names)
    return text if reference is None else f"{text} against {path_text(reference)}"


def _metric_file(run_dir: str | os.PathLike, name: str) -> Path:
    return Path(run_dir) / f"metric-{name}.jsonl"
