"""Runs the unfinished distillations one after the other, each in its own process, and passes signals on."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from dnnlib.terminal import stop_signals

from .folders import DIVERGED, FAILURE_FILE, REFUSED, STOPPED, last_snapshot, status, write_failure
from .plan import PROGRAM, Run

CONSOLE_FILE = "console.txt"  # in the run folder: everything that the run's processes print
MEANING = {REFUSED: "an option or a file is wrong", DIVERGED: "diverged", 4: "weights differ", 5: "a process hangs"}
ERROR = re.compile(r"(?:\[rank\d+\]: )?((?:Error|[\w.]+Error|[\w.]+Exception): .+)")  # a traceback's last line too


class Signals:
    """While open, signals don't end this process but are passed on to the current run, and `stopped` becomes true."""

    def __init__(self):
        self.stopped = False
        self._process: subprocess.Popen | None = None
        self._previous = {}

    def __enter__(self) -> "Signals":
        self._previous = {number: signal.signal(number, self._pass_on) for number in stop_signals()}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None and self._process.poll() is None:
            # torchrun would die of SIGUSR1, and its processes with it
            self._process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)

    def wait_for(self, process: subprocess.Popen) -> int:
        """The exit code of the process; an earlier signal is passed on to it, too."""
        self._process = process
        try:
            if self.stopped:
                process.send_signal(signal.SIGTERM)
            return process.wait()
        finally:
            self._process = None


def run_all(runs: list[Run], outdir: Path, processes: int) -> int:
    """Runs what isn't finished. Returns the exit code: 0, 1 if a run failed or diverged, STOPPED after a signal.

    Errors: UserError when a folder holds a run with other options.
    """
    failures = 0
    with Signals() as signals:
        for number, run in enumerate(runs, start=1):
            place, state = f"[{number}/{len(runs)}] {run.name}", status(run, outdir / run.name)
            if state in ("finished", "diverged"):
                print(f"{place}: {state} before", flush=True)
                failures += state == "diverged"
                continue
            if signals.stopped:
                return STOPPED
            if run.source and not last_snapshot(outdir / run.source):
                print(f"{place}: not started: {run.source}, which it starts from, isn't finished", flush=True)
                failures += 1
                continue
            print(f"{place}: {'starts' if state == 'new' else 'goes on'}, see {outdir / run.name}", flush=True)
            exit_code, message = run_one(run, outdir / run.name, processes, signals)
            after = status(run, outdir / run.name)
            if after == "finished":
                print(f"{place}: finished", flush=True)
            elif signals.stopped or exit_code == STOPPED:
                print(f"{place}: stopped", flush=True)
                return STOPPED
            else:
                message = message or f"it ended before the metrics of its last snapshot; see {CONSOLE_FILE}"
                write_failure(outdir / run.name, exit_code, message)
                failures += 1
                print(f"{place}: {MEANING.get(exit_code, 'failed')} (exit code {exit_code}): {message}", flush=True)
    return 1 if failures else 0


def run_one(run: Run, folder: Path, processes: int, signals: Signals) -> tuple[int, str]:
    """(exit code, last message) of a run, started or continued."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(folder / CONSOLE_FILE, "a+b") as console:
        start = console.tell()
        process = subprocess.Popen(
            command(run, folder, processes),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal reaches it once, by way of `Signals`
        )
        exit_code = signals.wait_for(process)
        console.seek(start)
        return outcome(exit_code, console.read().decode(errors="replace"))


def command(run: Run, folder: Path, processes: int) -> list[str]:
    """The command line of a run. One process needs no torchrun, which would hide its exit code.

    If the run starts from another setting's generator that is finished, its --transfer names that file.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = [sys.executable, *(torchrun if processes > 1 else [])]
    network = last_snapshot(folder.parent / run.source) if run.source else None
    given = f"--transfer={run.recorded['transfer']}"
    arguments = [f"--transfer={network}" if network and one == given else one for one in run.arguments]
    return [*start, *PROGRAM, *arguments, f"--outdir={folder}", "--nosubdir"]


def outcome(exit_code: int, output: str) -> tuple[int, str]:
    """(exit code of the training itself, its last error or else its last line), from what was printed.

    torchrun exits with 1 whatever happened and prints its processes' codes, the one that came first at the end.
    """
    codes = re.findall(r"^\s*exitcode\s*:\s*(-?\d+)", output, re.MULTILINE)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := ERROR.match(line))]
    message = (errors or lines or [""])[-1].removeprefix("Error: ")
    return (int(codes[-1]) if exit_code and codes else exit_code), message


def describe(runs: list[Run], outdir: Path, processes: int) -> str:
    """One line a run: how far it is, and its command."""
    lines = []
    for run in runs:
        folder = outdir / run.name
        lines.append(f"{status(run, folder)}: {shlex.join(command(run, folder, processes))}")
    return "\n".join(lines)
