"""What training a teacher prints and draws: a block at the start, pictures and metrics."""

from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, format_figure, kimg_name
from edm.images import save_grid
from edm.latents import decoder_of, image_shape
from edm.metrics.evaluate import Evaluator
from edm.metrics.reference import load_reference
from edm.next_steps import METRICS_STEPS, report
from edm.sampler import generate_all
from edm.snapshot_metrics import SnapshotMetrics, metrics_text
from torch_utils import distributed
from torch_utils.batches import split_batch
from torch_utils.checkpoint import attempt
from torch_utils.run_lines import batch_text, device_text, length_text, network_text, path_text
from training.training_loop import Training, TrainingConfig

PICTURE_COLUMNS, PICTURE_ROWS = 8, 8
REALS = "reals.png"
PICTURE_STEPS = 8  # of Heun's sampler: enough to see shapes and colours
METRICS_SAMPLER = f"by Heun's sampler with {2 * METRICS_STEPS - 1} evaluations"


class TeacherReport:
    """Writes `fakes_*.png` and `metric-*.jsonl` into the run folder of a teacher's training.

    Both show the moving average of the weights, sampled by Heun's method from the same seeds every time. `reals.png`
    has as many images of the data set, for comparison.
    evaluator: computes the metrics, or None for pictures only. batch: images per iteration, which file names depend on.
    Files that can't be written are reported and skipped.
    """

    def __init__(self, run_dir: Path, evaluator: Evaluator | None = None, batch: int = 1):
        self._run_dir, self._batch = run_dir, batch
        self._metrics = None if evaluator is None else SnapshotMetrics(run_dir, evaluator, METRICS_STEPS)

    def draw_reals(self, dataset: Any, net: torch.nn.Module) -> None:
        """Draws images from all over the data set, on process 0. Latents are decoded. net: is trained on it."""
        if distributed.rank() == 0:
            attempt(f"saving {REALS}", lambda: self._draw_reals(dataset, net))

    def _draw_reals(self, dataset: Any, net: torch.nn.Module) -> None:
        count = PICTURE_COLUMNS * PICTURE_ROWS
        chosen = sorted({len(dataset) * i // count for i in range(count)})
        images = torch.stack([torch.as_tensor(dataset[i][0]) for i in chosen])
        if dataset.metadata:  # means and standard deviations
            images = decoder_of(net).to_images(images[:, 0].to(next(net.parameters()).device)).cpu()
        save_grid(images, self._run_dir / REALS, PICTURE_COLUMNS)

    def snapshot(self, ema: torch.nn.Module, nimg: int) -> dict[str, float]:
        """Reports a snapshot. Every process must call it, with equal weights.

        Returns what was measured now, by name, on process 0.
        """
        if distributed.rank() == 0:
            name = f"fakes_{kimg_name(nimg, self._batch)}.png"
            attempt(f"saving {name}", lambda: self._draw(ema, self._run_dir / name))
        if self._metrics is not None:
            try:
                return self._metrics.measure(ema, nimg)
            except UserError as error:  # early in training, images may be unfit for any metric
                distributed.print0(f"Warning: no metrics at {nimg / 1e3:g} kimg: {error.message}; the run goes on")
        return {}

    def _draw(self, ema: torch.nn.Module, path: Path) -> None:
        images = generate_all(ema, range(PICTURE_COLUMNS * PICTURE_ROWS), steps=PICTURE_STEPS)
        save_grid(images, path, PICTURE_COLUMNS)


def make_evaluator(options: dict[str, Any], net: Any, device: torch.device) -> Evaluator | None:
    """The evaluator that --metrics, --data_stat and --detector ask for; None when none of them is given.

    net: whose images it is to measure. Errors: UserError when one of the options can't be used, or not for these.
    """
    given = options["data_stat"] is not None or options["detector"] is not None
    names = options["metrics"] if options["metrics"] is not None else "fid5k" if given else "none"
    if names == "none":
        if given:
            raise UserError("--metrics=none means nothing with --data_stat or --detector; leave one of them out")
        return None
    metrics = [name for name in names.split(",") if name]
    reference = options["data_stat"] and load_reference(options["data_stat"], "--data_stat")
    evaluator = Evaluator(metrics, reference, options["detector"], options["data"], device=device, progress=True)
    evaluator.check_images(*image_shape(net))
    return evaluator


def describe_start(
    training: Training, dataset: Any, data: str, reference: str | None, evaluator: Evaluator | None, run_dir: Path
) -> dict[str, str | None]:
    """{name: text} for `start_block`. data, reference: where the data set and the reference statistics come from."""
    metrics = None
    if evaluator is not None:
        names = [metric.name for metric in evaluator.metrics]
        metrics = f"{metrics_text(names, reference or data)}, {METRICS_SAMPLER}"
    return {
        **_describe(training.net, training.config, training.batch_gpu, training.device, dataset, data),
        "Metrics": metrics,
        "Run folder": str(run_dir),
        "Look at": f"fakes_*.png there (Heun's sampler, {PICTURE_STEPS} steps); {report(run_dir)}",
    }


def describe_plan(
    net: torch.nn.Module | None,
    config: TrainingConfig,
    device: torch.device,
    dataset: Any,
    options: dict[str, Any],
) -> dict[str, str | None]:
    """{name: text} for `start_block` of a training that isn't started: --dry-run.

    net: without its weights; None if it is too large for this machine. options: of the command line, by name.
    """
    batch_gpu, _ = split_batch(config.batch, config.batch_gpu, distributed.world_size())
    return {
        **_describe(net, config, batch_gpu, device, dataset, options["data"]),
        "Run folder": options["outdir"] if options["nosubdir"] else f"a new one in {options['outdir']}",
        "Dry run": "nothing was started; --dry-run=json shows all options",
    }


def _describe(
    net: torch.nn.Module | None, config: TrainingConfig, batch_gpu: int, device: torch.device, dataset: Any, data: str
) -> dict[str, str | None]:
    classes = f"{dataset.label_dim} classes" if dataset.label_dim else "without classes"
    size = f"{dataset.num_channels} x {dataset.resolution} x {dataset.resolution}"
    passes = config.total_kimg * 1000 / len(dataset)
    return {
        "Network": None if net is None else network_text(net),
        "Data": f"{path_text(data)}, {len(dataset)} of {size}, {classes}; {format_figure(passes)} passes over it",
        "Device": device_text(device),
        "Batch": batch_text(config.batch, batch_gpu),
        "Rate": f"lr {config.lr:g} after a warm-up of {config.lr_rampup_kimg:g} kimg, decay {config.lr_decay}",
        "Length": length_text(config.total_kimg, config.batch, config.kimg_per_tick, config.snapshot_ticks),
    }
