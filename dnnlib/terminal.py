"""Standard streams and signals of a process whose terminal, pipe or log may go away while it works."""

import contextlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

ESCAPE_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
STREAMS = ("stdin", "stdout", "stderr")  # in the order of their file descriptors


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a long run to save and stop.

    SIGHUP, which a closing terminal sends, is one of them unless this process ignores it already, as nohup asks.
    """
    names = ["SIGTERM", "SIGINT", "SIGUSR1"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        names.append("SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


class _Ended(BaseException):
    """A signal that ends the process."""


@contextlib.contextmanager
def tidy_end() -> Iterator[None]:
    """While open, SIGTERM and SIGHUP end the process as before, but only once files that aren't whole are removed.

    Signals stay as they are outside of the main thread, where they are handled or ignored already, and in one of
    several processes, which may wait for each other where Python can't act.
    """
    owner, ended, previous = os.getpid(), [], {}

    def end(number: int, _frame: object) -> None:
        ended.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second signal doesn't wait
        if os.getpid() != owner:  # a fork
            os.kill(os.getpid(), number)
        raise _Ended

    if os.environ.get("WORLD_SIZE", "1") == "1":
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                with contextlib.suppress(ValueError):  # not the main thread
                    previous[number] = signal.signal(number, end)
    try:
        yield
    except _Ended:
        os.kill(os.getpid(), ended[0])  # so that whoever waits for the process sees what ended it
        raise
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_DFL)


def open_closed_streams() -> None:
    """Opens the null device in place of each standard stream that was closed when the process started.

    Python has None for such a stream, and the next file that is opened would get its descriptor: whatever a library
    prints would then end up in that file.
    """
    for descriptor, name in enumerate(STREAMS):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is the missing one
        if null == descriptor:
            os.set_inheritable(null, True)  # child processes need it for the same reason
        stream = open(null, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115  lives as long as we do
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


class LossyFile(io.FileIO):
    """A file whose writes never fail: it loses what a vanished reader, a closed terminal or a full disk can't take."""

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError:
            return size
        return size if written is None else written  # None: a pipe that doesn't block is full


def lossy_text(file: LossyFile, encoding: str, errors: str) -> io.TextIOWrapper:
    """A text stream into `file` that appears line by line and shows what `encoding` lacks as escapes."""
    errors = "backslashreplace" if errors == "strict" else errors
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=encoding, errors=errors, line_buffering=True)


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """While open, printing to stdout and stderr can't fail: see `LossyFile`. Only streams that are files change."""
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            buffer = getattr(stream, "buffer", None)
            if type(getattr(buffer, "raw", buffer)) is not io.FileIO:
                continue  # a notebook's stream, a test's, or the console of Windows
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            file = LossyFile(stream.fileno(), "w", closefd=False)
            text = lossy_text(file, stream.encoding, stream.errors)
            stack.callback(text.flush)
            stack.enter_context(getattr(contextlib, f"redirect_{name}")(text))
        yield


@contextlib.contextmanager
def short_warnings() -> Iterator[None]:
    """While open, a warning is printed as one line, without the place in the program that it comes from."""
    original = warnings.formatwarning
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"Warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = original


class WholeLines:
    """Puts together what is written piece by piece, so that only whole lines go on.

    Of a line that was overwritten in place, as progress bars do, the last version goes on.
    """

    def __init__(self):
        self._begun = ""  # the line that isn't complete

    def add(self, text: str) -> str:
        """The lines that `text` completes, each with its newline."""
        *lines, begun = (self._begun + text).replace("\r\n", "\n").split("\n")
        self._begun = _last_version(begun)
        return "".join(f"{_last_version(line)}\n" for line in lines)

    @property
    def rest(self) -> str:
        """What has been written since the last whole line, without blanks at its end."""
        return self._begun.rstrip()


def _last_version(line: str) -> str:
    """What follows the last carriage return but one at the very end, which may belong to a newline to come."""
    start = line.rfind("\r", 0, max(len(line) - 1, 0)) + 1
    return line[start:]


def without_escapes(text: str) -> str:
    """`text` without the escape codes that colour it or move a terminal's cursor."""
    return ESCAPE_CODE.sub("", text)


def drop_unwritable_output() -> None:
    """Points stdout and stderr at the null device where they can't be written, so that exiting doesn't fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), stream.fileno())
