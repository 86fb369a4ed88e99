"""The bounds that every reader of foreign files keeps, in one place. Free of torch.

A file is either read, or refused within ten seconds and one gigabyte beyond what the file itself holds. Counts of what
a file asks for are checked before anything is built; where that can't be known in advance, a `Budget` ends the reading.
"""

import json
import os
import re
import time
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

from dnnlib import open_plain

MAX_SECONDS = 4.0  # of the reading thread's own time: a busy machine or a slow disk makes no difference
MAX_VALUES = 1_000_000  # visited, so one that is shared counts each time
MAX_DEPTH = 32  # of nested containers
MAX_TEXT = 1 << 24  # characters, all texts together, shared ones each time
MAX_UNPACKED_BYTES = 1 << 28  # that may come out of compressed data of any size; more only in proportion to it:
MAX_RATIO = 64  # unpacked bytes for a packed one; images, features and text stay below 20
MAX_ENTRIES = 1 << 21  # of an archive or a data set; ImageNet has 1.3 million images
MAX_NUMBER_LENGTH = 64  # characters of a number in JSON: longer ones take quadratic time
LONG_NUMBER = re.compile(f"[-+.0-9eE]{{{MAX_NUMBER_LENGTH + 1}}}")


class Refused(ValueError):
    """A foreign file goes beyond a bound; the text says which, and completes the sentence 'the file ...'."""


class Budget:
    """What may still be spent on one file: steps or visited values, and seconds of this thread's own time."""

    def __init__(self, values: int = MAX_VALUES, seconds: float | None = None):
        self._values = values
        self._until = time.thread_time() + (MAX_SECONDS if seconds is None else seconds)
        self._next_look = values

    def spend(self, values: int = 1) -> None:
        """Counts so many values. Errors: Refused when the budget is used up."""
        self._values -= values
        if self._values < 0:
            raise Refused("has more parts than any sound file of its kind")
        if self._values <= self._next_look:
            self._next_look = self._values - 256  # the clock is looked at now and then
            if time.thread_time() > self._until:
                raise Refused("takes too long to read")


def weigh(value: Any, budget: Budget, max_text: int = MAX_TEXT, max_depth: int = MAX_DEPTH) -> None:
    """Visits nested dicts, lists and tuples as those who use them will: what is shared counts every time.

    Errors: Refused when there are too many values, too much text, too deep nesting, or a list that holds itself.
    """
    pending, text = [(value, 0)], 0
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str | bytes):
            text += len(value)
        elif isinstance(value, dict | list | tuple):
            if depth >= max_depth:
                raise Refused("nests its values too deeply")
            budget.spend(1 + len(value))
            inner = value
            if isinstance(value, dict):
                text += sum(len(key) for key in value if isinstance(key, str | bytes))
                inner = value.values()
            pending += [(item, depth + 1) for item in inner]
        if text > max_text:
            raise Refused("holds too much text")


def parse_json(
    text: str | bytes, max_values: int = MAX_VALUES, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """`json.loads` of what a stranger wrote. make_object: makes an object of its (key, value) pairs; by default a dict.

    Errors: ValueError (of which Refused is one) when it isn't JSON, has more values, nests too deeply, or has numbers
    of more than MAX_NUMBER_LENGTH characters.
    """
    text = text if isinstance(text, str) else text.decode(json.detect_encoding(text), "surrogatepass")
    if sum(map(text.count, ",[{")) > 2 * max_values:  # before memory is taken for them
        raise Refused("has more parts than any sound file of its kind")
    numbers: dict[str, Any] = {}
    if LONG_NUMBER.search(text):  # in a name, perhaps
        numbers = {"parse_int": _number(int), "parse_float": _number(float)}
    try:
        return json.loads(text, **numbers, object_pairs_hook=make_object)
    except RecursionError:
        raise Refused("nests its values too deeply") from None


def _number(kind: type) -> Any:
    def parse(text: str) -> Any:
        if len(text) > MAX_NUMBER_LENGTH:
            raise Refused("holds a number with too many digits")
        return kind(text)

    return parse


def read_json(path: str | os.PathLike, max_bytes: int = 1 << 24, max_values: int = MAX_VALUES) -> Any:
    """What a JSON file holds. Errors: OSError when it can't be read or is no plain file; ValueError as `parse_json`."""
    with open_plain(path, max_bytes) as file:
        return parse_json(file.read(max_bytes), max_values)


class _ZipFile(zipfile.ZipFile):
    """A zip that closes the file which it was made from."""

    def close(self) -> None:
        file = self.fp
        super().close()
        if file is not None:
            file.close()


class _Directory:
    """A zip's file while its directory is read, at once: that may hold `max_entries` entries."""

    def __init__(self, file: BinaryIO, max_entries: int):
        self.file, self._max_entries = file, max_entries

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        if data.count(b"PK\x01\x02") > self._max_entries:
            raise Refused(f"has more than {self._max_entries} entries")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def open_zip(path: str | os.PathLike, max_entries: int = MAX_ENTRIES) -> zipfile.ZipFile:
    """A zip of at most `max_entries` entries, for reading.

    Errors: OSError when it can't be read or is no plain file; Refused; what zipfile raises on a broken directory.
    """
    file = open_plain(path)
    try:
        archive = _ZipFile(_Directory(file, max_entries))  # type: ignore[arg-type]
    except BaseException:
        file.close()
        raise
    archive.fp = file  # contents are read directly
    return archive


def check_unpacked(entry: zipfile.ZipInfo) -> None:
    """Raises Refused if a zip's entry claims to unpack to far more than it takes in the file."""
    check_ratio(entry.file_size, entry.compress_size)


def check_ratio(unpacked: int, packed: int) -> None:
    """Raises Refused if so many bytes are far more than ordinary data unpack to."""
    if unpacked > max(MAX_UNPACKED_BYTES, MAX_RATIO * packed):
        raise Refused(f"unpacks {packed} bytes to {unpacked}")
