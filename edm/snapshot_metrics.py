"""Metrics of the snapshots of a training, of a teacher or of a generator, recorded in its run folder."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from edm.metrics.evaluate import Evaluator
from edm.metrics.sources import NetworkSource
from edm.zoo import network_hash
from torch_utils import distributed
from torch_utils.records import sound_records
from torch_utils.training_stats import append_line


class SnapshotMetrics:
    """Measures snapshots and appends the results to `metric-<name>.jsonl` in the run folder.

    A snapshot is recognised by the hash of its weights, so a resumed run measures none twice, and completes one that
    an earlier part of the run measured only in part. Damaged lines are skipped.

    steps: how many steps of Heun's sampler make an image; None: as the network's metadata says, one for a generator.
    """

    def __init__(self, run_dir: Path, evaluator: Evaluator, steps: int | None = None):
        self._run_dir, self._evaluator, self._steps = run_dir, evaluator, steps

    def measure(self, net: torch.nn.Module, nimg: int) -> None:
        """Measures the snapshot after `nimg` images. Every process must call it, with equal weights.

        Errors: UserError on every process when the images fit no metric.
        """
        sha256 = network_hash(net)
        missing = distributed.from_process_0(self._missing(sha256))
        if not missing:
            return
        records = self._evaluator(NetworkSource(net, steps=self._steps, name="ema", sha256=sha256))
        if distributed.rank() != 0:
            return
        evaluations = "" if self._steps is None else f", {2 * self._steps - 1} evaluations"
        for record in records:
            if record["metric"] in missing:
                values = "  ".join(f"{name} {value:.4g}" for name, value in record["values"].items())
                print(f"{record['metric']} at {nimg / 1e3:.1f} kimg{evaluations}: {values}", flush=True)
                line = json.dumps({"kimg": nimg / 1e3, **record})
                append_line(_metric_file(self._run_dir, record["metric"]), line)

    def _missing(self, sha256: str) -> list[str]:
        """The metrics that are not yet recorded for the weights with this hash."""
        names = [metric.name for metric in self._evaluator.metrics]
        known = {name: {record.get("network_sha256") for record in read_metrics(self._run_dir, name)} for name in names}
        return [name for name in names if sha256 not in known[name]]


def read_metrics(run_dir: str | os.PathLike, name: str) -> list[dict[str, Any]]:
    """The records of `metric-<name>.jsonl`, oldest first, without damaged ones; none if there is no such file."""
    return sound_records(_metric_file(run_dir, name), "kimg", "value")


def _metric_file(run_dir: str | os.PathLike, name: str) -> Path:
    return Path(run_dir) / f"metric-{name}.jsonl"
