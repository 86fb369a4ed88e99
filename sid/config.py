"""The settings of a distillation run, as values. Importing it doesn't load torch, for the command lines' sake."""

import dataclasses
import math
from typing import Any

from dnnlib import UserError, format_number
from training.steps import INIT_NOISES, INIT_SIGMA, MAX_STEPS, STEPS_NOISES

from .guidance import Guidance, parse_guidance
from .objectives import OBJECTIVES, Objective, check_objective
from .schedules import TMAX, Karras, LogNormal, Schedule, Single, parse_schedule

AUGMENT = 0.12  # EDM's probability for CIFAR-10
# What a resumed run may change. ROUNDING affects how sums are rounded or draws are split, FREE_ON_RESUME nothing.
ROUNDING = {"batch_gpu", "compile", "channels_last", "chunk", "checkpoint"}
FREE_ON_RESUME = {"kimg_per_tick", "snapshot_ticks", "state_ticks", "save_minutes", "keep_states"}
FREE_ON_RESUME |= {"use_fp16"}  # `precision` records the outcome
FREE_ON_RESUME |= {"returns"}  # states record those that happened
# What the command line calls the options whose names differ there, and how many of our units its unit is.
COMMAND_LINE = {
    "total_kimg": ("duration", 1000),
    "ema_halflife_kimg": ("ema", 1000),
    "ema_rampup_ratio": ("ema-rampup", 1),
    "lr_rampup_kimg": ("lr-rampup", 1),
    "use_fp16": ("fp16", 1),
    "init_sigma": ("init_sigma", 1),
    "g_beta1": ("g_beta1", 1),
    "lsg_gan": ("lsg_gan", 1),
    "gan_freeze_kimg": ("gan-freeze", 1),
    "gan_start_kimg": ("gan-start", 1),
    "real_images": ("data (images)", 1),
    "prompts_sha256": ("prompts (contents)", 1),
}
MEASURED = ("init_sigma", "tmax")  # `auto` on the command line, None here: measured on the teacher when a run begins
DROPPED = "dropped_kimg"  # in a run's record: of the trials that don't go on, by which `total_kimg` is less than asked
OPTIMIZERS = ("adam", "muon")
ADAM_STATES = ("fp32", "bf16")
LORA_BASES = ("full", "half")
DROP_LABELS = ("before", "after")
FAKE_SCORE_WEIGHTINGS = ("edm", "prediction", "noise")


@dataclasses.dataclass(frozen=True)
class GradientFrom:
    """When gradients begin to pass through the score networks, in kimg: 0 for always, inf for never."""

    kimg: float = 0.0

    def passes(self, nimg: int) -> bool:
        """Whether gradients pass after `nimg` images."""
        return nimg >= self.kimg * 1000

    def __str__(self) -> str:
        return {0.0: "on", math.inf: "off"}.get(self.kimg, f"from={format_number(self.kimg)}")


def parse_score_gradient(value: str | GradientFrom) -> GradientFrom:
    """Parses 'on', 'off' or 'from=KIMG'. Errors: UserError naming --score-gradient."""
    if not isinstance(value, str):
        return value
    if value in ("on", "off"):
        return GradientFrom(0.0 if value == "on" else math.inf)
    try:
        kimg = float(value.removeprefix("from=")) if value.startswith("from=") else math.nan
    except ValueError:
        kimg = math.nan
    if not 0 <= kimg < math.inf:
        raise UserError(f"--score-gradient={value}: give on, off or from=KIMG, such as from=1000")
    return GradientFrom(kimg)


@dataclasses.dataclass
class DistillationConfig:
    """Settings of a distillation run; the defaults are the cifar10-uncond recipe. kimg: thousands of images.

    Schedules, guidance and the start of score gradients may be given as an option's text; they are parsed at once.
    Errors: UserError naming the option when a text isn't understood or options contradict each other.
    """

    total_kimg: float = 500_000
    batch: int = 256  # images per update, all processes together
    batch_gpu: int | None = None  # images per process and round; None: the most that fits
    objective: str = "sid"  # one of OBJECTIVES
    alpha: float = 1.2  # weight of L1 in L2 - alpha L1
    fake_score_weighting: str = "edm"  # of the fake score's squared error, one of FAKE_SCORE_WEIGHTINGS
    uncertainty: bool = False  # the fake score learns u(sigma), and both losses are balanced by it (EDM2)
    weighting: str | None = None  # one of WEIGHTINGS; None: what the objective was published with
    huber: float | None = None  # c of the pseudo-Huber distance, in pixels; None: the squared distance
    score_gradient: GradientFrom = GradientFrom()  # when gradients pass through the score networks
    sigma_schedule: Schedule = Karras()  # noise levels of the generator's loss
    fake_sigma_schedule: Schedule = LogNormal()  # noise levels of the fake score's loss
    tmax: float | None = TMAX  # Karras schedules reach up to t = tmax / 1000; None: `sid.calibration` chooses it
    fake_score_updates: int = 1  # updates of the fake score per update of the generator
    init_sigma: float | None = INIT_SIGMA  # noise level at which the generator starts; None: `sid.start` chooses it
    steps: int = 1  # evaluations per image, each at a noise level of its own (training.generator)
    init_noise: str = "white"  # that it starts from, one of INIT_NOISES
    steps_noise: str = "fresh"  # that takes images to the levels of further steps, one of STEPS_NOISES
    steps_shift: float = 1.0  # above 1, further steps start at higher noise levels than evenly spaced in time
    optimizer: str = "adam"  # of both networks, one of OPTIMIZERS
    lr: float = 1e-5  # fake score network
    glr: float = 1e-5  # generator
    g_beta1: float = 0.0  # Adam's first beta for the generator
    lr_rampup_kimg: float = 0
    lr_decay: str = "none"  # none, linear or cosine, over total_kimg; both learning rates
    ls: float = 1.0  # scales the fake score's loss
    lsg: float = 100.0  # scales the generator's loss
    ema_halflife_kimg: float = 500
    ema_rampup_ratio: float | None = 0.05
    dropout: float | None = None  # of generator and fake score; None: the teacher's
    use_fp16: bool | None = None  # None: the teacher's
    augment: float | None = None  # probability of augmentations for the fake score; None: AUGMENT if the teacher can
    precision: str | None = None  # of the layers: fp32, tf32, bf16, fp16; None: fp16 if use_fp16 and a GPU, else fp32
    compile: bool = False  # torch.compile
    channels_last: bool = False
    chunk: int | None = None  # images per pass through teacher and fake score in the generator's phase; None: all
    checkpoint: bool = False  # recompute activations instead of keeping them
    share_images: bool = False  # one batch of generated images for both phases
    share_noise: bool = False  # and one draw of noise for them: the fake score is called once
    adam_state: str = "fp32"  # Adam's second moments, one of ADAM_STATES
    lora_rank: int | None = None  # rank of the updates that generator and fake score learn; None: all weights
    lora_vectors: bool = True  # with lora_rank, whether the generator's biases and norms are trained, too
    lora_base: str = "full"  # with lora_rank, precision of the shared weights: full, or half as the layers'
    guidance: Guidance | None = None  # of the score networks: by classes, and of the teacher by a weaker one
    drop_labels: str = "before"  # where guidance drops labels: before generating, as published, or after
    gan: bool = False  # SiDA: an additional adversarial loss, from real images
    gan_freeze_kimg: float = 100  # with gan, how long the generator isn't updated
    gan_start_kimg: float = 200  # with gan, when the generator's loss gets its adversarial part
    lsd: float = 1.0  # scales the discriminator's loss, as ls does the fake score's
    lsg_gan: float = 0.01  # scales the adversarial loss, as lsg does the generator's
    real_images: int = 0  # number of images that `gan` draws from; the same in a resumed run
    prompts_sha256: str | None = None  # of the prompts of a text-to-image teacher; the same in a resumed run
    spike_guard: float | None = None  # skip updates whose gradient norm is this many times the usual; None: never
    returns: int = 0  # how often the run may go back to its last good state, with lower rates (`sid.returns`)
    kimg_per_tick: float = 10
    snapshot_ticks: int = 50
    state_ticks: int = 500
    save_minutes: float = 10  # the longest time between states; 0: by ticks only
    keep_states: int = 2  # older ones are removed; 0: keep all
    seed: int = 0

    def __post_init__(self):
        self.score_gradient = parse_score_gradient(self.score_gradient)
        tmax = TMAX if self.tmax is None else self.tmax
        self.sigma_schedule = parse_schedule(self.sigma_schedule, "--sigma-schedule", tmax)
        self.fake_sigma_schedule = parse_schedule(self.fake_sigma_schedule, "--fake-sigma-schedule", tmax)
        self.guidance = parse_guidance(self.guidance)
        check_objective(self.objective, self.weighting, self.huber, self.score_gradient == GradientFrom())
        for option, value, known in (
            ("init-noise", self.init_noise, INIT_NOISES),
            ("steps-noise", self.steps_noise, STEPS_NOISES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("adam-state", self.adam_state, ADAM_STATES),
            ("lora-base", self.lora_base, LORA_BASES),
            ("drop-labels", self.drop_labels, DROP_LABELS),
            ("fake-score-weighting", self.fake_score_weighting, FAKE_SCORE_WEIGHTINGS),
        ):
            if value not in known:
                raise UserError(f"--{option}={value}: not one of {', '.join(known)}")
        if not 1 <= self.steps <= MAX_STEPS:
            raise UserError(f"--steps={self.steps}: a generator has 1 to {MAX_STEPS} steps")
        if self.optimizer == "muon" and self.g_beta1:
            raise UserError("--optimizer=muon: it is without momentum here; use --g_beta1=0")
        if self.adam_state == "bf16" and self.g_beta1:
            raise UserError("--adam-state=bf16: only for Adam without a first moment; use --g_beta1=0")
        if self.gan:
            self._check_gan()
        if self.share_noise:
            self._check_share_noise()
        elif self.share_images and self.label_dropout and self.drop_labels == "before":
            raise UserError(
                f"--share-images: --guidance={self.guidance} drops labels for the fake score, but the generator's loss"
                " needs them; use --drop-labels=after"
            )

    @property
    def label_dropout(self) -> float:
        """Probability that an image of the fake score's phase loses its label. With share_noise it is 0, since the
        generator's loss has the same images; the fake score then learns both its answers from their guided sum.
        """
        return self.guidance.label_dropout if self.guidance is not None and not self.share_noise else 0.0

    @property
    def has_karras_levels(self) -> bool:
        """Whether `tmax` changes anything."""
        return any(isinstance(schedule, Karras) for schedule in (self.sigma_schedule, self.fake_sigma_schedule))

    @property
    def generator_objective(self) -> Objective:
        """The objective's row in `sid.objectives.OBJECTIVES`."""
        return OBJECTIVES[self.objective]

    def options(self) -> dict[str, Any]:
        """The settings as plain values, for records, states and messages. The constructor accepts them."""
        plain = (type(None), bool, int, float, str)
        return {name: value if isinstance(value, plain) else str(value) for name, value in vars(self).items()}

    def changed_options(self) -> dict[str, Any]:
        """The options that shape the result and differ from the defaults, as plain values."""
        defaults, left_out = DistillationConfig().options(), {*FREE_ON_RESUME, *ROUNDING, "seed"}
        return {n: v for n, v in self.options().items() if n not in left_out and v != defaults[n]}

    def _check_gan(self) -> None:
        if self.score_gradient != GradientFrom():
            raise UserError("--gan: its gradient comes through the fake score; use --score-gradient=on")
        if not self.generator_objective.passes_scores:
            raise UserError(
                f"--gan: its gradient comes through the fake score, but {self.objective} passes none; use sid"
            )
        if self.chunk:
            raise UserError("--gan: its loss is a mean over --batch-gpu, which --chunk would split; use --checkpoint=1")

    def _check_share_noise(self) -> None:
        """Both losses must be able to use the same output of the fake score."""
        if self.gan:
            raise UserError(
                "--share-noise=1: --gan shows the fake score real images, too; use --share-noise=0 --share-images=1"
            )
        if self.guidance is not None and self.guidance.fake_score_step != self.guidance.fake_score:
            raise UserError(
                f"--share-noise: --guidance={self.guidance} guides the fake score differently in the two losses, which"
                " share its output; use long=K or long-short=K"
            )
        schedules = {self.sigma_schedule, self.fake_sigma_schedule}
        if len(schedules) > 1 and any(isinstance(schedule, Single) for schedule in schedules):
            raise UserError("--share-noise: a single noise level must be the same for --fake-sigma-schedule")
        if self.tmax == 0:
            raise UserError("--share-noise: --tmax=0 leaves no range of noise levels; use --tmax=800")
        if self.augment:
            raise UserError("--share-noise: the generator's loss has no augmentation; use --augment=0")

    def network_overrides(self, teacher: Any) -> dict[str, Any]:
        """Constructor arguments in which generator and fake score differ from the teacher.

        `use_fp16` is an argument only of classes that have it; others are called in the precision that `resolve` gives.
        They don't inherit label dropout from the teacher's training: here only guidance drops labels.
        """
        wanted = {"dropout": self.dropout, "use_fp16": self.use_fp16 if hasattr(teacher, "use_fp16") else None}
        if getattr(teacher, "init_kwargs", {}).get("label_dropout"):
            wanted["label_dropout"] = 0
        return {name: value for name, value in wanted.items() if value is not None}

    def trains_generator(self, nimg: int) -> bool:
        """Whether the generator is updated after `nimg` images."""
        return self.generator_images(nimg) >= 0

    def generator_images(self, nimg: int) -> float:
        """Images since the generator began to learn, out of `nimg`; negative before that."""
        return nimg - (self.gan_freeze_kimg * 1000 if self.gan else 0)

    def is_adversarial(self, nimg: int) -> bool:
        """Whether the generator's loss has an adversarial part after `nimg` images."""
        return self.gan and nimg >= self.gan_start_kimg * 1000

    @property
    def stores_half(self) -> bool:
        """Whether weights of the teacher that its layers only cast to half precision are stored in it."""
        return self.precision in ("bf16", "fp16") and (not self.lora_rank or self.lora_base == "half")

    @property
    def passes_scores(self) -> bool:
        """Whether the generator's gradient ever passes through both networks."""
        return self.score_gradient.kimg < math.inf and self.generator_objective.passes_scores


def resolve(config: DistillationConfig, teacher: Any, device: Any) -> DistillationConfig:
    """Fills in weighting, tmax, augmentation and precision where the config leaves them open, from the objective, the
    teacher and the device. A tmax that is to be measured is SiD's here.
    """
    if config.tmax is None:
        config = dataclasses.replace(config, tmax=TMAX)
    if config.weighting is None:
        config = dataclasses.replace(config, weighting=config.generator_objective.weighting)
    if config.augment is None:
        can = getattr(teacher, "augment_dim", 0) and not config.share_noise
        config = dataclasses.replace(config, augment=AUGMENT if can else 0.0)
    if config.precision is None:
        half = getattr(teacher, "use_fp16", False) if config.use_fp16 is None else config.use_fp16
        config = dataclasses.replace(config, precision="fp16" if half and device.type != "cpu" else "fp32")
    if config.lora_base == "half" and config.precision not in ("bf16", "fp16"):
        raise UserError(f"--lora-base=half: the layers work in {config.precision}; add --precision=bf16")
    return config


def saved_options(options: dict[str, Any], teacher: Any, device: Any) -> dict[str, Any]:
    """The options of a saved run, resolved as `resolve` does; options that its version lacked have their defaults."""
    fields = {field.name for field in dataclasses.fields(DistillationConfig)}
    if options.get("guidance"):
        options = {"drop_labels": "after", **options}  # before the option existed
    known = DistillationConfig(**{name: value for name, value in options.items() if name in fields})
    return {**options, **resolve(known, teacher, device).options()}
