"""Files in the cache: locks, files being written, hashes, and the records of what was first seen."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError
from .files import write_atomically
from .passwords import without_password

try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import msvcrt  # Windows
except ImportError:
    msvcrt = None

CHUNK_BYTES = 1 << 16
MAX_RECORD_BYTES = 1 << 16


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds a lock that ends with the process, if not before; yields False where there are none."""
    with open_own(path, append=True) as file:
        yield _lock(file)


def _lock(file: BinaryIO) -> bool:
    while True:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            elif msvcrt is not None:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            return fcntl is not None or msvcrt is not None
        except OSError as error:
            if error.errno != errno.EDEADLK:  # msvcrt has waited for ten seconds; other errors: no locks on this disk
                return False


def open_own(path: Path, *, append: bool) -> BinaryIO:
    """Opens a file of the cache's own for writing, never what a link of its name leads to.

    append: go on at its end if it is there; else what is there is removed first.
    Errors: UserError where something else lies there.
    """
    if not append:
        path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_EXCL)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_symlink():  # for systems without O_NOFOLLOW
            raise OSError(errno.ELOOP, "")
        file = os.fdopen(os.open(path, flags, 0o666), "ab" if append else "wb")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise UserError(f"{path}: is not a plain file of the cache, but a link or the like: remove it") from None
        raise
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise UserError(f"{path}: is not a plain file of the cache, but a link or the like: remove it")
    return file


def is_own(path: Path) -> bool:
    """Whether a plain file, neither a link nor linked from elsewhere, lies at `path`."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def hash_file(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def record_path(path: Path) -> Path:
    """Where the record of a cached file lies."""
    return path.with_name(f"{path.name}.sha256")


def read_record(path: Path) -> dict[str, Any]:
    """What was recorded when the cached file `path` was first seen; empty if nothing was."""
    try:
        if not record_path(path).is_file():  # a pipe would be waited for
            return {}
        with open(record_path(path), "rb") as file:
            record = json.loads(file.read(MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def check(path: Path, sha256: str | None, url: str, reread: bool = False) -> str:
    """Compares a cached file's hash with the expected and the first-seen one and returns it.

    The file is read again if it was touched since, or if `reread`. Errors: UserError where the hashes differ.
    """
    status, record = path.stat(), read_record(path)
    touched = (record.get("bytes"), record.get("mtime_ns")) != (status.st_size, status.st_mtime_ns)
    found = hash_file(path) if reread or touched or not record.get("sha256") else record["sha256"]
    if sha256 not in (None, found):
        raise UserError(f"{path}: sha256 is {found}, not {sha256} as published: delete the file to fetch it again")
    if sha256 is None and record.get("sha256", found) != found:
        raise UserError(
            f"{path}: sha256 is {found}, but was {record['sha256']} when first seen: delete the file to fetch it again,"
            f" or {record_path(path)} to accept the change"
        )
    if touched or record.get("sha256") != found:
        record = {
            "sha256": found,
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "url": without_password(url),
        }
        with contextlib.suppress(OSError), write_atomically(record_path(path)) as file:  # a read-only cache is fine
            file.write(json.dumps(record).encode())
    return found
