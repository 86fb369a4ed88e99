"""Where downloads lie in the cache: inside it, each in its own place, and never behind a symbolic link."""

import itertools
import os
import re

import pytest

from dnnlib import UserError, cached_files, download, without_password, without_passwords
from dnnlib.addresses import cache_path

HOST = "https://host.example"
LONG = "x" * 300


def place(url, folder="/cache"):
    return cache_path(url, folder).relative_to(folder).as_posix()


def test_ordinary_names_are_those_of_the_web():
    assert place("https://Host.example/a/b-1.2_c.pkl") == "host.example/a/b-1.2_c.pkl"
    assert place("https://u:secret@host.example:8080/a b.npz#top") == "host.example%3A8080/a b.npz"


PATHS = [
    "/a",
    "/A",
    "/%41a",
    "/!a",
    "/a%2Fb",
    "/a/b",
    "/a//b",
    "/a/./b",
    "/a/../b",
    "/a/%2e%2e/b",
    "/a/%2E/b",
    "/a%252Fb",
    "/a.",
    "/a%20",
    "/a ",
    "/ a",
    "/a..",
    "/.a",
    "/a%00",
    "/%ff",
    "/%fe",
    "/a\\b",
    "/a:b",
    "/a%3fb",
    "/a?b",
    "/a?B",
    "/a?b&c",
    "/a.sha256",
    "/.a.lock",
    "/.a.part",
    "/a.SHA256",
    "/con",
    "/CON",
    "/nul.pkl",
    "/com1",
    "/lpt1.x.y",
    "/aux ",
    "/references/a",
    "/a~1",
    "/A~1",
    f"/{LONG}",
    f"/{LONG}y",
    f"/{LONG}.pkl",
    f"/{LONG.upper()}",
    f"/{LONG}/a",
    "/" + "d/" * 400 + "a",
    "/" + "d/" * 401 + "a",
    "/" + "D/" * 401 + "a",
    f"/{'%ff' * 200}",
    f"/{'%fe' * 200}",
    "/é",
    "/é",
    f"/a?{LONG}",
    f"/a?{LONG}y",
    "/%2e%2e%2f%2e%2e/etc/x",
    "/..%2f../etc/x",
    "/%7E",
    "/%257E",
    "/%25~",
]


def test_no_two_addresses_share_a_place_on_any_file_system():
    places = {}
    for path in PATHS:
        name = place(f"{HOST}{path}").lower()  # as a system that ignores capitals sees it
        names = [part.rstrip(". ") for part in name.split("/")]  # and one that ignores trailing dots and spaces
        assert all(0 < len(part) <= 200 for part in names)
        assert not {*names} & {".", "..", "con", "aux", "nul", "prn"}
        assert not any(c in name for c in '\\:*?"<>|\0')
        assert not names[-1].startswith(".")
        assert not names[-1].endswith(".sha256")
        places.setdefault("/".join(names), []).append(path)
    one_address = [
        {path.replace("%2e", ".").replace("%2E", ".").replace("%20", " ") for path in paths}
        for paths in places.values()
    ]
    shared = [paths for paths in one_address if len(paths) > 1]
    assert not shared


def test_places_lie_inside_the_cache_and_can_be_written(tmp_path):
    for path, host in itertools.product(PATHS, ["https://u:secret@Host", "https://..", "https://%2e%2e%2f"]):
        found = cache_path(f"{host}{path}", tmp_path)
        assert found.resolve().is_relative_to(tmp_path.resolve())
        assert found != tmp_path
        assert "secret" not in str(found)
        if path not in ("/a", "/A"):
            found.parent.mkdir(parents=True, exist_ok=True)
            if not found.is_dir():
                cached_files.record_path(found).with_name(f".{found.name}.{'1' * 40}.part").write_bytes(b"")


def test_a_query_with_a_token_is_not_part_of_a_name():
    assert "secret" not in place(f"{HOST}/a?token=secret")


ODD = ["/../x", "/a/../x", "/%2e%2e/x", "/a/%2E%2e/x", "/a/./x", "/.%2e/x", "/", "", "/a/", "/a\nb", "/a\tb", "/a\0b"]


@pytest.mark.parametrize("path", [*ODD, "/\ud800"])
def test_odd_addresses_are_refused(path, tmp_path):
    for url in (f"{HOST}{path}", f"http://localhost:9{path}"):
        with pytest.raises(UserError) as error:
            download.download(url, None, tmp_path)
        assert "\n" not in error.value.message
    assert not [*tmp_path.rglob("*")]


@pytest.mark.parametrize("url", ["http://evil.example\\@localhost/x", "http://localhost\\.evil.example/x"])
def test_what_two_libraries_read_differently_is_refused(url, tmp_path):
    with pytest.raises(UserError, match="no address"):
        download.download(url, None, tmp_path)


def test_a_file_address_of_another_machine_is_refused(tmp_path):
    with pytest.raises(UserError, match="another machine"):
        download.local_path("file://host/etc/hostname")


@pytest.mark.parametrize("name", [".x.pkl.part", ".x.pkl.lock"])
@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "pipe", "folder"])
def test_nothing_is_written_through_links(tmp_path, monkeypatch, name, kind):
    mirror, precious = tmp_path / "mirror", tmp_path / "precious"
    source, path = cache_path(f"{HOST}/x.pkl", mirror), cache_path(f"{HOST}/x.pkl", tmp_path / "cache")
    source.parent.mkdir(parents=True)
    path.parent.mkdir(parents=True)
    source.write_bytes(b"new")
    if kind != "dangling":
        precious.write_bytes(b"old")
    if kind == "hard link":
        os.link(precious, path.with_name(name))
    elif kind == "pipe":
        os.mkfifo(path.with_name(name))
    elif kind == "folder":
        path.with_name(name).mkdir()
    else:
        path.with_name(name).symlink_to(precious)
    monkeypatch.setenv("DNNLIB_MIRROR", str(mirror))
    if kind in ("symlink", "dangling", "hard link", "pipe") and name.endswith(".part"):  # is replaced
        assert download.download(f"{HOST}/x.pkl", None, tmp_path / "cache").read_bytes() == b"new"
    else:
        with pytest.raises(UserError, match=name):
            download.download(f"{HOST}/x.pkl", None, tmp_path / "cache")
    assert precious.exists() == (kind != "dangling")
    assert kind == "dangling" or precious.read_bytes() == b"old"


def test_a_pipe_as_a_record_is_not_waited_for(tmp_path):
    path = cache_path(f"{HOST}/x.pkl", tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"by hand")
    os.mkfifo(cached_files.record_path(path))
    assert download.download(f"{HOST}/x.pkl", None, tmp_path) == path


@pytest.mark.parametrize(("first", "second"), [("/a", "/a/b"), ("/a/b", "/a")])
def test_a_folder_and_a_file_of_one_name(tmp_path, first, second):
    path = cache_path(HOST + first, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"by hand")
    with pytest.raises(UserError, match="in the way"):
        download.download(HOST + second, None, tmp_path)


SECRETS = [
    "https://user:hush@host/f",
    "https://hush@host/f",
    "https:///user:hush@host/f",
    "HTTPS://u:hush@h",
    "ftp://u:hush@h",
    "https://user:pa/hush@host/f",
    "https://u:#hush@host/",
    "https://u:?hush@host/",
    "https://user:hu sh@hush/x@host",
    "https://u:p@hush@host",
    "https://u:12:hush@h:80/",
    'https://u:"hush@host/',
    "https://u:hush@[::1]:80/",
    "user:hush@host/f.pkl: no such file",
    "--edm_model=user:hush@host",
    "https:user:hush@host/f",
    "//user:hush@host/x",
    "u:p@hush@host",
    "https:\\\\user:hush@host/f",
    "https%3A%2F%2Fuser%3Ahush%40host",
    "https://u:hush%40host/f: bad port",
    "https://u:hush%2540host/f",
    "https://host/f?token=hush",
    "https://host/f?hush: bad",
    "https://host/f?hush&a=1",
    "https://h/f?a=1&X-Amz-Signature=hush&c=3",
    "https://h/f#access_token=hush",
    "https://h/f;token=hush",
    "https://h/f?a[b]=hush",
    "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /f?sig=hush (Caused by X())",
    "url: /f%3Ftoken%3Dhush",
    "Invalid URL 'https://u@h/f?token=hush': no host",
    "a https://h/f https://u:hush@h b",
]


@pytest.mark.parametrize("text", SECRETS)
def test_credentials_stay_out_of_messages(text):
    for shown in (without_password(text), UserError(text).message, str(without_passwords({"a": [text]}))):
        assert "hush" not in shown
        assert "***" in shown


@pytest.mark.parametrize(
    "user", ["u:hush/x", "u:hush", "u:hush#x", "u:hu/sh", "u:hush:x", "u:[hush", "u:hush\u2100", "u: hush"]
)
def test_no_part_of_a_password_is_quoted(tmp_path, monkeypatch, user):
    first = re.split("[/:]", user, maxsplit=1)[1].split("/")[0].strip()
    monkeypatch.setenv("https_proxy", f"http://{user}@127.0.0.1:9")
    monkeypatch.setattr(download, "RETRIES", 0)
    for url in (f"https://{user}@127.0.0.1:9/f", f"https://{user}/f", "https://host.invalid/f"):
        with pytest.raises(UserError) as error:
            download.download(url, None, tmp_path)
        shown = error.value.message if "@" in url else error.value.message.replace(url, "")  # no password, then
        assert first not in shown


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a@v1/f.pkl",
        "https://host:8080/pkg@1.0: not found",
        "C:\\data\\x@y.zip",
        "C:/data/me@home/x.zip",
        "https://host/f.pkl?download=true: not found",
        "git@host:repo",
        "https://host/f: 404: put it under /a/b",
        "Did you mean https://host/f? Yes",
        "me@host",
        "https://[::1]:80/f: mail me@host",
        "--classes=a.b:C",
        "a/b.py:12: x@y",
        "1.2 is not in the range 0<=x<=1.",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert without_password(text) == text
