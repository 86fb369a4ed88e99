"""Scripts in processes of their own, forked from one that has loaded torch, so that they start at once."""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = {"dnnlib", "torch_utils", "training", "edm", "sid", "sid_train", "fid"}  # its modules
_start_interpreter = util.spawnv_passfds


class _LikePopen:
    """Gives a process of multiprocessing the methods of subprocess.Popen."""

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout_sec: float | None = None) -> int:
        self.join(timeout_sec)
        if self.exitcode is None:
            self.kill()
            raise TimeoutError(f"it hasn't ended in {timeout_sec} seconds")
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Script(_LikePopen, multiprocessing.get_context("forkserver").Process):
    """`python` with these arguments (a script's, or -m and a module's), started.

    log: takes stdout and stderr, or is a terminal, which it then has for itself. cwd: as for Popen. env: variables to
    add. modules: the folder that this project's modules are loaded from, instead of those that are loaded already.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        log: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        modules: Path | None = None,
    ):
        texts = [str(argument) for argument in arguments]
        super().__init__(target=_run, args=(texts, str(log), cwd and str(cwd), dict(env or {}), modules))
        self.start()


class Child(_LikePopen, multiprocessing.get_context("fork").Process):
    """As Popen([sys.executable, *arguments], stdout=file, stderr=STDOUT), but forked from this process."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], **_as_here: Any):
        super().__init__(target=_run_child, args=(command[1:], stdout.fileno(), dict(env)))
        self.start()


def serve_forks_of_this_process() -> None:
    """Makes multiprocessing's fork server a copy of this process, so that nothing has to be loaded a second time.

    Call it before autograd has run, whose threads a fork doesn't inherit.
    """
    sys.warnoptions.append("ignore:resource_tracker")  # processes that tests kill leave semaphores behind
    resource_tracker.ensure_running()  # a new interpreter, as always
    sys.warnoptions.pop()
    util.spawnv_passfds = _fork_server
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking while pytest-xdist's thread waits
            forkserver.ensure_running()
    finally:
        util.spawnv_passfds = _start_interpreter


def _fork_server(_path: Any, arguments: Sequence[Any], passed: Sequence[int]) -> int:
    """As `spawnv_passfds` for `python -c COMMAND`; the process ID."""
    pid = os.fork()
    if pid:
        return pid
    try:
        util.spawnv_passfds = _start_interpreter
        forkserver._forkserver._lock.release()  # taken by ensure_running, to which this process never returns
        for number in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *passed}:
            with contextlib.suppress(OSError):  # the folder's own is closed already
                os.close(number)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # instead of pytest's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # scripts have files of their own; what fails raises in the test
            os.dup2(nowhere, stream)
        exec(arguments[-1], {})
    finally:
        os._exit(0)


def run(arguments: Sequence[str | Path], folder: Path, timeout_sec: float = 600, **options: Any) -> str:
    """Runs a script in `folder`, which must succeed, and returns everything that it prints; options: of `Script`."""
    log = folder / "forked.txt"
    code = Script(arguments, log, folder, **options).wait(timeout_sec)
    output = log.read_text(encoding="utf-8")
    log.unlink()
    assert code == 0, output
    return output


def launch(arguments: Sequence[str], log: Path, processes: int = 1, restarts: int = 0) -> Script:
    """A script; if there are several processes, under torchrun's agent, which forks them from itself."""
    agent = [str(Path(__file__)), str(processes), str(restarts)] if processes > 1 else []
    return Script([*agent, *arguments], log)


def _run(arguments: list[str], log: str, cwd: str | None, env: dict[str, str], modules: Path | None) -> None:
    is_terminal = Path(log).is_char_device()
    if is_terminal:
        os.setsid()  # the terminal that is opened first becomes this session's
    with open(log, "r+b" if is_terminal else "ab", buffering=0) as output:
        for stream in (0, 1, 2) if is_terminal else (1, 2):
            os.dup2(output.fileno(), stream)
    # New ones: those that the process was forked with have seen another file, which could be searched.
    sys.stdout = os.fdopen(1, "w", 1 if is_terminal else -1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False)
    os.environ.update(env)
    os.chdir(cwd or os.getcwd())
    if modules:
        _load_from(modules)
    _main(arguments)


def _load_from(folder: Path) -> None:
    """Forgets this project's modules and where they were found; from now on, they are found in `folder`."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PROJECT]:
        del sys.modules[name]
    here = {ROOT, ROOT / "tests"}  # not .venv, which may be in this folder
    sys.path[:] = [str(folder), *(path for path in sys.path if path and Path(path).resolve() not in here)]
    importlib.invalidate_caches()


def _run_child(arguments: list[str], output: int, env: dict[str, str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(env)
    _main(arguments)


def _main(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # it was imported before the fork
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _under_torchrun(processes: int, restarts: int, arguments: list[str]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _main)(arguments)


if __name__ == "__main__":
    _under_torchrun(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
