"""A local page over all runs of a folder, with live curves: python -m sid.report --serve FOLDER

It reads and never writes. It answers this computer only, and a request names a run among those that were found: no part
of an address is taken for a path.
"""

import http.server
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib import UserError
from torch_utils.records import is_figure

from ..monitor.records import OPTIONS_FILE, STATS_FILE
from .curves import charts
from .embedded import PictureCache
from .markup import document, escaped
from .page import page, teacher_name
from .run_record import RunRecord, read_run, silent_from
from .training_page import data_name

ADDRESS = "127.0.0.1"
MAX_RUNS, MAX_FOLDERS, MAX_DEPTH = 100, 5000, 3
# Charts, next to the first FID.
COMPARED = ("distance", "features", "divergence", "generator", "fake-score", "loss", "speed")
LIST_FILE, RUN_PLACE = "/runs.json", "/run/"

BODY = """<header><p class="path">{folder}</p><h1>Runs</h1><p class="quiet" id="status" role="status"></p></header>
<section aria-labelledby="runs"><h2 id="runs">All runs</h2>
<div class="scroll" role="region" tabindex="0" aria-label="All runs"><table id="table"></table></div></section>
<section aria-labelledby="curves"><h2 id="curves">Comparison</h2>
<p class="quiet">Curves of the ticked runs over kimg, thousands of images: generated ones in a
distillation, training images in a training.</p>
<div class="charts" id="charts"></div></section>
<noscript><p>This page needs JavaScript; the pages of single runs don't.</p></noscript>"""


class Runs:
    """The runs in a folder, read again when their files have changed. Several threads may use it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._known: dict[Path, tuple[Any, float, dict[str, Any]]] = {}
        self._pictures: dict[Path, PictureCache] = {}
        self._lock = threading.Lock()

    def summaries(self) -> list[dict[str, Any]]:
        """Plain values of all runs, for the page."""
        with self._lock:
            return [self._summary(name, path) for name, path in self._find().items()]

    def page(self, name: str) -> str | None:
        """The page of a run; None if there is no such run."""
        with self._lock:
            path = self._find().get(name)
            if path is None:
                return None
            return page(read_run(path), self._pictures.setdefault(path, PictureCache(path)))

    def _find(self) -> dict[str, Path]:
        """{the path below the folder: run folder}, sorted by name."""
        found = {}
        for path in _folders(self.folder):
            if (path / OPTIONS_FILE).is_file() and (path / STATS_FILE).is_file():
                found[path.relative_to(self.folder).as_posix()] = path
            if len(found) == MAX_RUNS:
                break
        return dict(sorted(found.items()))

    def _summary(self, name: str, path: Path) -> dict[str, Any]:
        record_files = [file for file in sorted([*path.glob("*.json*"), *path.glob("log.txt")]) if file.is_file()]
        version = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in record_files]
        if path not in self._known or self._known[path][0] != version:
            record = read_run(path)
            self._known[path] = version, silent_from(path, record.ticks), summary(record)
        _, until, found = self._known[path]
        is_silent = found["state"] == "running" and time.time() >= until
        return {"name": name, **found, **({"state": "stopped"} if is_silent else {})}


def _folders(folder: Path) -> Iterator[Path]:
    """A folder and those below it, without links, hidden ones and trials."""
    for number, (place, names, _) in enumerate(os.walk(folder)):
        if number == MAX_FOLDERS:
            return
        path = Path(place)
        deepest = len(path.relative_to(folder).parts) == MAX_DEPTH
        names[:] = [] if deepest else sorted(n for n in names if not n.startswith(".") and n != "trials")
        yield path


def summary(record: RunRecord) -> dict[str, Any]:
    """What the page shows of a run, as plain values."""
    fid, findings = record.fid, [] if record.is_training else record.findings()
    wanted = (*COMPARED, "" if fid is None else f"metric-{fid.name}")
    last = record.ticks[-1] if record.ticks else {}
    distance = record.distances[-1]["value"] if record.distances else None
    loss = last.get("Loss/loss") if record.is_training else None
    return {
        "what": f"training on {data_name(record)}" if record.is_training else f"{teacher_name(record)}, distilled",
        "state": record.state,
        "kimg": record.kimg,
        "total": record.total_kimg,
        "rate": last.get("Timing/img_per_sec"),
        "loss": loss,
        "distance": distance if is_figure(distance) else None,
        "features": record.distances[-1].get("features") if record.distances else None,
        "fid": fid.last if fid is not None and is_figure(fid.last) else None,
        "finding": findings[0].name if findings else "",
        "charts": {
            chart.name: {**chart.plain(), "title": chart.title} for chart in charts(record) if chart.name in wanted
        },
    }


def serve(folder: Path, port: int) -> None:
    """Serves the page until interrupted. port: 0 for any that is free. Errors: UserError naming --port."""
    server = make_server(folder, port)
    print(f"Runs of {folder}: http://{ADDRESS}:{server.server_address[1]}/  (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def make_server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of the page, not yet running. Errors: UserError naming --port when it is taken."""
    handler = type("RunsHandler", (_Handler,), {"runs": Runs(folder)})
    try:
        server = http.server.ThreadingHTTPServer((ADDRESS, port), handler)
    except OSError as error:
        raise UserError(f"--port={port}: can't be used ({error.strerror}); give another, or 0 for any") from None
    server.daemon_threads = True
    return server


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET and HEAD; everything else is refused by the base class."""

    runs: Runs
    timeout = 10  # seconds for a request

    def do_GET(self) -> None:
        """The page, the list of runs, or the page of one run."""
        if not self._is_for_us():
            self.send_error(403, "This server answers this computer only")
            return
        place = urllib.parse.urlsplit(self.path).path
        if place == "/":
            body = BODY.format(folder=escaped(self.runs.folder))
            self._answer(document("Runs", body, None, ("curves.js", "overview.js"), connect="'self'"), "text/html")
        elif place == LIST_FILE:
            self._answer(json.dumps(self.runs.summaries(), allow_nan=False), "application/json")
        else:
            name = urllib.parse.unquote(place.removeprefix(RUN_PLACE))
            found = self.runs.page(name) if place.startswith(RUN_PLACE) else None
            if found is None:
                self.send_error(404, "No such run")
            else:
                self._answer(found, "text/html")

    do_HEAD = do_GET

    def _is_for_us(self) -> bool:
        """Whether the request names this computer, as no page of another site can make a browser do (DNS rebinding)."""
        port = self.connection.getsockname()[1]
        return self.headers.get("Host") in (f"{ADDRESS}:{port}", f"localhost:{port}")

    def _answer(self, text: str, kind: str) -> None:
        content = text.encode("utf-8", "backslashreplace")
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests aren't printed."""
