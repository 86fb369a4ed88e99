"""Signals and the clock: when to save a state, when to stop. All processes of a run get the same answer."""

import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from dnnlib.terminal import stop_signals

from . import distributed

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the command again
SAME_SIGNAL_SEC = 2.0  # torchrun passes on what the terminal has sent to every process already
CHECK_SEC = 2.0  # on an accelerator, how often processes ask each other: each time the host waits for the device


class Interruption:
    """While open, the `stop_signals` no longer end the process: they make `stop` true at the next `check`.

    A second SIGINT ends it at once. Opens in the main thread only; elsewhere signals stay as they are.

    device:       where messages between processes live.
    save_minutes: `save` becomes true so long after the last `saved`, by the clock of process 0; 0 = never.
    """

    def __init__(self, device: torch.device, save_minutes: float = 0.0):
        self.stop = self.save = False
        self._device, self._save_sec = device, save_minutes * 60
        self._signal, self._signal_time = 0, 0.0
        self._check_time = self._save_time = time.monotonic()
        self._interval = self._iterations_left = 1
        self._previous = {}

    def __enter__(self) -> "Interruption":
        try:
            self._previous = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        except ValueError:  # not the main thread
            self._previous = {}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal and number == signal.SIGINT and now - self._signal_time > SAME_SIGNAL_SEC:
            raise KeyboardInterrupt
        if not self._signal:
            self._signal, self._signal_time = number, now
            if distributed.rank() == 0:  # not print: the signal may have come within one
                with contextlib.suppress(OSError):  # a closed terminal sends SIGHUP and takes no text
                    os.write(2, f"\n{signal.Signals(number).name}: saving after this iteration\n".encode())

    def check(self) -> None:
        """Sets `stop` and `save`; every process calls it after each iteration.

        Processes on a CPU agree after each iteration, those on an accelerator after so many as take CHECK_SEC.
        """
        self.stop = self.save = False
        self._iterations_left -= 1
        if self._iterations_left > 0 and distributed.world_size() > 1:
            return
        now = time.monotonic()
        due = distributed.rank() == 0 and 0 < self._save_sec <= now - self._save_time
        answers = [float(self._signal), float(due), now - self._check_time]
        if distributed.world_size() > 1:
            answers = distributed.all_reduce_max(torch.tensor(answers, device=self._device)).tolist()
        self._signal, self.stop, self.save = int(answers[0]), answers[0] > 0, answers[1] > 0
        self._check_time = now
        if self._device.type != "cpu":  # from the agreed duration, so that all processes compute the same interval
            self._interval = max(1, min(2 * self._interval, round(self._interval * CHECK_SEC / max(answers[2], 1e-3))))
        self._iterations_left = self._interval

    def saved(self) -> None:
        """To be called when a state was saved, or couldn't be: the next is due `save_minutes` from now."""
        self._save_time = time.monotonic()

    def leave(self, run_dir: Path, state: Path | None) -> NoReturn:
        """Ends the process with EXIT_CODE and tells the command that continues. Every process calls it.

        state: the file saved last, None if that failed.
        """
        saved = f"state saved as {state}" if state else "the state could not be saved: the one before will be taken"
        name = signal.Signals(self._signal).name
        distributed.print0(f"Stopped by {name}; {saved}. To continue:\n{continue_command(run_dir)}")
        distributed.shutdown()
        raise SystemExit(EXIT_CODE)


def ignore_signals(worker: int) -> None:
    """For data-loader workers: a terminal sends Ctrl-C to them too, but it is their parent that ends them."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def continue_command(run_dir: Path) -> str:
    """This process's own command line, with --resume naming the run folder."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec else [sys.argv[0]]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    start = ["torchrun", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    if distributed.world_size() > processes:
        start.append(f"--nnodes={distributed.world_size() // processes}")
    options, given = [], iter(sys.argv[1:])
    for option in given:
        if option == "--resume":
            next(given, None)
        elif not option.startswith("--resume="):
            options.append(option)
    return shlex.join([*start, *program, *options, f"--resume={run_dir}"])
