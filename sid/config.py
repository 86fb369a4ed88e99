"""What a distillation run is made of. No torch here: command lines read it before anything heavy loads."""

import dataclasses
import math
from typing import Any

from dnnlib import UserError

AUGMENT = 0.12  # EDM's probability for CIFAR-10
P_MEAN, P_STD = -1.2, 1.2  # of ln sigma in EDM's training
LABEL_DROPOUT = 0.1  # SiD-LSG's, with long-short guidance
# What a resumed run may change: it doesn't touch the mathematics, or (ROUNDING) only rounding and the split of draws.
ROUNDING = {"batch_gpu", "compile", "channels_last", "chunk", "checkpoint"}
FREE_ON_RESUME = {"kimg_per_tick", "snapshot_ticks", "state_ticks", "save_minutes", "keep_states"}
FREE_ON_RESUME |= {"use_fp16"}  # `precision` says what came of it

# Of the generator: sid is L2 - alpha L1, and what ends in -l1 is that objective less alpha L1.
OBJECTIVES = (
    "sid", "l1", "l2", "cross", "full", "cross-l1", "full-l1", "diff-instruct", "diff-instruct-l1", "dmd"
)  # fmt: skip
STOPPED = ("diff-instruct", "dmd")  # without gradient through the score networks
PROJECTED = ("sid", "l2")  # u(x_t) times a projected factor: u may be another distance's, or have no gradient
ADAM_STATES = ("fp32", "bf16")
WEIGHTINGS = ("omega", "sigma", "none")


@dataclasses.dataclass
class DistillationConfig:
    """Numbers of a distillation run; the defaults are the cifar10-uncond recipe. kimg: thousands of images."""

    total_kimg: float = 500_000
    batch: int = 256  # images per update, all processes together
    batch_gpu: int | None = None  # images per process and round; None: the most that fits
    objective: str = "sid"  # one of OBJECTIVES
    alpha: float = 1.2  # weight of L1 in L2 - alpha L1
    weighting: str | None = None  # one of WEIGHTINGS; None: what the objective was published with
    huber: float | None = None  # c of the pseudo-Huber distance, in pixels; None: the squared distance
    score_gradient: str = "on"  # through both networks to the generator: on, off or from=KIMG
    sigma_schedule: str = "karras"  # noise levels of the generator's loss, see parse_schedule
    fake_sigma_schedule: str = "lognormal"  # those of the fake score's loss
    tmax: float = 800  # karras reaches up to t = tmax / 1000
    fake_score_updates: int = 1  # of the fake score for every one of the generator
    init_sigma: float = 2.5  # noise level at which the generator starts
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
    share_noise: bool = False  # and of noise for them: the fake score is asked once
    adam_state: str = "fp32"  # Adam's second moments, one of ADAM_STATES
    lora_rank: int | None = None  # of the updates that generator and fake score learn; None: they learn all weights
    guidance: str | None = None  # long=K, short=K or long-short=K, as `parse_guidance` reads it
    gan: bool = False  # SiDA: an adversarial loss beside the generator's, from real images
    gan_freeze_kimg: float = 100  # with gan, the generator stays as it starts for so long
    gan_start_kimg: float = 200  # with gan, the generator's loss gets its adversarial part then
    lsd: float = 1.0  # scales the discriminator's loss, as ls does the fake score's
    lsg_gan: float = 0.01  # scales the adversarial loss, as lsg does the generator's
    real_images: int = 0  # how many `gan` draws from; a resumed run must have as many
    spike_guard: float | None = None  # skip updates with a gradient norm so many times the usual; None: never
    kimg_per_tick: float = 10
    snapshot_ticks: int = 50
    state_ticks: int = 500
    save_minutes: float = 10  # a state at least so often; 0: by ticks only
    keep_states: int = 2  # older ones are removed; 0: none is
    seed: int = 0

    def __post_init__(self):
        """Errors: UserError naming the option when a text isn't understood or options contradict each other."""
        check_objective(self.objective, self.weighting, self.huber, self.score_gradient == "on")
        parse_schedule(self.sigma_schedule, "--sigma-schedule")
        parse_schedule(self.fake_sigma_schedule, "--fake-sigma-schedule")
        parse_guidance(self.guidance)
        self.has_score_gradient(0)
        if self.adam_state not in ADAM_STATES:
            raise UserError(f"--adam-state={self.adam_state}: not one of {', '.join(ADAM_STATES)}")
        if self.adam_state == "bf16" and self.g_beta1:
            raise UserError("--adam-state=bf16: only for Adam without a first moment; use --g_beta1=0")
        if self.gan:
            self._check_gan()
        if self.share_noise:
            self._check_share_noise()

    def _check_gan(self) -> None:
        if self.score_gradient != "on":
            raise UserError("--gan: its gradient comes through the fake score; use --score-gradient=on")
        if self.objective in STOPPED:
            raise UserError(
                f"--gan: its gradient comes through the fake score, but none with {self.objective}; use sid"
            )
        if self.chunk:
            raise UserError("--gan: its loss is a mean over --batch-gpu, which --chunk would split; use --checkpoint=1")

    def _check_share_noise(self) -> None:
        """The fake score's one answer must do for both losses."""
        if self.gan:
            raise UserError("--share-noise: --gan shows the fake score real images, too; use --share-images=1")
        guidance = parse_guidance(self.guidance)
        if guidance != Guidance(teacher=guidance.teacher):
            raise UserError(f"--share-noise: --guidance={self.guidance} guides the fake score; only long=K fits")
        schedules = {self.sigma_schedule, self.fake_sigma_schedule}
        if len(schedules) > 1 and any(parse_schedule(s, "").kind == "single" for s in schedules):
            raise UserError("--share-noise: a single noise level must be the same for --fake-sigma-schedule")
        if not self.tmax:
            raise UserError("--share-noise: --tmax=0 leaves no range of noise levels; use --tmax=800")
        if self.augment:
            raise UserError("--share-noise: the generator's loss knows no augmentation; use --augment=0")

    def network_overrides(self, teacher: Any) -> dict[str, Any]:
        """Constructor arguments in which generator and fake score differ from the teacher.

        A teacher that dropped labels in its training passes that on to neither: here only guidance drops labels.
        """
        wanted = {"dropout": self.dropout, "use_fp16": self.use_fp16}
        if getattr(teacher, "init_kwargs", {}).get("label_dropout"):
            wanted["label_dropout"] = 0
        return {name: value for name, value in wanted.items() if value is not None}

    def trains_generator(self, nimg: int) -> bool:
        """Whether the generator is updated after `nimg` images."""
        return self.generator_images(nimg) >= 0

    def generator_images(self, nimg: int) -> float:
        """How many of `nimg` images came since the generator began to learn; below 0 before."""
        return nimg - (self.gan_freeze_kimg * 1000 if self.gan else 0)

    def is_adversarial(self, nimg: int) -> bool:
        """Whether the generator's loss has an adversarial part after `nimg` images."""
        return self.gan and nimg >= self.gan_start_kimg * 1000

    @property
    def passes_scores(self) -> bool:
        """Whether the generator's gradient ever passes through both networks."""
        return self.score_gradient != "off" and self.objective not in STOPPED

    def has_score_gradient(self, nimg: int) -> bool:
        """Whether the generator's gradient passes through both networks after `nimg` images."""
        if self.score_gradient in ("on", "off"):
            return self.score_gradient == "on"
        start = _number_after("from=", self.score_gradient)
        if start is None:
            raise UserError(f"--score-gradient={self.score_gradient}: give on, off or from=KIMG, such as from=1000")
        return nimg >= start * 1000


def resolve(config: DistillationConfig, teacher: Any, device: Any) -> DistillationConfig:
    """The config with weighting, augmentation and precision chosen, where it leaves them to the objective, the teacher
    and the device.
    """
    if config.weighting is None:
        config = dataclasses.replace(config, weighting=published_weighting(config.objective))
    if config.augment is None:
        can = getattr(teacher, "augment_dim", 0) and not config.share_noise
        config = dataclasses.replace(config, augment=AUGMENT if can else 0.0)
    if config.precision is None:
        half = getattr(teacher, "use_fp16", False) if config.use_fp16 is None else config.use_fp16
        config = dataclasses.replace(config, precision="fp16" if half and device.type != "cpu" else "fp32")
    return config


def saved_options(options: dict[str, Any], teacher: Any, device: Any) -> dict[str, Any]:
    """Those of a saved run as a `resolve`d config has them: at their defaults where its version lacked them."""
    weighting = options.get("weighting") or published_weighting(options.get("objective"))
    return {**vars(resolve(DistillationConfig(), teacher, device)), **options, "weighting": weighting}


def published_weighting(objective: Any) -> str:
    """That which an objective was published with, one of WEIGHTINGS."""
    return "none" if objective == "diff-instruct" else "omega"


def check_objective(objective: str, weighting: str | None, huber: float | None, score_gradient: bool) -> str:
    """The weighting: the one given, or that which the objective was published with.

    Errors: UserError naming the option that doesn't fit.
    """
    for option, value, known in (("objective", objective, OBJECTIVES), ("weighting", weighting, (None, *WEIGHTINGS))):
        if value not in known:
            raise UserError(f"--{option}={value}: not one of {', '.join(filter(None, known))}")
    if objective == "dmd" and weighting not in (None, "omega"):
        raise UserError(f"--weighting={weighting}: dmd has its own, omega; --objective=diff-instruct takes others")
    if objective not in PROJECTED and huber is not None:
        raise UserError(f"--huber={huber:g}: {objective} has no such form; use --objective={' or '.join(PROJECTED)}")
    if objective not in PROJECTED and not score_gradient:
        raise UserError(f"--score-gradient: {objective} needs on; --objective={' or '.join(PROJECTED)} can do without")
    return weighting or published_weighting(objective)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The noise levels of a loss. kind: 'karras', 'lognormal' (mean and std of log sigma) or 'single' (level)."""

    kind: str
    mean: float = 0.0
    std: float = 0.0
    level: float | None = None


def parse_schedule(text: str, option: str, mean: float = P_MEAN, std: float = P_STD) -> Schedule:
    """'karras', 'lognormal', 'lognormal=MEAN,STD' or 'single=SIGMA'. Errors: UserError naming `option`.

    mean, std: what 'lognormal' alone means.
    """
    if text == "karras":
        return Schedule(text)
    if text == "lognormal":
        return Schedule(text, mean, std)
    own_mean, comma, own_std = text.removeprefix("lognormal=").partition(",")
    mean, std = _number(own_mean), _number(own_std)
    if text.startswith("lognormal=") and comma and mean is not None and std is not None and std > 0:
        return Schedule("lognormal", mean, std)
    level = _number_after("single=", text)
    if not level:
        raise UserError(
            f"{option}={text}: give karras, lognormal[=MEAN,STD] of ln sigma, or single=SIGMA, such as single=0.5"
        )
    return Schedule("single", level=level)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Weights kappa of classifier-free guidance in the three places where a score network is asked; 1 is none.

    SiD-LSG, arXiv:2406.01561.
    """

    fake_score_step: float = 1.0  # kappa1: psi in its own loss
    fake_score: float = 1.0  # kappa2 = kappa3: psi in the generator's loss
    teacher: float = 1.0  # kappa4: phi in the generator's loss
    label_dropout: float = 0.0  # probability that an image loses its label in psi's own loss


def parse_guidance(text: str | None) -> Guidance:
    """'long=K', 'short=K' or 'long-short=K'; None is no guidance. Errors: UserError naming --guidance."""
    if text is None:
        return Guidance()
    kind = text.partition("=")[0]
    scale = _number_after(f"{kind}=", text)
    if kind == "long" and scale is not None and scale > 1:
        return Guidance(teacher=scale)
    if kind == "short" and scale is not None and scale < 1:
        return Guidance(fake_score_step=scale)
    if kind == "long-short" and scale is not None and scale > 1:
        return Guidance(scale, scale, scale, LABEL_DROPOUT)
    raise UserError(f"--guidance={text}: give long=K or long-short=K with K > 1, or short=K with K < 1")


def _number_after(prefix: str, text: str) -> float | None:
    """The number, finite and not negative, that follows `prefix`; None if there is none."""
    number = _number(text.removeprefix(prefix))
    return number if text.startswith(prefix) and number is not None and number >= 0 else None


def _number(text: str) -> float | None:
    """A finite number; None if it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
