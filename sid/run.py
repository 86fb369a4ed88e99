"""A distillation from its checked options to its end: loads its inputs, resumes, trains."""

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from dnnlib import UserError, without_passwords
from dnnlib.options import AS_JSON
from edm import zoo
from torch_utils import checkpoint, distributed, misc, run_folder
from torch_utils.interruption import Interruption
from torch_utils.run_lines import environment, path_text, start_block
from torch_utils.tracking import trackers_of
from torch_utils.untrusted import edm_pickle
from torch_utils.updates import DivergenceError
from torch_utils.watchdog import SPARE_SEC, watching
from training.denoiser import DenoiserModule, check_denoiser

from . import __version__, memory
from .calibration import choose_tmax, levels_to_measure
from .config import COMMAND_LINE, FREE_ON_RESUME, MEASURED, ROUNDING, DistillationConfig, resolve, saved_options
from .distillation import Distillation
from .generator import OneStepGenerator
from .guidance import check_weight
from .inputs import (
    GUIDE_FILE,
    TEACHER_FILE,
    Inputs,
    checked_guide,
    checked_teacher,
    choose_metrics,
    choose_snapshots,
    first_images,
    guided_teacher,
    load_inputs,
    load_start,
    prompts_hash,
    published_reference,
    teacher_fid,
)
from .options import other_options
from .prepare import prepare
from .report.opening import describe_plan, describe_run
from .report.page import RunPage
from .report.progress import Report, track
from .returns import Returns
from .start import choose_start
from .state import SavedState
from .teacher_distance import TeacherDistance
from .training_loop import training_loop
from .trials import Plan, has_begun, plan_trials, run_trials

GPUS = (24, 80)  # sizes of memory in GB, for which --dry-run tells what fits
# Runs of at least this length measure the distance from the teacher's samples at every snapshot. Making the samples
# takes as long as half a kimg of training.
WORTH_SAMPLES_KIMG = 10
COMMAND = ("recipe", "arguments")  # of the options: how sid_train.py was called, which the run's folder records


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
    prompts, data, data_stat, detector, metrics, resume, override, device, log: as the options of sid_train.py.
    Errors: UserError naming what doesn't fit; SystemExit when a signal such as Ctrl-C asked to stop, after saving.
    """
    check_denoiser(teacher, "teacher")
    if guide is not None:
        check_denoiser(guide, "guide")
    given = {
        "prompts": prompts,
        "data": data,
        "data_stat": data_stat,
        "detector": detector,
        "metrics": metrics,
        "resume": resume,
    }
    settled = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    given |= {"trials": trials, "override": override, "device": device, "log": log}
    given |= {"nosubdir": True, "outdir": os.fspath(out), "edm_model": str(Path(out) / TEACHER_FILE)}
    if guide is not None:
        given["guide"] = str(Path(out) / GUIDE_FILE)
    generator = run({**other_options(given), "given": settled}, config, teacher, start, guide)
    assert generator is not None  # only --dry-run makes none
    return generator


def run(
    options: dict[str, Any],
    config: DistillationConfig,
    teacher: torch.nn.Module | None = None,
    start: torch.nn.Module | None = None,
    guide: torch.nn.Module | None = None,
) -> OneStepGenerator | None:
    """Runs a distillation from its options to its end; None after --dry-run.

    options: the options of sid_train.py that aren't part of the config, by name.
    teacher, start, guide: networks to use instead of loading --edm_model, --transfer and --guide; they aren't changed.
    Errors: UserError naming the option.
    """
    check_required(options, config)
    reference = options["data_stat"] or (published_reference(options["edm_model"]) if teacher is None else None)
    metrics = choose_metrics(options["metrics"], reference, options["data"], options["detector"])
    device = distributed.init(options["device"], timeout_sec=60 * options["timeout"] + SPARE_SEC)
    with watching(60 * options["timeout"]) as training_begins:
        misc.split_batch(config.batch, config.batch_gpu, distributed.world_size())
        trackers = trackers_of(options["log"])
        if teacher is None:
            options = choose_snapshots(options)
        summary = summarise(options, config, reference, metrics)
        if options["dry_run"]:
            distributed.print0(dry_run(options, config, summary, device))
            return None

        torch.backends.cudnn.benchmark = options["bench"]
        copies = [None if net is None else edm_pickle.frozen_copy(net).float() for net in (teacher, start, guide)]
        networks = cast(list[DenoiserModule | None], copies)
        inputs = load_inputs(options, config, metrics, reference, device, *networks)
        config = dataclasses.replace(config, prompts_sha256=prompts_hash(inputs.teacher))
        if config.gan and inputs.dataset is not None:
            config = dataclasses.replace(config, real_images=len(inputs.dataset))
        goal = teacher_fid(inputs, options["edm_model"])
        if goal is not None:
            summary["teacher_fid"] = dataclasses.asdict(goal)
        plan = make_plan(inputs, config, options, device)
        summary |= plan.summary()
        # Both may refuse their inputs, and then there is no folder yet.
        picture = first_images(inputs.dataset, inputs.teacher) if inputs.dataset is not None else None
        distillation = build(inputs, plan.config, device, plan.saved, options["override"])
        summary["environment"] = {"this library": __version__, **environment(device)}
        summary |= without_passwords({name: options.get(name) for name in COMMAND})
        folder = run_folder.create(*plan.place, summary, plan.saved and plan.saved.path)
        with folder as run_dir, RunPage(run_dir, distributed.rank() == 0) as page:
            if distributed.rank() == 0:
                settled = (config.total_kimg, plan.trials, plan.starts, plan.answers, goal)
                about = describe_run(inputs, distillation, options, reference, run_dir, *settled)
                print(start_block(about), flush=True)
            if teacher is not None and distributed.rank() == 0:
                zoo.save_network(teacher, run_dir / TEACHER_FILE, **getattr(teacher, "metadata", {}))
                if guide is not None:
                    zoo.save_network(guide, run_dir / GUIDE_FILE, **getattr(guide, "metadata", {}))
            training_begins.set()
            page.write()
            if plan.trials is not None:
                del distillation  # each trial has its own
                plan = after_trials(plan, inputs, page, picture, device, options)
                if distributed.rank() == 0:
                    run_folder.record_options(run_dir, summary | plan.summary())
                distillation = build(inputs, plan.config, device, plan.saved, options["override"])
            report = Report(run_dir, inputs.evaluator, picture, config.batch, plan.distance, page)
            net = train(distillation, run_dir, report, trackers, plan.dropped)
            snapshot = checkpoint.snapshot_path(run_dir, distillation.state.nimg, config.batch)
            if teacher is None:  # else the caller gets the generator
                checkpoint.check_saved(snapshot)
            if snapshot.is_file():
                distributed.print0(f"Finished: {path_text(snapshot)}")
    distributed.shutdown()
    return OneStepGenerator(net)


def train(
    distillation: Distillation, run_dir: Path, report: Report, trackers: list[str], dropped: int
) -> torch.nn.Module:
    """Trains to the end and returns the generator; goes back to earlier states as often as --returns allows.

    trackers: names of those that show the run. dropped: images of the trials that don't go on.
    Errors: as for `training_loop`.
    """
    config, returns = distillation.config, Returns(distillation, run_dir)
    with Interruption(distillation.device, config.save_minutes) as interruption:
        while True:
            try:
                with track(run_dir, trackers, distillation.state.nimg, config.batch) as tracking:
                    shared = {"track": tracking.update, "returns": returns, "interruption": interruption}
                    return training_loop(distillation, run_dir, report, dropped=dropped, before=dropped, **shared)
            except DivergenceError as error:
                returns.go_back(error)


def check_required(options: dict[str, Any], config: DistillationConfig) -> None:
    """Errors: UserError when an option is missing that others need, or doesn't fit them."""
    if not options["edm_model"]:
        raise UserError("--recipe=auto: name the teacher with --edm_model, such as the run folder of edm.train")
    if config.gan and not options["data"]:
        raise UserError("--gan learns from real images; name them with --data")
    check_weight(config.guidance, bool(options["guide"]))


def summarise(
    options: dict[str, Any],
    config: DistillationConfig,
    reference: str | None,
    metrics: list[str],
) -> dict[str, Any]:
    """The options of the run, as plain values without passwords."""
    asked = {name: value for name, value in options.items() if name not in ("given", *COMMAND)}
    summary = {**config.options(), **asked, "data_stat": reference, "metrics": metrics}
    summary["processes"] = distributed.world_size()
    return without_passwords(json.loads(json.dumps(summary)))


# --- everything that is settled before there is a run folder


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """How a run begins.

    config      its settings with the start chosen; with trials, the settings of the first candidate
    place       outdir, description and nosubdir of the run folder
    saved       the state to go on from; None at the beginning of a run
    trials      the trials that are still to be run, if any
    distance    measures how far images are from the teacher's, on process 0; None if the run doesn't
    starts      {noise level: distance from the teacher} of the starts that were measured; None if none was to be
    answers     {noise level: what the teacher's answers vary by} (`sid.calibration`); None if none were measured
    dropped     images of the trials that don't go on, whether they are still to be run or not
    """

    config: DistillationConfig
    place: tuple[str, str, bool]
    saved: SavedState | None
    trials: Plan | None
    distance: TeacherDistance | None
    starts: dict[str, float] | None
    answers: dict[str, dict[str, float]] | None
    dropped: int

    def summary(self) -> dict[str, Any]:
        """What the plan adds to the record of the run."""
        measured = {"starts": self.starts, "answers": self.answers}
        return self.config.options() | {name: value for name, value in measured.items() if value is not None}


def make_plan(inputs: Inputs, config: DistillationConfig, options: dict[str, Any], device: torch.device) -> RunPlan:
    """Finds the state to go on from, measures the teacher, and chooses the start and the trials.

    config: what the user asked for. Errors: UserError when an option doesn't fit the teacher or the state.
    """
    with_trials = options["trials"] > 0
    place, file = find_place(options, describe(inputs.teacher, config, with_trials))
    saved = None if file is None else SavedState(file, inputs.weight_hashes(config))
    distance = measure_teacher(inputs, config, with_trials, device, saved_value(saved, "tmax") is None)
    starts, answers, trials, dropped = None, None, None, 0
    if config.init_sigma is None:
        level, starts = settle("init_sigma", lambda: choose_start(inputs.teacher, distance), saved)
        config = dataclasses.replace(config, init_sigma=level)
    if config.tmax is None:
        tmax, answers = settle("tmax", lambda: choose_tmax({} if distance is None else distance.answers), saved)
        config = dataclasses.replace(config, tmax=tmax)
    if with_trials:
        trials = plan_trials(config, options["trials"], options["given"], inputs.teacher)
        config = trials.fitting(saved and saved.options, options["given"])
        dropped = trials.dropped_images
        if len(trials.configs) == 1 or saved is not None:  # nothing to choose, or chosen already
            trials = None
    return RunPlan(config, place, saved, trials, distance, starts, answers, dropped)


def find_place(options: dict[str, Any], description: str) -> tuple[tuple[str, str, bool], checkpoint.StateFile | None]:
    """(outdir, description, nosubdir) of the run folder and the state to go on from, None at the beginning of a run.

    A run that ended during its trials goes on in its folder, without a state of its own.
    """
    place = (options["outdir"], options["desc"] or description, options["nosubdir"])
    former = run_folder.find_run(options["resume"], *place, has_begun if options["trials"] else lambda folder: False)
    if former is None:
        return place, None
    return place if former.state is not None else (str(former.folder), "", True), former.state


def after_trials(
    plan: RunPlan,
    inputs: Inputs,
    page: RunPage,
    picture: torch.Tensor | None,
    device: torch.device,
    options: dict[str, Any],
) -> RunPlan:
    """Runs the trials and returns how the run goes on from the best of them. page: of the run, shows them."""

    def build_candidate(config: DistillationConfig, state: checkpoint.StateFile | None) -> Distillation:
        # Networks of its own, whose weights it may store in another precision.
        own = dataclasses.replace(inputs, teacher=copy.deepcopy(inputs.teacher), guide=copy.deepcopy(inputs.guide))
        saved = state and SavedState(state, own.weight_hashes(config))
        return build(own, config, device, saved, options["override"])

    def report(folder: Path) -> Report:
        return Report(folder, None, picture, plan.config.batch, plan.distance, page)

    assert plan.trials is not None
    best = run_trials(plan.trials, page.run_dir, build_candidate, report)
    saved = SavedState(best, inputs.weight_hashes(plan.config))
    config = plan.trials.fitting(saved.options, options["given"])
    return dataclasses.replace(plan, config=config, saved=saved, trials=None)


def measure_teacher(
    inputs: Inputs, config: DistillationConfig, with_trials: bool, device: torch.device, chooses_tmax: bool
) -> TeacherDistance | None:
    """The distance from the teacher's samples, on process 0, if the run wants it and the teacher makes any.

    A guided teacher makes guided samples. chooses_tmax: whether --tmax=auto has no value from a saved state.

    Errors: UserError when trials need it and the teacher makes no samples.
    """
    teacher: Any = inputs.teacher
    if getattr(teacher, "metadata", {}).get("sigma") is not None:
        if with_trials:
            raise UserError("--trials: the teacher knows one noise level only, so it makes no samples to compare with")
        return None
    wanted = with_trials or config.returns or None in [getattr(config, name) for name in MEASURED]
    if not (wanted or config.total_kimg >= WORTH_SAMPLES_KIMG):
        return None
    with distributed.shared_errors():  # such as samples that aren't finite
        if distributed.rank() != 0:
            return None
        teacher = guided_teacher(teacher, inputs.guide, config.guidance)
        changes = resolve(config, teacher, device).precision in ("bf16", "fp16")
        levels = levels_to_measure(teacher) if chooses_tmax and config.tmax is None and config.has_karras_levels else []
        return TeacherDistance(teacher.to(device).eval(), keep=changes, levels=levels)


def saved_value(saved: SavedState | None, name: str) -> float | None:
    """The value that an option to be measured has in the state to go on from; None if there is none."""
    value = None if saved is None else saved.options.get(name)
    return float(value) if isinstance(value, float | int) else None


def settle(
    name: str, choose: Callable[[], tuple[float, dict[str, Any]]], saved: SavedState | None
) -> tuple[float, dict[str, Any]]:
    """(the value of an option that is to be measured, what was measured, by noise level).

    choose: returns both; it is called on process 0. saved: the state to go on from, whose value stays.
    """
    value = saved_value(saved, name)
    if value is not None:
        return value, {}
    return distributed.from_process_0(choose() if distributed.rank() == 0 else None)


def dry_run(options: dict[str, Any], config: DistillationConfig, summary: dict[str, Any], device: torch.device) -> str:
    """What --dry-run prints, after checks of the networks that the options name, where they are on this machine.

    summary: what the run would record; gets the memory that it needs (`memory_estimate`).
    """
    teacher = None
    if zoo.is_here(options["edm_model"]):
        teacher = checked_teacher(config, options, zoo.load_shapes(options["edm_model"]))
        if options["transfer"] and zoo.is_here(options["transfer"]):
            load_start(options["transfer"], teacher, options["classes"])
        guide = checked_guide(teacher, options) if options["guide"] and zoo.is_here(options["guide"]) else None
        summary["memory_GB"] = memory_estimate(teacher, config, device, guide)
    if options["dry_run"] == AS_JSON:
        return json.dumps(summary, indent=2)
    return start_block(describe_plan(options, config, device, summary, teacher))


def memory_estimate(
    teacher: DenoiserModule, config: DistillationConfig, device: torch.device, guide: DenoiserModule | None = None
) -> dict[str, Any]:
    """GB per process by purpose, at --batch-gpu or the largest that fits, and the largest that fits each of GPUS."""
    config = resolve(config, teacher, device)
    share = misc.split_batch(config.batch, None, distributed.world_size())[0]
    fitting = memory.Fitting(teacher, config, share, device, guide)
    batch_gpu = config.batch_gpu or fitting.largest_here()[0]
    found = fitting.estimate(batch_gpu).rounded()
    fits = {f"{size} GB": images for size in GPUS for images, peak in [fitting.largest(size)] if peak is not None}
    return {"batch_gpu": batch_gpu, **found, "batch_gpu_that_fits": fits}


def describe(teacher: DenoiserModule, config: DistillationConfig, with_trials: bool = False) -> str:
    """The run folder's description when --desc isn't given. with_trials: alpha and rates aren't chosen yet."""
    cond = "cond" if teacher.label_dim else "text" if getattr(teacher, "prompt_dim", 0) else "uncond"
    size = f"{teacher.img_resolution}x{teacher.img_resolution}"
    chosen = "auto" if with_trials else f"alpha{config.alpha:g}-glr{config.glr:g}"
    steps = f"-{config.steps}steps" if config.steps > 1 else ""
    return f"sid-{size}-{cond}-{chosen}-batch{config.batch}{steps}"


# --- resume: compare the state's options with this run's, then build the distillation


def build(
    inputs: Inputs, config: DistillationConfig, device: torch.device, saved: SavedState | None, override: bool
) -> Distillation:
    """The distillation, ready for its next iteration. saved: the state that it goes on from.

    Errors: UserError when the options don't fit the teacher, the processes or the run that saved the state.
    """
    config = resolve(config, inputs.teacher, device)
    rules = resume_rules(config, override)
    former: dict[str, Any] = {} if saved is None else saved_options(saved.options, inputs.teacher, device)
    if saved is not None:
        asked = config.options()
        del asked["batch_gpu"]  # a run that doesn't give it takes the state's
        run_folder.refuse_changes(saved.path, former, asked, rules)
    distillation = prepare(inputs, config, device, saved)
    if saved is not None:
        current = checkpoint.setting(distillation.config.options(), device)
        there = {"options": former, "surroundings": saved.surroundings}
        run_folder.check_setting(saved.path, there, current, rules)
    return distillation


def resume_rules(config: DistillationConfig, override: bool = False) -> run_folder.ResumeRules:
    """What a resumed distillation may change."""
    free = FREE_ON_RESUME
    if config.lr_decay == "none":  # without a decay the end changes nothing before it
        free = free | {"total_kimg"}
    rounding = ROUNDING
    if config.gan:  # its loss is a mean over --batch-gpu
        rounding = rounding - {"batch_gpu"}
    return run_folder.ResumeRules(free, rounding, override, COMMAND_LINE)
