"""What training a teacher prints and draws: the sizes at the start, pictures and metrics, the next command."""

import shlex
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, kimg_name
from edm.images import save_grid
from edm.metrics.evaluate import Evaluator
from edm.sampler import generate_all
from edm.snapshot_metrics import SnapshotMetrics
from torch_utils import distributed
from torch_utils.checkpoint import attempt

PICTURE_COLUMNS, PICTURE_ROWS = 8, 8
PICTURE_STEPS = 8  # of Heun's sampler: enough to see shapes and colours
METRICS_STEPS = 18  # of Heun's sampler, 35 evaluations, as EDM's figures for 32x32 images


class TeacherReport:
    """Writes `fakes_*.png` and `metric-*.jsonl` into the run folder of a teacher's training.

    Both show the moving average of the weights, sampled by Heun's method from the same seeds every time.
    evaluator: computes the metrics, or None for pictures only. batch: images per iteration, which file names depend on.
    Files that can't be written are reported and skipped.
    """

    def __init__(self, run_dir: Path, evaluator: Evaluator | None = None, batch: int = 1):
        self._run_dir, self._batch = run_dir, batch
        self._metrics = None if evaluator is None else SnapshotMetrics(run_dir, evaluator, METRICS_STEPS)

    def snapshot(self, ema: torch.nn.Module, nimg: int) -> None:
        """Reports a snapshot. Every process must call it, with equal weights."""
        if distributed.rank() == 0:
            name = f"fakes_{kimg_name(nimg, self._batch)}.png"
            if attempt(f"saving {name}", lambda: self._draw(ema, self._run_dir / name)):
                count, evaluations = PICTURE_COLUMNS * PICTURE_ROWS, 2 * PICTURE_STEPS - 1
                sampler = f"Heun's sampler, {PICTURE_STEPS} steps ({evaluations} network evaluations)"
                print(f"{self._run_dir / name}: {count} samples, {sampler}", flush=True)
        if self._metrics is not None:
            try:
                self._metrics.measure(ema, nimg)
            except UserError as error:  # early in training, images may be unfit for any metric
                distributed.print0(f"Warning: no metrics at {nimg / 1e3:.1f} kimg: {error.message}; the run goes on")

    def _draw(self, ema: torch.nn.Module, path: Path) -> None:
        images = generate_all(ema, range(PICTURE_COLUMNS * PICTURE_ROWS), steps=PICTURE_STEPS)
        save_grid(images, path, PICTURE_COLUMNS)


def make_evaluator(options: dict[str, Any], device: torch.device) -> Evaluator | None:
    """The evaluator that --metrics, --data_stat and --detector ask for; None when none of them is given.

    Errors: UserError when one of them can't be used.
    """
    given = options["data_stat"] is not None or options["detector"] is not None
    names = options["metrics"] if options["metrics"] is not None else "fid5k" if given else "none"
    if names == "none":
        if given:
            raise UserError("--metrics=none means nothing with --data_stat or --detector; leave one of them out")
        return None
    metrics = [name for name in names.split(",") if name]
    return Evaluator(metrics, options["data_stat"], options["detector"], options["data"], device=device)


def describe_start(net: torch.nn.Module, dataset: Any, config: Any, device: torch.device) -> str:
    """Three lines about the network, the data, and the length and pace of the training."""
    parameters = sum(p.numel() for p in net.parameters())
    classes = f"{dataset.label_dim} classes" if dataset.label_dim else "without classes"
    side, channels = dataset.resolution, f"{dataset.num_channels} channel{'s' * (dataset.num_channels > 1)}"
    passes = config.total_kimg * 1000 / len(dataset)
    return "\n".join(
        [
            f"Network:  {type(net).__name__}, {parameters / 1e6:.2f} million parameters",
            f"Data:     {dataset.name}, {len(dataset)} images of {side}x{side}, {channels}, {classes}",
            f"Training: {config.total_kimg:g} kimg ({passes:.1f} passes over the data) in batches of {config.batch} on"
            f" {distributed.world_size()} x {device.type}, warm-up {config.lr_rampup_kimg:g} kimg,"
            f" a report every {config.kimg_per_tick:g} kimg, a snapshot every {config.snapshot_ticks} reports",
        ]
    )


def next_command(run_dir: Path, options: dict[str, Any], evaluator: Evaluator | None) -> str:
    """The command that distils the run's newest snapshot, quoted for a shell."""
    arguments = ["--recipe=auto", f"--edm_model={run_dir}", f"--outdir={options['outdir']}-sid"]
    if evaluator is not None and options["data_stat"] is not None:
        given = [name for name in ("data_stat", "detector") if options[name] is not None]
        arguments += [f"--{name}={options[name]}" for name in given]
    else:
        arguments.append("--metrics=none")
    program = ["python", "sid_train.py"] if Path("sid_train.py").is_file() else ["sid-train"]
    return shlex.join([*program, *arguments])
