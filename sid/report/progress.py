"""Pictures and metrics of a generator while it is distilled, and the summary of a finished run.

python -m sid.report RUN_FOLDER    prints the summary and writes RUN_FOLDER/comparison.png
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib import Command, UserError, kimg_name, write_atomically

from ..monitor.records import OPTIONS_FILE, measured_value, read_records, read_run_options, sound_records

if TYPE_CHECKING:
    import torch

    from edm.metrics.evaluate import Evaluator

GRID_COLUMNS, GRID_ROWS = 16, 8
COMPARISON_COLUMNS, COMPARISON_ROWS = 16, 2
TEACHER_STEPS = 18  # of Heun's sampler: 35 evaluations
MIN_GRID_PIXELS = 512  # small images are shown larger


class Report:
    """Writes `fakes_*.png` and `metric-*.jsonl` into the run folder and remembers the best snapshot.

    The best one's name and FID are in `best.json`; `best.safetensors` links to it.

    evaluator: computes the metrics, or None for pictures only. reals: uint8 images [N, C, H, W] for `reals.png`.
    batch: images per iteration, which file names depend on (`dnnlib.kimg_name`).
    What can't be written to a full disk is reported and left out.
    """

    def __init__(
        self,
        run_dir: Path,
        evaluator: "Evaluator | None" = None,
        reals: "torch.Tensor | None" = None,
        batch: int = 1,
    ):
        self._run_dir = run_dir
        self._batch = batch
        self._evaluator = evaluator
        self._reals = reals

    def start(self, ema: "torch.nn.Module") -> None:
        """Before the first iteration: `ema` is the teacher used as a one-step generator."""
        if self._reals is not None and _is_process_0():
            _attempt("saving reals.png", lambda: _save_grid(self._reals, self._run_dir / "reals.png"))
        self._show(ema, 0, "fakes_init.png")

    def snapshot(self, ema: "torch.nn.Module", nimg: int) -> None:
        """Every process calls it with equal weights."""
        self._show(ema, nimg, f"fakes_{kimg_name(nimg, self._batch)}.png")

    def _show(self, ema: "torch.nn.Module", nimg: int, name: str) -> None:
        if _is_process_0():
            images = _generate(ema, GRID_COLUMNS * GRID_ROWS)
            _attempt(f"saving {name}", lambda: _save_grid(images, self._run_dir / name))
        if self._evaluator is not None:
            self._measure(ema, nimg)

    def _measure(self, ema: "torch.nn.Module", nimg: int) -> None:
        from edm.metrics.sources import NetworkSource
        from edm.zoo import network_hash
        from torch_utils import distributed
        from torch_utils.checkpoint import BEST_LINK
        from torch_utils.training_stats import append_line

        sha256 = network_hash(ema)
        if not distributed.from_process_0(self._missing(sha256)):
            return  # resumed at a snapshot that was measured already
        for record in self._evaluator(NetworkSource(ema, name="ema", sha256=sha256)):
            if not _is_process_0() or record["metric"] not in self._missing(sha256):
                continue
            values = "  ".join(f"{name} {value:.4g}" for name, value in record["values"].items())
            print(f"{record['metric']} at {nimg / 1e3:.1f} kimg: {values}", flush=True)
            line = json.dumps({"kimg": nimg / 1e3, **record})
            append_line(_metric_file(self._run_dir, record["metric"]), line)
        if _is_process_0():
            _attempt(f"remembering the best in {BEST_LINK}", self._remember_best)

    def _missing(self, sha256: str) -> list[str]:
        """The metrics not yet recorded of the weights with this hash."""
        names = [metric.name for metric in self._evaluator.metrics]
        known = {name: {record.get("network_sha256") for record in read_metrics(self._run_dir, name)} for name in names}
        return [name for name in names if sha256 not in known[name]]

    def _remember_best(self) -> None:
        """best.json and best.safetensors: the snapshot with the lowest value of the first FID asked for."""
        from torch_utils import checkpoint

        name = next((metric.name for metric in self._evaluator.metrics if metric.kind == "fid"), None)
        trained = [r for r in read_metrics(self._run_dir, name) if r["kimg"] > 0] if name else []
        if trained:
            best = min(trained, key=measured_value)
            nimg = round(best["kimg"] * 1000)  # another --batch before, another name
            paths = [checkpoint.snapshot_path(self._run_dir, nimg, batch) for batch in (self._batch, 1, 1000)]
            snapshot = next((path for path in paths if path.exists()), paths[0]).name
            content = {"snapshot": snapshot, "kimg": best["kimg"], "metric": name, "value": best["value"]}
            with write_atomically(self._run_dir / "best.json") as file:
                file.write(json.dumps(content, indent=2).encode())
            _link(self._run_dir / checkpoint.BEST_LINK, snapshot)


def _link(path: Path, target: str) -> None:
    """Makes `path` a link to the file `target` beside it, or a copy where links don't work, if that file is there."""
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


def read_metrics(run_dir: str | os.PathLike, name: str) -> list[dict[str, Any]]:
    """The records of `metric-<name>.jsonl`, oldest first, without damaged ones; none if there is no such file."""
    return sound_records(_metric_file(run_dir, name), "kimg", "value")


def _metric_file(run_dir: str | os.PathLike, name: str) -> Path:
    return Path(run_dir) / f"metric-{name}.jsonl"


def _attempt(what: str, action: Callable[[], Any]) -> None:
    from torch_utils.checkpoint import attempt

    attempt(what, action)


def _is_process_0() -> bool:
    from torch_utils import distributed

    return distributed.rank() == 0


def _generate(net: "torch.nn.Module", num: int, **options) -> "torch.Tensor":
    import torch

    from edm.sampler import generate_images

    return torch.cat(list(generate_images(net, range(num), **options)))


def _save_grid(images: "torch.Tensor", path: Path, columns: int = GRID_COLUMNS) -> None:
    from edm.images import save_grid

    save_grid(images, path, columns, zoom=max(1, MIN_GRID_PIXELS // (columns * images.shape[-1])))


# ----------------------------------------------------------------------------
# Summary of a finished run.


def compare(teacher: "torch.nn.Module", generator: "torch.nn.Module", path: Path) -> None:
    """A picture of three bands, the same seeds in each: teacher at 35 evaluations, at one, and the generator at one."""
    import torch

    num = COMPARISON_COLUMNS * COMPARISON_ROWS
    init_sigma = generator.metadata["init_sigma"]
    bands = [
        _generate(teacher, num, steps=TEACHER_STEPS),
        _generate(teacher, num, steps=1, init_sigma=init_sigma),
        _generate(generator, num),
    ]
    gap = torch.full_like(bands[0][:COMPARISON_COLUMNS], 255)
    _save_grid(torch.cat([bands[0], gap, bands[1], gap, bands[2]]), path, COMPARISON_COLUMNS)


def summarise(run_dir: Path, teacher: "torch.nn.Module", transfer: str | None = None) -> list[tuple[str, int, float]]:
    """Rows (network, evaluations per image, FID) of a run: what it measured, what the teacher's file records.

    transfer: the network that it started from, if that isn't the teacher.
    """
    files = sorted(run_dir.glob("metric-fid*.jsonl"))
    if not files:
        raise UserError(f"{run_dir}: no metric-fid*.jsonl; distil with --metrics=fid50k to have FID in the summary")
    records = read_records(files[0], "kimg", "value")
    if not records:
        raise UserError(f"{files[0]}: holds no record; wait for the first snapshot of the run")
    rows, evaluations = [], 2 * TEACHER_STEPS - 1
    recorded = getattr(teacher, "metadata", {}).get("fid")
    if isinstance(recorded, dict) and recorded.get("detector_sha256") == records[0].get("detector_sha256"):
        value = recorded.get(f"evaluations_{evaluations}")
        if isinstance(value, int | float):
            rows.append(("teacher", evaluations, float(value)))
    if records[0]["kimg"] == 0:
        before = "generator before (--transfer)" if transfer else "teacher = generator before"
        rows.append((before, 1, records[0]["value"]))
    rows.append(("generator after", 1, records[-1]["value"]))
    return rows


@click.command(cls=Command)
@click.argument("run", type=click.Path(exists=True))
def main(run: str) -> None:
    """Summarise the distillation in the folder RUN: a table of FID and a picture."""
    from edm import zoo
    from torch_utils import checkpoint

    run_dir, options = Path(run), read_run_options(run)
    snapshots = checkpoint.snapshots(run_dir)
    if not snapshots:
        raise UserError(f"{run}: has no snapshot yet; wait for the first one")
    if "edm_model" not in options:
        raise UserError(f"{run_dir / OPTIONS_FILE}: names no edm_model; name a run folder of sid_train.py")
    rows = summarise(run_dir, teacher := zoo.load_network(options["edm_model"]), options.get("transfer"))
    generator = zoo.load_network(snapshots[0])
    if "init_sigma" not in generator.metadata:
        raise UserError(f"{snapshots[0]}: records no init_sigma, so it is no snapshot of a distillation")
    picture = run_dir / "comparison.png"
    try:
        compare(teacher, generator, picture)
        pictures = f"{picture}  (teacher at {2 * TEACHER_STEPS - 1} evaluations, at one, generator at one)"
    except OSError as error:
        pictures = f"none, since {picture} can't be written ({error.strerror})"

    print(f"\n{'':30s} {'evaluations':>11s} {'FID':>8s}")
    for name, evaluations, fid in rows:
        print(f"{name:30s} {evaluations:11d} {fid:8.4g}")
    if len(rows) > 1 and rows[-2][1] == 1 and rows[-1][2] > 0:
        print(f"\nFID of the one-step image fell {rows[-2][2] / rows[-1][2]:.1f} times.")
    print(f"Generator: {snapshots[0]}")
    print(f"Pictures:  {pictures}")


if __name__ == "__main__":
    main()
