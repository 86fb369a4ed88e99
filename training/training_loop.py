"""Trains a denoiser on images."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from dnnlib import UserError
from torch_utils import batches, checkpoint, distributed, seeding
from torch_utils.interruption import Interruption, ignore_signals
from torch_utils.training_stats import Collector, TickLog
from torch_utils.updates import (
    DivergenceError,
    Updater,
    check_finite,
    ema_beta,
    lr_factor,
    power_function_beta,
    update_ema,
)
from torch_utils.watchdog import check_equal_weights

from .decoder import clean_samples
from .networks_edm2 import normalize_weights

# What a resumed run may change. FREE_ON_RESUME changes no result, ROUNDING only how sums are rounded and draws split.
ROUNDING = {"batch_gpu"}
FREE_ON_RESUME = {"kimg_per_tick", "snapshot_ticks", "state_ticks", "save_minutes", "keep_states", "workers"}


@dataclasses.dataclass
class TrainingConfig:
    """Numbers of a training run. Images are counted in thousands (kimg) where a name says so."""

    total_kimg: float = 200_000
    batch: int = 512  # images per update, all processes together
    batch_gpu: int | None = None  # images per process and round; None: no accumulation
    lr: float = 1e-3
    lr_rampup_kimg: float = 10_000
    lr_decay: str = "none"  # none, linear or cosine over total_kimg, or sqrt (`lr_factor`)
    lr_constant_kimg: float = 0  # before the decay sqrt begins
    beta2: float = 0.999  # Adam's
    ema_halflife_kimg: float = 500
    ema_std: float | None = None  # width of a power-function average, in place of the half-life
    ema_rampup_ratio: float | None = 0.05
    loss_scaling: float = 1.0
    kimg_per_tick: float = 50
    snapshot_ticks: int = 50
    state_ticks: int = 500
    save_minutes: float = 10  # a state at least so often; 0: by ticks only
    keep_states: int = 2  # older ones are removed; 0: none is
    seed: int = 0
    workers: int = 1


class Training:
    """A training of a denoiser: its network, moving average, optimiser and counters, and one iteration.

    resume: the training state to go on from, checked by `check_state`. options: the run's options as plain values,
    which its states record.
    """

    def __init__(
        self,
        config: TrainingConfig,
        net: torch.nn.Module,
        loss: Callable,
        augment_pipe: Callable | None,
        device: torch.device,
        options: dict[str, Any],
        resume: checkpoint.StateFile | None = None,
    ):
        self.config, self.net, self.device = config, net, device
        self._loss, self._augment_pipe, self._options = loss, augment_pipe, options
        self.batch_gpu, self._rounds = batches.split_batch(config.batch, config.batch_gpu, distributed.world_size())
        net.train().requires_grad_(True).to(device)
        normalize_weights(net)
        if augment_pipe is None:
            freeze_augment_mapping(net)
        distributed.broadcast_module(net)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.collector = Collector()
        updater = Updater.of("network", net, config.lr, beta1=0.9, beta2=config.beta2)
        self._parts = {"net": net, "ema": self.ema, "updater": updater}
        self.nimg, self.tick, self.elapsed_sec, self.at_snapshot = 0, 0, 0.0, False
        if resume is not None:
            state = resume.take()
            checkpoint.restore(self, self._parts, state, resume.path)
            self.collector.load_state_dict(state["statistics"], device)

    def iteration(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One update on `batch` images, and one of the moving average."""
        config = self.config
        for r in range(self._rounds):
            items, labels = next(batches)
            place = self.nimg + (r * distributed.world_size() + distributed.rank()) * self.batch_gpu
            seeding.seed_at(config.seed, place)
            value = self._loss(self.net, clean_samples(items), labels, self._augment_pipe)
            self.collector.report("Loss/loss", value)
            (value.sum() * (config.loss_scaling / config.batch)).backward()
        self.collector.report("Gradient/norm", self._parts["updater"].step(self.lr_factor()))
        if config.ema_std is None:
            beta = ema_beta(config.batch, self.nimg, config.ema_halflife_kimg * 1000, config.ema_rampup_ratio)
        else:
            beta = power_function_beta(config.batch, self.nimg, config.ema_std)
        update_ema(self.ema, self.net, beta)
        if self.device.type == "cpu":
            self.check()
        self.nimg += config.batch

    def lr_factor(self) -> float:
        """What the learning rate is multiplied by at the next update."""
        kimg = self.config.total_kimg, self.config.lr_rampup_kimg, self.config.lr_constant_kimg
        total, rampup, constant = (1000 * value for value in kimg)
        return lr_factor(self.nimg, total, rampup, self.config.lr_decay, constant)

    def statistics(self) -> dict[str, dict[str, float]]:
        """What `Collector.collect` returns, and the current learning rate; every process must call it."""
        return {**self.collector.collect(), "Rate/lr": {"mean": self.config.lr * self.lr_factor()}}

    def check(self) -> None:
        """Waits for the device. Errors: DivergenceError when gradients stay non-finite."""
        self._parts["updater"].check(self.nimg)

    def contents(self) -> dict[str, Any]:
        """What a state's file holds; every process must call it."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        counters = {name: getattr(self, name) for name in checkpoint.PROGRESS}
        return {
            **state,
            **counters,
            **checkpoint.setting(self._options, self.device),
            "statistics": self.collector.state_dict(),
        }


def training_loop(
    training: Training,
    dataset: torch.utils.data.Dataset,
    run_dir: Path,
    save_snapshot: Callable[[torch.nn.Module, int], None],
    report_snapshot: Callable[[torch.nn.Module, int], dict[str, float] | None] | None = None,
    track: Callable[[], None] = lambda: None,
) -> torch.nn.Module:
    """Trains to the end and returns the moving average of the weights.

    dataset: items are (uint8 image [C, H, W] or latent [2, C, H, W], float32 label [label_dim]); `clean_samples`.
    save_snapshot: called on process 0 as save_snapshot(ema, nimg) every `snapshot_ticks` ticks and at the end.
    report_snapshot: called after it in the same way, but on every process. What it measures, on process 0, by name, is
    shown.
    track: called when all of a tick, and of its snapshot, has been recorded.
    Errors: DivergenceError when gradients stay non-finite; SystemExit (EXIT_CODE) when a signal asked to stop.
    """
    networks = {"network": training.net, "average": training.ema}

    def publish() -> dict[str, float] | None:
        if distributed.rank() == 0:
            checkpoint.attempt("saving a snapshot", lambda: save_snapshot(training.ema, training.nimg))
        return None if report_snapshot is None else report_snapshot(training.ema, training.nimg)

    with (
        contextlib.closing(_endless_batches(dataset, training)) as batches,
        advised(run_dir, training, training.config.batch, "--lr"),
    ):
        routine = Routine(
            progress=training,
            networks=networks,
            device=training.device,
            iteration=lambda: training.iteration(batches),
            check=training.check,
            statistics=training.statistics,
            contents=training.contents,
            publish=publish,
            after_tick=lambda statistics: track(),
            shown={"Loss/loss": "loss"},
        )
        run_to_end(routine, training.config, run_dir)
    return training.ema


class Progress(Protocol):
    """Where a training is; a state records these attributes (`checkpoint.PROGRESS`)."""

    nimg: int  # images that it has learnt from
    tick: int  # how many ticks have ended
    elapsed_sec: float  # up to its last state
    at_snapshot: bool  # whether the last iteration ends with a snapshot


class LoopConfig(Protocol):
    """What a training's config says about its length, and about ticks, states and snapshots: see `TrainingConfig`."""

    total_kimg: float
    batch: int
    kimg_per_tick: float
    snapshot_ticks: int
    state_ticks: int
    save_minutes: float
    keep_states: int


@dataclasses.dataclass(frozen=True)
class Routine:
    """What `run_to_end` trains, and what a training does there; every process calls each of the functions."""

    progress: Progress
    networks: dict[str, torch.nn.Module]  # what must stay finite, and equal on all processes
    device: torch.device
    iteration: Callable[[], None]  # trains on one batch
    check: Callable[[], None]  # waits for the device; raises DivergenceError
    statistics: Callable[[], dict[str, dict[str, float]]]  # of the tick that ends, {name: {"mean": value}}
    contents: Callable[[], dict[str, Any]]  # what a training state holds
    publish: Callable[[], dict[str, float] | None]  # writes a snapshot and, on process 0, gives what it measures
    begin: Callable[[], dict[str, float] | None] = lambda: None  # the same before the first iteration of a new run
    after_tick: Callable[[dict[str, dict[str, float]]], None] = lambda statistics: None  # its line has been printed
    shown: Mapping[str, str] = dataclasses.field(default_factory=dict)  # statistics in each line (`TickLog`)
    kept_state: Callable[[], Path | None] = lambda: None  # a state that stays, however many are kept


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Which stretch of a run a training is, where a run consists of several, such as trials.

    end_img     images of this training after which it ends; None: at the end of its config
    before_img  images of the run that came before this training's own count
    total_img   images of the whole run; None: those of this training
    resume_dir  what --resume names to go on with the run; None: the training's folder
    """

    end_img: int | None = None
    before_img: int = 0
    total_img: int | None = None
    resume_dir: Path | None = None


WHOLE_RUN = Stretch()


def run_to_end(
    routine: Routine,
    config: LoopConfig,
    run_dir: Path,
    stretch: Stretch = WHOLE_RUN,
    interruption: Interruption | None = None,
) -> None:
    """Iterates to the end of a stretch of a run, with ticks, training states and snapshots on the way.

    run_dir: takes statistics and states. interruption: an open one, if it is to last longer than this call.
    Errors: DivergenceError when weights aren't finite; SystemExit (EXIT_CODE) when a signal asked to stop.
    """
    progress, networks, device = routine.progress, routine.networks, routine.device
    states = checkpoint.StateFolder(run_dir, config.keep_states)
    end_img = int(config.total_kimg * 1000) if stretch.end_img is None else stretch.end_img
    counts = {"elapsed_sec": progress.elapsed_sec, "nimg": progress.nimg}
    counts |= {"total_img": stretch.total_img, "before_img": stretch.before_img}
    step_img = max(1000 * config.kimg_per_tick, config.batch)
    log = TickLog(run_dir, device, end_img, step_img, **counts, shown=routine.shown)
    opened = Interruption(device, config.save_minutes) if interruption is None else contextlib.nullcontext(interruption)
    with contextlib.closing(log), opened as interruption:
        measured = None
        if progress.nimg == 0:
            measured = routine.begin()
        elif progress.at_snapshot:  # the run had ended between this state and its snapshot
            measured = routine.publish()
        if measured:
            log.show(progress.nimg, measured)
        log.begin_tick(progress.nimg)
        while progress.nimg < end_img:
            routine.iteration()
            log.advance(progress.nimg)
            tick, save = milestones(progress, config, end_img, interruption)
            if tick or save:
                routine.check()
                check_finite(networks, progress.nimg)
                check_equal_weights(networks, progress.nimg)
            statistics = routine.statistics() if tick else {}
            if tick:
                log.tick(progress.tick, progress.nimg, statistics)
            if save:
                progress.elapsed_sec = log.elapsed_sec
                saved = states.save(routine.contents(), config.batch, routine.kept_state())
                interruption.saved()
            publishes = progress.at_snapshot and not interruption.stop
            measured = routine.publish() if publishes else None
            if tick:
                log.show(progress.nimg, measured)
                routine.after_tick(statistics)
            if interruption.stop:
                log.close()
                interruption.leave(stretch.resume_dir or run_dir, saved)
            if tick:
                log.begin_tick(progress.nimg)


@contextlib.contextmanager
def advised(run_dir: Path, progress: Progress, batch: int, rates: str, details: str = "") -> Iterator[None]:
    """Adds to a DivergenceError raised while open what to do next.

    batch: images per iteration. rates: the options of the learning rates. details: about the run, added in brackets.
    """
    try:
        yield
    except DivergenceError as error:
        here = checkpoint.state_path(run_dir, progress.nimg, batch)
        earlier = [path for path in checkpoint.states(run_dir) if path != here]
        if earlier:
            advice = f"go on from a state before, such as --resume={earlier[0]}, with lower {rates} and --override"
        else:
            advice = f"there is no earlier training state: start again, with lower {rates} if the rates are the cause"
        raise DivergenceError(error.reason, advice + (f" ({details})" if details else "")) from None


def milestones(progress: Progress, config: LoopConfig, end_img: int, interruption: Interruption) -> tuple[bool, bool]:
    """(whether a tick ends, whether a state is to be saved) after an iteration of any training.

    progress: its `tick` and `at_snapshot` are brought up to date. end_img: images after which the training ends. Every
    process must call it.
    """
    tick_img = config.kimg_per_tick * 1000
    done = progress.nimg >= end_img
    tick = done or int(progress.nimg / tick_img) != int((progress.nimg - config.batch) / tick_img)
    progress.tick += tick
    progress.at_snapshot = tick and (done or progress.tick % config.snapshot_ticks == 0)
    interruption.check()
    due = progress.at_snapshot or (tick and progress.tick % config.state_ticks == 0)
    return tick, due or interruption.save or interruption.stop


def check_state(file: checkpoint.StateFile, net: torch.nn.Module) -> None:
    """Reads a training state. Errors: UserError when it is none, or that of another network than `net`."""
    state = file.read()
    if not {"net", "ema", "updater"} <= state.keys() or not checkpoint.is_complete(state):
        raise UserError(f"--resume={file.path}: not the state of a teacher; name a training-state-*.pt of edm.train")
    expected = {k: v.shape for k, v in net.state_dict().items()}
    for name in ("net", "ema"):
        weights = state[name] if isinstance(state[name], dict) else {}
        if {k: getattr(v, "shape", None) for k, v in weights.items()} == expected:
            continue
        raise UserError(f"--resume={file.path}: its network is another; give the --data, --arch, … it was started with")


def freeze_augment_mapping(net: torch.nn.Module) -> None:
    """Excludes the mapping of augmentation labels from training, for networks that are never given any."""
    for name, parameter in net.named_parameters():
        if name.endswith("map_augment.weight"):
            parameter.requires_grad_(False)


def _endless_batches(
    dataset: torch.utils.data.Dataset, training: Training
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Endless batches on the device: (items of `clean_samples` [batch_gpu, ...], labels [batch_gpu, label_dim])."""
    config, device = training.config, training.device
    sampler = batches.InfiniteSampler(
        len(cast(Sized, dataset)), distributed.rank(), distributed.world_size(), seed=config.seed, start=training.nimg
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=training.batch_gpu,
        sampler=sampler,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=config.workers > 0,
        worker_init_fn=ignore_signals,
    )
    for items, labels in loader:
        yield items.to(device, non_blocking=True), labels.to(device, non_blocking=True)
