"""Reads the JSON lines in a run folder, any of which may be damaged. Works without torch, for quick commands."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from dnnlib import UserError
from dnnlib.options import MAX_NUMBER

MAX_BYTES = 256 << 20
STATS_FILE = "stats.jsonl"  # in a run folder: one record per tick
METRIC_FILE = re.compile(r"metric-([\w.-]{1,40})\.jsonl")  # names of a metric's records in a run folder


def read_records(path: Path, *needed: str, wanted: str) -> list[Any]:
    """The JSON lines of `path`, each an object with the numbers `needed`; a last line that was cut off is left out.

    wanted: the folder to name instead when the file is missing, for the message.
    Errors: UserError naming the file and its first damaged line.
    """
    records = []
    for number, record in _lines(read_text(path, wanted)):
        if record is None or not _has_numbers(record, needed):
            what = f" with the numbers {', '.join(needed)}" if needed else ""
            raise UserError(f"{path}: line {number} is damaged, not a record{what}; remove it, or restore the file")
        records.append(record)
    return records


def sound_records(path: Path, *needed: str) -> list[dict[str, Any]]:
    """As `read_records`, but skips damaged lines; empty if the file is missing or can't be read.

    For running trainings, which a damaged record must not end.
    """
    try:
        text = read_text(path, "a run folder", errors="replace")
    except UserError:
        return []
    return [record for _, record in _lines(text) if isinstance(record, dict) and _has_numbers(record, needed)]


def read_text(path: Path, wanted: str, errors: str = "strict") -> str:
    """The text of a record, at most MAX_BYTES long.

    wanted: as for `read_records`. errors: what to do with bytes that aren't UTF-8, as for `open`.
    Errors: UserError when the file can't be read or is too large.
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise UserError(f"{path}: is not a plain file; remove it, or restore the file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MB, so it can't be a run's; name {wanted}")
        return path.read_text(encoding="utf-8", errors=errors)
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; name {wanted} that has finished a tick") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it isn't text in UTF-8"
        raise UserError(f"{path}: can't be read ({reason}); restore the file") from None


def parse_line(line: str) -> Any:
    """The content of one JSON line; None if it is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_figure(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is a number small enough to compute with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def measured_value(record: dict[str, Any], key: str = "value") -> float:
    """The value of a metric's record, for finding the lowest: NaN counts as infinite."""
    return math.inf if math.isnan(record[key]) else record[key]


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    """(line number, parsed content or None if damaged) of each complete line."""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        yield number, parse_line(line)


def _has_numbers(record: Any, needed: tuple[str, ...]) -> bool:
    if not needed:
        return True
    return isinstance(record, dict) and all(_is_needed(name, record.get(name)) for name in needed)


def _is_needed(name: str, value: Any) -> bool:
    """Counts of images must be finite; measured values may be infinite or NaN."""
    if name.endswith("kimg"):
        return is_figure(value) and value >= 0
    return isinstance(value, float) or is_figure(value)
