"""Downloads into a cache folder: streamed, checked, and present whole or not at all.

The cache mirrors the web: `https://host/a/b.pkl` lies at `$DNNLIB_CACHE_DIR/host/a/b.pkl` (without that variable
`~/.cache/dnnlib/host/a/b.pkl`; capital letters and odd names are written otherwise, see `addresses`). A file put there
by hand is used like a downloaded one. Next to it, `b.pkl.sha256` records the hash it had when first seen; a file that
has another hash later is refused.

Without internet: `DNNLIB_MIRROR` names a folder or the base of a web address where all files lie as in the cache, so
that `https://host/a/b.pkl` comes from `$DNNLIB_MIRROR/host/a/b.pkl`. (A folder has the cache's names, an address the
web's.) The cache folder of another machine will do.

Plain http, where anyone on the way can change a file, is only for a mirror and this machine itself; an address that
leads to plain http elsewhere, or to a file of this machine, is refused.
"""

import os
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

from . import web
from .addresses import (
    cache_folder,
    cache_path,
    file_path,
    is_this_machine,
    is_url,
    mirrored,
    split,
    split_file_address,
)
from .cached_files import check, hash_file, is_own, locked, open_own, read_record, record_path
from .errors import UserError
from .files import user_path

__all__ = ["cache_folder", "cache_path", "download", "hash_file", "is_url", "local_path", "open_url", "verify"]

RETRIES = 5
MAX_BYTES = 16 << 30  # of one download; the largest published network takes about 1.2 GB


def open_url(
    source: str | os.PathLike, sha256: str | None = None, cache_dir: str | os.PathLike | None = None
) -> BinaryIO:
    """Opens a path, a file:// or an http(s) address for reading bytes; the latter is downloaded first.

    Errors: UserError when it isn't available.
    """
    path = local_path(source, sha256, cache_dir)
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check the file name") from None


def local_path(
    source: str | os.PathLike, sha256: str | None = None, cache_dir: str | os.PathLike | None = None
) -> Path:
    """The local file behind a path, a file:// or an http(s) address; the latter is downloaded first.

    Errors: UserError when it isn't available.
    """
    if is_url(source):
        if split(source).scheme != "file":
            return download(source, sha256, cache_dir)
        path = file_path(source)
    else:
        path = user_path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the file name")
    return path


def download(
    url: str,
    sha256: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    *,
    retry_sec: float = 1.0,
) -> Path:
    """The path of the file behind an http(s) address in the cache, downloaded if it isn't there yet.

    A broken transfer is resumed, until `RETRIES` more attempts bring nothing new; the pauses start at `retry_sec`
    seconds and double. Processes that ask for the same file at once download it once.

    sha256:     the expected hash in hex, if known.
    cache_dir:  instead of the folder named in the module's docstring.
    Errors: UserError, one line, when the file can't be fetched or has another hash than expected or first seen.
    """
    parts = split_file_address(url)
    path = cache_path(url, cache_dir)
    try:
        if not path.is_file():
            if mirrored(url) == url and parts.scheme == "http" and not is_this_machine(url):
                raise UserError(f"{url}: plain http can be changed on its way: give its https:// address")
            _make_room(path, url)
            with locked(path.with_name(f".{path.name}.lock")) as alone:
                if not path.is_file():  # another process may have fetched it meanwhile
                    _Transfer(url, path, sha256, retry_sec, alone).run()
        check(path, sha256, url)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error} (while downloading {url})") from None
    return path


def _make_room(path: Path, url: str) -> None:
    """Makes the folder of `path`. Errors: UserError where a file is in its way, or a folder in that of the file."""
    in_the_way = path if path.is_dir() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        in_the_way = next(folder for folder in path.parents if folder.exists() and not folder.is_dir())
    if in_the_way:
        raise UserError(
            f"{in_the_way}: is in the way of {url}: move it away, or let DNNLIB_CACHE_DIR name another folder"
        )


def verify(url: str, sha256: str | None = None, cache_dir: str | os.PathLike | None = None) -> str | None:
    """Reads the cached file of an http(s) address again and returns its sha256, in hex; None if it isn't there.

    Errors: UserError when that is another hash than expected or first seen.
    """
    path = cache_path(url, cache_dir)
    try:
        return check(path, sha256, url, reread=True) if path.is_file() else None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check its permissions") from None


class _Transfer:
    """One download: what has arrived lies in a hidden file next to the target, which is renamed when it is whole.

    alone: whether no other process writes that file; if any may, this one takes a file of its own.
    """

    def __init__(self, url: str, path: Path, sha256: str | None, retry_sec: float, alone: bool):
        self._url, self._path, self._sha256, self._retry_sec = url, path, sha256, retry_sec
        self._place = mirrored(url)
        self._part = path.with_name(f".{path.name}{'' if alone else f'.{os.getpid()}-{threading.get_ident()}'}.part")
        if sha256 is None or not is_own(self._part):
            self._part.unlink(missing_ok=True)  # of an unknown version: only a known hash could vouch for the whole

    def run(self) -> None:
        resumed = self._part.exists()
        found = self._fetch()
        if self._sha256 not in (None, found) and resumed:  # the part file was of another version
            self._part.unlink()
            found = self._fetch()
        if self._sha256 not in (None, found):
            self._part.unlink()
            raise UserError(
                f"{self._url}: sha256 is {found}, not {self._sha256} as published: the download is discarded"
            )
        first = read_record(self._path).get("sha256")
        if self._sha256 is None and first not in (None, found):
            self._part.unlink()
            raise UserError(
                f"{self._url}: sha256 is {found}, but was {first} when first seen: the download is discarded;"
                f" delete {record_path(self._path)} to accept the change"
            )
        os.replace(self._part, self._path)

    def _fetch(self) -> str:
        """Fetches the part file and returns its sha256."""
        if isinstance(self._place, Path):
            if not self._place.is_file():
                raise UserError(f"{self._place}: not in the mirror: put the file of {self._url} there")
            with open(self._place, "rb") as source, open_own(self._part, append=False) as file:
                shutil.copyfileobj(source, file)
        else:
            web.fetch(
                self._place,
                self._part,
                hash_known=self._sha256 is not None,
                advice=f"fetch it on another machine and put it under {self._path}",
                max_bytes=MAX_BYTES,
                retries=RETRIES,
                retry_sec=self._retry_sec,
            )
        if self._part.stat().st_size == 0:
            self._part.unlink()
            raise UserError(f"{self._url}: is an empty file: check the address")
        return hash_file(self._part)
