"""What a distillation works with: loads what its options name and checks it against the teacher."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from edm import latents, published, zoo
from edm.hub import title
from edm.measured_fid import identity
from edm.metrics.evaluate import Evaluator, captions_for
from edm.metrics.reference import load_reference
from edm.own_classes import own_classes
from edm.text_encoders import prompts_for, read_prompts
from torch_utils import distributed
from training.conditions import learnt_classes
from training.dataset import ImageFolderDataset
from training.denoiser import DenoiserModule, noise_range, only_sigma
from training.guidance import GuidedDenoiser, check_guide
from training.latent_dataset import LatentDataset, open_dataset
from training.moments import Moments, split_off, start_of
from training.networks_edm2 import Precond
from training.steps import Steps

from .config import DistillationConfig
from .guidance import Guidance
from .report.pictures import GRID_COLUMNS, GRID_ROWS
from .run_options import RunOptions
from .schedules import LogNormal, Single
from .state import WeightHashes

# In the run folder, of networks that were given as modules.
TEACHER_FILE, GUIDE_FILE = "teacher.safetensors", "guide.safetensors"
DEFAULT_METRIC = "fid50k_full"
NETWORKS = ("edm_model", "transfer", "guide")  # options that name one


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The networks and images of a distillation; None stands for what it doesn't use.

    teacher:   phi, a denoiser (`training.denoiser`) of any class
    start:     another denoiser whose weights theta starts from
    guide:     a weaker denoiser that guides the teacher (`Guidance.over_guide`)
    dataset:   real images, for the discriminator of `config.gan`
    picture:   the first of them, uint8 [N, C, H, W], for pictures
    evaluator: computes the metrics
    moments:   of the noise that theta starts from, for --init-noise=moments
    hashes:    of the networks' weights, if they are known already
    """

    teacher: DenoiserModule
    start: DenoiserModule | None = None
    guide: DenoiserModule | None = None
    dataset: ImageFolderDataset | LatentDataset | None = None
    picture: torch.Tensor | None = None
    evaluator: Evaluator | None = None
    moments: Moments | None = None
    hashes: WeightHashes | None = None

    def weight_hashes(self, config: DistillationConfig) -> WeightHashes:
        """The hashes of the networks' weights, which take a while for large networks if they aren't known yet."""
        return self.hashes or WeightHashes.of(self.teacher, self.start, config, self.guide)

    def identity(self, config: DistillationConfig) -> list[Any]:
        """Plain values on which the teacher's images depend, guided or not, beside the code of its classes."""
        hashes, guidance = self.weight_hashes(config), config.guidance
        found = identity(self.teacher, hashes.teacher)
        if self.guide is not None and hashes.guide is not None:
            found += identity(self.guide, hashes.guide)
        if guided_teacher(self.teacher, self.guide, guidance) is not self.teacher and guidance is not None:
            found.append([guidance.over_guide, guidance.teacher])
        prompts = prompts_hash(self.teacher)
        return found if prompts is None else [*found, prompts]


def load_inputs(
    options: RunOptions,
    config: DistillationConfig,
    metrics: list[str],
    reference: str | None,
    device: torch.device,
    teacher: DenoiserModule | None = None,
    start: DenoiserModule | None = None,
    guide: DenoiserModule | None = None,
) -> Inputs:
    """Loads everything.

    teacher, start, guide: networks to use instead of loading --edm_model, --transfer and --guide.
    Errors: UserError naming the option that doesn't fit.
    """
    teacher = with_prompts(checked_teacher(config, options, teacher), options.prompts, device)
    if start is not None:
        start = fitting_start(start, "start", teacher)
    elif options.transfer:
        start = load_start(options.transfer, teacher, options.classes)
    guide = checked_guide(teacher, options, guide)
    dataset = None
    if options.data:
        dataset = load_dataset(options.data, teacher, config, options.xflip, options.cache)
    return Inputs(
        hashes=WeightHashes.of(teacher, start, config, guide),
        teacher=teacher,
        start=start,
        dataset=dataset,
        picture=None if dataset is None else first_images(dataset, teacher),
        evaluator=make_evaluator(metrics, reference, options, teacher, device) if metrics else None,
        guide=guide,
    )


def choose_snapshots(options: RunOptions) -> RunOptions:
    """The options, with a snapshot in place of each run folder; chosen once, since a better one may appear later."""
    named = {name: source for name in NETWORKS if (source := getattr(options, name))}
    chosen = {name: distributed.from_process_0(zoo.network_file(source)) for name, source in named.items()}
    return dataclasses.replace(options, **chosen)


def checked_teacher(
    config: DistillationConfig, options: RunOptions, teacher: DenoiserModule | None = None
) -> DenoiserModule:
    """`teacher`, or the network of --edm_model. Errors: UserError when other options don't fit it."""
    if teacher is None:
        teacher = zoo.load_denoiser(options.edm_model, own_classes(options.classes))
        teacher.metadata.setdefault("name", title(options.edm_model))
    check_is_no_generator(teacher, "--edm_model")
    check_architecture(teacher, options)
    check_noise_levels(teacher, config)
    return teacher


def check_is_no_generator(net: DenoiserModule, option: str) -> None:
    """Errors: UserError when `net` is a generator, which has learnt to make images of noise, and to denoise none."""
    if start_of(net) is not None or Steps.of(net) is not None:
        raise UserError(
            f"{option}: names a generator, which can't teach another; name the diffusion model that it was distilled"
            " from"
        )


def with_prompts(teacher: DenoiserModule, source: str | None, device: torch.device | str) -> DenoiserModule:
    """The teacher, with the prompts of --prompts, a file named `source`, if it makes images of prompts.

    Errors: UserError when it does and there are none, or it doesn't and there are some.
    """
    if source:
        teacher.prompts = prompts_for(teacher, read_prompts(source), device)
    elif getattr(teacher, "prompt_dim", 0):
        raise UserError("--edm_model: the teacher makes images of prompts; name some with --prompts=FILE, one per line")
    return teacher


def prompts_hash(teacher: DenoiserModule) -> str | None:
    """A hash of the prompts that a text-to-image teacher has; None for other teachers."""
    prompts = getattr(teacher, "prompts", None)
    return None if prompts is None else hashlib.sha256("\n".join(prompts.texts).encode()).hexdigest()[:16]


def load_teacher(run_dir: Path, record: Mapping[str, Any], classes: Mapping[str, Callable]) -> DenoiserModule:
    """The teacher of a run: the one in its folder, where `sid.distil` keeps it, otherwise the recorded --edm_model.

    record: of the run's options.
    """
    source = record["edm_model"]
    is_kept = record.get("nosubdir") and source == str(Path(record["outdir"]) / TEACHER_FILE)
    teacher = zoo.load_denoiser(run_dir / TEACHER_FILE if is_kept else source, classes)
    return with_prompts(teacher, record.get("prompts"), "cpu")


def checked_guide(
    teacher: DenoiserModule, options: RunOptions, guide: DenoiserModule | None = None
) -> DenoiserModule | None:
    """`guide`, or the network of --guide; None if there is none. Errors: UserError when it doesn't fit the teacher."""
    if guide is None and options.guide:
        guide = zoo.load_denoiser(options.guide, own_classes(options.classes))
    if guide is not None:
        check_is_no_generator(guide, "--guide")
        check_guide(guide, teacher)
    return guide


def load_guide(run_dir: Path, record: Mapping[str, Any], classes: Mapping[str, Callable]) -> DenoiserModule | None:
    """The weaker network that guides a run's teacher, looked for as in `load_teacher`; None if there is none."""
    source = record.get("guide")
    if not source:
        return None
    is_kept = record.get("nosubdir") and source == str(Path(record["outdir"]) / GUIDE_FILE)
    return zoo.load_denoiser(run_dir / GUIDE_FILE if is_kept else source, classes)


def guided_teacher(teacher: Any, guide: Any, guidance: Guidance | None) -> Any:
    """The denoiser whose images a generator learns to make: the teacher, guided where `guidance` guides it.

    guide: the weaker network of --guide, if there is one.
    """
    if guidance is None:
        return teacher
    if guide is not None:
        teacher = GuidedDenoiser(teacher, guide, guidance.over_guide or 1)
    return teacher if guidance.teacher == 1 else GuidedDenoiser(teacher, None, guidance.teacher)


def check_architecture(teacher: DenoiserModule, options: RunOptions) -> None:
    """Errors: UserError when an option contradicts the teacher's architecture."""
    is_edm = any(base.__name__.endswith("Precond") for base in type(teacher).__mro__)
    init = getattr(teacher, "init_kwargs", None) if is_edm else None
    found: dict[str, Any] = {"cond": bool(teacher.label_dim)}
    for name in () if is_edm else ("arch", "precond", "cbase", "cres"):
        given = getattr(options, name)
        if given is not None:
            raise UserError(
                f"--{name}={_text(given)}: describes networks of EDM, and the teacher is a"
                f" {type(teacher).__name__}; leave the option out"
            )
    if init is not None:
        song = "ncsnpp" if init.get("embedding_type") == "fourier" else "ddpmpp"
        found["arch"] = "adm" if init.get("model_type", "DhariwalUNet") == "DhariwalUNet" else song
        found["precond"] = type(teacher).__name__.removesuffix("Precond").lower()
        if isinstance(teacher, Precond):
            found |= {"arch": "edm2", "precond": "edm"}
        found["cbase"] = init.get("model_channels")
        found["cres"] = list(init["channel_mult"]) if "channel_mult" in init else None
    for name, value in found.items():
        given = getattr(options, name)
        if given is not None and value is not None and given != value:
            raise UserError(f"--{name}={_text(given)}: the teacher has {_text(value)}; leave the option out")


def check_noise_levels(teacher: DenoiserModule, config: DistillationConfig) -> None:
    """Checks the start and the schedules against the noise levels that the teacher was trained for.

    Errors: UserError naming the option.
    """
    low, high = noise_range(teacher)
    if config.init_sigma is not None and not low <= config.init_sigma <= high:
        raise UserError(f"--init_sigma={config.init_sigma:g}: the teacher knows noise levels from {low:g} to {high:g}")
    schedules = {"--sigma-schedule": config.sigma_schedule, "--fake-sigma-schedule": config.fake_sigma_schedule}
    for option, schedule in schedules.items():
        if isinstance(schedule, Single | LogNormal):
            median = schedule.quantile(torch.tensor(0.5)).item()
            if not low <= median <= high:
                raise UserError(
                    f"{option}={schedule}: half of its noise levels and more lie outside those that the teacher knows,"
                    f" {low:g} to {high:g}; give others, or karras"
                )
    level = only_sigma(teacher)
    if level is None:
        return
    wrong = [f"{option}=single={level}" for option, s in schedules.items() if s != Single(level)]
    if config.init_sigma not in (level, None):
        wrong.append(f"--init_sigma={level}")
    if wrong:
        raise UserError(f"the teacher of --edm_model knows one noise level only; give {' '.join(wrong)}")


def makes_samples(teacher: DenoiserModule, needed_by: Mapping[str, str]) -> bool:
    """Whether a teacher makes samples. One that knows one noise level only makes none.

    needed_by: {an option that needs samples, for the message: what to give in its place}.
    Errors: UserError naming the first of these options, when there are some and the teacher makes no samples.
    """
    if only_sigma(teacher) is None:
        return True
    for option, advice in needed_by.items():
        raise UserError(f"{option}: the teacher knows one noise level only, so it makes no samples; give {advice}")
    return False


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def load_start(source: str, teacher: DenoiserModule, classes: str | None = None) -> DenoiserModule:
    """The network of --transfer. Errors: UserError when its weights don't fit the teacher's architecture."""
    return fitting_start(zoo.load_denoiser(source, own_classes(classes)), f"--transfer={source}", teacher)


def fitting_start(start: DenoiserModule, name: str, teacher: DenoiserModule) -> DenoiserModule:
    """`start`. Errors: UserError with `name` when its weights don't fit the teacher's architecture."""
    ours, theirs = (split_off(net.state_dict())[0] for net in (teacher, start))
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise UserError(f"{name}: its weights don't fit the teacher's architecture")
    return start


def load_dataset(
    path: str, teacher: DenoiserModule, config: DistillationConfig, xflip: bool = False, cache: bool = True
) -> ImageFolderDataset | LatentDataset:
    """Real images for the picture and metrics, and for --gan, which needs what the teacher makes: images with class
    labels, or latents.

    xflip, cache: with config.gan, whether the mirror images are added, and whether images stay in memory.
    Errors: UserError when they don't fit the teacher.
    """
    use_labels = config.gan and bool(teacher.label_dim)
    dataset = open_dataset(path, use_labels, xflip, config.gan and cache)
    if config.gan:
        latents.check_same_vae(teacher, dataset.metadata.get("vae"), path)
        channels, resolution = teacher.img_channels, teacher.img_resolution
    elif dataset.metadata:
        raise UserError(f"--data={path}: only --gan learns from latents; give the images themselves")
    else:
        channels, resolution = latents.image_shape(teacher)
    if (dataset.resolution, dataset.num_channels) != (resolution, channels):
        raise UserError(
            f"--data={path}: {dataset.num_channels} x {dataset.resolution} x {dataset.resolution} images, but the"
            f" teacher makes {channels} x {resolution} x {resolution}"
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


def first_images(dataset: ImageFolderDataset | LatentDataset, teacher: DenoiserModule) -> torch.Tensor:
    """The first images of the data set, for the picture, uint8 [N, C, H, W]; latents are decoded."""
    items = torch.stack([torch.as_tensor(dataset[i][0]) for i in range(min(GRID_COLUMNS * GRID_ROWS, len(dataset)))])
    return items if items.dtype == torch.uint8 else latents.decoder_of(teacher).to_images(items[:, 0])


def published_reference(teacher: str) -> str | None:
    """The name of the reference statistics of a published teacher; None for other teachers."""
    entry = zoo.published(teacher)
    return published.reference_of(entry) if entry is not None else None


def choose_metrics(
    names: str | None, reference: str | None, data: str | None = None, detector: str | None = None
) -> list[str]:
    """The metrics of --metrics; by default FID if there is a reference.

    Errors: UserError when FID has no reference, or --detector no metric.
    """
    if names is None:
        if detector and not reference:
            raise UserError("--detector means nothing without metrics; give --data_stat, or --metrics and --data")
        return [DEFAULT_METRIC] if reference else []
    if names == "none":
        return []
    chosen = [name.strip() for name in names.split(",")]
    if not reference and not data and any(name.startswith("fid") for name in chosen):
        raise UserError(f"--metrics={names} needs --data_stat (reference statistics) or --data (to make them)")
    return chosen


def make_evaluator(
    metrics: list[str], reference: str | None, options: RunOptions, teacher: DenoiserModule, device: torch.device
) -> Evaluator:
    """An evaluator of `metrics`. Errors: UserError when the reference or the detector isn't available, or isn't of
    such images as the teacher makes.
    """
    needed = options.data_stat or any(m.startswith("fid") for m in metrics)
    # A given reference names its detector. Without one, the evaluator makes a reference from --data.
    loaded = load_reference(reference, "--data_stat") if reference and needed else None
    evaluator = Evaluator(
        metrics,
        loaded,
        options.detector,
        options.data,
        batch=options.metrics_batch,
        captions=captions_for(metrics, options.prompts),
        device=device,
        progress=True,
    )
    evaluator.check_images(*latents.image_shape(teacher))
    return evaluator
