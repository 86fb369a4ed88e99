"""What a distillation prints at its start: a block of lines about what it does, with what, and where to look."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from edm.snapshot_metrics import MultiStepFid, first_fid, metrics_text
from torch_utils import batches, distributed
from torch_utils.run_lines import batch_text, device_text, length_text, network_text, path_text

from .. import memory
from ..calibration import tmax_of
from ..config import DistillationConfig, resolve
from ..distillation import Distillation
from ..inputs import Inputs
from ..plan import RunPlan
from ..run_options import RunOptions
from ..schedules import Karras
from ..trials import Plan, plan_trials
from .commands import changed_options
from .page import PAGE_FILE

TOLD = ("--edm_model", "--data", "--data_stat", "--metrics")  # options that have a line of their own


def describe_run(
    plan: RunPlan,
    distillation: Distillation,
    inputs: Inputs,
    options: RunOptions,
    reference: str | None,
    run_dir: Path,
) -> dict[str, str | None]:
    """{name: text} for `start_block`.

    distillation: ready for its next iteration.
    reference: where the reference statistics come from, if there are any.
    """
    config, device = distillation.config, distillation.device
    measured = plan.measured if plan.saved is None else {}  # now, not by the run that goes on
    return {
        "Teacher": f"{path_text(options.edm_model)} ({_teacher_text(inputs.teacher, inputs.guide is not None)})",
        "Data": _data_text(options, config, None if inputs.dataset is None else len(inputs.dataset)),
        "Method": _method_text(config, distillation.state.steps.levels, plan.trials is None),
        "Start": _start_text(distillation.state.steps.levels[0], measured.get("starts"), plan.moments is not None),
        "Levels": levels_text(config.tmax, measured.get("calibration")),
        "Trials": plan.trials and _trials_text(plan.trials),
        "Device": _device_text(config, device),
        "Batch": batch_text(config.batch, distillation.batch_gpu),
        "Memory": _memory_text(distillation),
        "Length": length_text(plan.total_kimg, config.batch, config.kimg_per_tick, config.snapshot_ticks),
        "Metrics": _metrics_text(inputs, reference or options.data, plan.goal),
        "Run folder": str(run_dir),
        "Look at": f"{PAGE_FILE} there, in a browser; {_doctor()} {shlex.quote(path_text(run_dir))}",
    }


def describe_plan(
    options: RunOptions,
    config: DistillationConfig,
    device: torch.device,
    summary: dict[str, Any],
    teacher: torch.nn.Module | None,
) -> dict[str, str | None]:
    """{name: text} for `start_block` of a run that isn't started: --dry-run.

    summary: what the run would record, with the memory that it needs if that is known.
    teacher: None if it isn't on this machine.
    """
    place, estimate = path_text(options.edm_model), summary.get("memory_GB", {})
    batch_gpu, trials = config.batch_gpu, None
    if teacher is not None and options.trials:
        trials = plan_trials(config, options.trials, options.given, teacher)
    if teacher is not None:
        place += f" ({_teacher_text(teacher, bool(options.guide))})"
        config, batch_gpu = resolve(config, teacher, device), estimate["batch_gpu"]
    else:
        place += " (not on this machine, so its size and memory aren't known yet)"
    batch_gpu = batch_gpu or batches.split_batch(config.batch, None, distributed.world_size())[0]
    levels = None if config.init_sigma is None else [config.init_sigma]
    changed = [(name, value) for name, value, *_ in changed_options(summary) if name not in TOLD and value != "none"]
    reference = summary["data_stat"] or options.data
    return {
        "Teacher": place,
        "Data": _data_text(options, config),
        "Method": _method_text(config, levels, not options.trials),
        "Trials": trials and _trials_text(trials),
        "Device": _device_text(config, device),
        "Batch": batch_text(config.batch, batch_gpu),
        "Memory": _estimate_text(estimate) if estimate else None,
        "Length": length_text(config.total_kimg, config.batch, config.kimg_per_tick, config.snapshot_ticks),
        "Metrics": metrics_text(summary["metrics"], reference) if summary["metrics"] else None,
        "Run folder": options.outdir if options.nosubdir else f"a new one in {options.outdir}",
        "Options": " ".join(f"{name}={value}" for name, value in changed) or "the defaults",
        "Dry run": "nothing was started; --dry-run=json shows all options",
    }


def _doctor() -> str:
    """How to call sid.doctor: by its module in a checkout, by its command where the package is installed."""
    return "python -m sid.doctor" if Path("sid_train.py").is_file() else "sid-doctor"


def _device_text(config: DistillationConfig, device: torch.device) -> str:
    precision = "" if config.precision is None else f", precision {config.precision}"
    return f"{device_text(device)}{precision}{', compiled' * config.compile}"


def _estimate_text(estimate: dict[str, Any]) -> str:
    """estimate: GB by purpose, as --dry-run records it."""
    parts = {name.replace("_", " "): value for name, value in estimate.items() if isinstance(value, float) and value}
    peak = parts.pop("peak")
    fits = ", ".join(f"{images} in {size}" for size, images in estimate["batch_gpu_that_fits"].items())
    text = f"about {peak:g} GB per process ({', '.join(f'{name} {value:g}' for name, value in parts.items())})"
    return f"{text}; images at once that fit: {fits or 'none'}"


def _teacher_text(teacher: Any, guided: bool) -> str:
    """guided: whether a weaker network guides it."""
    size = f"{teacher.img_channels} x {teacher.img_resolution} x {teacher.img_resolution}"
    kind = "latents" if getattr(teacher, "metadata", {}).get("vae") else "images"
    classes = f", {teacher.label_dim} classes" if teacher.label_dim else ""
    if getattr(teacher, "prompt_dim", 0):
        prompts = getattr(teacher, "prompts", None)
        classes = ", prompts" if prompts is None else f", {len(prompts.texts)} prompts"
    return f"{network_text(teacher)}, {size} {kind}{classes}{', guided by a weaker network' * guided}"


def _data_text(options: RunOptions, config: DistillationConfig, count: int | None = None) -> str:
    """count: how many images there are, if that is known."""
    if not options.data:
        return "none (data-free)"
    use = "for the adversarial loss, a picture and metrics" if config.gan else "for a picture and metrics only"
    images = "" if count is None else f"{count} images, "
    return f"{path_text(options.data)}, {images}{use}"


def _method_text(config: DistillationConfig, levels: Sequence[float] | None, with_rates: bool) -> str:
    """levels: where the steps start; None: it is still to be measured. with_rates: whether the rates are settled."""
    parts = [f"{config.objective}{' and an adversarial loss' * config.gan}"]
    if config.objective == "sid" or config.objective.endswith("-l1"):
        parts.append(f"alpha {config.alpha:g}")
    if config.guidance is not None:
        parts.append(f"guidance {config.guidance}")
    count = "one step" if config.steps == 1 else f"{config.steps} steps ({config.steps_noise} noise)"
    start = "a noise level to be measured"
    if levels is not None:
        start = f"sigma {', '.join(f'{level:.3g}' for level in levels)}"
    parts.append(f"{count} from {start}")
    parts.append(f"{config.optimizer}, lr {config.lr:g}, glr {config.glr:g}" if with_rates else config.optimizer)
    if config.lora_rank:
        base = f" on a base in {config.precision}" if config.lora_base == "half" else ""
        parts.append(f"LoRA of rank {config.lora_rank}{base}")
    return ", ".join(parts)


def _start_text(level: float, starts: dict[str, float] | None, with_moments: bool) -> str | None:
    """starts: {noise level: distance from the teacher} of the starts that were measured now."""
    kind = "noise with the moments of the teacher's samples: " if with_moments else ""
    own = None if starts is None else starts.get(f"{level:g}")
    if starts is None or own is None:
        return kind.removesuffix(": ") or None
    nearest = min(starts, key=starts.__getitem__)
    text = f"{kind}at sigma {level:g} the teacher's one-step images are {own:.3f} from its samples"
    return text if starts[nearest] == own else f"{text} ({starts[nearest]:.3f} at {nearest}, not clearly nearer)"


def levels_text(tmax: float | None, calibration: dict[str, Any] | None) -> str | None:
    """calibration: what `sid.calibration` records."""
    if tmax is None or not calibration:
        return None
    is_hidden = tmax == tmax_of(calibration["hiding"])
    reason = "noise hides the images" if is_hidden else "the teacher's answers vary more than a denoiser's"
    return f"up to sigma {Karras(tmax).highest:.3g} (--tmax={tmax:g}): above, {reason}"


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
    teacher = "" if first_fid(inputs.evaluator) is None else "; the teacher's isn't known (--measure-teacher=1)"
    if goal is not None:
        teacher = f"; the teacher: {goal.value:.4g} with {goal.evaluations} evaluations"
    return metrics_text([metric.name for metric in inputs.evaluator.metrics], reference) + teacher
