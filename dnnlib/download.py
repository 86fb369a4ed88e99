"""Downloads into a cache folder: streamed, checked, and present whole or not at all.

The cache mirrors the web: `https://host/a/b.pkl` lies at `$DNNLIB_CACHE_DIR/host/a/b.pkl` (without that variable
`~/.cache/dnnlib/host/a/b.pkl`). A file put there by hand is used like a downloaded one. Beside it, `b.pkl.sha256`
records the hash it had when first seen; a file that has another hash later is refused.

Without internet: `DNNLIB_MIRROR` names a folder or the base of a web address where all files lie as in the cache, so
that `https://host/a/b.pkl` comes from `$DNNLIB_MIRROR/host/a/b.pkl`. The cache folder of another machine will do.

Plain http, where anyone on the way can change a file, is only for a mirror and this machine itself; an https address
that leads to plain http or to a file of this machine is refused.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import url2pathname

from .util import UserError, user_path, without_password, write_atomically

try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import msvcrt  # Windows
except ImportError:
    msvcrt = None

CHUNK_BYTES = 1 << 16  # what has arrived of a broken chunk is lost
CONNECT_SEC, READ_SEC = 20, 60
RETRIES = 5
MAX_RETRY_SEC = 30
MAX_BYTES = 16 << 30  # of one download; the largest published network takes about 1.2 GB
MAX_RECORD_BYTES = 1 << 16
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
RETRY_STATUS = {408, 425, 429, 500, 502, 503, 504}


def is_url(source: Any) -> bool:
    """Whether `source` is an http(s) or file address rather than a path."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://", "file://"))


def open_url(
    source: str | os.PathLike, sha256: str | None = None, cache_dir: str | os.PathLike | None = None
) -> BinaryIO:
    """Opens a path, a file:// or an http(s) address for reading bytes; the latter is downloaded first.

    Errors: UserError when it can't be had.
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

    Errors: UserError when it can't be had.
    """
    if not is_url(source):
        path = user_path(source)
    elif _split(source).scheme == "file":
        path = user_path(url2pathname(unquote(_split(source).path)))
    else:
        return download(source, sha256, cache_dir)
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the file name")
    return path


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url}: {error}: correct the address") from None


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """`cache_dir`, by default the cache folder that the module's docstring names."""
    folder = cache_dir or os.environ.get("DNNLIB_CACHE_DIR") or Path.home() / ".cache" / "dnnlib"
    return user_path(folder)


def cache_path(url: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Where the file of an http(s) address lies in the cache, whether it is there or not."""
    parts = _split(url)
    names = [quote(unquote(name), safe=" +=,@") for name in f"{_host(parts)}{parts.path}".split("/")]
    names = [name for name in names if name not in ("", ".", "..")]
    if parts.query:
        names[-1] += "%3F" + quote(parts.query, safe="=")
    return cache_folder(cache_dir).joinpath(*names)


def mirrored(url: str) -> str | Path:
    """Where an http(s) address is fetched from: itself, or its place under `DNNLIB_MIRROR`, an address or a path.

    Errors: UserError when the mirror is neither an http(s) address nor a folder.
    """
    mirror = os.environ.get("DNNLIB_MIRROR")
    if not mirror:
        return url
    if mirror.lower().startswith(("http://", "https://")):
        parts = _split(url)
        return f"{mirror.rstrip('/')}/{_host(parts)}{parts.path}" + (f"?{parts.query}" if parts.query else "")
    folder = user_path(url2pathname(unquote(_split(mirror).path)) if is_url(mirror) else mirror)
    if not folder.is_dir():
        raise UserError(f"DNNLIB_MIRROR={mirror}: neither an http(s) address nor a folder: correct it or unset it")
    return cache_path(url, folder)


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2].lower()  # without user and password


def download(
    url: str,
    sha256: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    *,
    retry_sec: float = 1.0,
) -> Path:
    """The path of the file behind an http(s) address in the cache, downloaded if it isn't there yet.

    A broken transfer is resumed, until `RETRIES` more attempts bring nothing new; the pauses start at `retry_sec`
    seconds and double.
    Processes that ask for the same file at once download it once.

    sha256:     the expected hash in hex, if known.
    cache_dir:  instead of the folder named in the module's docstring.
    Errors: UserError, one line, when the file can't be fetched or has another hash than expected or first seen.
    """
    parts = _split(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.path.endswith(("/", ".."))
        or not parts.path
    ):
        raise UserError(f"{url}: not the http:// or https:// address of a file")
    path = cache_path(url, cache_dir)
    try:
        if not path.is_file():
            if mirrored(url) == url and parts.scheme == "http" and parts.hostname not in THIS_MACHINE:
                raise UserError(f"{url}: plain http can be changed on its way: give its https:// address")
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(f".{path.name}.lock")) as alone:
                if not path.is_file():  # another process may have fetched it meanwhile
                    _Transfer(url, path, sha256, retry_sec, alone).run()
        _check(path, sha256, url)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error} (while downloading {url})") from None
    return path


def verify(url: str, sha256: str | None = None, cache_dir: str | os.PathLike | None = None) -> str | None:
    """Reads the cached file of an http(s) address again and returns its sha256, in hex; None if it isn't there.

    Errors: UserError when that is another hash than expected or first seen.
    """
    path = cache_path(url, cache_dir)
    try:
        return _check(path, sha256, url, reread=True) if path.is_file() else None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check its permissions") from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds a lock that ends with the process, if not before; yields False where there are none."""
    with open(path, "ab") as file:
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


def _session() -> Any:
    """A requests.Session that doesn't follow https addresses to anything less."""
    import requests

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> str | None:
            target = super().get_redirect_target(resp)
            leaves_https = urlsplit(resp.url).scheme == "https"
            if target is not None and leaves_https and urlsplit(urljoin(resp.url, target)).scheme != "https":
                raise requests.exceptions.InvalidSchema("an https address redirects to one that is not")
            return target

    return Session()


class _Broken(Exception):
    """A transfer that may succeed when tried again; its text says why it broke."""


class _Transfer:
    """One download: what has arrived lies in a hidden file beside the target, which is renamed when it is whole.

    alone: whether no other process writes that file; if any may, this one takes a file of its own.
    """

    def __init__(self, url: str, path: Path, sha256: str | None, retry_sec: float, alone: bool):
        self._url, self._path, self._sha256, self._retry_sec = url, path, sha256, retry_sec
        self._place = mirrored(url)
        self._part = path.with_name(f".{path.name}{'' if alone else f'.{os.getpid()}-{threading.get_ident()}'}.part")
        self._validator: str | None = None  # names the version of the file whose beginning is in the part file
        if sha256 is None:
            self._part.unlink(missing_ok=True)  # of an unknown version: only a known hash could vouch for the whole

    def run(self) -> None:
        resumed = self._part.exists()
        self._fetch()
        found = hash_file(self._part)
        if self._sha256 not in (None, found) and resumed:  # the part file was of another version
            self._part.unlink()
            self._fetch()
            found = hash_file(self._part)
        if self._sha256 not in (None, found):
            self._part.unlink()
            raise UserError(
                f"{self._url}: sha256 is {found}, not {self._sha256} as published: the download is discarded"
            )
        first = _record(self._path).get("sha256")
        if self._sha256 is None and first not in (None, found):
            self._part.unlink()
            raise UserError(
                f"{self._url}: sha256 is {found}, but was {first} when first seen: the download is discarded;"
                f" delete {_record_path(self._path)} to accept the change"
            )
        os.replace(self._part, self._path)

    def _fetch(self) -> None:
        if isinstance(self._place, Path):
            if not self._place.is_file():
                raise UserError(f"{self._place}: not in the mirror: put the file of {self._url} there")
            shutil.copyfile(self._place, self._part)
            return
        self._fetch_from_web()

    def _fetch_from_web(self) -> None:
        import requests  # slow to import, and needed only here

        with _session() as session:
            failures, most = 0, 0
            while failures <= RETRIES:
                try:
                    return self._attempt(session)
                except ValueError as error:  # what requests and urllib3 raise on addresses that are none
                    raise UserError(
                        f"{self._place}: leads to an address that is not http(s): {_reason(error)}"
                    ) from None
                except (_Broken, requests.exceptions.RequestException) as error:
                    reason = _reason(error)
                failures = failures + 1 if self._received() <= most else 1  # a long file over a bad line gets there too
                most = max(most, self._received())
                if failures <= RETRIES:
                    time.sleep(min(self._retry_sec * 2 ** (failures - 1), MAX_RETRY_SEC))
        raise UserError(
            f"{self._place}: cannot be downloaded ({reason}): fetch it on another machine and put it under {self._path}"
        )

    def _refuse_size(self) -> None:
        self._part.unlink(missing_ok=True)
        raise UserError(f"{self._place}: has more than {MAX_BYTES >> 30} GiB: not one of the files read here")

    def _received(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _attempt(self, session: Any) -> None:
        have = self._received() if self._sha256 or self._validator else 0  # else the two halves may differ in version
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self._validator:
                headers["If-Range"] = self._validator
        with session.get(self._place, headers=headers, stream=True, timeout=(CONNECT_SEC, READ_SEC)) as response:
            status = response.status_code
            if (
                status == 416
            ):  # nothing after what is there: whole, or nonsense; the hash can't tell which, so start anew
                self._part.unlink(missing_ok=True)
                raise _Broken("the server can't continue the transfer")
            if status in RETRY_STATUS:
                raise _Broken(f"the server answers {status} {response.reason}")
            if status not in (200, 206):
                raise UserError(
                    f"{self._place}: the server answers {status} {response.reason}: check the address, or fetch"
                    f" the file elsewhere and put it under {self._path}"
                )
            if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                self._part.unlink(missing_ok=True)
                raise _Broken("the server continues at another place")
            self._receive(response, have if status == 206 else 0)

    def _receive(self, response: Any, start: int) -> None:
        from tqdm import tqdm

        etag = response.headers.get("ETag", "")
        self._validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and re.fullmatch(r"[0-9]{1,18}", length) else None
        if total is not None and total > MAX_BYTES:
            self._refuse_size()
        quiet = not sys.stderr.isatty()
        with (
            open(self._part, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=self._path.name, disable=quiet) as bar,
        ):
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > MAX_BYTES:
                    self._refuse_size()
            file.flush()
            os.fsync(file.fileno())
            if total is not None and file.tell() != total:
                raise _Broken(f"the connection broke after {file.tell()} of {total} bytes")


def _reason(error: Exception) -> str:
    """The innermost cause in one line: requests wraps it three times."""
    while isinstance(getattr(error, "reason", None) or (error.args[0] if error.args else None), Exception):
        error = getattr(error, "reason", None) or error.args[0]
    return " ".join(str(error).split())[:200] or type(error).__name__


def hash_file(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _record(path: Path) -> dict[str, Any]:
    """What was recorded when the file was first seen; empty if nothing was."""
    try:
        with open(_record_path(path), "rb") as file:
            record = json.loads(file.read(MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _check(path: Path, sha256: str | None, url: str, reread: bool = False) -> str:
    """Compares a cached file's hash with the expected and the first-seen one and returns it.

    The file is read again if it was touched since, or if `reread`.
    """
    stat, record = path.stat(), _record(path)
    touched = (record.get("bytes"), record.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns)
    found = hash_file(path) if reread or touched or not record.get("sha256") else record["sha256"]
    if sha256 not in (None, found):
        raise UserError(f"{path}: sha256 is {found}, not {sha256} as published: delete the file to fetch it again")
    if sha256 is None and record.get("sha256", found) != found:
        raise UserError(
            f"{path}: sha256 is {found}, but was {record['sha256']} when first seen: delete the file to fetch it again,"
            f" or {_record_path(path)} to accept the change"
        )
    if touched or record.get("sha256") != found:
        record = {"sha256": found, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "url": without_password(url)}
        with contextlib.suppress(OSError), write_atomically(_record_path(path)) as file:  # a read-only cache is fine
            file.write(json.dumps(record).encode())
    return found
