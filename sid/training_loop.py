"""The distillation from its first iteration to its last: ticks, statistics, snapshots and states."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edm import zoo
from edm.latents import decoder_of
from edm.sampler import NonFiniteImagesError
from torch_utils import distributed
from torch_utils.checkpoint import attempt, snapshot_path
from torch_utils.interruption import Interruption
from torch_utils.records import sound_records
from torch_utils.updates import DivergenceError
from training.denoiser import DenoiserModule
from training.training_loop import WHOLE_RUN, Routine, Stretch, advised, run_to_end

from . import __version__, lora
from .citations import papers
from .config import DistillationConfig
from .distillation import Distillation
from .monitor.diagnosis import Watch
from .monitor.measure import EDGE, PER_CLASS, Health, worst_class
from .monitor.records import DISTANCES_FILE
from .report.progress import Report
from .returns import Returns
from .state import DistillationState


def training_loop(
    distillation: Distillation,
    run_dir: Path,
    report: Report,
    stretch: Stretch = WHOLE_RUN,
    track: Callable[[], None] = lambda: None,
    returns: Returns | None = None,
    interruption: Interruption | None = None,
) -> torch.nn.Module:
    """Runs the distillation to its end and returns the one-step generator (the moving average of theta).

    run_dir: takes statistics, snapshots and states. report: makes pictures of the generator and measures it.
    stretch: of a run with trials; schedules keep the config's length wherever it ends.
    track: called when all of a tick, and of its snapshot, has been recorded.
    returns: judges every snapshot; None: snapshots aren't judged. interruption: as for `run_to_end`.
    Errors: DivergenceError when gradients stay non-finite, or `returns` finds that the run has left the teacher;
    SystemExit (EXIT_CODE) when a signal asked to stop.
    """
    state, config, collector = distillation.state, distillation.config, distillation.collector
    if state.statistics:
        collector.load_state_dict(state.statistics, distillation.device)
    health = Health(distillation, report.samples)
    watch = Watch(
        {**config.options(), **state.rates(config)}, lambda: sound_records(run_dir / DISTANCES_FILE, "kimg", "value")
    )

    decoder = decoder_of(distillation.teacher)

    def iteration() -> None:
        decoder.leave_device()  # where pictures and metrics have put its VAE
        distillation.iteration()

    def statistics() -> dict[str, dict[str, float]]:
        found = {**collector.collect(), **worst_class(collector.collect_groups(PER_CLASS))}
        return found | {**health.measure(), **skipped_updates(state)}

    def after_tick(found: dict[str, dict[str, float]]) -> None:
        for warning in watch.tick(state.nimg, found):
            distributed.print0(warning)
        track()

    def judged(measured: dict[str, float] | None) -> dict[str, float] | None:
        if returns is not None:
            returns.judge()
        return measured

    low, high = distillation.loss.sigma_schedule.quantile(torch.tensor([EDGE, 1 - EDGE])).tolist()
    levels = f"the generator's loss sees noise levels {low:.2g} to {high:.2g}"
    routine = Routine(
        progress=state,
        networks=state.networks,
        device=distillation.device,
        iteration=iteration,
        check=distillation.check,
        statistics=statistics,
        after_tick=after_tick,
        contents=lambda: state.contents(config, collector.state_dict()),
        publish=lambda: judged(publish(state, config, run_dir, report)),
        begin=lambda: judged(report.start(lora.merge(state.ema))),
        kept_state=lambda: None if returns is None else returns.kept_state(),
    )
    with advised(run_dir, state, config.batch, "--lr and --glr", levels):
        run_to_end(routine, config, run_dir, stretch, interruption)
    return lora.merge(state.ema)


def publish(
    state: DistillationState, config: DistillationConfig, run_dir: Path, report: Report
) -> dict[str, float] | None:
    """Writes the snapshot, its picture and its metrics; all of them again when a run is resumed here.

    Returns, on process 0, what was measured, by name.
    Errors: DivergenceError when the generator's images aren't finite.
    """
    net = lora.merge(state.ema)
    path = snapshot_path(run_dir, state.nimg, config.batch)
    if distributed.rank() == 0:
        attempt(f"saving {path.name}", lambda: save_snapshot(net, state, config, path))
    try:
        found = report.snapshot(net, state.nimg)
    except NonFiniteImagesError as error:
        raise DivergenceError(f"{error.message} at {state.nimg / 1e3:g} kimg") from None
    if distributed.rank() == 0 and (fid := report.fid(net)):
        attempt(f"adding the FID to {path.name}", lambda: save_snapshot(net, state, config, path, fid=fid))
    return found


def skipped_updates(state: DistillationState) -> dict[str, dict[str, float]]:
    """Nonzero counts of updates skipped for non-finite gradients and by the spike guard."""
    updaters = {"generator": state.generator_updater, "fake_score": state.fake_score_updater}
    counts = {f"Health/{name}_skipped": updater.skipped for name, updater in updaters.items()}
    counts |= {f"Health/{name}_spikes": updater.spikes for name, updater in updaters.items()}
    return {name: {"mean": count} for name, count in counts.items() if count}


def save_snapshot(
    net: DenoiserModule, state: DistillationState, config: DistillationConfig, path: Path, **measured: Any
) -> None:
    """Saves the one-step generator, with the metadata needed to use it and the settings that made it.

    measured: further metadata, such as the FID.
    """
    recipe: dict[str, Any] = {"alpha": config.alpha, "tmax": config.tmax, "kimg": state.nimg / 1e3}
    if config.objective != "sid":
        recipe["objective"] = config.objective
    if config.guidance is not None:
        recipe["guidance"] = str(config.guidance)
    if config.gan:
        recipe |= {"gan": True, "lsg_gan": config.lsg_gan}
    if config.lora_rank:
        recipe["lora_rank"] = config.lora_rank
        if config.lora_base == "half":
            recipe["lora_base"] = config.precision
    if state.returns:
        recipe["returns"] = state.returns
    recipe |= {"seed": config.seed, "version": __version__, "papers": papers(config)}
    recipe["options"] = config.changed_options()
    zoo.save_network(net, path, **net.metadata, **recipe, **measured)
