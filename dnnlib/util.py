"""Small helpers without torch."""

import contextlib
import importlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click


class UserError(click.ClickException):
    """Something the user can mend. The command lines print it as one line and exit with code 2.

    The message names the option (or file) at fault and the remedy.
    """

    exit_code = 2


class EasyDict(dict):
    """A dict whose items are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


class IntList(click.ParamType):
    """Comma-separated whole numbers: `1,2,2`."""

    name = "list"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        if isinstance(value, list):
            return value
        if not re.fullmatch(r"\d+(,\d+)*", value):
            self.fail(f"{value!r} is not a comma-separated list of whole numbers, such as 2,2,2", param, ctx)
        return [int(v) for v in value.split(",")]


class FiniteRange(click.FloatRange):
    """A number within bounds that is neither infinite nor nan."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def construct_class_by_name(*args: Any, class_name: str, **kwargs: Any) -> Any:
    """Calls `package.module.Name(*args, **kwargs)`; `class_name` is that dotted path."""
    module_name, _, name = class_name.rpartition(".")
    return getattr(importlib.import_module(module_name), name)(*args, **kwargs)


def format_time(seconds: float) -> str:
    """Seconds as the shortest of `45s`, `12m 03s`, `5h 09m 00s`, `2d 07h 15m`."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // 3600}h {s // 60 % 60:02}m {s % 60:02}s"
    return f"{s // 86400}d {s // 3600 % 24:02}h {s // 60 % 60:02}m"


class Logger:
    """While open, everything printed to stdout and stderr is also appended to a file."""

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in __exit__
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Logger":
        self._stack.enter_context(self._file)
        for name in ("stdout", "stderr"):
            redirect = getattr(contextlib, f"redirect_{name}")
            self._stack.enter_context(redirect(_Tee(getattr(sys, name), self._file)))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()


class _Tee:
    def __init__(self, stream: Any, file: Any):
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        self._file.write(text)
        self._file.flush()  # a run that is killed keeps its last line
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` on success and leaves nothing behind on failure."""
    path = Path(path)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private; a result is as readable as any file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
