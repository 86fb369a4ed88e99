"""One process per mode, asleep between its turns, so that modes don't affect each other's time and memory.

The parent's side doesn't load torch. Each process builds its work once, does a first piece of it, which includes
compilation, and then takes turns.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import time
import traceback
from typing import Any

import click

from dnnlib import UserError

CLOSE_SEC = 5.0


class WorkerFailed(click.ClickException):
    """The work can't be done here, for a reason that isn't an option's: out of memory, no compiler, killed."""


class Worker:
    """The parent's side.

    job: as for `tasks.make_task`; with "machine", "profile" or "wrapper" as job["what"] there is `first` and no turns.
    first: what the process reported when it was ready.
    Errors: UserError when an option is at fault; WorkerFailed.
    """

    def __init__(self, job: dict[str, Any]):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()
        self.first: dict[str, Any] = self._receive()

    def turn(self, seconds: float, steps: int | None) -> dict[str, Any]:
        """Lets it work for about `seconds`, or exactly `steps` pieces, and returns what it measured."""
        with contextlib.suppress(BrokenPipeError):  # it has died: receiving says so
            self._connection.send({"seconds": seconds, "steps": steps})
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()  # the process ends when its connection closes
        self._process.join(CLOSE_SEC)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> dict[str, Any]:
        try:
            kind, content = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self.close()
            raise WorkerFailed(
                f"its process ended with code {self._process.exitcode} (-9 usually means a lack of memory)"
            ) from None
        if kind == "result":
            return content
        self.close()
        raise (UserError if kind == "user" else WorkerFailed)(content)


# ----------------------------------------------------------------------------
# The process's own side.


def _serve(connection: Any, job: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its processes
    try:
        _work(connection, job)
    except (EOFError, BrokenPipeError):
        pass
    except UserError as error:
        connection.send(("user", error.message))
    except Exception as error:
        from torch_utils.persistence import one_line

        traceback.print_exc()
        connection.send(("failed", one_line(error)))


def _work(connection: Any, job: dict[str, Any]) -> None:
    import torch

    from torch_utils import distributed

    os.environ.pop("WORLD_SIZE", None)  # a benchmark is one process, whatever started it
    mode = job.get("mode")  # measuring the machine's own speed has none
    device = distributed.init(job["device"], keep_memory=mode is None or not mode.published)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if job["what"] == "machine":
        connection.send(("result", machine_facts(job, device)))
        return
    if job["what"] == "profile":
        from . import profile, tasks

        connection.send(("result", profile.profile_step(tasks.make_step(job, device), device)))
        return
    if job["what"] == "wrapper":
        from .recipes import RECIPES, build_network
        from .wrapper import measure_wrappers

        net, turns = build_network(RECIPES[job["recipe"]]), (job["rounds"], job["seconds"], job["steps"])
        connection.send(("result", measure_wrappers(net, job["eval_batch"], *turns, device)))
        return
    runner = Runner(job, device)
    connection.send(("result", runner.first))
    while True:
        connection.send(("result", runner.turn(**connection.recv())))


def machine_facts(job: dict[str, Any], device: Any) -> dict[str, Any]:
    """The machine, its speed at products of matrices, and operations per image for each of job["mathematics"]."""
    import dataclasses

    from . import measure, tasks
    from .recipes import RECIPES, build_network

    config = tasks.make_config(job)
    counts = [
        measure.count_flops(build_network(RECIPES[job["recipe"]]), dataclasses.replace(config, **changes), device)
        for changes in job["mathematics"]
    ]
    peaks = measure.matmul_peaks(device)
    facts = {**measure.describe_machine(device), "matmul_flops_per_sec": peaks, "flops_per_image": counts}
    return {**facts, "batch": config.batch, "batch_gpu": config.batch_gpu}


class Runner:
    """Builds a task, times its first piece, then takes turns."""

    def __init__(self, job: dict[str, Any], device: Any):
        from . import measure, tasks

        self._device, self._synchronize = device, measure.synchronize
        self._memory = measure.MemoryMeter(device)
        self._task = tasks.make_task(job, device)
        first = self._run(1)
        if self._task.compiled and not measure.all_compiled():
            raise RuntimeError("torch.compile doesn't work here, the step ran without it")
        if self._task.compiled or device.type == "cuda":
            self._run(1)
        self._give_back()
        self.first = {
            "first_sec": first,
            "baseline_GB": self._memory.baseline,
            "images": self._task.images,
            "precision": self._task.precision,
        }

    def turn(self, seconds: float, steps: int | None) -> dict[str, Any]:
        """{steps, sec (of one), phases_sec (of one), peak_GB}"""
        if self._device.type == "cuda":
            self._run(1)  # allocates again what was given back to the driver after the last turn
        if steps is None:
            steps = max(1, math.ceil(seconds / self._sec))
        self._memory.restart()
        total = self._run(steps)
        phases = {name: value / steps for name, value in self._task.clock.read().items()}
        if phases:
            phases["rest"] = total / steps - sum(phases.values())
        peak = self._memory.peak()
        self._give_back()
        return {"steps": steps, "sec": total / steps, "phases_sec": phases, "peak_GB": peak}

    def _give_back(self) -> None:
        """Frees room on the GPU for the other processes' turns."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _run(self, steps: int) -> float:
        self._synchronize(self._device)
        self._task.clock.read()
        start = time.perf_counter()
        for _ in range(steps):
            self._task()
        self._synchronize(self._device)
        total = time.perf_counter() - start
        self._sec = total / steps
        return total
