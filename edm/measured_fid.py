"""FIDs that were measured with several evaluations per image, kept in the cache folder for the next who asks."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib import UserError
from dnnlib.download import cache_folder
from dnnlib.files import write_atomically
from edm.metrics.evaluate import Evaluator
from edm.next_steps import METRICS_STEPS
from edm.snapshot_metrics import MultiStepFid
from torch_utils.records import is_figure
from training.conditions import learnt_classes
from training.denoiser import noise_range

SAMPLING = {"steps": METRICS_STEPS, "sampler": "heun"}  # of all that is kept


def identity(net: Any, sha256: str) -> list[Any]:
    """Plain values on which a network's images depend, beside the code of its class. sha256: of its weights."""
    arguments = [getattr(net, name, None) for name in ("init_args", "init_kwargs")]
    return [sha256, repr((type(net).__qualname__, arguments, noise_range(net), learnt_classes(net)))]


def find(images: Sequence[Any], evaluator: Evaluator) -> MultiStepFid | None:
    """What `keep` kept; None if there is nothing, or it is damaged."""
    try:
        record = json.loads(_file(images, evaluator).read_text(encoding="utf-8"))
        value, evaluations = record["value"], record["evaluations"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return MultiStepFid(value, evaluations) if is_figure(value) and isinstance(evaluations, int) else None


def keep_all(images: Sequence[Any], evaluator: Evaluator, records: Sequence[dict[str, Any]]) -> None:
    """Keeps the FIDs among an evaluator's records of a network that nothing guides."""
    for metric, record in zip(evaluator.metrics, records, strict=True):
        if metric.kind == "fid":
            keep(images, evaluator.only(metric.name), record["value"], 2 * METRICS_STEPS - 1)


def keep(images: Sequence[Any], evaluator: Evaluator, value: float, evaluations: int) -> None:
    """Keeps the FID of images by the only metric of an evaluator; a folder that can't be written keeps none.

    images: plain values that tell whose images they are; they are made by SAMPLING from the seeds from 0.
    """
    file = _file(images, evaluator)
    with contextlib.suppress(OSError, UserError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(file) as stream:
            stream.write(json.dumps({"value": value, "evaluations": evaluations}).encode())


def _file(images: Sequence[Any], evaluator: Evaluator) -> Path:
    (metric,), reference = evaluator.metrics, evaluator.reference
    assert reference is not None
    values = [metric.name, evaluator.detector.sha256, reference.sha256, METRICS_STEPS, *images]
    key = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    return cache_folder() / "teacher-fid" / f"{key}.json"
