"""A distillation from its checked options to its end: loads its inputs, resumes, trains."""

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, cast

import torch

from dnnlib import UserError, without_passwords
from edm import zoo
from torch_utils import checkpoint, distributed, misc, run_folder
from torch_utils.untrusted import edm_pickle
from torch_utils.watchdog import SPARE_SEC, watching
from training.denoiser import DenoiserModule, check_denoiser
from training.guidance import GuidedDenoiser

from . import memory
from .adversarial import RealImages
from .config import COMMAND_LINE, FREE_ON_RESUME, ROUNDING, DistillationConfig, resolve, saved_options
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
    load_inputs,
    load_start,
    published_reference,
    teacher_fid,
)
from .options import parse
from .prepare import prepare
from .report.progress import Report
from .start import choose_start
from .state import WeightHashes, check_state
from .teacher_distance import TeacherDistance
from .training_loop import training_loop
from .trials import has_begun, plan_trials, run_trials

# Runs of at least this length measure the distance from the teacher's samples at every snapshot. Making the samples
# takes as long as half a kimg of training.
WORTH_SAMPLES_KIMG = 10


def distil(
    teacher: torch.nn.Module,
    config: DistillationConfig,
    out: str | os.PathLike,
    *,
    start: torch.nn.Module | None = None,
    guide: torch.nn.Module | None = None,
    data: str | None = None,
    data_stat: str | None = None,
    detector: str | None = None,
    metrics: str | None = None,
    resume: str | None = None,
    override: bool = False,
    device: str | None = None,
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
    data, data_stat, detector, metrics, resume, override, device: as the options of sid_train.py.
    Errors: UserError naming what doesn't fit; SystemExit when a signal such as Ctrl-C asked to stop, after saving.
    """
    check_denoiser(teacher, "teacher")
    if guide is not None:
        check_denoiser(guide, "guide")
    given = {"data": data, "data_stat": data_stat, "detector": detector, "metrics": metrics, "resume": resume}
    settled = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    given |= {
        "trials": trials,
        "given": settled,
        "override": override,
        "device": device,
        "nosubdir": True,
        "outdir": os.fspath(out),
    }
    given["edm_model"] = str(Path(out) / TEACHER_FILE)
    if guide is not None:
        given["guide"] = str(Path(out) / GUIDE_FILE)
    generator = run({**parse([])[1], **given}, config, teacher, start, guide)
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
    if not options["edm_model"]:
        raise UserError("--recipe=auto: name the teacher with --edm_model, such as the run folder of edm.train")
    if config.gan and not options["data"]:
        raise UserError("--gan learns from real images; name them with --data")
    check_weight(config.guidance, bool(options["guide"]))
    reference = options["data_stat"] or (published_reference(options["edm_model"]) if teacher is None else None)
    metrics = choose_metrics(options["metrics"], reference, options["data"])
    device = distributed.init(options["device"], timeout_sec=60 * options["timeout"] + SPARE_SEC)
    with watching(60 * options["timeout"]) as training_begins:
        misc.split_batch(config.batch, config.batch_gpu, distributed.world_size())
        if teacher is None:
            options = choose_snapshots(options)
        summary = {**config.options(), **options, "data_stat": reference, "metrics": metrics}
        del summary["given"]
        summary["processes"] = distributed.world_size()
        if options["dry_run"] and zoo.is_here(options["edm_model"]):
            summary["memory_GB"] = dry_run(options, config, device)
        summary = without_passwords(json.loads(json.dumps(summary)))
        distributed.print0(json.dumps(summary, indent=2))
        if options["dry_run"]:
            return None

        copies = [None if net is None else edm_pickle.frozen_copy(net).float() for net in (teacher, start, guide)]
        networks = cast(list[DenoiserModule | None], copies)
        inputs = load_inputs(options, config, metrics, reference, device, *networks)
        if config.gan and inputs.dataset is not None:
            summary["real_images"] = len(inputs.dataset)
            config = dataclasses.replace(config, real_images=len(inputs.dataset))
        goal = teacher_fid(inputs, options["edm_model"])
        if goal is not None:
            summary["teacher_fid"] = dataclasses.asdict(goal)
        torch.backends.cudnn.benchmark = options["bench"]
        place, resume = find_place(options, describe(inputs.teacher, config, options["trials"] > 0))
        saved = None if resume is None else resume.read().get("options")
        saved = saved if isinstance(saved, dict) else None  # a file of another kind is refused by `build`
        distance = measure_teacher(inputs, config, options["trials"] > 0, device)
        if config.init_sigma is None:
            level, summary["starts"] = find_start(inputs.teacher, distance, saved)
            config = dataclasses.replace(config, init_sigma=level)
        trials = None
        if options["trials"]:
            trials = plan_trials(config, options["trials"], options["given"], inputs.teacher)
            config = trials.fitting(saved, options["given"])
            if len(trials.configs) == 1 or resume is not None:  # nothing to choose, or chosen already
                trials = None
        summary |= config.options()
        distillation = build(inputs, config, device, resume, options["override"])  # may refuse: before the folder
        picture = first_images(inputs.dataset) if inputs.dataset is not None else None
        with run_folder.create(*place, summary, resume and resume.path) as run_dir:
            distributed.print0(f"Run folder: {run_dir}")
            if teacher is not None and distributed.rank() == 0:
                zoo.save_network(teacher, run_dir / TEACHER_FILE, **getattr(teacher, "metadata", {}))
                if guide is not None:
                    zoo.save_network(guide, run_dir / GUIDE_FILE, **getattr(guide, "metadata", {}))
            training_begins.set()
            if trials is not None:
                del distillation  # each trial has its own
                resume = run_trials(
                    trials,
                    run_dir,
                    lambda config, state: build(own_copy(inputs), config, device, state, options["override"]),
                    lambda folder: Report(folder, None, picture, config.batch, distance),
                )
                config = trials.fitting(resume.read()["options"], options["given"])
                if distributed.rank() == 0:
                    run_folder.record_options(run_dir, {**summary, **config.options()})
                distillation = build(inputs, config, device, resume, options["override"])
            report = Report(run_dir, inputs.evaluator, picture, config.batch, distance, goal)
            net = training_loop(distillation, run_dir, report)
    distributed.shutdown()
    return OneStepGenerator(net)


def find_place(options: dict[str, Any], description: str) -> tuple[tuple[str, str, bool], checkpoint.StateFile | None]:
    """(outdir, description, nosubdir) of the run folder and the state to go on from, None for a new run.

    A run that ended during its trials goes on in its folder, without a state of its own.
    """
    place = (options["outdir"], options["desc"] or description, options["nosubdir"])
    begun = run_folder.find_begun(options["resume"], *place, has_begun) if options["trials"] else None
    if begun is not None:
        return (str(begun), "", True), None
    return place, run_folder.resolve_resume(options["resume"], *place)


def own_copy(inputs: Inputs) -> Inputs:
    """The same with a teacher and a guide of its own, whose weights a distillation may store in another precision."""
    return dataclasses.replace(inputs, teacher=copy.deepcopy(inputs.teacher), guide=copy.deepcopy(inputs.guide))


def measure_teacher(
    inputs: Inputs, config: DistillationConfig, with_trials: bool, device: torch.device
) -> TeacherDistance | None:
    """The distance from the teacher's samples, on process 0, if the run wants it and the teacher makes any.

    A teacher with a guide makes guided samples.

    Errors: UserError when trials need it and the teacher makes no samples.
    """
    teacher: Any = inputs.teacher
    if getattr(teacher, "metadata", {}).get("sigma") is not None:
        if with_trials:
            raise UserError("--trials: the teacher knows one noise level only, so it makes no samples to compare with")
        return None
    if not (with_trials or config.init_sigma is None or config.total_kimg >= WORTH_SAMPLES_KIMG):
        return None
    with distributed.shared_errors():  # such as samples that aren't finite
        if distributed.rank() != 0:
            return None
        if inputs.guide is not None and config.guidance is not None:
            teacher = GuidedDenoiser(teacher, inputs.guide, config.guidance.over_guide or 1)
        changes = resolve(config, teacher, device).precision in ("bf16", "fp16")
        return TeacherDistance(teacher.to(device).eval(), keep=changes)


def find_start(
    teacher: DenoiserModule, distance: TeacherDistance | None, saved: dict[str, Any] | None
) -> tuple[float, dict[str, float]]:
    """Chooses the start of --init_sigma=auto and returns (noise level, measured distances).

    distance: on process 0, of a teacher that makes samples. saved: the options of a state to go on from, whose level
    stays.
    """
    level = None if saved is None else saved.get("init_sigma")
    if isinstance(level, float | int):
        return float(level), {}
    chosen_there = choose_start(teacher, distance) if distributed.rank() == 0 else None
    level, measured = distributed.from_process_0(chosen_there)
    for candidate, found in measured.items():
        chosen = "  <- the generator starts here" if float(candidate) == level else ""
        distributed.print0(f"start at {candidate:>4}: energy distance from the teacher {found:.3f}{chosen}")
    return level, measured


def dry_run(options: dict[str, Any], config: DistillationConfig, device: torch.device) -> dict[str, float]:
    """Checks the networks that the options name and estimates the memory that the run needs (`memory_estimate`)."""
    teacher = checked_teacher(config, options)
    if options["transfer"] and zoo.is_here(options["transfer"]):
        load_start(options["transfer"], teacher, options["classes"])
    guide = checked_guide(teacher, options) if options["guide"] and zoo.is_here(options["guide"]) else None
    return memory_estimate(teacher, config, device, guide)


def memory_estimate(
    teacher: DenoiserModule, config: DistillationConfig, device: torch.device, guide: DenoiserModule | None = None
) -> dict[str, float]:
    """GB per process by purpose, at --batch-gpu or at the largest that fits."""
    config = resolve(config, teacher, device)
    share = misc.split_batch(config.batch, None, distributed.world_size())[0]
    batch_gpu = config.batch_gpu or memory.fitting_batch_gpu(teacher, config, share, device, guide)
    return {"batch_gpu": batch_gpu, **memory.estimate(teacher.to(device), config, batch_gpu, guide).rounded()}


def describe(teacher: DenoiserModule, config: DistillationConfig, with_trials: bool = False) -> str:
    """The run folder's description when --desc isn't given. with_trials: alpha and rates aren't chosen yet."""
    cond = "cond" if teacher.label_dim else "uncond"
    size = f"{teacher.img_resolution}x{teacher.img_resolution}"
    chosen = "auto" if with_trials else f"alpha{config.alpha:g}-glr{config.glr:g}"
    return f"sid-{size}-{cond}-{chosen}-batch{config.batch}"


# --- resume: read the state, compare it with this run, build the distillation


def build(
    inputs: Inputs,
    config: DistillationConfig,
    device: torch.device,
    resume: checkpoint.StateFile | None,
    override: bool,
) -> Distillation:
    """The distillation, ready for its next iteration. resume: the state that it goes on from.

    Errors: UserError when the options don't fit the teacher, the processes or the run that saved the state.
    """
    config = resolve(config, inputs.teacher, device)
    rules = resume_rules(config, override)
    hashes = WeightHashes.of(inputs.teacher, inputs.start, config, inputs.guide)
    saved = None if resume is None else read_setting(resume, hashes, inputs.teacher, config, device, rules)
    reals = (
        RealImages(inputs.dataset, inputs.teacher.label_dim, device)
        if config.gan and inputs.dataset is not None
        else None
    )
    distillation = prepare(inputs.teacher, config, device, inputs.start, resume, reals, hashes, inputs.guide)
    if resume is not None and saved is not None:
        current = checkpoint.setting(distillation.config.options(), device)
        run_folder.check_setting(resume.path, saved, current, rules)
    return distillation


def read_setting(
    resume: checkpoint.StateFile,
    hashes: WeightHashes,
    teacher: DenoiserModule,
    config: DistillationConfig,
    device: torch.device,
    rules: run_folder.ResumeRules,
) -> dict[str, dict[str, Any]]:
    """Options and surroundings (`checkpoint.setting`) of the run that saved a state.

    hashes: of the weights that this run builds on.
    Errors: UserError when the run distilled other weights, or had other options. --batch-gpu isn't compared here: a
    run that doesn't give it takes the state's.
    """
    check_state(resume, hashes)
    state = resume.read()
    saved = saved_options(state["options"], teacher, device)
    asked = config.options()
    del asked["batch_gpu"]
    run_folder.refuse_changes(resume.path, saved, asked, rules)
    return {"options": saved, "surroundings": state["surroundings"]}


def resume_rules(config: DistillationConfig, override: bool = False) -> run_folder.ResumeRules:
    """What a resumed distillation may change."""
    free = FREE_ON_RESUME
    if config.lr_decay == "none":  # without a decay the end changes nothing before it
        free = free | {"total_kimg"}
    rounding = ROUNDING
    if config.gan:  # its loss is a mean over --batch-gpu
        rounding = rounding - {"batch_gpu"}
    return run_folder.ResumeRules(free, rounding, override, COMMAND_LINE)
