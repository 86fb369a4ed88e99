"""The lines that a training prints: a block at its start, and one line a tick. Plain text for a narrow terminal."""

import math
import os
import platform
import textwrap
from collections.abc import Mapping

import numpy as np
import torch

from dnnlib import format_count
from dnnlib.errors import printable

from . import distributed

COLUMNS = 80
UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def start_block(lines: Mapping[str, str | None]) -> str:
    """Aligned lines of a name and what there is to say about it, without those that are None.

    Long values go on in the next line. A single word that is too long, such as a path, stays whole, to be copied.
    """
    said = {name: printable(value) for name, value in lines.items() if value is not None}
    width = max(map(len, said), default=0) + 2
    return "\n".join(
        textwrap.fill(
            value,
            COLUMNS,
            initial_indent=name.ljust(width),
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, value in said.items()
    )


def tick_line(
    nimg: int,
    end_img: int,
    step_img: float,
    share: float,
    rate: float | None = None,
    left_sec: float | None = None,
    values: Mapping[str, float] | None = None,
) -> str:
    """How far a training is. At most COLUMNS wide; values that don't fit go on in a second line.

    nimg, end_img: images of this training, so far and at its end. step_img: images from one line to the next.
    share: of the whole run, from 0 to 1. rate: images per second, None before the first iteration.
    left_sec: seconds to the end of the run, None if unknown. values: measured numbers by name.
    """
    end = kimg_text(end_img, step_img)
    line = f"{kimg_text(nimg, step_img):>{len(end)}}/{end} kimg {int(100 * share):3}%"
    if rate is None:
        line += " " * 27
    else:
        left = "?" if left_sec is None else duration_text(left_sec)
        line += f"  {rate_text(rate):>5} img/s  {left:>7} left"
    lines = [line]
    for name, value in (values or {}).items():
        text = f"  {name} {figure_text(value)}"
        if len(lines[-1] + text) > COLUMNS:
            lines.append("")
        lines[-1] += text
    return "\n".join(line.rstrip() for line in lines)


def kimg_text(nimg: int, step_img: float) -> str:
    """A count of images in kimg, with as many decimals as steps of `step_img` images need to be seen."""
    decimals = sum(step_img < least for least in (10_000, 1000, 100))
    return f"{nimg / 1000:.{decimals}f}"


def rate_text(rate: float) -> str:
    """A rate with three digits, or all those before the point: `0.312`, `25.0`, `1234`."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:#.3g}".rstrip(".")


def figure_text(value: float) -> str:
    """A measured number with four digits."""
    return f"{value:#.4g}".rstrip(".")


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: `45s`, `12m 03s`, `5h 09m`, `2d 07h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    index = next(i for i, (_, size) in enumerate(UNITS) if whole >= size)
    (large, size), (small, part) = UNITS[index : index + 2]
    return f"{whole // size}{large} {whole % size // part:02}{small}"


def path_text(path: str | os.PathLike) -> str:
    """A path from the current folder on if it lies there, otherwise as it is; a URL or a short name stays as it is."""
    absolute, here = os.path.abspath(path), os.getcwd()
    inside = os.path.exists(absolute) and os.path.commonpath([absolute, here]) == here
    return os.path.relpath(absolute, here) if inside else os.fspath(path)


def network_text(net: torch.nn.Module) -> str:
    """The kind of a network and its size."""
    return f"{type(net).__name__}, {format_count(sum(p.numel() for p in net.parameters()))} parameters"


def device_text(device: torch.device) -> str:
    """Where a training runs: `8 x NVIDIA H200`, `cpu with 4 threads`."""
    processes, threads = distributed.world_size(), torch.get_num_threads()
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    text = f"{device.type} with {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type
    return text if processes == 1 else f"{processes} processes on {text} each"


def environment(device: torch.device) -> dict[str, str]:
    """What a run is computed with, for its record: versions, device and machine, by name."""
    return {
        "Python": platform.python_version(),
        "PyTorch": str(torch.__version__),
        "NumPy": np.__version__,
        "device": device_text(device),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()}), {os.cpu_count()} CPU cores",
    }


def batch_text(batch: int, batch_gpu: int) -> str:
    """How a batch is split over processes and rounds."""
    processes = distributed.world_size()
    rounds = batch // (batch_gpu * processes)
    each = " on each process" if processes > 1 else ""
    if rounds == 1:
        return f"{batch} images, {'at once' if processes == 1 else f'{batch_gpu}{each}'}"
    return f"{batch} images in {rounds} rounds of {batch_gpu}{each}"


def length_text(kimg: float, batch: int, kimg_per_tick: float, snapshot_ticks: int) -> str:
    """The length of a training, and how often it reports."""
    text = f"{kimg:g} kimg ({math.ceil(int(1000 * kimg) / batch)} updates)"
    tick = max(kimg_per_tick, batch / 1000)
    if tick >= kimg:
        return text
    snapshot = snapshot_ticks * tick
    often = f"every {snapshot:g}" if snapshot < kimg else "at the end"
    return f"{text}, a line every {tick:g} kimg, a snapshot {often}"
