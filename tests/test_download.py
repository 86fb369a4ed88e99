"""dnnlib.download against a local server: files arrive whole or not at all, resumed, checked and shared."""

import contextlib
import hashlib
import itertools
import os
import shutil
import socket
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dnnlib import UserError, addresses, cached_files, download

CONTENT = bytes(range(256)) * 2048  # 512 kB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/file whole, with ranges; /drop breaks in the middle of the first answer; /noresume ignores ranges and breaks."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        name = self.path.split("?")[0].removeprefix("/nowhere.invalid")
        if name == "/moved":
            return self._redirect("/file")
        if name == "/moved-to-disk":
            return self._redirect("file:///etc/hostname")
        if name == "/busy" and len(server.requests) < 3:
            return self.send_error(503)
        if name == "/endless":  # says no length
            self.send_response(200)
            self.end_headers()
            self.wfile.write(server.content)
            return None
        if name not in ("/file", "/drop", "/noresume", "/busy"):
            return self.send_error(404)
        start = 0
        if self.headers.get("Range") and name != "/noresume":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        first = [path for path, _ in server.requests].count(self.path) == 1
        self.wfile.write(body[: len(body) // 2] if first and name in ("/drop", "/noresume") else body)
        return None

    def _redirect(self, target):
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.requests = CONTENT, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(url, folder, sha256=None):
    return download.download(url, sha256, folder, retry_sec=0.001)


def refused(*args, **kwargs):
    with pytest.raises(UserError) as error:
        fetch(*args, **kwargs)
    assert "\n" not in error.value.message
    return error.value.message


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith((".sha256", ".lock"))]


def test_fetched_once_and_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    path = download.download(f"{server.url}/file", SHA256)
    assert path == download.cache_path(f"{server.url}/file")
    assert path.is_relative_to(tmp_path)
    assert path.read_bytes() == CONTENT
    with download.open_url(f"{server.url}/file") as file:
        assert file.read() == CONTENT
    assert len(server.requests) == 1


def test_paths_and_file_urls_open_without_a_network(tmp_path):
    path = tmp_path / "a b.bin"
    path.write_bytes(b"abc")
    for source in (path, str(path), path.as_uri()):
        with download.open_url(source) as file:
            assert file.read() == b"abc"
    with pytest.raises(UserError, match="no such file"):
        download.open_url(tmp_path / "absent")


@pytest.mark.parametrize("sha256", [SHA256, None])
@pytest.mark.parametrize("name", ["moved", "drop", "noresume", "busy"])
def test_arrives_whole(server, tmp_path, name, sha256):
    assert fetch(f"{server.url}/{name}", tmp_path, sha256).read_bytes() == CONTENT
    assert len(leftovers(tmp_path)) == 1
    if name == "drop":
        assert server.requests == [("/drop", None), ("/drop", f"bytes={len(CONTENT) // 2}-")]


def test_a_killed_download_is_resumed_only_under_a_known_hash(server, tmp_path):
    path = download.cache_path(f"{server.url}/file", tmp_path)
    path.parent.mkdir(parents=True)
    for begun, sha256, asked in [(CONTENT[:1000], SHA256, "bytes=1000-"), (CONTENT[:1000], None, None)]:
        path.with_name(".file.part").write_bytes(begun)
        assert fetch(f"{server.url}/file", tmp_path, sha256).read_bytes() == CONTENT
        assert server.requests[-1] == ("/file", asked)
        path.unlink()
    path.with_name(".file.part").write_bytes(b"of another version")
    assert fetch(f"{server.url}/file", tmp_path, SHA256).read_bytes() == CONTENT


def test_a_missing_file_is_reported_at_once(server, tmp_path):
    assert "404" in refused(f"{server.url}/absent", tmp_path)
    assert len(server.requests) == 1
    assert not leftovers(tmp_path)


def test_redirects_lead_only_to_http(server, tmp_path):
    assert "not http" in refused(f"{server.url}/moved-to-disk", tmp_path)
    for url in ("ftp://host/file", "http:///file", "http://host/", "http://host/a/..", "file:///etc/hostname"):
        assert "address of a file" in refused(url, tmp_path)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("https://host/a", "https://other/b", True),
        ("https://host/a", "http://host/b", False),
        ("https://host/a", "HTTP://host/b", False),
        ("https://host/a", "http://localhost/b", False),
        ("https://localhost/a", "http://localhost/b", False),
        ("https://host/a", "file:///etc/hostname", False),
        ("https://host/a", "ftp://host/b", False),
        ("http://localhost/a", "https://host/b", True),
        ("http://localhost/a", "http://127.0.0.1:8080/b", True),
        ("http://localhost/a", "http://host/b", False),
        ("http://127.0.0.1/a", "http://127.0.0.1.host/b", False),
        ("http://mirror/a", "http://mirror:8080/b", True),
        ("http://mirror/a", "http://host/b", False),
        ("http://mirror/a", "http://localhost/b", False),
        ("http://mirror/a", "http://host\\@mirror/b", False),
    ],
)
def test_redirects_never_lead_to_plain_http_elsewhere(source, target, allowed):
    with contextlib.nullcontext() if allowed else pytest.raises(UserError):
        addresses.check_redirect(source, source, target)


def test_plain_http_is_for_this_machine_and_mirrors(tmp_path):
    assert "https://" in refused("http://host.invalid/file", tmp_path)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("name", ["file", "endless"])
def test_downloads_are_bounded(server, tmp_path, monkeypatch, name):
    monkeypatch.setattr(download, "MAX_BYTES", len(CONTENT) - 1)
    assert "GiB" in refused(f"{server.url}/{name}", tmp_path)
    assert not leftovers(tmp_path)


def test_passwords_are_not_shown(server, tmp_path):
    place = server.url.replace("http://", "http://user:secret@")
    fetch(f"{place}/file", tmp_path)
    assert "secret" not in cached_files.record_path(download.cache_path(f"{place}/file", tmp_path)).read_text()
    for url in (
        f"{place}/absent",
        "http://user:secret@127.0.0.1:9/file",
        "https://u:p@ss:secret@host/",
        "http://u:secret@[",
    ):
        message = refused(url, tmp_path)
        assert "secret" not in message
        assert "***@" in message


@pytest.mark.parametrize("url", ["http://[", "https://[::1/x", "https://host:port/x", "https:///x", "https://a..b/x"])
def test_invalid_addresses(tmp_path, url):
    refused(url, tmp_path)


def test_wrong_hash_leaves_nothing(server, tmp_path):
    assert SHA256 in refused(f"{server.url}/file", tmp_path, "0" * 64)
    assert not leftovers(tmp_path)


def test_a_change_since_first_seen_is_refused(server, tmp_path):
    path = fetch(f"{server.url}/file", tmp_path)
    path.write_bytes(b"changed on disk")
    assert "first seen" in refused(f"{server.url}/file", tmp_path)
    path.unlink()
    server.content = b"changed at the source"
    assert "first seen" in refused(f"{server.url}/file", tmp_path)
    assert not path.exists()
    path.with_name("file.sha256").unlink()
    assert fetch(f"{server.url}/file", tmp_path).read_bytes() == server.content


def test_offline_names_the_place_to_put_the_file(tmp_path):
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a/file.pkl"
    path = download.cache_path(url, tmp_path)
    message = refused(url, tmp_path)
    assert url in message
    assert str(path) in message
    assert not leftovers(tmp_path)
    path.write_bytes(CONTENT)
    assert fetch(url, tmp_path, SHA256) == path
    assert "published" in refused(url, tmp_path, "0" * 64)


def test_concurrent_requests_download_once(server, tmp_path):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(f"{server.url}/drop", tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 6
    assert paths[0].read_bytes() == CONTENT
    assert len(server.requests) == 2  # the broken one and its continuation


@pytest.mark.parametrize("locks", ["none", "unsupported", "windows"])
def test_whole_files_also_where_locks_differ(server, tmp_path, monkeypatch, locks):
    calls, posix = [], cached_files.fcntl
    order, all_three = itertools.count(1), threading.Barrier(3)

    def locking(*arguments):
        calls.append(arguments)
        number = next(order)
        if number <= 3:  # one of each thread: nobody comes so late that the file is there
            all_three.wait(timeout=60)
        if number == 1:
            raise OSError(cached_files.errno.EDEADLK, "ten seconds over")
        posix.flock(arguments[0], posix.LOCK_EX)

    def flock(*_):
        raise OSError(cached_files.errno.ENOLCK, "no locks here")

    fcntl = types.SimpleNamespace(flock=flock, LOCK_EX=2) if locks == "unsupported" else None
    monkeypatch.setattr(cached_files, "fcntl", fcntl)
    if locks == "windows":
        monkeypatch.setattr(cached_files, "msvcrt", types.SimpleNamespace(locking=locking, LK_LOCK=1))
    threads = [threading.Thread(target=fetch, args=(f"{server.url}/drop", tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in leftovers(tmp_path)] == [CONTENT]
    assert len(calls) == (4 if locks == "windows" else 0)


def test_mirrors(server, tmp_path, monkeypatch):
    url = "http://u:secret@nowhere.invalid/file"  # no such host: all comes from the mirror
    for mirror in (server.url, f"{server.url}/"):
        monkeypatch.setenv("DNNLIB_MIRROR", mirror)
        path = fetch(url, tmp_path / "first", SHA256)
        assert path.read_bytes() == CONTENT
        assert server.requests == [("/nowhere.invalid/file", None)]
    assert "404" in refused("http://nowhere.invalid/absent", tmp_path)
    monkeypatch.setenv("DNNLIB_MIRROR", str(tmp_path / "first"))  # a cache folder serves as a mirror
    assert fetch(url, tmp_path / "second").read_bytes() == CONTENT
    monkeypatch.setenv("DNNLIB_MIRROR", (tmp_path / "first").as_uri())
    assert "published" in refused(url, tmp_path / "third", "0" * 64)
    assert not leftovers(tmp_path / "third")
    missing = refused("http://nowhere.invalid/absent", tmp_path / "third")
    assert str(tmp_path / "first" / "nowhere.invalid" / "absent") in missing
    shutil.rmtree(tmp_path / "first")
    assert "DNNLIB_MIRROR=" in refused("http://nowhere.invalid/other", tmp_path)


def test_verify_reads_again(server, tmp_path):
    url = f"{server.url}/file"
    assert download.verify(url, SHA256, tmp_path) is None
    path = fetch(url, tmp_path, SHA256)
    assert download.verify(url, SHA256, tmp_path) == download.verify(url, None, tmp_path) == SHA256
    before = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # rotted on disk: size and time are the same
    assert fetch(url, tmp_path, SHA256) == path
    for sha256, words in ((SHA256, "published"), (None, "first seen")):
        with pytest.raises(UserError, match=words):
            download.verify(url, sha256, tmp_path)
