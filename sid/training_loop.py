"""The distillation from its first iteration to its last: ticks, statistics, snapshots and states."""

from pathlib import Path

import torch

from edm import zoo
from torch_utils import checkpoint, distributed
from torch_utils.training_stats import TickLog

from .config import DistillationConfig
from .distillation import Distillation
from .doctor import Watch
from .health import Health
from .report import Report
from .state import DistillationState


def training_loop(distillation: Distillation, run_dir: Path, report: Report) -> torch.nn.Module:
    """Runs the distillation to its end and returns the one-step generator (the moving average of theta).

    run_dir: takes statistics, snapshots and states. report: makes pictures and metrics of the generator.
    Errors: DivergenceError when gradients stay non-finite.
    """
    state, config = distillation.state, distillation.config
    if state.nimg:
        distributed.print0(f"Resumed at {state.nimg / 1e3:.1f} kimg")
    else:
        report.start(state.ema)
    health, watch = Health(distillation), Watch(vars(config))
    log = TickLog(run_dir, distillation.device, state.elapsed_sec)
    log.resume_clock(state.nimg)

    total_img = int(config.total_kimg * 1000)
    tick_img = config.kimg_per_tick * 1000
    while state.nimg < total_img:
        distillation.iteration()
        if state.nimg < total_img and int(state.nimg / tick_img) == int((state.nimg - config.batch) / tick_img):
            continue
        distillation.check()
        state.tick += 1
        state.elapsed_sec = log.elapsed_sec
        statistics = {**distillation.collector.collect(), **health.measure(), **skipped_updates(state)}
        log.tick(state.tick, state.nimg, statistics)
        for warning in watch.tick(state.nimg, statistics):
            distributed.print0(warning)
        done = state.nimg >= total_img
        snapshot = done or state.tick % config.snapshot_ticks == 0
        if distributed.rank() == 0 and snapshot:
            save_snapshot(state, config, run_dir)
        if distributed.rank() == 0 and (done or state.tick % config.state_ticks == 0):
            state.save(checkpoint.state_path(run_dir, state.nimg))
        if snapshot:
            report.snapshot(state.ema, state.nimg)
        log.resume_clock(state.nimg)
    return state.ema


def skipped_updates(state: DistillationState) -> dict[str, dict[str, float]]:
    """Counts of updates skipped for non-finite gradients, where there are any."""
    updaters = {"generator": state.generator_updater, "fake_score": state.fake_score_updater}
    return {f"Health/{name}_skipped": {"mean": u.skipped} for name, u in updaters.items() if u.skipped}


def save_snapshot(state: DistillationState, config: DistillationConfig, run_dir: Path) -> Path:
    """Saves the one-step generator with what it takes to use it and how it was made."""
    path = checkpoint.snapshot_path(run_dir, state.nimg)
    recipe = {"alpha": config.alpha, "tmax": config.tmax, "kimg": state.nimg / 1e3}
    if config.objective != "sid":
        recipe["objective"] = config.objective
    zoo.save_network(state.ema, path, **state.ema.metadata, **recipe)
    return path
