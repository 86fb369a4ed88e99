"""Downloads one http(s) address into a file: all of one version, in bounded time. Otherwise one line says why not."""

import contextlib
import email.utils
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urljoin, urlsplit

from .addresses import check_redirect, is_this_machine
from .cached_files import is_own, open_own
from .errors import UserError
from .passwords import without_password

CHUNK_BYTES = 1 << 13  # what has arrived of a broken chunk is lost
CONNECT_SEC, READ_SEC = 10, 30
MAX_REDIRECTS = 20
MAX_RETRY_SEC = 30
SLOW_SEC, SLOWEST_BYTES_PER_SEC = 30, 1000  # an attempt that brings less than this for so long is given up
SLOW_WEIGHT = 3  # such an attempt counts as so many broken ones
DEADLINE_SEC = 24 * 60 * 60  # of a download, all attempts and pauses together
RETRY_STATUS = {408, 425, 429, 500, 502, 503, 504}
PAGE = re.compile(rb"[\s\xef\xbb\xbf]*<(!doctype|html|head|body|script|!--|\?xml)", re.IGNORECASE)
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
PAGE_TYPES = ("text/html", "application/xhtml+xml")


class _Broken(Exception):
    """A transfer that broke and may succeed when it is tried again; the text says why it broke."""


class _TooSlow(_Broken):
    pass


@dataclass(frozen=True)
class _Version:
    """What tells the versions of a file apart, as the answer with its beginning stated it."""

    address: str  # that answered, redirects followed, without its query, which may be a signature
    etag: str | None
    modified: str | None
    validator: str | None  # for If-Range: a strong ETag, or a date that is as good as one
    total: int | None  # bytes of the whole file


def fetch(
    place: str,
    part: Path,
    *,
    hash_known: bool,
    advice: str,
    max_bytes: int,
    retries: int = 5,
    retry_sec: float = 1.0,
) -> None:
    """Fetches the address `place` into the file `part`, which may hold a beginning already.

    A broken transfer is resumed until `retries` more attempts bring nothing new; the pauses start at `retry_sec`
    seconds and double.

    hash_known:  the caller compares the whole with a known hash, so that a beginning of an unknown version may be
                 continued and an answer of unstated length will do.
    advice:      what the user can do where the file can't be fetched.
    max_bytes:   a longer file is refused.
    Errors: UserError.
    """
    import requests  # slow to import, and needed only here

    begun, failures, most, version = time.monotonic(), 0, 0, None
    while failures <= retries:
        attempt = _Attempt(place, part, version, hash_known, max_bytes, advice)
        try:
            _watch(attempt, begun)
            return
        except ValueError:  # what requests and urllib3 raise on addresses that are none; it may quote half a password
            raise UserError(
                f"{place}: this address, one that it leads to, or that of a proxy ({', '.join(PROXIES)}) can't be read:"
                " correct it"
            ) from None
        except (_Broken, requests.exceptions.RequestException) as error:
            reason, weight = _reason(error), SLOW_WEIGHT if isinstance(error, _TooSlow) else 1
        version = attempt.version
        arrived = _size(part)  # a long file over a bad line gets there too
        failures = weight + (0 if arrived >= most + SLOW_SEC * SLOWEST_BYTES_PER_SEC else failures)
        most = max(most, arrived)
        if failures <= retries:
            time.sleep(min(retry_sec * 2 ** (failures - 1), MAX_RETRY_SEC))
    raise UserError(f"{place}: cannot be downloaded ({reason}): {advice}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _watch(attempt: "_Attempt", begun: float) -> None:
    """Runs an attempt in a thread of its own and gives up when it is too slow.

    Nothing else would end the wait for a server that sends its headers or a chunk byte by byte.
    """
    from .progress import ProgressBar

    failure: list[BaseException] = []

    def work() -> None:
        try:
            attempt.run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    mark, marked = 0, time.monotonic()
    try:
        with ProgressBar(unit="B", unit_scale=True, desc=attempt.name) as bar:
            thread.start()
            while thread.is_alive():
                thread.join(timeout=0.2)
                bar.total = attempt.version.total if attempt.version else None
                bar.advance_to(attempt.position)
                now = time.monotonic()
                if now - begun > DEADLINE_SEC:
                    attempt.give_up()
                    raise UserError(f"{attempt.place}: takes more than {DEADLINE_SEC / 3600:g} hours: {attempt.advice}")
                if thread.is_alive() and now - marked >= SLOW_SEC:
                    if attempt.arrived - mark < SLOWEST_BYTES_PER_SEC * (now - marked):
                        raise _TooSlow(f"it sends less than {SLOWEST_BYTES_PER_SEC} bytes a second")
                    mark, marked = attempt.arrived, now
    finally:
        attempt.give_up()
    if failure:
        raise failure[0]


class _Attempt:
    """One attempt, which changes the part file until it is given up."""

    def __init__(self, place: str, part: Path, version: _Version | None, hash_known: bool, max_bytes: int, advice: str):
        self.place, self.version, self.advice = place, version, advice
        self.name = part.name.strip(".").removesuffix(".part")
        self.arrived = 0  # bytes, in this attempt
        self.position = 0  # bytes, in the part file
        self._part, self._hash_known, self._max_bytes = part, hash_known, max_bytes
        self._lock, self._given_up = threading.Lock(), False

    def give_up(self) -> None:
        """Makes sure that the part file no longer changes, even if the thread still waits for the server."""
        with self._lock:
            self._given_up = True

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            if self._given_up:
                raise _Broken("given up")
            yield

    def run(self) -> None:
        import requests

        with requests.Session() as session:
            while not self._ask(session):  # a server may send a range in several answers
                pass

    def _ask(self, session: Any) -> bool:
        """Asks for the bytes that are missing; returns True when the file is complete."""
        resumable = self._hash_known or (self.version is not None and self.version.validator)
        have = _size(self._part) if resumable and is_own(self._part) else 0
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.version is not None and self.version.validator:
                headers["If-Range"] = self.version.validator
        with self._follow(session, headers) as response:
            self._check_status(response)
            self._check_coding(response)
            try:
                end = _checked_range(response, have, self.version)
            except _Broken:
                self._discard()
                raise
            if response.status_code == 206:
                self.version = replace(self.version or _version(response, end[1]), total=end[1])
                self._receive(response, start=have, stop=end[0])
                return end[0] == end[1]
            self.version = _version(response, _length(response))
            self._receive(response, start=0, stop=self.version.total)
            return True

    def _follow(self, session: Any, headers: dict[str, str]) -> Any:
        """The answer at the end of all redirects, each of which is checked."""
        from requests.utils import get_auth_from_url

        url, auth = self.place, None
        for _ in range(MAX_REDIRECTS):
            no_proxy = (
                {"no_proxy": urlsplit(url).hostname} if is_this_machine(url) else None
            )  # its localhost is another
            response = session.get(
                url,
                headers=headers,
                auth=auth,
                proxies=no_proxy,
                timeout=(CONNECT_SEC, READ_SEC),
                stream=True,
                allow_redirects=False,
            )
            target = session.get_redirect_target(response)
            if target is None:
                return response
            response.close()
            target = urljoin(url, target)
            check_redirect(self.place, url, target)
            auth = auth or get_auth_from_url(url)
            auth = auth if auth != ("", "") and not session.should_strip_auth(url, target) else None
            url = target
        raise UserError(f"{self.place}: is redirected more than {MAX_REDIRECTS} times: check the address")

    def _check_status(self, response: Any) -> None:
        status = response.status_code
        if status == 416:  # nothing after what is there: whole, or nonsense; nobody can tell which, so start again
            self._discard()
            raise _Broken("the server can't continue the transfer")
        if status in RETRY_STATUS:
            raise _Broken(f"the server answers {status} {response.reason}")
        if status not in (200, 206):
            raise UserError(
                f"{self.place}: the server answers {status} {response.reason}: check the address, or {self.advice}"
            )

    def _check_coding(self, response: Any) -> None:
        """Refuses answers that aren't the file itself: one that was compressed on the way, or a page about it."""
        for header, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
            coding = response.headers.get(header, plain)
            if coding.strip().lower() not in ("", plain):
                raise UserError(
                    f"{self.place}: the server sends it with {header}: {coding}, not as it is: {self.advice}"
                )
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        wanted = urlsplit(self.place).path.lower().endswith((".html", ".htm", ".xhtml"))
        if kind in PAGE_TYPES and not wanted and not self._hash_known:
            self._refuse_page()

    def _refuse_page(self) -> NoReturn:
        self._discard()
        raise UserError(
            f"{self.place}: a web page comes instead of the file (a login or an error, perhaps): {self.advice}"
        )

    def _refuse_size(self) -> NoReturn:
        self._discard()
        raise UserError(f"{self.place}: has more than {self._max_bytes >> 30} GiB: not one of the files read here")

    def _discard(self) -> None:
        with self._changing():
            self._part.unlink(missing_ok=True)
            self.version = None

    def _receive(self, response: Any, start: int, stop: int | None) -> None:
        """Writes an answer's bytes to the part file from `start`; `stop` is where it must end, if anyone said so."""
        total = self.version.total if self.version is not None else None
        if max(stop or 0, total or 0) > self._max_bytes:
            self._refuse_size()
        with self._changing():
            file = open_own(self._part, append=start > 0)
        self.position = start
        response.raw.enforce_content_length = False  # below instead; its exception would lose the last bytes
        with file:
            for piece in response.iter_content(CHUNK_BYTES):
                if self.position == 0 and not self._hash_known and PAGE.match(piece):
                    self._refuse_page()
                with self._changing():
                    file.write(piece)
                self.position += len(piece)
                self.arrived += len(piece)
                if self.position > self._max_bytes:
                    self._refuse_size()
            with self._changing():
                file.flush()
            os.fsync(file.fileno())
        if stop is not None and self.position > stop:
            self._discard()
            raise _Broken(f"the server sends {self.position} bytes instead of {stop}")
        if stop is not None and self.position < stop:
            raise _Broken(f"the connection broke after {self.position} of {stop} bytes")
        chunked = "Transfer-Encoding" in response.headers
        if stop is None and not chunked and not self._hash_known:
            self._discard()
            raise UserError(
                f"{self.place}: the server doesn't say how long the file is, so it may be cut short: {self.advice}"
            )


def _length(response: Any) -> int | None:
    """Content-Length; None where another header, or nothing, says where the answer ends."""
    length = response.headers.get("Content-Length")
    if length is None or "Transfer-Encoding" in response.headers:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise _Broken(f"the server sends Content-Length: {length}")
    return int(length)


def _version(response: Any, total: int | None) -> _Version:
    headers = response.headers
    etag, modified = headers.get("ETag"), headers.get("Last-Modified")
    validator = None
    if etag is not None:
        validator = etag if re.fullmatch(r'"[^"]*"', etag) else None
    elif modified is not None:
        with contextlib.suppress(TypeError, ValueError):  # a file changed within that second may change again in it
            seconds = email.utils.parsedate_to_datetime(headers.get("Date", ""))
            age = seconds - email.utils.parsedate_to_datetime(modified)
            validator = modified if age.total_seconds() >= 1 else None
    return _Version(response.url.partition("?")[0], etag, modified, validator, total)


def _checked_range(response: Any, have: int, version: _Version | None) -> tuple[int, int]:
    """(end of the answer's bytes, total bytes) of a 206 that continues `version` after `have` bytes.

    Of a 200, whose bytes are the file's from the start, (0, 0). Raises _Broken where it continues something else.
    """
    stated = response.headers.get("Content-Range")
    if response.status_code == 200:
        if stated is not None:
            raise _Broken("the server sends a part as if it were the whole file")
        return 0, 0
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", stated or "", re.IGNORECASE)
    if not have or match is None:
        raise _Broken("the server sends a part that wasn't asked for")
    first, last, total = map(int, match.groups())
    length = _length(response)
    if not first == have <= last < total or length not in (None, last + 1 - first):
        raise _Broken("the server continues at another place")
    if version is not None:
        found = _version(response, total)
        same_date = None in (found.modified, version.modified) or found.modified == version.modified
        same = (found.address, found.etag, found.total) == (version.address, version.etag, version.total or total)
        if not same or not same_date:
            raise _Broken("the file changed during the transfer")
    return last + 1, total


def _reason(error: Exception) -> str:
    """The innermost cause of an error, in one line; requests wraps it three times."""
    while isinstance(getattr(error, "reason", None) or (error.args[0] if error.args else None), Exception):
        error = getattr(error, "reason", None) or error.args[0]
    return " ".join(without_password(str(error)).split())[:200] or type(error).__name__
