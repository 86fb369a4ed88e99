"""Training states: tensors and plain values only, written whole or not at all."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, write_atomically


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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--resume={path}: no such file; name a training-state-*.pt or a run folder") from None
    except Exception as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise UserError(f"--resume={path}: not a readable training state ({reason}); try an earlier one") from None
    if not isinstance(state, dict) or "nimg" not in state:
        raise UserError(f"--resume={path}: not a training state; name a training-state-*.pt or a run folder")
    return state


def newest_state(run_dir: str | os.PathLike) -> Path | None:
    """The state with the most images in a run folder, or None."""
    found = [
        (int(m[1]), p) for p in Path(run_dir).iterdir() if (m := re.fullmatch(r"training-state-(\d+)\.pt", p.name))
    ]
    return max(found)[1] if found else None
