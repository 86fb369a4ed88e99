"""Passes on what a run records to TensorBoard or Weights & Biases while it goes on: `--log`.

Everything comes from the records and pictures in the run's folder, so the training itself knows nothing of it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dnnlib import kimg_name
from dnnlib.errors import printable

from . import distributed
from .records import METRIC_FILE, STATS_FILE, is_figure, parse_line
from .run_folder import OPTIONS_FILE
from .trackers import TRACKERS, Moment, Tracker, check_trackers

GENERATED = "Pictures/generated"


def trackers_of(names: str | None) -> list[str]:
    """The trackers that --log names, on process 0, which shows the run. Every process must call it.

    Errors: UserError, on every process, when one of them can't be used.
    """
    with distributed.shared_errors():
        return check_trackers(names) if distributed.rank() == 0 else []


class Tracking:
    """Reads what is new in a run's folder and passes it on to trackers until it is closed.

    An error of a tracker costs a warning and that tracker, never the run.

    names: from `trackers_of`. nimg: images of the state that the run goes on from. batch: images per iteration.
    curves: {file: {figure: curve}} of records in the folder besides ticks and metrics.
    pictures: {file: name} of pictures that are shown once.
    """

    def __init__(
        self,
        run_dir: Path,
        names: Sequence[str],
        nimg: int,
        batch: int,
        curves: Mapping[str, Mapping[str, str]] | None = None,
        pictures: Mapping[str, str] | None = None,
    ):
        self._run_dir, self._batch = run_dir, batch
        self._curves, self._waiting = curves or {}, dict(pictures or {})
        self._bytes_read: dict[str, int] = {}
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            with self._surviving(name):
                options = json.loads((run_dir / OPTIONS_FILE).read_text(encoding="utf-8"))
                self._trackers[name] = TRACKERS[name](run_dir, nimg, options)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.update()
        for name, tracker in list(self._trackers.items()):
            with self._surviving(name):
                tracker.close(failed=error is not None)

    def update(self) -> None:
        """Passes on what the run has recorded since the last call."""
        if not self._trackers:
            return
        with self._surviving(*self._trackers):
            for moment in self._new_moments():
                for name, tracker in list(self._trackers.items()):
                    if moment.nimg >= tracker.first_nimg:
                        with self._surviving(name):
                            tracker.show(moment)

    @contextlib.contextmanager
    def _surviving(self, *names: str) -> Iterator[None]:
        """Whatever is raised while open ends these trackers instead of the run."""
        try:
            yield
        except Exception as error:
            for name in names:
                self._trackers.pop(name, None)
            reason = printable(str(error) or type(error).__name__)
            print(f"Warning: --log={','.join(names)} failed ({reason}); the run goes on without it", flush=True)

    def _new_moments(self) -> list[Moment]:
        """What the folder holds that no call has given before, in the order of the run."""
        is_first = not self._bytes_read
        moments: dict[int, Moment] = {}
        for path in sorted(self._run_dir.glob("*.jsonl")):
            for record in self._new_records(path):
                kimg = record.get("Progress/kimg", record.get("kimg"))
                if not is_figure(kimg) or kimg < 0:
                    continue
                nimg = round(kimg * 1000)
                moment = moments.setdefault(nimg, Moment(nimg))
                moment.curves |= {n: v for n, v in self._curves_of(path.name, record).items() if is_figure(v)}
                if path.name == STATS_FILE:
                    timestamp = record.get("timestamp")
                    moment.timestamp = timestamp if is_figure(timestamp) else None
        for nimg, moment in moments.items():
            picture = self._run_dir / f"fakes_{kimg_name(nimg, self._batch)}.png"
            if picture.exists():
                moment.pictures[GENERATED] = picture
        here = [file for file in self._waiting if (self._run_dir / file).exists()]
        for file in here:
            nimg = 0 if is_first else max(moments, default=0)
            moments.setdefault(nimg, Moment(nimg)).pictures[self._waiting.pop(file)] = self._run_dir / file
        return [moments[nimg] for nimg in sorted(moments)]

    def _new_records(self, path: Path) -> list[dict[str, Any]]:
        """The sound records in the lines that a file has gained."""
        with open(path, "rb") as file:
            file.seek(self._bytes_read.get(path.name, 0))
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        self._bytes_read[path.name] = self._bytes_read.get(path.name, 0) + len(lines)
        records = [parse_line(line.decode("utf-8", "replace")) for line in lines.split(b"\n")]
        return [record for record in records if isinstance(record, dict)]

    def _curves_of(self, file: str, record: dict[str, Any]) -> dict[str, Any]:
        """{curve: figure} of a record; a tick's figures keep their names."""
        if file == STATS_FILE:
            return {name: value for name, value in record.items() if "/" in name and not name.startswith("Progress/")}
        metric = METRIC_FILE.fullmatch(file)
        if metric is None:
            return {curve: record.get(figure) for figure, curve in self._curves.get(file, {}).items()}
        values = record.get("values")
        parts = {n: v for n, v in values.items() if not n.endswith("_std")} if isinstance(values, dict) else {}
        if len(parts) < 2:
            return {f"Metrics/{metric[1]}": record.get("value")}
        return {f"Metrics/{metric[1]}_{name}": value for name, value in parts.items()}
