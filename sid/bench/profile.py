"""Where the time of a training step goes: torch.profiler's record of one step, by phase and kind of operation."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .tasks import PHASES, StepTask

KINDS = {  # the first kind with a part that occurs in the operation's name
    "convolutions": ("conv",),
    "attention": ("bmm", "softmax", "scaled_dot", "attention"),
    "dense layers": ("addmm", "mm", "linear"),
    "group norm": ("group_norm", "batch_norm", "native_norm"),
    "silu": ("silu",),
    "dropout": ("dropout", "bernoulli", "native_drop"),
    "random draws": ("normal_", "uniform_", "random_", "randn", "rand", "randint"),
    "resampling": ("upsample", "avg_pool", "grid_sampler"),
    "copies": ("copy_", "cat", "clone", "fill_", "zero_", "empty", "reflection_pad", "_pad"),
}
REST = "element by element"
PREFIX = "phase: "


def profile_step(task: StepTask, device: torch.device) -> dict[str, dict[str, float]]:
    """{phase: {kind: seconds}} of one step that follows a first one; of the device's time on CUDA, else the CPU's."""
    for phase, method in PHASES.items():
        _name_calls(task.step, method, phase)
    task()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as record:
        task()
    return summarise(record.events() or [], "device" if device.type == "cuda" else "cpu")


def summarise(events: list[Any], clock: str) -> dict[str, dict[str, float]]:
    """clock: 'cpu' or 'device'. An operation belongs to the phase during which the host started it."""
    spans = [(event.name.removeprefix(PREFIX), event.time_range) for event in events if event.name.startswith(PREFIX)]
    result: dict[str, dict[str, float]] = {phase: {} for phase in [*PHASES, "rest"]}
    for event in events:
        microseconds = getattr(event, f"self_{clock}_time_total")
        if microseconds <= 0 or event.name.startswith(PREFIX) or not event.name.startswith("aten::"):
            continue
        start = event.time_range.start
        phase = next((name for name, span in spans if span.start <= start < span.end), "rest")
        kind = kind_of(event.name)
        result[phase][kind] = result[phase].get(kind, 0.0) + microseconds / 1e6
    return result


def kind_of(operation: str) -> str:
    """The kind of one of PyTorch's operations, `aten::...`."""
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), REST)


def _name_calls(owner: Any, method: str, phase: str) -> None:
    original = getattr(owner, method)

    def named(*args, **kwargs):
        with record_function(PREFIX + phase):
            return original(*args, **kwargs)

    setattr(owner, method, named)
