"""Servers that lie, change the file or never finish: the right bytes arrive, or one line and no file.

The test server answers each request with the bytes that a test scripts, headers included.
"""

import contextlib
import gzip
import hashlib
import itertools
import random
import socket
import threading
import time

import pytest

from dnnlib import UserError, download, web

BODY = random.Random(0).randbytes(100_000)
OTHER = random.Random(1).randbytes(100_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
HALF = 50_000
DATE = "Date: Sun, 01 Nov 2026 00:01:00 GMT"
MODIFIED = "Last-Modified: Sun, 01 Nov 2026 00:00:00 GMT"


def answer(status, *headers, body=b"", length=True):
    lines = [
        f"HTTP/1.1 {status} X",
        *headers,
        *([f"Content-Length: {len(body)}"] if length is True else []),
        "Connection: close",
    ]
    if length not in (True, False):
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def half(*headers):
    return answer(200, *headers, body=BODY[:HALF], length=len(BODY))


def rest(start, *headers, body=BODY, stop=None, total=None):
    stop = stop or len(BODY)
    content = f"Content-Range: bytes {start}-{stop - 1}/{total or len(BODY)}"
    return answer(206, content, *headers, body=body[start:stop])


class Server:
    """Answers the n-th request by `script(n, path, start of the range asked for)`: bytes, or pieces and pauses."""

    def __init__(self):
        self.requests, self._count = [], itertools.count()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536)
            lines = head.decode().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:] if line)}
            start = int(headers["range"][6:-1]) if "range" in headers else None
            self.requests.append((lines[0].split()[1], start, headers))
            reply = self.script(next(self._count), lines[0].split()[1], start)
            for piece in [reply] if isinstance(reply, bytes) else reply:
                if self.closed:
                    return
                connection.sendall(piece)

    def close(self):
        self.closed = True
        self._socket.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def fetch(server, script, folder, sha256=None, path="/f.pkl"):
    server.script = script
    return download.download(server.url + path, sha256, folder, retry_sec=0.001).read_bytes()


def refused(server, script, folder, sha256=None, path="/f.pkl"):
    with pytest.raises(UserError) as error:
        fetch(server, script, folder, sha256, path)
    assert "\n" not in error.value.message
    assert not [found for found in folder.rglob("*") if found.name in ("f.pkl", "f.pkl.sha256")]
    return error.value.message


ONE, TWO, WEAK = 'ETag: "1"', 'ETag: "2"', 'ETag: W/"1"'
WRONG_CONTINUATIONS = {
    "another ETag": lambda at: rest(at, TWO, body=OTHER),
    "no ETag": lambda at: rest(at, body=OTHER),
    "a weak ETag": lambda at: rest(at, WEAK, body=OTHER),
    "another date": lambda at: rest(at, ONE, "Last-Modified: Sun, 01 Nov 2026 00:00:30 GMT", body=OTHER),
    "another total": lambda at: rest(at, ONE, total=len(BODY) + 1),
    "a smaller total": lambda at: rest(at, ONE, stop=at + 10, total=at + 10),
    "no total": lambda at: answer(206, ONE, f"Content-Range: bytes {at}-99999/*", body=BODY[at:]),
    "another start": lambda at: rest(at + 1, ONE),
    "an earlier start": lambda at: rest(at - 1, ONE),
    "no range": lambda at: answer(206, ONE, body=BODY[at:]),
    "an end beyond the total": lambda at: answer(
        206, ONE, f"Content-Range: bytes {at}-100000/100000", body=BODY[at:] + b"x"
    ),
    "an end before the start": lambda at: answer(206, ONE, f"Content-Range: bytes {at}-{at - 1}/100000", body=b""),
    "another length": lambda at: answer(206, ONE, f"Content-Range: bytes {at}-99999/100000", body=BODY[at:-1]),
    "another unit": lambda at: answer(206, ONE, f"Content-Range: lines {at}-99999/100000", body=BODY[at:]),
    "several ranges": lambda at: answer(206, ONE, "Content-Type: multipart/byteranges; boundary=x", body=b"--x"),
    "more than its range": lambda at: answer(
        206,
        ONE,
        f"Content-Range: bytes {at}-99999/100000",
        "Transfer-Encoding: chunked",
        length=False,
        body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY) - at + 5, BODY[at:] + b"xxxxx"),
    ),
    "a part as the whole": lambda at: answer(200, ONE, f"Content-Range: bytes {at}-99999/100000", body=BODY[at:]),
    "nothing satisfiable": lambda at: answer(416, ONE, "Content-Range: bytes */100000"),
}


@pytest.mark.parametrize("sha256", [None, SHA256])
@pytest.mark.parametrize("wrong", WRONG_CONTINUATIONS.values(), ids=WRONG_CONTINUATIONS.keys())
def test_a_wrong_continuation_is_discarded_and_the_file_fetched_anew(server, tmp_path, wrong, sha256):
    def script(n, path, start):
        if start is not None:
            return wrong(start)
        return half(ONE, DATE, MODIFIED) if n == 0 else answer(200, ONE, body=BODY)

    assert fetch(server, script, tmp_path, sha256) == BODY
    assert [start for _, start, _ in server.requests] == [None, HALF, None]


@pytest.mark.parametrize("what", ["another ETag", "another start", "another length", "a part as the whole"])
def test_a_server_that_always_continues_wrongly_is_refused(server, tmp_path, what):
    wrong = WRONG_CONTINUATIONS[what]
    refused(server, lambda n, path, start: half(ONE, DATE, MODIFIED) if start is None else wrong(start), tmp_path)


def test_a_range_in_several_answers_is_put_together(server, tmp_path):
    def script(n, path, start):
        return half(ONE) if start is None else rest(start, ONE, stop=min(start + 7_000, len(BODY)))

    assert fetch(server, script, tmp_path) == BODY


def test_the_whole_in_place_of_the_rest_is_taken_as_the_whole(server, tmp_path):
    assert (
        fetch(server, lambda n, path, start: half(ONE) if n == 0 else answer(200, TWO, body=OTHER), tmp_path) == OTHER
    )


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ([ONE], '"1"'),
        ([ONE, DATE, MODIFIED], '"1"'),
        ([DATE, MODIFIED], MODIFIED.split(": ")[1]),
        ([MODIFIED], None),  # the file may have changed again within that second
        ([DATE.replace("01:00", "00:00"), MODIFIED], None),
        ([WEAK], None),
        ([WEAK, DATE, MODIFIED], None),
        (["ETag: 1"], None),
        ([DATE, "Last-Modified: yesterday"], None),
        ([], None),
    ],
)
def test_only_a_strong_validator_lets_a_transfer_go_on(server, tmp_path, headers, condition):
    def script(n, path, start):
        if n == 0:
            return half(*headers)
        return answer(200, body=OTHER) if start is None else rest(start, *headers)

    assert fetch(server, script, tmp_path) == (BODY if condition else OTHER)
    _, start, asked = server.requests[1]
    assert (start, asked.get("if-range")) == (HALF if condition else None, condition)


def test_a_redirect_that_changes_between_attempts_starts_anew(server, tmp_path):
    def script(n, path, start):
        if path == "/f.pkl":
            return answer(302, f"Location: /v{1 + (n > 1)}/f?signature={n}")
        if path.startswith("/v1/"):
            return half(ONE)
        return answer(200, ONE, body=OTHER) if start is None else rest(start, ONE, body=OTHER)

    assert fetch(server, script, tmp_path) == OTHER


def test_a_new_signature_is_no_new_file(server, tmp_path):
    def script(n, path, start):
        if path == "/f.pkl":
            return answer(302, f"Location: /v1/f?signature={n}")
        return half(ONE) if start is None else rest(start, ONE)

    assert fetch(server, script, tmp_path) == BODY
    assert server.requests[-1][1] == HALF


def chunked(*pieces, end=b"0\r\n\r\n"):
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end
    return answer(200, "Transfer-Encoding: chunked", body=body, length=False)


def test_chunks_are_put_together(server, tmp_path):
    assert fetch(server, lambda *_: chunked(BODY[:HALF], BODY[HALF:]), tmp_path) == BODY


PAGE = b"\n <!DOCTYPE html><html>Please log in</html>"
WRONG_ANSWERS = {
    "chunks end early": chunked(BODY[:HALF], end=b""),
    "a chunk ends early": chunked(BODY[:HALF], end=b"c350\r\nabc"),
    "a chunk of no length": chunked(BODY[:HALF], end=b"xyz\r\n"),
    "a length that is too large": answer(200, body=BODY, length=len(BODY) + 1),
    "a length that is none": answer(200, body=BODY, length="many"),
    "a negative length": answer(200, body=BODY, length=-5),
    "two lengths": answer(200, "Content-Length: 50000", body=BODY),
    "no length": answer(200, ONE, body=BODY[:HALF], length=False),
    "gzip": answer(200, "Content-Encoding: gzip", body=gzip.compress(BODY)),
    "x-gzip": answer(200, "Content-Encoding: X-GZIP", body=gzip.compress(BODY)),
    "two codings": answer(200, "Content-Encoding: identity, gzip", body=gzip.compress(BODY)),
    "br": answer(200, "Content-Encoding: br", body=BODY),
    "gzip said of what isn't": answer(200, "Content-Encoding: gzip", body=BODY),
    "gzip as a transfer coding": answer(200, "Transfer-Encoding: gzip", body=gzip.compress(BODY), length=False),
    "a page": answer(200, "Content-Type: text/html; charset=utf-8", body=b"Please log in"),
    "a page in disguise": answer(200, "Content-Type: application/octet-stream", body=PAGE),
    "a page with a byte-order mark": answer(200, body=b"\xef\xbb\xbf" + PAGE),
    "an error in XML": answer(200, body=b'<?xml version="1.0"?><Error/>'),
    "nothing": answer(200, body=b""),
    "no content": answer(204, length=False),
    "a part that nobody asked for": rest(HALF),
    "the whole as a part": answer(206, "Content-Range: bytes 0-99999/100000", body=BODY),
    "no redirect": answer(302),
    "a circle": answer(302, "Location: /f.pkl"),
    "no address": answer(302, "Location: http://["),
    "another scheme": answer(302, "Location: file:///etc/hostname"),
    "plain http elsewhere": answer(302, "Location: http://host.invalid/f.pkl"),
    "plain http elsewhere, without its scheme": answer(302, "Location: //host.invalid/f.pkl"),
    "no HTTP": b"SSH-2.0-x\r\n",
    "an end at once": b"",
}


@pytest.mark.parametrize("wrong", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS.keys())
def test_wrong_answers_are_refused(server, tmp_path, wrong):
    refused(server, lambda *_: wrong, tmp_path)
    assert not [path for path in tmp_path.rglob("*.part") if path.stat().st_size > len(BODY)]


def test_a_page_may_be_fetched_as_one(server, tmp_path):
    page = answer(200, "Content-Type: text/html", body=b"a page")
    assert fetch(server, lambda *_: page, tmp_path, path="/f.html") == b"a page"


def test_a_known_hash_vouches_for_what_the_headers_do_not(server, tmp_path):
    assert fetch(server, lambda *_: answer(200, body=BODY, length=False), tmp_path, SHA256) == BODY
    for body in (BODY[:HALF], PAGE):
        assert "sha256" in refused(
            server, lambda *_, body=body: answer(200, body=body, length=False), tmp_path / "b", SHA256
        )


def test_a_server_that_closes_early_every_time(server, tmp_path):
    def script(n, path, start):  # a little more each time
        start = start or 0
        return answer(
            206 if start else 200,
            ONE,
            *([f"Content-Range: bytes {start}-99999/100000"] if start else []),
            body=BODY[start : start + 30_000],
            length=len(BODY) - start,
        )

    assert fetch(server, script, tmp_path) == BODY
    assert "cannot be downloaded" in refused(
        server, lambda n, path, start: half(ONE) if start is None else b"", tmp_path / "b"
    )
    assert len(server.requests) < 20


def drip(head, body=b"", pause=0.02):
    yield head
    for byte in itertools.cycle(body or b"x"):
        time.sleep(pause)
        yield bytes([byte])


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"
DRIPS = {
    "body": lambda: drip(HEAD + b"\r\n", BODY),
    "status": lambda: drip(b"HTTP/1.1 200 "),
    "headers": lambda: drip(HEAD, b"a: b\r\n"),
    "chunk": lambda: drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "chunks": lambda: drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "redirect": lambda: drip(b"HTTP/1.1 302 Found\r\nLocation: /g\r\n", b"a: b\r\n"),
    "unbounded": lambda: drip(b"HTTP/1.1 200 OK\r\n\r\n"),
}


@pytest.mark.parametrize("slow", DRIPS.values(), ids=DRIPS.keys())
def test_a_server_that_drips_is_given_up(server, tmp_path, monkeypatch, slow):
    monkeypatch.setattr(web, "SLOW_SEC", 0.6)
    began = time.monotonic()
    assert "bytes a second" in refused(server, lambda *_: slow(), tmp_path)
    assert time.monotonic() - began < 20
    assert len(server.requests) <= 2


def test_small_answers_that_drip_are_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "SLOW_SEC", 0.5)

    def script(n, path, start):
        time.sleep(0.01)
        return half(ONE) if start is None else rest(start, ONE, stop=start + 1)

    began = time.monotonic()
    refused(server, script, tmp_path)
    assert time.monotonic() - began < 20


def test_one_slow_attempt_is_not_the_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "SLOW_SEC", 1)

    def script(n, path, start):
        return drip(half(ONE), BODY[HALF:]) if n == 0 else rest(start, ONE)

    assert fetch(server, script, tmp_path) == BODY


def test_no_download_takes_longer_than_its_deadline(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "DEADLINE_SEC", 1)

    def script(n, path, start):
        yield HEAD + b"\r\n"
        for at in range(0, len(BODY), 1000):
            time.sleep(0.1)
            yield BODY[at : at + 1000]

    assert "hours" in refused(server, script, tmp_path)


def test_what_is_given_up_changes_nothing_later(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "SLOW_SEC", 1)
    release = threading.Event()

    def script(n, path, start):
        if n > 0:
            return answer(200, TWO, body=OTHER)

        def late():
            yield HEAD + b"\r\n" + BODY[:20_000]
            release.wait(10)
            yield BODY[20_000:]

        return late()

    path = download.cache_path(f"{server.url}/f.pkl", tmp_path)
    assert fetch(server, script, tmp_path) == OTHER
    release.set()
    time.sleep(0.3)
    assert path.read_bytes() == OTHER
    assert not [*tmp_path.rglob("*.part")]


def test_credentials_go_to_their_own_server_only(server, tmp_path):
    other = Server()
    other.script = lambda *_: answer(200, body=BODY)
    server.script = lambda n, path, start: answer(302, "Location: " + ("/g" if n == 0 else f"{other.url}/h"))
    try:
        place = server.url.replace("//", "//user:hush@")
        download.download(f"{place}/f.pkl", None, tmp_path)
    finally:
        other.close()
    assert ["authorization" in headers for _, _, headers in server.requests + other.requests] == [True, True, False]


def test_credentials_in_a_redirect_are_not_shown(server, tmp_path):
    for target in (
        "http://user:hush@host.invalid/f",
        "ftp://host/f?token=hush",
        "http://user:hush@[/",
        "//u:hush@127.0.0.1:9/?k=hush",
    ):
        message = refused(server, lambda *_, target=target: answer(302, f"Location: {target}"), tmp_path)
        assert "hush" not in message
