"""Means and deviations of training statistics, over images and processes, between two ticks."""

import errno
import functools
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from dnnlib import write_atomically
from dnnlib.progress import ProgressBar

from . import checkpoint, distributed
from .records import STATS_FILE, parse_line
from .run_lines import tick_line

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} img, {rate_noinv_fmt}, {remaining} left"  # for tqdm


class Collector:
    """Collects named values; `collect()` gives the mean and deviation of each since the last call, over all processes.

    Values stay on their device until `collect()`, so reporting costs no synchronisation.
    """

    def __init__(self):
        self._moments: dict[str, torch.Tensor] = {}  # name -> [count, sum, sum of squares], float64 (float32 on mps)
        self._groups: dict[str, torch.Tensor] = {}  # the same by group, [groups, 3]

    @torch.no_grad()
    def report(
        self,
        name: str,
        values: torch.Tensor | float,
        device: torch.device | None = None,
        groups: torch.Tensor | None = None,
    ) -> None:
        """groups: which group each of the values [N] belongs to, one-hot [N, groups], to collect them by group, too."""
        values = torch.as_tensor(values, device=device).detach()
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        values = values.reshape(-1).to(wide)
        moments = torch.stack([torch.full_like(values[0], values.numel()), values.sum(), values.square().sum()])
        self._moments[name] = self._moments[name] + moments if name in self._moments else moments
        if groups is not None:
            powers = torch.stack([torch.ones_like(values), values, values.square()], dim=1)
            moments = (groups.detach().to(wide).unsqueeze(2) * powers.unsqueeze(1)).sum(dim=0)
            self._groups[name] = self._groups[name] + moments if name in self._groups else moments

    def collect(self) -> dict[str, dict[str, float]]:
        """{name: {'num', 'mean', 'std'}} with finite means only; every process must have reported the same names."""
        names = sorted(self._moments)
        if not names:
            return {}
        moments = distributed.all_reduce_sum(torch.stack([self._moments[name] for name in names])).tolist()
        self._moments.clear()
        result = {}
        for name, (count, total, squares) in zip(names, moments):
            mean = total / count
            if math.isfinite(mean):
                result[name] = {"num": int(count), "mean": mean, "std": math.sqrt(max(squares / count - mean**2, 0.0))}
        return result

    def collect_groups(self, least: int) -> dict[str, torch.Tensor]:
        """{name: [groups, 3], count, sum and sum of squares on the CPU} of what has `least` values in every group.

        Statistics with fewer values go on collecting; the others begin again.
        """
        groups = {name: distributed.all_reduce_sum(self._groups[name].clone()).cpu() for name in sorted(self._groups)}
        complete = {name: moments for name, moments in groups.items() if moments[:, 0].min() >= least}
        for name in complete:
            del self._groups[name]
        return complete

    def state_dict(self) -> dict[str, Any]:
        """What was collected since the last tick, of every process; every process must call it."""
        names = sorted(self._moments)
        groups = {name: distributed.gather(self._groups[name]).cpu() for name in sorted(self._groups)}
        if not names:
            return {"names": [], "moments": torch.zeros(distributed.world_size(), 0, 3), "groups": groups}
        own = torch.stack([self._moments[name] for name in names])  # [names, 3]
        return {"names": names, "moments": distributed.gather(own).cpu(), "groups": groups}  # [processes, names, 3]

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Each process takes what was its own; when their number has changed, process 0 takes the sum."""

        def own(moments: torch.Tensor) -> torch.Tensor:
            if len(moments) == distributed.world_size():
                return moments[distributed.rank()].to(device)
            return moments.sum(0).to(device) * (distributed.rank() == 0)

        self._moments = dict(zip(state["names"], own(state["moments"])))
        self._groups = {name: own(moments) for name, moments in state.get("groups", {}).items()}


def drop_later_records(run_dir: Path, nimg: int) -> None:
    """Drops from the *.jsonl of a run folder what was recorded after `nimg` images, and lines cut short by a kill."""

    def kept(line: str) -> bool:
        record = parse_line(line)
        kimg = record.get("Progress/kimg", record.get("kimg", 0)) if isinstance(record, dict) else None
        return isinstance(kimg, int | float) and kimg <= nimg / 1e3

    def rewrite(path: Path, content: bytes) -> None:
        with write_atomically(path) as file:
            file.write(content)

    for path in (path.resolve() for path in run_dir.glob("*.jsonl") if path.is_file()):  # a link stays one
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        content = "".join(f"{line}\n" for line in lines if kept(line)).encode()
        if content != path.read_bytes():
            checkpoint.attempt(f"shortening {path.name}", functools.partial(rewrite, path, content))


def append_line(path: Path, line: str) -> None:
    """Appends a line and flushes it to the disk. If that fails, a warning says so, and only the line is lost."""

    def write() -> None:
        data = f"{line}\n".encode()
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)  # no half line, which the next one would go on
                raise

    checkpoint.attempt(f"writing to {path.name}", write)


class TickLog:
    """Shows how far a training is and appends one JSON record a tick to `stats.jsonl`, on process 0.

    Prints one line a tick. Between ticks a terminal shows a progress bar.

    end_img: images at the end of this training. step_img: images from one tick to the next.
    elapsed_sec, nimg: time and images of the state that a run goes on from; later records in the folder are dropped.
    total_img: images of the whole run, for the percentage done and the time left; by default `end_img`.
    before_img: those of them that were trained on before the count `nimg` began, in trials that were dropped.
    shown: which statistics each line shows, {name: what the line calls it}.
    """

    def __init__(
        self,
        run_dir: Path,
        device: torch.device,
        end_img: int,
        step_img: float,
        elapsed_sec: float = 0.0,
        nimg: int = 0,
        total_img: int | None = None,
        before_img: int = 0,
        shown: Mapping[str, str] | None = None,
    ):
        if nimg:
            distributed.print0(f"Resumed at {nimg / 1e3:g} kimg")
        if distributed.rank() == 0:
            drop_later_records(run_dir, nimg)
        self._path = run_dir / STATS_FILE
        self._device = device
        self._end_img, self._step_img = end_img, min(step_img, end_img)
        self._total_img, self._before_img = end_img if total_img is None else total_img, before_img
        self._shown = shown or {}
        self._start = time.time() - elapsed_sec
        self._tick_start = time.time()
        self._tick_nimg = nimg
        self._rate: float | None = None
        self._values: dict[str, float] = {}
        self._bar: ProgressBar | None = None

    @property
    def elapsed_sec(self) -> float:
        return time.time() - self._start

    def begin_tick(self, nimg: int) -> None:
        """Starts the time of a tick: what happened since `tick` (snapshots, metrics) doesn't count as training."""
        self._tick_start, self._tick_nimg = time.time(), nimg
        if nimg < self._end_img:
            done = min(self._before_img + nimg, self._total_img)
            hidden = distributed.rank() != 0
            self._bar = ProgressBar(self._total_img, done, self._rate, hidden=hidden, among_lines=True, bar_format=BAR)

    def advance(self, nimg: int) -> None:
        """`nimg` images have been trained on."""
        if self._bar is not None:
            self._bar.advance_to(min(self._before_img + nimg, self._total_img))

    def tick(self, tick: int, nimg: int, statistics: dict[str, dict[str, float]]) -> None:
        """Records the end of a tick, whose line `show` prints. statistics: what `Collector.collect` returns."""
        self.close()
        seconds = time.time() - self._tick_start
        self._rate = (nimg - self._tick_nimg) / seconds
        self._values = {self._shown[name]: s["mean"] for name, s in statistics.items() if name in self._shown}
        gpu = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else 0.0
        fields = {
            "Progress/tick": tick,
            "Progress/kimg": nimg / 1e3,
            "Timing/total_sec": self.elapsed_sec,
            "Timing/sec_per_tick": seconds,
            "Timing/img_per_sec": self._rate,
            "Resources/cpu_mem_GB": psutil.Process().memory_info().rss / 2**30,
            "Resources/gpu_mem_GB": gpu,
        }
        if distributed.rank() == 0:
            record = {**fields, **{name: s["mean"] for name, s in statistics.items()}, "timestamp": time.time()}
            append_line(self._path, json.dumps(record, allow_nan=False))

    def show(self, nimg: int, measured: Mapping[str, float] | None = None) -> None:
        """Prints the line of a tick. measured: what its snapshot's images were measured to be, by name."""
        done = self._before_img + nimg
        share = min(done / self._total_img, 1.0) if self._total_img else 1.0
        left = max(self._total_img - done, 0) / self._rate if self._rate else None
        values = {**self._values, **(measured or {})}
        distributed.print0(tick_line(nimg, self._end_img, self._step_img, share, self._rate, left, values))

    def close(self) -> None:
        """Removes the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
