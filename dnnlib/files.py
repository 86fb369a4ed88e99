"""Files: paths as users give them, files that appear whole or not at all, folders that one process has to itself."""

import contextlib
import errno
import io
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

LOCK_FILE = ".lock"


def user_path(path: str | os.PathLike) -> Path:
    """`path` with its `~` replaced. Errors: UserError when there is no such user, or no path can be so named."""
    try:
        found = Path(path).expanduser()
        found.is_file()
    except UnicodeEncodeError:
        raise UserError(f"{path}: {locale_problem()}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}: check the file name") from None
    return found


def locale_problem() -> str:
    """Why a name can't be used in this locale, and the remedy."""
    encoding = sys.getfilesystemencoding()
    return f"this locale takes {encoding} names only: set PYTHONUTF8=1 (or LC_ALL=C.UTF-8) and try again"


def open_plain(path: str | os.PathLike, max_bytes: int | None = None) -> io.BufferedReader:
    """Opens a plain file of at most `max_bytes` bytes for reading; links to plain files are followed.

    Other kinds of files are refused, because a pipe can block and a device such as /dev/zero has no end.
    Errors: OSError (its strerror says what is wrong) when the file isn't there, isn't plain, or is larger.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(status.st_mode) else "not a plain file"
            raise OSError(errno.EINVAL, reason, os.fspath(path))
        if max_bytes is not None and status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"larger than {max_bytes / 2**20:.4g} MiB", os.fspath(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` on success and leaves nothing behind on failure.

    The file and its name are on the disk then, so neither a kill nor a power cut leaves half a file under `path`.
    """
    path = Path(path)
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        error.filename = str(path)  # not of the temporary file, which says nothing to anybody
        raise
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
    _sync_folder(path.parent)


def check_new_file(path: str | os.PathLike, option: str = "") -> None:
    """Makes sure, before long work, that a new file can be written at `path`; leaves nothing behind.

    option: that gives the path, for messages; empty for an argument. Errors: UserError.
    """
    named, path = f"{option}={path}" if option else str(path), Path(path)
    if os.path.lexists(path):
        raise UserError(f"{named} exists already; remove it or choose another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{named}: there is no folder {path.parent}; make it first")
    try:
        with tempfile.TemporaryFile(prefix=f".{path.name}.", suffix=".part", dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{named} can't be written ({error.strerror}); choose another folder") from None


def _sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, where the system supports that (Windows doesn't)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes what a killed `write_atomically` has left in a folder; nothing may be writing there."""
    for path in Path(folder).glob(".*.part"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps a second run out of a folder while open; the lock ends with the process, however that ends.

    Errors: UserError naming --outdir when another run has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(Path(folder) / LOCK_FILE, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--outdir={folder}: another run is at work there; wait for its end or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield
