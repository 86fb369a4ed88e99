"""Training states: tensors and plain values only, written whole or not at all, verified when they are read."""

import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from dnnlib import UserError, kimg_name, write_atomically

from . import distributed, finiteness
from .untrusted.state_file import read_state

COUNTERS = {"nimg": (int,), "tick": (int,), "elapsed_sec": (int, float)}
PROGRESS = (*COUNTERS, "at_snapshot")  # attributes of every training

STATE_PATTERN = r"training-state-(\d+)(?:\.(\d{3}))?\.pt"
SNAPSHOT_PATTERN = r"network-snapshot-(\d+)(?:\.(\d{3}))?\.(?:safetensors|pkl)"  # .pkl: EDM's own runs
PICTURE_PATTERN = r"fakes_(\d+)(?:\.(\d{3}))?\.png"
BEST_LINK = "best.safetensors"  # the snapshot with the lowest FID or distance, in runs that measure one
BEST_FILE = "best.json"  # which one that is
SPARE_BYTES = 1 << 20  # left free next to a state
CHECKSUM = "sha256"
PLAIN_TYPES = (type(None), bool, int, float, str)


def state_path(run_dir: str | os.PathLike, nimg: int, batch: int = 1) -> Path:
    """Where the training state of a run lies after `nimg` images."""
    return Path(run_dir) / f"training-state-{kimg_name(nimg, batch)}.pt"


def snapshot_path(run_dir: str | os.PathLike, nimg: int, batch: int = 1) -> Path:
    """Where the network snapshot of a run lies after `nimg` images."""
    return Path(run_dir) / f"network-snapshot-{kimg_name(nimg, batch)}.safetensors"


def states(run_dir: str | os.PathLike) -> list[Path]:
    """The training states in a run folder, newest first."""
    return _numbered(run_dir, STATE_PATTERN)


def snapshots(run_dir: str | os.PathLike) -> list[Path]:
    """The network snapshots in a run folder, newest first."""
    return _numbered(run_dir, SNAPSHOT_PATTERN)


def _numbered(run_dir: str | os.PathLike, pattern: str) -> list[Path]:
    found = [path for path in Path(run_dir).iterdir() if re.fullmatch(pattern, path.name)]
    return sorted(found, key=_images_in_name, reverse=True)


def _images_in_name(path: Path) -> tuple[int, int]:
    """The number in a name that ends as these do: (kimg, images beyond them)."""
    found = re.search(r"(\d+)(?:\.(\d{3}))?\.\w+$", path.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


# --- one state


def save_state(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Writes a state with its checksum; the file appears whole or not at all.

    Errors: OSError when there is no room for it (nothing is written then) or writing fails.
    """
    path = Path(path)
    needed, free = _size(state) + SPARE_BYTES, shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
    with write_atomically(path) as file:
        sink = _Sink(file)
        torch.save({**state, CHECKSUM: checksum(state)}, cast(IO[bytes], sink))
        if sink.error is not None:
            raise sink.error


def load_state(path: str | os.PathLike) -> dict[str, Any]:
    """The state saved at `path`, on the CPU; nothing in the file is executed.

    Errors: UserError naming --resume when the file is missing, damaged or no training state.
    """
    try:
        state = read_state(path)
    except FileNotFoundError:
        raise UserError(f"--resume={path}: no such file; name a training-state-*.pt or a run folder") from None
    except Exception as error:
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(f"--resume={path}: not a readable training state ({reason}); try an earlier one") from None
    if not isinstance(state, dict) or not all(_is_count(state.get(k), kinds) for k, kinds in COUNTERS.items()):
        raise UserError(f"--resume={path}: not a training state; name a training-state-*.pt or a run folder")
    try:
        sound = state.pop(CHECKSUM, None) == checksum(state)
    except (TypeError, ValueError, RecursionError, RuntimeError):  # of what no state holds
        sound = False
    if not sound:
        raise UserError(f"--resume={path}: damaged, its contents don't have their checksum; try an earlier one")
    return state


class StateFile:
    """A training state on the disk. It is read and verified on first use, with the errors of `load_state`."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._contents: dict[str, Any] | None = None

    def read(self) -> dict[str, Any]:
        """The contents of the file."""
        if self._contents is None:
            self._contents = load_state(self.path)
        return self._contents

    def take(self) -> dict[str, Any]:
        """The contents, which aren't kept here any longer, since they are large."""
        contents = self.read()
        self._contents = None
        return contents


def restore(training: Any, parts: dict[str, Any], state: dict[str, Any], path: str | os.PathLike) -> None:
    """Puts a loaded state into the `parts` of a training, by their names in it, and its progress into `training`.

    parts: networks and optimisers, changed in place. path: where the state comes from.
    Errors: UserError naming --resume and the part that doesn't fit.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"--resume={path}: its {name} doesn't fit this run ({reason})") from None
        if isinstance(part, torch.nn.Module) and finiteness.first_non_finite(part) is not None:
            raise UserError(f"--resume={path}: weights of its {name} are NaN or infinite; try an earlier one")
    for name in PROGRESS:
        setattr(training, name, state[name])


def _is_count(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and 0 <= value < math.inf


def setting(options: dict[str, Any], device: torch.device) -> dict[str, dict[str, Any]]:
    """Where a state comes from: the run's options, and the surroundings that can make rounding differ."""
    surroundings = {"processes": distributed.world_size(), "device": device.type, "torch": str(torch.__version__)}
    return {"options": dict(options), "surroundings": surroundings}


def is_complete(state: dict[str, Any]) -> bool:
    """Whether a loaded state has the entries that every training writes, in sound form; its parts aren't checked."""
    if not all(isinstance(state.get(name), dict) for name in ("options", "surroundings", "statistics")):
        return False
    if any(isinstance(v, torch.Tensor) for name in ("options", "surroundings") for v in state[name].values()):
        return False
    names, moments = (state["statistics"].get(key) for key in ("names", "moments"))
    sound = names is None or (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(moments, torch.Tensor)
        and moments.ndim == 3
        and tuple(moments.shape[1:]) == (len(names), 3)
    )
    groups = state["statistics"].get("groups", {})  # which older ones lack
    sound = sound and isinstance(groups, dict)
    sound = sound and all(isinstance(m, torch.Tensor) and m.ndim == 3 and m.shape[2] == 3 for m in groups.values())
    return sound and type(state.get("at_snapshot")) is bool


def checksum(value: Any) -> str:
    """sha256, in hex, of nested dicts and lists of tensors and plain values."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)}\n".encode())
        for key, item in value.items():
            digest.update(f"{key!r}\n".encode())
            _feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)}\n".encode())
        for item in value:
            _feed(digest, item)
    elif type(value) in PLAIN_TYPES:
        digest.update(f"{value!r}\n".encode())
    else:  # it would be saved, but load_state would refuse it
        raise TypeError(f"a state holds tensors and plain values, not {type(value)}")


def _size(value: Any) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(_size(part) for part in parts)


class _Sink:
    """A file for torch.save that remembers the first write error, whose reason torch's own report hides."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


# --- the states of a run


class StateFolder:
    """Saves the states of a run into its folder and keeps the last few.

    keep: how many states to keep; 0 keeps all.
    """

    def __init__(self, run_dir: str | os.PathLike, keep: int = 2):
        self._run_dir, self._keep = Path(run_dir), keep

    def save(self, state: dict[str, Any], batch: int, kept: Path | None = None) -> Path | None:
        """Saves on process 0 and removes what is older than the last `keep`, except for the state `kept`.

        Returns the path, None if it failed.

        If the disk is full or broken, one line says so and training goes on without this state.
        """
        path = state_path(self._run_dir, state["nimg"], batch)
        if distributed.rank() != 0:
            return path
        if not attempt(f"saving {path.name}", lambda: save_state(path, state)):
            return None
        older = states(self._run_dir)[self._keep :] if self._keep else []
        for old in (path for path in older if path != kept):
            attempt(f"removing {old.name}", old.unlink)
        return path


def attempt(what: str, action: Callable[[], Any]) -> bool:
    """Does something with files that training can do without. If it fails, one line says why, and False is returned."""
    try:
        action()
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        print(f"Warning: {what} failed ({reason}); the run goes on: free the disk or mend it", flush=True)
        return False
    return True


def check_saved(snapshot: Path) -> None:
    """Errors: UserError on every process when the snapshot that a run ends with couldn't be saved."""
    if not distributed.from_process_0(snapshot.is_file() if distributed.rank() == 0 else None):
        raise UserError(
            f"{snapshot}: couldn't be saved, so the run has no result yet: free the disk or mend it, and give the same"
            f" command again with --resume={snapshot.parent}, which writes it"
        )


def newest_good_state(run_dir: str | os.PathLike) -> StateFile | None:
    """The newest undamaged state in a run folder, already read; None if there is no state. Damaged ones are reported.

    Errors: UserError when there are states and all are damaged.
    """
    found = [StateFile(path) for path in states(run_dir)]
    for file in found:
        try:
            file.read()
        except UserError as error:
            print(f"Warning: {error.message.removeprefix('--resume=')}", flush=True)
        else:
            return file
    if found:
        raise UserError(f"--resume={run_dir}: all training states in it are damaged; start again in another folder")
    return None


def remove_later(run_dir: str | os.PathLike, nimg: int, batch: int) -> None:
    """Removes the states, snapshots and pictures of a run after `nimg` images, and what says which snapshot is best.

    A run that went back to that point makes them again. A file that can't be removed is reported.
    """
    own = _images_in_name(state_path(run_dir, nimg, batch))
    files = _numbered(run_dir, f"{STATE_PATTERN}|{SNAPSHOT_PATTERN}|{PICTURE_PATTERN}")
    later = [path for path in files if _images_in_name(path) > own]
    for path in (*later, Path(run_dir) / BEST_LINK, Path(run_dir) / BEST_FILE):
        attempt(f"removing {path.name}", lambda path=path: path.unlink(missing_ok=True))


def set_aside_later(state: Path) -> None:
    """Renames the newer states in the folder of `state`, since the run goes on from `state` and saves them again."""
    everything = states(state.parent)
    for later in everything[: everything.index(state)] if state in everything else ():
        aside = later.with_name(f"{later.name}.unused")
        if attempt(f"renaming {later.name}", lambda later=later, aside=aside: os.replace(later, aside)):
            print(f"{later.name} is newer than the state to continue from: renamed to {aside.name}", flush=True)
