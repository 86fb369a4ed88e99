"""`--dry-run`: what a run would do and need, from the shapes of its networks."""

import json
from typing import Any

import torch

from dnnlib.options import AS_JSON
from edm import zoo
from torch_utils import batches, distributed
from torch_utils.run_lines import start_block
from training.denoiser import DenoiserModule

from . import memory
from .config import DistillationConfig, resolve
from .inputs import checked_guide, checked_teacher, load_start
from .report.opening import describe_plan
from .run_options import RunOptions

GPUS = (24, 80)  # sizes of memory in GB, for which --dry-run tells what fits


def dry_run(options: RunOptions, config: DistillationConfig, summary: dict[str, Any], device: torch.device) -> str:
    """What --dry-run prints, after checks of the networks that the options name, where they are on this machine.

    summary: what the run would record; gets the memory that it needs (`memory_estimate`).
    """
    teacher = None
    if zoo.is_here(options.edm_model):
        teacher = checked_teacher(config, options, zoo.load_shapes(options.edm_model))
        if options.transfer and zoo.is_here(options.transfer):
            load_start(options.transfer, teacher, options.classes)
        guide = checked_guide(teacher, options) if options.guide and zoo.is_here(options.guide) else None
        summary["memory_GB"] = memory_estimate(teacher, config, device, guide)
    if options.dry_run == AS_JSON:
        return json.dumps(summary, indent=2)
    return start_block(describe_plan(options, config, device, summary, teacher))


def memory_estimate(
    teacher: DenoiserModule, config: DistillationConfig, device: torch.device, guide: DenoiserModule | None = None
) -> dict[str, Any]:
    """GB per process by purpose, at --batch-gpu or the largest that fits, and the largest that fits each of GPUS."""
    config = resolve(config, teacher, device)
    share = batches.split_batch(config.batch, None, distributed.world_size())[0]
    fitting = memory.Fitting(teacher, config, share, device, guide)
    batch_gpu = config.batch_gpu or fitting.largest_here()[0]
    found = fitting.estimate(batch_gpu).rounded()
    fits = {f"{size} GB": images for size in GPUS for images, peak in [fitting.largest(size)] if peak is not None}
    return {"batch_gpu": batch_gpu, **found, "batch_gpu_that_fits": fits}
