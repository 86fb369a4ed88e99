"""Memory over a long run of a tiny distillation: python tests/crash/memory.py --iterations=2000

Ticks, statistics, snapshots and states come as in any run. The process may not grow by more than 1 % after the first
tenth of the run.
"""

import sys
import tempfile
from pathlib import Path

import click
import psutil
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

BATCH, TICK_ITERATIONS = 2, 20


class Memory:
    """In place of a report: the process's memory at each snapshot, in bytes."""

    def __init__(self):
        self.bytes = []

    def start(self, ema: torch.nn.Module) -> None:
        pass

    def snapshot(self, ema: torch.nn.Module, nimg: int) -> None:
        self.bytes.append(psutil.Process().memory_info().rss)


@click.command()
@click.option("--iterations", default=2000, show_default=True)
def main(iterations: int) -> None:
    """Run and tell how much the process has grown."""
    from tiny import tiny_distillation

    from sid.training_loop import training_loop
    from torch_utils.devices import keep_freed_memory

    keep_freed_memory()
    memory, tick = Memory(), TICK_ITERATIONS * BATCH / 1000
    changes = {"kimg_per_tick": tick, "snapshot_ticks": 1, "save_minutes": 0.1, "lr": 1e-4, "glr": 1e-4}
    distillation = tiny_distillation(batch=BATCH, batch_gpu=1, total_kimg=iterations * BATCH / 1000, **changes)
    with tempfile.TemporaryDirectory() as folder:
        training_loop(distillation, Path(folder), memory)
    first, last = memory.bytes[len(memory.bytes) // 10], memory.bytes[-1]
    growth = last / first - 1
    at = TICK_ITERATIONS * (len(memory.bytes) // 10 + 1)
    print(f"{first / 2**20:.1f} MiB after {at} iterations, {last / 2**20:.1f} MiB after {iterations}: {growth:+.2%}")
    raise SystemExit(growth > 0.01)


if __name__ == "__main__":
    main()
