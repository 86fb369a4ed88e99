"""Addresses of files: which are accepted, and where each file lies in the cache.

No two addresses share a place in the cache, on any file system: capital letters are written `!a`, as some systems do
not tell them from small ones, and what a system could read differently (`..`, a trailing dot, Windows's `nul`) is
percent-encoded. Overlong names end in a hash. A query is only ever a hash: it may hold a token.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from .errors import UserError
from .files import user_path

THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
MAX_NAME = 150  # characters of one name; most systems take 255, and locks and records have longer names
MAX_PLACE = 600  # characters of all names together
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|clock\$|com\d|lpt\d)(?![^. ])")  # of Windows, with any suffix
OWN_FOLDERS = ("prompts", "references", "teacher-fid", "teacher-samples")  # what else this project keeps in the cache


def is_url(source: Any) -> TypeGuard[str]:
    """Whether `source` is an http(s) or file address rather than a path."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://", "file://"))


def split(url: str) -> SplitResult:
    """The parts of an address. Errors: UserError where it has none."""
    try:
        url.encode()
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # its text may quote a password, or the first half of one
        raise UserError(f"{url}: has no host and port that can be read: correct the address") from None
    if re.search(r"[\x00-\x1f\x7f]", url) or "\\" in parts.netloc:
        raise UserError(f"{url}: holds a character that no address has: correct the address")
    return parts


def split_file_address(url: str) -> SplitResult:
    """The parts of the http(s) address of a file. Errors: UserError where it is none."""
    parts = split(url)
    names = [unquote(name) for name in parts.path.split("/")]
    if parts.scheme not in ("http", "https") or not parts.hostname or not names[-1] or {".", ".."} & {*names}:
        raise UserError(f"{url}: not the http:// or https:// address of a file")
    return parts


def file_path(url: str) -> Path:
    """The path of a file:// address. Errors: UserError where it names another machine."""
    parts = split(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise UserError(f"{url}: is on another machine: give file:///PATH or an https:// address")
    return user_path(url2pathname(unquote(parts.path)))


def is_this_machine(url: str) -> bool:
    """Whether an address's host is this machine by its very name."""
    return split(url).hostname in THIS_MACHINE


def check_redirect(place: str, source: str, target: str) -> None:
    """Errors: UserError where the file at `place`, redirected at `source`, must not be fetched from `target`.

    An https address may lead to https only. A plain http one (a mirror, or this machine) may also lead to plain http on
    the same machine.
    """
    before, after = split(source), split(target)
    if after.scheme not in ("http", "https") or not after.hostname:
        raise UserError(f"{place}: leads to an address that is not http(s), {target}: give the file's own address")
    same = before.hostname == after.hostname or (is_this_machine(source) and is_this_machine(target))
    if after.scheme == "http" and not (before.scheme == "http" and same):
        raise UserError(
            f"{place}: leads to plain http, {target}, which can be changed on its way: give the file's https:// address"
        )


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """`cache_dir`, by default `DNNLIB_CACHE_DIR` or `~/.cache/dnnlib`."""
    folder = cache_dir or os.environ.get("DNNLIB_CACHE_DIR") or Path.home() / ".cache" / "dnnlib"
    return user_path(folder)


def cache_path(url: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Where the file of an http(s) address lies in the cache, whether it is there or not."""
    parts = split(url)
    names = [_file_name(name) for name in f"{_host(parts)}{parts.path}".split("/")]
    if parts.query:
        names[-1] = _shortened(names[-1], MAX_NAME // 2) + f"%~{_hash(parts.query)}"
    if sum(map(len, names)) > MAX_PLACE:
        names = [names[0], f"%~{_hash('/'.join(names))}", names[-1]]
    return cache_folder(cache_dir).joinpath(*names)


def _file_name(name: str) -> str:
    """A part of an address as a file name of its own. Every `%` that isn't of quote()'s making marks a special case."""
    name = quote(unquote_to_bytes(name), safe=" +=,@").replace("~", "%7E")  # ~ would allow Windows's short names
    name = re.sub(r"%[0-9A-F]{2}|[A-Z]", lambda m: m[0] if len(m[0]) == 3 else f"!{m[0].lower()}", name)
    if not name:
        return "%~"
    if name[0] in ". " or DEVICES.match(name) or name in OWN_FOLDERS:  # hidden names are for locks and unfinished files
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if name[-1] in ". ":
        name = f"{name[:-1]}%{ord(name[-1]):02X}"
    return _shortened(re.sub(r"\.sha256$", "%2Esha256", name), MAX_NAME)  # `.sha256` is a record's


def _shortened(name: str, length: int) -> str:
    if len(name) <= length:
        return name
    return f"{name[: length - 52]}%~{_hash(name)}%~{name[-16:]}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def mirrored(url: str) -> str | Path:
    """Where an http(s) address is fetched from: itself, or its place under `DNNLIB_MIRROR`, an address or a path.

    Errors: UserError when the mirror is neither an http(s) address nor a folder.
    """
    mirror = os.environ.get("DNNLIB_MIRROR")
    if not mirror:
        return url
    if mirror.lower().startswith(("http://", "https://")):
        parts = split(url)
        return f"{mirror.rstrip('/')}/{_host(parts)}{parts.path}" + (f"?{parts.query}" if parts.query else "")
    folder = file_path(mirror) if is_url(mirror) else user_path(mirror)
    if not folder.is_dir():
        raise UserError(f"DNNLIB_MIRROR={mirror}: neither an http(s) address nor a folder: correct it or unset it")
    return cache_path(url, folder)


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2].lower()  # without user and password
