"""From checked options to a finished run: loads the teacher, checks the options against it, trains."""

import dataclasses
import json
import math
import threading
from typing import Any

import torch

from dnnlib import UserError, without_passwords
from edm import published, zoo
from edm.metrics.evaluate import Evaluator
from edm.metrics.reference import load_reference
from torch_utils import checkpoint, distributed, misc, run_folder
from torch_utils.watchdog import SPARE_SEC, watching
from training.conditions import learnt_classes
from training.dataset import ImageFolderDataset

from . import memory
from .adversarial import RealImages
from .config import COMMAND_LINE, FREE_ON_RESUME, ROUNDING, DistillationConfig, resolve, saved_options
from .prepare import prepare
from .report.pictures import GRID_COLUMNS, GRID_ROWS
from .report.progress import Report
from .schedules import Single
from .training_loop import training_loop

DEFAULT_METRIC = "fid50k_full"
NETWORKS = ("edm_model", "transfer")  # options that name one


def distil(options: dict[str, Any], config: DistillationConfig) -> None:
    """Runs a distillation from its options to its end.

    options: the options of sid_train.py that aren't part of the config, by name.
    Errors: UserError naming the option.
    """
    if config.gan and not options["data"]:
        raise UserError("--gan learns from real images; name them with --data")
    reference = options["data_stat"] or published_reference(options["edm_model"])
    metrics = choose_metrics(options["metrics"], reference, options["data"])
    device = distributed.init(options["device"], timeout_sec=60 * options["timeout"] + SPARE_SEC)
    with watching(60 * options["timeout"]) as training:
        _distil_on(device, options, config, reference, metrics, training)
    distributed.shutdown()


def _distil_on(
    device: torch.device,
    options: dict[str, Any],
    config: DistillationConfig,
    reference: str | None,
    metrics: list[str],
    training: threading.Event,
) -> None:
    """The rest of `distil`, watched by the other processes. training: is set when training begins."""
    misc.split_batch(config.batch, config.batch_gpu, distributed.world_size())
    for name in NETWORKS:  # a run folder's snapshot is chosen once, since a better one may appear later
        if options[name]:
            options = {**options, name: distributed.from_process_0(zoo.network_file(options[name]))}
    summary = {**config.options(), **options, "data_stat": reference, "metrics": metrics}
    summary["processes"] = distributed.world_size()
    if options["dry_run"] and zoo.is_here(options["edm_model"]):
        teacher = checked_teacher(config, options)
        if options["transfer"] and zoo.is_here(options["transfer"]):
            load_start(options["transfer"], teacher)
        summary["memory_GB"] = memory_estimate(teacher, config, device)
    summary = without_passwords(json.loads(json.dumps(summary)))
    distributed.print0(json.dumps(summary, indent=2))
    if options["dry_run"]:
        return

    teacher = checked_teacher(config, options)
    start = load_start(options["transfer"], teacher) if options["transfer"] else None
    dataset = load_dataset(options["data"], teacher, config, options) if options["data"] else None
    picture = first_images(dataset) if dataset is not None else None
    reals = None
    if config.gan:
        summary["real_images"] = len(dataset)
        config = dataclasses.replace(config, real_images=len(dataset))
        reals = RealImages(dataset, teacher.label_dim, device)
    evaluator = make_evaluator(metrics, reference, options, device) if metrics else None
    torch.backends.cudnn.benchmark = options["bench"]
    place = (options["outdir"], options["desc"] or describe(teacher, config), options["nosubdir"])
    resume = run_folder.resolve_resume(options["resume"], *place)
    config = resolve(config, teacher, device)
    rules = resume_rules(config, options["override"])

    def check(was: dict[str, Any]) -> None:
        now = config.options()
        del now["batch_gpu"]  # which may come from `was`
        run_folder.refuse_changes(resume.path, saved_options(was, teacher, device), now, rules)

    distillation = prepare(
        teacher, config, device, start, resume, reals, check
    )  # may refuse, so it comes before the folder
    if resume is not None:
        was, now = distillation.state.setting, checkpoint.setting(distillation.config.options(), device)
        was = {**was, "options": saved_options(was["options"], teacher, device)}
        run_folder.check_setting(resume.path, was, now, rules)
    with run_folder.create(*place, summary, resume and resume.path) as run_dir:
        distributed.print0(f"Run folder: {run_dir}")
        training.set()
        training_loop(distillation, run_dir, Report(run_dir, evaluator, picture, config.batch))


def resume_rules(config: DistillationConfig, override: bool = False) -> run_folder.ResumeRules:
    """What a resumed distillation may change."""
    free = FREE_ON_RESUME
    if config.lr_decay == "none":  # without a decay the end changes nothing before it
        free = free | {"total_kimg"}
    rounding = ROUNDING
    if config.gan:  # its loss is a mean over --batch-gpu
        rounding = rounding - {"batch_gpu"}
    return run_folder.ResumeRules(free, rounding, override, COMMAND_LINE)


def make_evaluator(
    metrics: list[str], reference: str | None, options: dict[str, Any], device: torch.device
) -> Evaluator:
    """An evaluator of `metrics`. Errors: UserError when the reference or the detector isn't available."""
    needed = options["data_stat"] or any(m.startswith("fid") for m in metrics)
    # A given reference names its detector. Without one, the evaluator makes a reference from --data.
    loaded = load_reference(reference) if reference and needed else None
    return Evaluator(
        metrics, loaded, options["detector"], options["data"], batch=options["metrics_batch"], device=device
    )


def checked_teacher(config: DistillationConfig, options: dict[str, Any]) -> torch.nn.Module:
    """The network of --edm_model. Errors: UserError when other options don't fit it."""
    teacher = zoo.load_network(options["edm_model"])
    check_architecture(teacher, options)
    check_noise_levels(teacher, config)
    return teacher


def memory_estimate(teacher: torch.nn.Module, config: DistillationConfig, device: torch.device) -> dict[str, float]:
    """GB per process by purpose, at --batch-gpu or at the largest that fits."""
    config = resolve(config, teacher, device)
    share = misc.split_batch(config.batch, None, distributed.world_size())[0]
    batch_gpu = config.batch_gpu or memory.fitting_batch_gpu(teacher, config, share, device)
    return {"batch_gpu": batch_gpu, **memory.estimate(teacher.to(device), config, batch_gpu).rounded()}


def published_reference(teacher: str) -> str | None:
    """The name of the reference statistics of a published teacher; None for other teachers."""
    entry = zoo.published(teacher)
    return published.reference_of(entry) if entry is not None else None


def choose_metrics(names: str | None, reference: str | None, data: str | None = None) -> list[str]:
    """The metrics of --metrics; by default FID if there is a reference. Errors: UserError when FID has none."""
    if names is None:
        return [DEFAULT_METRIC] if reference else []
    if names == "none":
        return []
    chosen = [name.strip() for name in names.split(",")]
    if not reference and not data and any(name.startswith("fid") for name in chosen):
        raise UserError(f"--metrics={names} needs --data_stat (reference statistics) or --data (to make them)")
    return chosen


def check_architecture(teacher: torch.nn.Module, options: dict[str, Any]) -> None:
    """Errors: UserError when an option contradicts the teacher's architecture."""
    init = getattr(teacher, "init_kwargs", None)
    found = {"cond": bool(teacher.label_dim)}
    if init is not None:
        song = "ncsnpp" if init.get("embedding_type") == "fourier" else "ddpmpp"
        found["arch"] = "adm" if init.get("model_type", "DhariwalUNet") == "DhariwalUNet" else song
        found["precond"] = type(teacher).__name__.removesuffix("Precond").lower()
        found["cbase"] = init.get("model_channels")
        found["cres"] = list(init["channel_mult"]) if "channel_mult" in init else None
    for name, value in found.items():
        given = options[name]
        if given is not None and value is not None and given != value:
            raise UserError(f"--{name}={_text(given)}: the teacher has {_text(value)}; leave the option out")


def check_noise_levels(teacher: torch.nn.Module, config: DistillationConfig) -> None:
    """Checks the start and the schedules against the noise levels that the teacher was trained for.

    Errors: UserError naming the option.
    """
    low, high = (float(getattr(teacher, f"sigma_{end}", limit)) for end, limit in (("min", 0), ("max", math.inf)))
    if not low <= config.init_sigma <= high:
        raise UserError(f"--init_sigma={config.init_sigma:g}: the teacher knows noise levels from {low:g} to {high:g}")
    level = getattr(teacher, "metadata", {}).get("sigma")
    if level is None:
        return
    schedules = {"--sigma-schedule": config.sigma_schedule, "--fake-sigma-schedule": config.fake_sigma_schedule}
    wrong = [f"{option}=single={level}" for option, s in schedules.items() if s != Single(level)]
    if config.init_sigma != level:
        wrong.append(f"--init_sigma={level}")
    if wrong:
        raise UserError(f"the teacher of --edm_model knows one noise level only; give {' '.join(wrong)}")


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def load_start(source: str, teacher: torch.nn.Module) -> torch.nn.Module:
    """The network of --transfer. Errors: UserError when its weights don't fit the teacher's architecture."""
    start = zoo.load_network(source)
    ours, theirs = teacher.state_dict(), start.state_dict()
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise UserError(f"--transfer={source}: its weights don't fit the teacher's architecture")
    return start


def load_dataset(
    path: str, teacher: torch.nn.Module, config: DistillationConfig, options: dict[str, Any]
) -> ImageFolderDataset:
    """Real images for the picture, metrics and --gan, with class labels only for --gan.

    Errors: UserError when they don't fit the teacher.
    """
    use_labels = config.gan and bool(teacher.label_dim)
    dataset = ImageFolderDataset(
        path, use_labels=use_labels, xflip=options["xflip"], cache=config.gan and options["cache"]
    )
    if (dataset.resolution, dataset.num_channels) != (teacher.img_resolution, teacher.img_channels):
        raise UserError(
            f"--data={path}: {dataset.num_channels} x {dataset.resolution} x {dataset.resolution} images, but the"
            f" teacher makes {teacher.img_channels} x {teacher.img_resolution} x {teacher.img_resolution}"
        )
    if dataset.label_dim > teacher.label_dim:
        raise UserError(
            f"--data={path}: its classes go up to {dataset.label_dim - 1}, but the teacher has only"
            f" {teacher.label_dim}; give the images that it was trained on"
        )
    unknown = set(dataset.classes) - set(learnt_classes(teacher) or range(teacher.label_dim))
    if unknown:
        raise UserError(
            f"--data={path}: holds images of class {min(unknown)}, which the teacher has never seen; give the images"
            " that it was trained on"
        )
    return dataset


def first_images(dataset: ImageFolderDataset) -> torch.Tensor:
    """The first images of the data set, for the picture, uint8 [N, C, H, W]."""
    return torch.stack([torch.as_tensor(dataset[i][0]) for i in range(min(GRID_COLUMNS * GRID_ROWS, len(dataset)))])


def describe(teacher: torch.nn.Module, config: DistillationConfig) -> str:
    """The run folder's description when --desc isn't given."""
    cond = "cond" if teacher.label_dim else "uncond"
    size = f"{teacher.img_resolution}x{teacher.img_resolution}"
    return f"sid-{size}-{cond}-alpha{config.alpha:g}-glr{config.glr:g}-batch{config.batch}"
