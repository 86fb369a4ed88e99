"""Verifies files against their checksums: networks, training states, references, detectors, records, pictures."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib import UserError
from edm import diffusers_reader, network_files, zoo
from edm.metrics.detector import load_detector
from edm.metrics.npz import read_arrays
from edm.metrics.reference import load_reference
from edm.metrics.sources import array_source
from torch_utils import checkpoint, persistence
from torch_utils.untrusted import edm_pickle
from torch_utils.untrusted.bounds import check_ratio, open_zip, parse_json
from torch_utils.untrusted.images import open_image

VERIFIED = "as it was written"
READABLE = "can be read; it has no checksum"
UNKNOWN = "not checked: this kind of file has no checksum"
PICTURE_FORMATS = ("PNG", "JPEG")
MAX_PICTURE_PIXELS = 1 << 28  # a grid of pictures, of our own making
STATE_NAME = re.compile(rf"{checkpoint.STATE_PATTERN}(\.unused)?")


@dataclass
class Finding:
    """The result for one file. damaged: whether the file differs from what was written; text: the result in words."""

    path: Path
    damaged: bool
    text: str


def examine(path: str | os.PathLike) -> Iterator[Finding]:
    """One finding for a file or a network's folder, or one for each file in any other folder, by name.

    Errors: UserError when there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder, and no published file has that name: see edm.zoo list")
    for file in _files(path):
        try:
            text = _check(file)
        except UserError as error:
            reason = error.message.removeprefix("--resume=").removeprefix("--ref=").removeprefix("--detector=")
            yield Finding(file, True, f"DAMAGED: {reason.removeprefix(f'{file}: ')}")
        else:
            yield Finding(file, False, text)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir() or network_files.is_folder(path):
        yield path
        return
    for entry in sorted(path.iterdir()):
        if not entry.name.startswith(".") and not (entry.is_dir() and entry.is_symlink()):
            yield from _files(entry)


def _check(path: Path) -> str:
    """Says how a file was verified. Errors: UserError when it is damaged."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: links to {os.readlink(path)}, which isn't there")
    if path.is_dir():
        return _check_network(path)
    if not path.is_file():
        return "not checked: no plain file"
    if STATE_NAME.fullmatch(path.name):
        checkpoint.load_state(path)
        return VERIFIED
    check = CHECKS.get(path.suffix.lower())
    if check is None:
        return UNKNOWN
    try:
        return check(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _check_network(path: Path) -> str:
    if path.is_dir() and diffusers_reader.is_folder(path):
        zoo.load_network(path)
        return READABLE
    header, state, source = network_files.contents(path)
    with network_files.verified(header, state, source):
        name = header["class_name"]
        if name in zoo.NETWORK_CLASSES:
            network_files.build(header, state, zoo.NETWORK_CLASSES, source)
    return _known(name, checkpoint.CHECKSUM in header)


def _known(class_name: str, has_checksum: bool) -> str:
    text = VERIFIED if has_checksum else READABLE
    return text if class_name in zoo.NETWORK_CLASSES else f"{text}; a {class_name[:80]!r}, which isn't known here"


def _check_tensors(path: Path) -> str:
    header, _ = network_files.read_tensors(path)
    if "class_name" in header:
        load_detector(path)
        return VERIFIED if checkpoint.CHECKSUM in header else READABLE
    if header.keys() <= {"format"} and not re.fullmatch(checkpoint.SNAPSHOT_PATTERN, path.name):
        return f"{READABLE}; tensors of another program"
    return _check_network(path)


def _check_pickle(path: Path) -> str:
    contents = edm_pickle.read(path)
    record = contents.get("ema")
    name = record.class_name if type(record) is edm_pickle.Record else None
    if name is None or name in zoo.NETWORK_CLASSES:
        network_files.read(path, zoo.NETWORK_CLASSES)
    return _known(name or "", edm_pickle.has_checksum(path))


def _check_arrays(path: Path) -> str:
    try:
        has_mean = bool(read_arrays(path, {"mu": "f"}, 1 << 30))
    except ValueError as error:
        raise UserError(f"{path}: {persistence.one_line(error)}") from None
    if not has_mean:
        array_source(path)
        return READABLE
    return VERIFIED if load_reference(path).has_checksum else READABLE


def _check_picture(path: Path) -> str:
    try:
        data = path.read_bytes()
        with open_image(data, PICTURE_FORMATS, MAX_PICTURE_PIXELS) as image:
            image.verify()  # a PNG's checksums
        with open_image(data, PICTURE_FORMATS, MAX_PICTURE_PIXELS) as image:
            image.load()
            return VERIFIED if image.format == "PNG" else READABLE
    except Exception as error:  # of Pillow's many decoders
        raise UserError(f"{path}: {persistence.one_line(error)}") from None


def _check_archive(path: Path) -> str:
    try:
        with open_zip(path) as archive:
            check_ratio(sum(entry.file_size for entry in archive.infolist()), path.stat().st_size)
            broken = archive.testzip()
    except Exception as error:  # of zipfile's decompressors
        raise UserError(f"{path}: {persistence.one_line(error)}") from None
    if broken is not None:
        raise UserError(f"{path}: {broken} in it has another checksum")
    return VERIFIED


def _check_json(path: Path) -> str:
    value = _parsed(path, path.read_bytes())
    if path.name == "best.json":
        _check_best(path, value)
    return READABLE


def _check_records(path: Path) -> str:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        record = _parsed(path, line, f"line {number} ")
        values = record.get("values")
        if path.name.startswith("metric-") and (
            not isinstance(values, dict) or record.get("value") not in values.values()
        ):
            raise UserError(f"{path}: line {number} is no record of a metric")
    return READABLE


def _check_best(path: Path, best: dict[str, Any]) -> None:
    """Compares best.json with the snapshots and metric records in its folder."""
    name, metric = os.path.basename(str(best.get("snapshot"))), str(best.get("metric"))
    if not (path.parent / name).is_file():
        raise UserError(f"{path}: names {name}, which isn't there")
    records = path.parent / os.path.basename(str(best.get("records", f"metric-{metric}.jsonl")))
    if not records.is_file():
        raise UserError(f"{path}: was chosen by {records.name}, which isn't there")
    found = [_parsed(records, line) for line in records.read_bytes().splitlines()]
    chosen = best.get("kimg"), best.get("value")
    if chosen not in [(record.get("kimg"), record.get(key)) for record in found for key in ("value", metric)]:
        raise UserError(f"{path}: {records.name} has no record of its kimg and value")


def _parsed(path: Path, text: bytes, place: str = "") -> dict[str, Any]:
    try:
        value = parse_json(text.decode())
    except ValueError as error:
        raise UserError(f"{path}: {place}is no JSON: {persistence.one_line(error)}") from None
    if type(value) is not dict:
        raise UserError(f"{path}: {place}is no record")
    return value


CHECKS: dict[str, Callable[[Path], str]] = {
    ".safetensors": _check_tensors,
    ".pkl": _check_pickle,
    ".npz": _check_arrays,
    ".zip": _check_archive,
    ".json": _check_json,
    ".jsonl": _check_records,
    **dict.fromkeys((".png", ".jpg", ".jpeg"), _check_picture),
}
