"""What a distillation prints at its start: a block of lines about what it does, with what, and where to look."""

import shlex
from pathlib import Path
from typing import Any

import psutil
import torch

from edm.snapshot_metrics import MultiStepFid, metrics_text
from torch_utils import distributed
from torch_utils.run_lines import batch_text, device_text, length_text, network_text, path_text

from .. import memory
from ..config import DistillationConfig
from ..distillation import Distillation
from ..inputs import Inputs
from ..trials import Plan
from .page import PAGE_FILE


def describe_run(
    inputs: Inputs,
    distillation: Distillation,
    options: dict[str, Any],
    reference: str | None,
    run_dir: Path,
    total_kimg: float,
    trials: Plan | None,
    starts: dict[str, float] | None,
    goal: MultiStepFid | None,
) -> dict[str, str | None]:
    """{name: text} for `start_block`.

    distillation: ready for its next iteration. options: of sid_train.py that aren't part of the config, by name.
    reference: where the reference statistics come from, if there are any.
    total_kimg: the length of the whole run. trials: those that are still to be run. starts: measured distances from
    the teacher by start level. goal: the teacher's FID, if known.
    """
    config, device = distillation.config, distillation.device
    return {
        "Teacher": f"{path_text(options['edm_model'])} ({_teacher_text(inputs)})",
        "Data": _data_text(inputs, options, config),
        "Method": _method_text(distillation, trials is None),
        "Start": _start_text(distillation.state.steps.levels[0], starts),
        "Trials": trials and _trials_text(trials),
        "Device": f"{device_text(device)}, precision {config.precision}{', compiled' * config.compile}",
        "Batch": batch_text(config.batch, distillation.batch_gpu),
        "Memory": _memory_text(distillation),
        "Length": length_text(total_kimg, config.batch, config.kimg_per_tick, config.snapshot_ticks),
        "Metrics": _metrics_text(inputs, reference or options["data"], goal),
        "Run folder": str(run_dir),
        "Look at": f"{PAGE_FILE} there, in a browser; {_doctor()} {shlex.quote(path_text(run_dir))}",
    }


def _doctor() -> str:
    """How to call sid.doctor: by its module in a checkout, by its command where the package is installed."""
    return "python -m sid.doctor" if Path("sid_train.py").is_file() else "sid-doctor"


def _teacher_text(inputs: Inputs) -> str:
    teacher = inputs.teacher
    size = f"{teacher.img_channels} x {teacher.img_resolution} x {teacher.img_resolution}"
    kind = "latents" if getattr(teacher, "metadata", {}).get("vae") else "images"
    classes = f", {teacher.label_dim} classes" if teacher.label_dim else ""
    if getattr(teacher, "prompt_dim", 0):
        classes = f", {len(teacher.prompts.texts)} prompts"
    guide = "" if inputs.guide is None else ", guided by a weaker network"
    return f"{network_text(teacher)}, {size} {kind}{classes}{guide}"


def _data_text(inputs: Inputs, options: dict[str, Any], config: DistillationConfig) -> str:
    if inputs.dataset is None:
        return "none (data-free)"
    use = "for the adversarial loss, a picture and metrics" if config.gan else "for a picture and metrics only"
    return f"{path_text(options['data'])}, {len(inputs.dataset)} images, {use}"


def _method_text(distillation: Distillation, with_rates: bool) -> str:
    """with_rates: whether the learning rates are settled."""
    config = distillation.config
    parts = [f"{config.objective}{' and an adversarial loss' * config.gan}"]
    if config.objective == "sid" or config.objective.endswith("-l1"):
        parts.append(f"alpha {config.alpha:g}")
    if config.guidance is not None:
        parts.append(f"guidance {config.guidance}")
    steps = distillation.state.steps
    count = "one step" if len(steps) == 1 else f"{len(steps)} steps ({steps.noise} noise)"
    parts.append(f"{count} from sigma {', '.join(f'{level:.3g}' for level in steps.levels)}")
    parts.append(f"{config.optimizer}, lr {config.lr:g}, glr {config.glr:g}" if with_rates else config.optimizer)
    if config.lora_rank:
        parts.append(f"LoRA of rank {config.lora_rank}")
    return ", ".join(parts)


def _start_text(level: float, starts: dict[str, float] | None) -> str | None:
    """starts: as for `describe_run`."""
    own = None if starts is None else starts.get(f"{level:g}")
    if starts is None or own is None:
        return None
    nearest = min(starts, key=starts.__getitem__)
    text = f"at sigma {level:g} the teacher's one-step images are {own:.3f} from its samples"
    return text if starts[nearest] == own else f"{text} ({starts[nearest]:.3f} at {nearest}, not clearly nearer)"


def _trials_text(trials: Plan) -> str:
    rates = "; ".join(f"{name} (lr {c.lr:g}, glr {c.glr:g})" for name, c in trials.configs.items())
    return f"{rates}: {trials.images / 1000:g} kimg each, then the best goes on"


def _memory_text(distillation: Distillation) -> str | None:
    """The estimate that the rounds were chosen by, and what was done to need less. None without an estimate."""
    config, device, plan = distillation.config, distillation.device, ""
    if distillation.peak_GB is None:
        return None
    if device.type == "cuda":
        there = f"this GPU's {torch.cuda.mem_get_info(device)[1] / memory.GB:.3g}"
    else:
        there = f"this machine's {psutil.virtual_memory().total / memory.GB:.3g}"
    if config.checkpoint:
        plan += ", recomputing activations"
    if config.chunk:
        plan += f", {config.chunk} images at once through the score networks"
    each = " per process" if distributed.world_size() > 1 else ""
    return f"about {distillation.peak_GB:.2g} GB of {there} GB{each}{plan}"


def _metrics_text(inputs: Inputs, reference: str | None, goal: MultiStepFid | None) -> str | None:
    """reference: where the real images or their statistics come from."""
    if inputs.evaluator is None:
        return None
    teacher = "" if goal is None else f"; the teacher: {goal.value:.4g} with {goal.evaluations} evaluations"
    return metrics_text(inputs.evaluator, reference) + teacher
