"""A distillation from its checked options to its end: loads its inputs, makes its folder, runs its trials, trains."""

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from dnnlib import UserError, without_passwords
from edm import zoo
from edm.snapshot_metrics import SnapshotMetrics
from torch_utils import batches, checkpoint, distributed, run_folder
from torch_utils.interruption import Interruption
from torch_utils.run_lines import environment, path_text, start_block
from torch_utils.tracking import trackers_of
from torch_utils.untrusted import edm_pickle
from torch_utils.updates import DivergenceError
from torch_utils.watchdog import SPARE_SEC, watching
from training.denoiser import DenoiserModule, check_denoiser
from training.training_loop import WHOLE_RUN, Stretch

from . import __version__, lora
from .config import DistillationConfig
from .distillation import Distillation
from .dry_run import dry_run
from .generator import OneStepGenerator
from .guidance import check_weight
from .inputs import (
    GUIDE_FILE,
    TEACHER_FILE,
    Inputs,
    choose_metrics,
    choose_snapshots,
    load_inputs,
    prompts_hash,
    published_reference,
)
from .options import run_options
from .plan import RunPlan, make_plan
from .prepare import build
from .report.opening import describe_run
from .report.page import RunPage
from .report.progress import Report, track
from .returns import Returns
from .run_options import RunOptions
from .state import SavedState
from .training_loop import training_loop
from .trials import run_trials


def distil(
    teacher: torch.nn.Module,
    config: DistillationConfig,
    out: str | os.PathLike,
    *,
    start: torch.nn.Module | None = None,
    guide: torch.nn.Module | None = None,
    prompts: str | None = None,
    data: str | None = None,
    data_stat: str | None = None,
    detector: str | None = None,
    metrics: str | None = None,
    measure_teacher: bool | None = None,
    resume: str | None = None,
    override: bool = False,
    device: str | None = None,
    log: str | None = None,
    trials: float = 0.0,
) -> OneStepGenerator:
    """Distils a denoiser into a one-step generator, with a run folder as sid_train.py makes it.

    teacher: a denoiser (`training.denoiser`) of any class; it stays as it is. The folder keeps a copy of it as
             teacher.safetensors, for sid.report and sid_train.py.
    out:     the run folder itself. If it holds a training state of this run, the run goes on from there.
    start:   another denoiser, whose weights the generator starts from.
    guide:   a weaker denoiser, which guides the teacher with the weight that the config's guidance gives; kept as
             guide.safetensors.
    trials:  share of the config's length for short trials of settings (`sid.trials`), of which the best goes on. They
             vary only what the config leaves at its default.
    prompts, data, data_stat, detector, metrics, measure_teacher, resume, override, device, log: as the options of
             sid_train.py.
    Errors: UserError naming what doesn't fit; SystemExit when a signal such as Ctrl-C asked to stop, after saving.
    """
    check_denoiser(teacher, "teacher")
    if guide is not None:
        check_denoiser(guide, "guide")
    options = {
        "outdir": os.fspath(out),
        "nosubdir": True,
        "edm_model": str(Path(out) / TEACHER_FILE),
        "prompts": prompts,
        "data": data,
        "data_stat": data_stat,
        "detector": detector,
        "metrics": metrics,
        "measure_teacher": measure_teacher,
        "resume": resume,
        "override": override,
        "device": device,
        "log": log,
        "trials": trials,
    }
    if guide is not None:
        options["guide"] = str(Path(out) / GUIDE_FILE)
    settled = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    generator = run(run_options(options, settled), config, teacher, start, guide)
    assert generator is not None  # only --dry-run makes none
    return generator


def run(
    options: RunOptions,
    config: DistillationConfig,
    teacher: torch.nn.Module | None = None,
    start: torch.nn.Module | None = None,
    guide: torch.nn.Module | None = None,
) -> OneStepGenerator | None:
    """Runs a distillation from its options to its end; None after --dry-run.

    teacher, start, guide: networks to use instead of loading --edm_model, --transfer and --guide; they aren't changed.
    Errors: UserError naming the option.
    """
    check_required(options, config)
    reference = options.data_stat or (published_reference(options.edm_model) if teacher is None else None)
    metrics = choose_metrics(options.metrics, reference, options.data, options.detector)
    device = distributed.init(options.device, timeout_sec=60 * options.timeout + SPARE_SEC)
    with watching(60 * options.timeout) as training_begins:
        batches.split_batch(config.batch, config.batch_gpu, distributed.world_size())
        trackers = trackers_of(options.log)
        if teacher is None:
            options = choose_snapshots(options)
        summary = summarise(options, config, reference, metrics)
        if options.dry_run:
            distributed.print0(dry_run(options, config, summary, device))
            return None

        torch.backends.cudnn.benchmark = options.bench
        copies = [None if net is None else edm_pickle.frozen_copy(net).float() for net in (teacher, start, guide)]
        networks = cast(list[DenoiserModule | None], copies)
        inputs = load_inputs(options, config, metrics, reference, device, *networks)
        config = identify_inputs(config, inputs)
        plan = make_plan(inputs, config, options, device)
        inputs = dataclasses.replace(inputs, moments=plan.moments)
        # It may refuse its inputs, and then there is no folder yet.
        first = inputs if plan.trials is None else with_own_networks(inputs)
        distillation = build(first, plan.config, device, plan.saved, options.override, plan.dropped)
        surroundings = {"environment": {"this library": __version__, **environment(device)}}
        surroundings |= without_passwords({"recipe": options.recipe, "arguments": options.arguments})
        record = {**summary, **plan.summary(), **surroundings}
        folder = run_folder.create(*plan.place, record, plan.saved and plan.saved.path)
        with folder as run_dir, RunPage(run_dir, distributed.rank() == 0) as page:
            if distributed.rank() == 0:
                print(start_block(describe_run(plan, distillation, inputs, options, reference, run_dir)), flush=True)
                keep_networks(run_dir, {TEACHER_FILE: teacher, GUIDE_FILE: guide})
            training_begins.set()
            page.write()
            if plan.trials is not None:
                measure_start(distillation, inputs, run_dir)
                del distillation  # each trial has its own
                plan = after_trials(plan, inputs, page, device, options)
                if distributed.rank() == 0:
                    run_folder.record_options(run_dir, record | plan.summary())
                distillation = build(inputs, plan.config, device, plan.saved, options.override, plan.dropped)
            report = Report(run_dir, inputs.evaluator, inputs.picture, config.batch, plan.distance, page)
            net = train(distillation, run_dir, report, trackers, plan.after_trials())
            snapshot = checkpoint.snapshot_path(run_dir, distillation.state.nimg, config.batch)
            if teacher is None:  # else the caller gets the generator
                checkpoint.check_saved(snapshot)
            if snapshot.is_file():
                distributed.print0(f"Finished: {path_text(snapshot)}")
    distributed.shutdown()
    return OneStepGenerator(net)


def check_required(options: RunOptions, config: DistillationConfig) -> None:
    """Errors: UserError when an option is missing that others need, or doesn't fit them."""
    if not options.edm_model:
        raise UserError("--recipe=auto: name the teacher with --edm_model, such as the run folder of edm.train")
    if config.gan and not options.data:
        raise UserError("--gan learns from real images; name them with --data")
    late = (("--gan-freeze", config.gan_freeze_kimg, "the generator"), ("--gan-start", config.gan_start_kimg, "--gan"))
    for option, kimg, who in late if config.gan else ():
        if kimg >= config.total_kimg:
            raise UserError(
                f"{option}={kimg:g}: {who} would do nothing in all the {config.total_kimg:g} kimg of the run; give less"
                " than that, or a longer --duration"
            )
    check_weight(config.guidance, bool(options.guide))


def summarise(
    options: RunOptions,
    config: DistillationConfig,
    reference: str | None,
    metrics: list[str],
) -> dict[str, Any]:
    """The options of the run, as plain values without passwords."""
    summary = {**config.options(), **options.record(), "data_stat": reference, "metrics": metrics}
    summary["processes"] = distributed.world_size()
    return without_passwords(json.loads(json.dumps(summary)))


def identify_inputs(config: DistillationConfig, inputs: Inputs) -> DistillationConfig:
    """The config, with what identifies the prompts and the real images, which a resumed run must have again."""
    config = dataclasses.replace(config, prompts_sha256=prompts_hash(inputs.teacher))
    if config.gan and inputs.dataset is not None:
        config = dataclasses.replace(config, real_images=len(inputs.dataset))
    return config


def keep_networks(run_dir: Path, networks: dict[str, torch.nn.Module | None]) -> None:
    """Saves networks that were given as modules in the run folder. networks: by file name, None for one that wasn't."""
    for name, net in networks.items():
        if net is not None:
            zoo.save_network(net, run_dir / name, **getattr(net, "metadata", {}))


def with_own_networks(inputs: Inputs) -> Inputs:
    """The same inputs for one of several distillations, which may store its networks' weights in another precision."""
    return dataclasses.replace(inputs, teacher=copy.deepcopy(inputs.teacher), guide=copy.deepcopy(inputs.guide))


def measure_start(distillation: Distillation, inputs: Inputs, run_dir: Path) -> None:
    """Measures the generator as it starts, for a run whose trials measure nothing but distances."""
    if inputs.evaluator is None:
        return
    metrics = SnapshotMetrics(run_dir, inputs.evaluator)
    found = metrics.measure(lora.merge(distillation.state.ema), distillation.state.nimg)
    if found:
        print("The start: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)


def after_trials(
    plan: RunPlan,
    inputs: Inputs,
    page: RunPage,
    device: torch.device,
    options: RunOptions,
) -> RunPlan:
    """Runs the trials and returns how the run goes on from the best of them. page: of the run, shows them."""

    def build_candidate(config: DistillationConfig, state: checkpoint.StateFile | None) -> Distillation:
        own = with_own_networks(inputs)
        saved = state and SavedState(state, own.weight_hashes(config))
        return build(own, config, device, saved, options.override, plan.dropped)

    def report(folder: Path) -> Report:
        return Report(folder, None, inputs.picture, plan.config.batch, plan.distance, page)

    assert plan.trials is not None
    best = run_trials(plan.trials, page.run_dir, build_candidate, report)
    saved = SavedState(best, inputs.weight_hashes(plan.config))
    config = plan.trials.fitting(saved.options, options.given)
    return dataclasses.replace(plan, config=config, saved=saved, trials=None)


def train(
    distillation: Distillation,
    run_dir: Path,
    report: Report,
    trackers: Sequence[str] = (),
    stretch: Stretch = WHOLE_RUN,
) -> torch.nn.Module:
    """Trains to the end and returns the generator; goes back to earlier states as often as --returns allows.

    trackers: names of those that show the run. stretch: of the run, which comes after its trials.
    Errors: as for `training_loop`.
    """
    config, returns = distillation.config, Returns(distillation, run_dir)
    with Interruption(distillation.device, config.save_minutes) as interruption:
        while True:
            try:
                with track(run_dir, trackers, distillation.state.nimg, config.batch) as tracking:
                    return training_loop(distillation, run_dir, report, stretch, tracking.update, returns, interruption)
            except DivergenceError as error:
                returns.go_back(error)
