"""A copy of what a process prints, in a file."""

import contextlib
import os
import sys
from typing import Any

from . import terminal


class Logger:
    """While open, every line printed to stdout and stderr is also appended to a file, as plain text.

    Progress bars and escape codes are left out of the file. If the disk is full, the file misses lines and the run goes
    on. Errors: OSError when the file can't be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self._file = terminal.lossy_text(terminal.LossyFile(path, "a"), "utf-8", "strict")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Logger":
        self._stack.enter_context(self._file)
        for name in ("stdout", "stderr"):
            tee = self._stack.enter_context(contextlib.closing(_Tee(getattr(sys, name), self._file)))
            self._stack.enter_context(getattr(contextlib, f"redirect_{name}")(tee))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()


class _Tee:
    def __init__(self, stream: Any, file: Any):
        self._stream, self._file, self._lines = stream, file, terminal.WholeLines()

    def write(self, text: str) -> int:
        self._log(self._lines.add(text))
        return self._stream.write(text)

    def _log(self, text: str) -> None:
        if text:
            self._file.write(terminal.without_escapes(text))
            self._file.flush()  # a run that is killed keeps its last line

    def close(self) -> None:
        """Logs the rest of the output, which has no newline. The stream itself stays open."""
        self._log(self._lines.rest)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
