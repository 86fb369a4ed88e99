"""Training states: tensors and plain values only, written whole or not at all."""

import math
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, write_atomically

COUNTERS = {"nimg": (int,), "tick": (int,), "elapsed_sec": (int, float)}


def state_path(run_dir: str | os.PathLike, nimg: int) -> Path:
    return Path(run_dir) / f"training-state-{nimg // 1000:06d}.pt"


def snapshot_path(run_dir: str | os.PathLike, nimg: int) -> Path:
    return Path(run_dir) / f"network-snapshot-{nimg // 1000:06d}.safetensors"


def save_state(path: str | os.PathLike, state: dict[str, Any]) -> None:
    with write_atomically(path) as file:
        torch.save(state, file)


def load_state(path: str | os.PathLike) -> dict[str, Any]:
    """The state saved at `path`, on the CPU; nothing in the file is executed.

    Errors: UserError naming --resume when the file is missing, damaged or no training state.
    """
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles: they are read, or refused in one line
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--resume={path}: no such file; name a training-state-*.pt or a run folder") from None
    except Exception as error:
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(f"--resume={path}: not a readable training state ({reason}); try an earlier one") from None
    if not isinstance(state, dict) or not all(_is_count(state.get(k), kinds) for k, kinds in COUNTERS.items()):
        raise UserError(f"--resume={path}: not a training state; name a training-state-*.pt or a run folder")
    return state


def _check_archive(path: str | os.PathLike) -> None:
    """Raises ValueError unless the file is laid out as `save_state` does it: a zip of plain files, not compressed.

    torch.load also takes older layouts, which before torch 2.6 could run code even with weights_only (CVE-2025-32434),
    and TorchScript, which is code; and it would unpack what is compressed, however much that is.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("it doesn't begin as one")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if any(entry.filename.endswith("constants.pkl") for entry in entries):
        raise ValueError("it is a program")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise ValueError("its parts overlap")


def _is_count(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and 0 <= value < math.inf


def newest_state(run_dir: str | os.PathLike) -> Path | None:
    """The state with the most images in a run folder, or None."""
    found = [
        (int(m[1]), p) for p in Path(run_dir).iterdir() if (m := re.fullmatch(r"training-state-(\d+)\.pt", p.name))
    ]
    return max(found)[1] if found else None
