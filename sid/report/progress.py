"""Pictures and metrics of a generator while it is distilled."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import kimg_name, write_atomically
from edm.images import save_grid
from edm.metrics.evaluate import Evaluator
from edm.snapshot_metrics import SnapshotMetrics, fid_record, first_fid, read_metrics
from edm.zoo import network_hash
from torch_utils import distributed
from torch_utils.checkpoint import BEST_FILE, BEST_LINK, attempt, snapshot_path
from torch_utils.records import measured_value, sound_records
from torch_utils.tracking import GENERATED, Tracking
from torch_utils.training_stats import append_line
from training.moments import start_of

from ..monitor.closeness import FEATURES_WHITE
from ..monitor.clusters import lost_share
from ..monitor.records import DISTANCES_FILE
from ..teacher_distance import Distance, TeacherDistance
from .embedded import CLUSTERS_PICTURE, NEAREST_PICTURE, PROMPTS_PICTURE, TEACHER_PICTURE
from .page import RunPage
from .pictures import GRID_COLUMNS, GRID_ROWS, prompts_of, sample, save_clusters, save_nearest, save_prompted

FIRST_PICTURE = "fakes_init.png"
DISTANCE_CURVES = {
    "value": "Distance/teacher",
    "pixels": "Distance/pixels",
    "detail": "Distance/detail",
    "features": "Distance/features",
    "lost_share": "Distance/lost_share",
}


def track(run_dir: Path, trackers: Sequence[str], nimg: int, batch: int) -> Tracking:
    """What passes the records of a distillation on to trackers. nimg: images of the state that it goes on from."""
    pictures = {FIRST_PICTURE: GENERATED, TEACHER_PICTURE: "Pictures/teacher"}
    return Tracking(run_dir, trackers, nimg, batch, {DISTANCES_FILE: DISTANCE_CURVES}, pictures)


class Report:
    """Writes `fakes_*.png` and `metric-*.jsonl` into the run folder and remembers the best snapshot.

    The best one's name is in `best.json`, with its FID or, if none is measured, its distance in the teacher's features;
    `best.safetensors` links to it.

    evaluator: computes the metrics, or None for pictures only. reals: uint8 images [N, C, H, W] for `reals.png`.
    batch: images per iteration, which file names depend on (`dnnlib.kimg_name`).
    distance: measures how far the images are from the teacher's, for the record; None: nobody does. With it, the
    teacher's own images of the same seeds are in `teacher.png`, those nearest to the generator's in `nearest.png`, and
    the kinds of them that the generator lacks most in `clusters.png`.
    page: shows all that on process 0, in `index.html`.
    Files that can't be written, to a full disk for instance, are reported and skipped.
    """

    def __init__(
        self,
        run_dir: Path,
        evaluator: Evaluator | None = None,
        reals: torch.Tensor | None = None,
        batch: int = 1,
        distance: TeacherDistance | None = None,
        page: RunPage | None = None,
    ):
        self._run_dir = run_dir
        self._batch = batch
        self._metrics = None if evaluator is None else SnapshotMetrics(run_dir, evaluator)
        self._fid = None if evaluator is None else first_fid(evaluator)
        self._reals = reals
        self._distance = distance
        self._page = page

    @property
    def samples(self) -> torch.Tensor | None:
        """The teacher's own images, uint8 [N, C, H, W], on process 0; None if the run compares with none."""
        return None if self._distance is None else self._distance.samples

    def start(self, ema: torch.nn.Module) -> dict[str, float]:
        """Reports before the first iteration, when `ema` is the teacher used as a one-step generator.

        Returns the same as `snapshot`.
        """
        reals = self._reals
        if reals is not None and distributed.rank() == 0:
            attempt("saving reals.png", lambda: save_grid(reals, self._run_dir / "reals.png", GRID_COLUMNS))
        return self._show(ema, 0, FIRST_PICTURE)

    def snapshot(self, ema: torch.nn.Module, nimg: int) -> dict[str, float]:
        """Reports a snapshot. Every process must call it, with equal weights.

        Returns what was measured now, by name, on process 0: how far images are from the teacher's, and the metrics.
        """
        return self._show(ema, nimg, f"fakes_{kimg_name(nimg, self._batch)}.png")

    def fid(self, ema: torch.nn.Module) -> dict[str, Any] | None:
        """The first FID of these weights for a network's metadata, on process 0; None if it hasn't been measured."""
        return fid_record(ema, self._run_dir, self._fid) if self._fid else None

    def _show(self, ema: torch.nn.Module, nimg: int, name: str) -> dict[str, float]:
        found = {}
        with distributed.shared_errors():
            if distributed.rank() == 0:
                images = sample(ema, GRID_COLUMNS * GRID_ROWS)
                attempt(f"saving {name}", lambda: save_grid(images, self._run_dir / name, GRID_COLUMNS))
                distance = self._distance
                if prompts := prompts_of(ema):
                    samples = None if distance is None else distance.samples
                    prompted = functools.partial(save_prompted, images, samples, prompts, self._run_dir)
                    attempt(f"saving {PROMPTS_PICTURE}", prompted)
                if distance is not None:
                    attempt(f"saving {TEACHER_PICTURE}", lambda: self._show_teacher(distance))
                    nearest = self._run_dir / NEAREST_PICTURE
                    attempt(f"saving {nearest.name}", lambda: save_nearest(images, distance.samples, nearest))
                    attempt(f"recording {DISTANCES_FILE}", lambda: found.update(self._distance_of(ema, nimg, distance)))
        if self._metrics is not None:
            found |= self._metrics.measure(ema, nimg)
        if distributed.rank() == 0:
            attempt(f"remembering the best in {BEST_LINK}", self._remember_best)
        if self._page is not None:
            self._page.write()
        return found

    def _show_teacher(self, distance: TeacherDistance) -> None:
        path = self._run_dir / TEACHER_PICTURE
        if not path.exists():
            save_grid(distance.samples[: GRID_COLUMNS * GRID_ROWS], path, GRID_COLUMNS)

    def _distance_of(self, ema: torch.nn.Module, nimg: int, distance: TeacherDistance) -> dict[str, float]:
        """Measures the distance from the teacher's samples and appends it to the run's record, once per snapshot.

        Returns the part of it that is worth a place in a line: the one that still tells good generators apart.
        """
        path = self._run_dir / DISTANCES_FILE
        sha256 = network_hash(ema)
        known = [record for record in sound_records(path, "kimg", "value") if round(1000 * record["kimg"]) == nimg]
        if any(record.get("network_sha256") == sha256 for record in known):
            return {}  # resumed at this snapshot
        found = distance(ema)
        line = {"kimg": nimg / 1e3, **_figures(found), "network_sha256": sha256}
        if nimg == 0 and start_of(ema) is not None and distance.features_white is not None:
            line[FEATURES_WHITE] = distance.features_white
        append_line(path, json.dumps(line))
        if found.clusters is not None:
            picture = self._run_dir / CLUSTERS_PICTURE
            attempt(f"saving {picture.name}", lambda: save_clusters(found, picture))
        return {"distance": found.value} if found.features is None else {"features": found.features}

    def _remember_best(self) -> None:
        """best.json and best.safetensors: the snapshot with the lowest first requested FID, or else `features`."""
        measured = read_metrics(self._run_dir, self._fid) if self._fid else []
        metric, key, file = self._fid, "value", f"metric-{self._fid}.jsonl"
        if not self._fid:
            measured = sound_records(self._run_dir / DISTANCES_FILE, "kimg", "features")
            metric, key, file = "features", "features", DISTANCES_FILE
        trained = [record for record in measured if record["kimg"] > 0]
        if not trained:
            return
        best = min(trained, key=lambda record: measured_value(record, key))
        nimg = round(best["kimg"] * 1000)
        # The file's name depends on --batch, which an earlier part of the run may have set differently.
        paths = [snapshot_path(self._run_dir, nimg, batch) for batch in (self._batch, 1, 1000)]
        snapshot = next((path for path in paths if path.exists()), paths[0]).name
        content = {"snapshot": snapshot, "kimg": best["kimg"], "metric": metric, "value": best[key], "records": file}
        with write_atomically(self._run_dir / BEST_FILE) as written:
            written.write(json.dumps(content, indent=2).encode())
        _link(self._run_dir / BEST_LINK, snapshot)


def _figures(distance: Distance) -> dict[str, Any]:
    """What is recorded of a distance."""
    found: dict[str, Any] = {"value": distance.value, "pixels": distance.pixels, "detail": distance.detail}
    if distance.features is not None:
        found["features"] = distance.features
    if distance.clusters is not None:
        clusters = dataclasses.asdict(distance.clusters)
        found |= {"lost_share": lost_share(clusters), "clusters": clusters}
    return found


def _link(path: Path, target: str) -> None:
    """Links `path` to the file `target` in the same folder, if it exists, or copies it where links don't work."""
    if not (path.parent / target).is_file() or (path.is_symlink() and os.readlink(path) == target):
        return
    new = path.with_name(f".{path.name}.part")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(target)
        os.replace(new, path)
    except (OSError, NotImplementedError):
        with open(path.parent / target, "rb") as source, write_atomically(path) as file:
            shutil.copyfileobj(source, file)
