"""The teacher's own FID, with which that of its generator is compared."""

from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from edm import measured_fid, zoo
from edm.metrics.detector import DEFAULT_DETECTOR
from edm.metrics.evaluate import Evaluator
from edm.metrics.sources import NetworkSource
from edm.next_steps import METRICS_STEPS
from edm.published import FILES, reference_of
from edm.snapshot_metrics import MultiStepFid, first_fid, recorded_fid
from torch_utils import distributed
from training.guidance import GuidedDenoiser

from .config import DistillationConfig
from .inputs import Inputs, guided_teacher, makes_samples

SHARE = 0.5  # evaluations per image of the run that are worth it; the run itself takes about ten


def teacher_fid(
    inputs: Inputs, config: DistillationConfig, source: str, wanted: bool | None, device: torch.device
) -> MultiStepFid | None:
    """The teacher's FID by the run's first FID metric; every process must call it.

    As its owners published it, or its file, the run that trained it, or an earlier run or `fid.py eval` that measured
    it recorded it; otherwise it is measured now, with 35 evaluations per image, and kept in the cache folder. A guided
    teacher's is that of its guided images.

    source: the teacher's file. wanted: whether to measure it; None: if that takes at most SHARE evaluations per image
        of the run.
    Returns None if it isn't known and wasn't measured, or the run measures no FID.
    Errors: UserError when it's wanted and the run measures no FID or the teacher makes no samples, or the images fit no
    metric.
    """
    metric = None if inputs.evaluator is None else first_fid(inputs.evaluator)
    if inputs.evaluator is None or metric is None:
        if wanted:
            raise UserError("--measure-teacher: the run measures no FID; give --metrics=fid50k, for instance")
        return None
    teacher = guided_teacher(inputs.teacher, inputs.guide, config.guidance)
    if not makes_samples(inputs.teacher, {"--measure-teacher": "--measure-teacher=0"} if wanted else {}):
        return None
    evaluator = inputs.evaluator.only(metric)
    images, found = inputs.identity(config), None
    if distributed.rank() == 0:
        if teacher is inputs.teacher:
            assert evaluator.reference is not None
            measure = (metric, evaluator.detector.sha256, evaluator.reference.sha256)
            found = _published_fid(source, evaluator) or recorded_fid(teacher, source, *measure)
        found = found or measured_fid.find(images, evaluator)
    found = distributed.from_process_0(found)
    evaluations = _evaluations(teacher) * (2 * METRICS_STEPS - 1)
    worth_it = evaluations * evaluator.metrics[0].num <= SHARE * 1000 * config.total_kimg
    if found is not None or not (worth_it if wanted is None else wanted):
        return found
    distributed.print0(f"Measuring the teacher's {metric} with {evaluations} evaluations per image", flush=True)
    (record,) = evaluator(NetworkSource(teacher.to(device).eval(), steps=METRICS_STEPS))
    if distributed.rank() == 0:
        measured_fid.keep(images, evaluator, record["value"], evaluations)
    return MultiStepFid(record["value"], evaluations)


def _published_fid(source: str, evaluator: Evaluator) -> MultiStepFid | None:
    """The figure of a published teacher's owners, if the run measures what they did."""
    entry, reference = zoo.published(source), evaluator.reference
    if entry is None or entry.fid is None or entry.nfe is None or reference is None:
        return None
    theirs = (50_000, FILES[DEFAULT_DETECTOR].sha256, reference_of(entry))
    own = (evaluator.metrics[0].num, evaluator.detector.sha256, Path(reference.path).stem)
    return MultiStepFid(entry.fid, entry.nfe) if own == theirs else None


def _evaluations(net: Any) -> int:
    """How many networks a denoiser evaluates."""
    if not isinstance(net, GuidedDenoiser):
        return 1
    return _evaluations(net.net) + _evaluations(net.net if net.guide is None else net.guide)
