"""Time by phase, peak memory, number of operations, and the machine's own speed at matrix products."""

import contextlib
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch._dynamo.utils
from torch.utils.flop_counter import FlopCounterMode

from sid.config import DistillationConfig
from sid.inputs import Inputs
from sid.prepare import prepare
from training.denoiser import DenoiserModule

from .published_step import explicit_attention

MATMUL_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 1024}
MATMUL_REPEATS, MATMUL_SEC = 20, 1.0  # how often a product is timed at most, and how long after the third time
COUNTED_IMAGES = 2  # operations are proportional to images
GB = 2**30


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class PhaseClock:
    """Sums the seconds spent in chosen methods; on CUDA by events, so that nothing waits for the device in between."""

    def __init__(self, device: torch.device):
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    def watch(self, name: str, owner: Any, method: str) -> None:
        """Counts the calls of `owner.method` under `name`."""
        original = getattr(owner, method)
        spans = self._spans.setdefault(name, [])

        def timed(*args, **kwargs):
            start = self._now()
            result = original(*args, **kwargs)
            spans.append((start, self._now()))
            return result

        setattr(owner, method, timed)

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading; the device must have finished."""
        seconds = {name: sum(self._between(*span) for span in spans) for name, spans in self._spans.items()}
        for spans in self._spans.values():
            spans.clear()
        return seconds

    def _now(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        synchronize(self._device)
        return time.perf_counter()

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start


class MemoryMeter:
    """Peak memory in GB since `restart`: memory of tensors on CUDA, resident memory of the process elsewhere.

    baseline: the same kind of memory before the process built anything.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.baseline = self._resident("VmRSS")

    def restart(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif sys.platform == "linux":
            with contextlib.suppress(OSError):  # if that's forbidden, the peak covers the process's whole life
                Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest resident size

    def peak(self) -> float:
        return self._resident("VmHWM")

    def _resident(self, field: str) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GB
        if sys.platform == "linux":
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / GB
        if field == "VmRSS" or sys.platform == "win32":
            return psutil.Process().memory_info().rss / GB
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GB  # bytes on macOS


def all_compiled() -> bool:
    """Whether everything that torch.compile tried in this process succeeded."""
    frames = torch._dynamo.utils.counters["frames"]
    return frames["total"] > 0 and frames["ok"] == frames["total"]


def count_flops(teacher: DenoiserModule, config: DistillationConfig, device: torch.device) -> float:
    """Floating-point operations (a multiply-add is two) that one step needs per generated image.

    Counted by torch over one real step of `Distillation`, without recomputation, attention as matrix products.
    As usual, only convolutions and matrix products count.
    """
    config = dataclasses.replace(config, batch=COUNTED_IMAGES, batch_gpu=COUNTED_IMAGES)
    step = prepare(Inputs(teacher), config, device)
    for net in (step.teacher, step.state.generator, step.state.fake_score):
        explicit_attention(net)  # torch counts no operations of some fused kernels
    with FlopCounterMode(display=False) as counter:
        step.iteration()
    return counter.get_total_flops() / COUNTED_IMAGES


def matmul_peaks(device: torch.device) -> dict[str, float]:
    """{precision: operations per second} of one large product of matrices, the best of several."""
    peaks = {"fp32": matmul_peak(device, torch.float32), "bf16": matmul_peak(device, torch.bfloat16)}
    if device.type == "cuda":
        peaks["fp16"] = matmul_peak(device, torch.float16)
        torch.backends.cuda.matmul.allow_tf32 = True
        peaks["tf32"] = matmul_peak(device, torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = False
    return peaks


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second with the faster of the libraries for matrix products, of which a CPU may have two."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products = [lambda: a @ b]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        with contextlib.suppress(RuntimeError):  # if it doesn't support the dtype
            blocked = a.to_mkldnn(), b.to_mkldnn()
            torch.nn.functional.linear(*blocked)
            products.append(lambda: torch.nn.functional.linear(*blocked))
    return 2 * size**3 / min(shortest_time(product, device) for product in products)


def shortest_time(product: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several calls: fewer where a call is slow, as bfloat16 is on many CPUs."""
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < MATMUL_REPEATS and sum(seconds) < MATMUL_SEC):
        synchronize(device)
        start = time.perf_counter()
        product()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: hardware, threads, versions."""
    machine = {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_GB": round(psutil.virtual_memory().total / GB, 1),
        "platform": platform.platform(),
    }
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device)}
        machine |= {"gpu_memory_GB": round(torch.cuda.get_device_properties(device).total_memory / GB, 1)}
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"machine": machine, "versions": versions}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
