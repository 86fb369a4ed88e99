"""Run folders: `00003-description/` with training_options.json and log.txt, made once and never overwritten."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from dnnlib import Logger, UserError
from torch_utils import checkpoint, distributed

MAX_NAME_BYTES = 255  # on all usual disks
OPTIONS_FILE = "training_options.json"


def resolve_resume(resume: str | None) -> Path | None:
    """The training state that --resume names: a state file, or the newest in a run folder."""
    if resume is None:
        return None
    path = Path(resume)
    if path.is_dir():
        newest = checkpoint.newest_state(path)
        if newest is None:
            raise UserError(f"--resume={resume}: no training-state-*.pt in this folder")
        return newest
    if not path.is_file():
        raise UserError(f"--resume={resume}: no such file; name a training-state-*.pt or a run folder")
    return path


@contextlib.contextmanager
def create(outdir: str, description: str, nosubdir: bool, options: dict, resume: Path | None) -> Iterator[Path]:
    """Makes the run folder on process 0, writes the options there, logs to log.txt while open; gives its path.

    A resumed run goes on in the folder of its state. With `nosubdir` the folder is `outdir` itself.
    Errors: UserError when that folder already holds another run or can't be made.
    """
    if any(separator in description for separator in "/\\"):
        raise UserError(f"--desc={description}: becomes part of a folder's name, so it can't hold / or \\")
    run_dir = [None]
    if distributed.rank() == 0:
        run_dir[0] = str(_new_folder(Path(outdir), description, nosubdir) if resume is None else resume.parent)
    if dist.is_initialized():
        dist.broadcast_object_list(run_dir, src=0)
    path = Path(run_dir[0])
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:  # seen here, before folders are made
        raise UserError(f"--outdir={outdir} with --desc: the name {path.name} is too long")
    if distributed.rank() != 0:
        yield path
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / OPTIONS_FILE).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--outdir={outdir}: can't write to {path} ({error.strerror}); name another folder") from None
    with Logger(path / "log.txt"):
        yield path


def _new_folder(outdir: Path, description: str, nosubdir: bool) -> Path:
    if outdir.exists() and not outdir.is_dir():
        raise UserError(f"--outdir={outdir} is a file; name a folder")
    if nosubdir:
        if (outdir / OPTIONS_FILE).exists():
            raise UserError(
                f"--outdir={outdir} holds a run already: continue it with --resume={outdir}, or name another"
            )
        return outdir
    taken = [int(m[1]) for p in outdir.glob("*") if (m := re.match(r"(\d{5})-", p.name))]
    return outdir / f"{max(taken, default=-1) + 1:05d}-{description}"
