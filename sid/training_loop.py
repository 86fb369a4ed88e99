"""The distillation from its first iteration to its last: ticks, statistics, snapshots and states."""

from pathlib import Path

import torch

from edm import zoo
from edm.sampler import NonFiniteImagesError
from torch_utils import distributed
from torch_utils.checkpoint import StateFolder, attempt, snapshot_path
from torch_utils.interruption import Interruption
from torch_utils.training_stats import TickLog
from torch_utils.updates import DivergenceError, check_finite
from torch_utils.watchdog import check_equal_weights
from training.training_loop import advised, milestones

from . import lora
from .config import DistillationConfig
from .distillation import Distillation
from .monitor.measure import EDGE, PER_CLASS, Health, worst_class
from .monitor.rules import Watch
from .report.progress import Report
from .state import DistillationState


def training_loop(distillation: Distillation, run_dir: Path, report: Report) -> torch.nn.Module:
    """Runs the distillation to its end and returns the one-step generator (the moving average of theta).

    run_dir: takes statistics, snapshots and states. report: makes pictures of the generator and measures it.
    Errors: DivergenceError when gradients stay non-finite; SystemExit (EXIT_CODE) when a signal asked to stop.
    """
    state, config = distillation.state, distillation.config
    states = StateFolder(run_dir, config.keep_states)
    log = TickLog(run_dir, distillation.device, state.elapsed_sec, state.nimg)
    if state.statistics:
        distillation.collector.load_state_dict(state.statistics, distillation.device)

    health, watch = Health(distillation), Watch(config.options())
    total_img = int(config.total_kimg * 1000)
    low, high = distillation.loss.sigma_schedule.quantile(torch.tensor([EDGE, 1 - EDGE])).tolist()
    levels = f"the generator's loss sees noise levels {low:.2g} to {high:.2g}"
    with (
        advised(run_dir, state, config.batch, "--lr and --glr", levels),
        Interruption(distillation.device, config.save_minutes) as interruption,
    ):
        if state.nimg == 0:
            report.start(lora.merge(state.ema))
        elif state.at_snapshot:  # the run ended between this state and its snapshot
            publish(state, config, run_dir, report)
        log.resume_clock(state.nimg)
        while state.nimg < total_img:
            distillation.iteration()
            tick, save = milestones(state, config, interruption)
            if tick or save:
                distillation.check()
                check_finite(state.networks, state.nimg)
                check_equal_weights(state.networks, state.nimg)
            if tick:
                collector = distillation.collector
                statistics = {**collector.collect(), **worst_class(collector.collect_groups(PER_CLASS))}
                statistics |= {**health.measure(), **skipped_updates(state)}
                log.tick(state.tick, state.nimg, statistics)
                for warning in watch.tick(state.nimg, statistics):
                    distributed.print0(warning)
            if save:
                state.elapsed_sec = log.elapsed_sec
                saved = states.save(state.contents(config, distillation.collector.state_dict()), config.batch)
                interruption.saved()
            if interruption.stop:
                interruption.leave(run_dir, saved)
            if state.at_snapshot:
                publish(state, config, run_dir, report)
            if tick:
                log.resume_clock(state.nimg)
    return lora.merge(state.ema)


def publish(state: DistillationState, config: DistillationConfig, run_dir: Path, report: Report) -> None:
    """Writes the snapshot, its picture and its metrics; all of them again when a run is resumed here.

    Errors: DivergenceError when the generator's images aren't finite.
    """
    net = lora.merge(state.ema)
    if distributed.rank() == 0:
        path = snapshot_path(run_dir, state.nimg, config.batch)
        attempt(f"saving {path.name}", lambda: save_snapshot(net, state.nimg, config, path))
    try:
        report.snapshot(net, state.nimg)
    except NonFiniteImagesError as error:
        raise DivergenceError(f"{error.message} at {state.nimg / 1e3:.1f} kimg") from None


def skipped_updates(state: DistillationState) -> dict[str, dict[str, float]]:
    """Nonzero counts of updates skipped for non-finite gradients and by the spike guard."""
    updaters = {"generator": state.generator_updater, "fake_score": state.fake_score_updater}
    counts = {f"Health/{name}_skipped": updater.skipped for name, updater in updaters.items()}
    counts |= {f"Health/{name}_spikes": updater.spikes for name, updater in updaters.items()}
    return {name: {"mean": count} for name, count in counts.items() if count}


def save_snapshot(net: torch.nn.Module, nimg: int, config: DistillationConfig, path: Path) -> None:
    """Saves the one-step generator, with the metadata needed to use it and the settings that made it."""
    recipe = {"alpha": config.alpha, "tmax": config.tmax, "kimg": nimg / 1e3}
    if config.objective != "sid":
        recipe["objective"] = config.objective
    if config.guidance is not None:
        recipe["guidance"] = str(config.guidance)
    if config.gan:
        recipe |= {"gan": True, "lsg_gan": config.lsg_gan}
    if config.lora_rank:
        recipe["lora_rank"] = config.lora_rank
    zoo.save_network(net, path, **net.metadata, **recipe)
