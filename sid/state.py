"""Everything that changes during a distillation: three networks, two optimisers, the counters."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from edm import zoo
from torch_utils import checkpoint, distributed, seeding
from torch_utils.updates import GRADIENT_LIMIT, Updater
from training.denoiser import DenoiserModule
from training.generator import spaced_levels
from training.moments import Moments, attach, loaded, split_off
from training.networks_edm2 import freeze_logvar, normalize_weights
from training.steps import Steps
from training.training_loop import freeze_augment_mapping

from . import lora, step_vectors
from .config import DistillationConfig

GAN_LIMIT = 1.0  # psi's gradients are clipped to this by value with --gan (SiDA)
EPSILON = {False: 1e-8, True: 1e-6}  # Adam's, in full and in half precision
FACTORS_PHASE = 4  # random stream of the initial low-rank factors, separate from training's draws
ROUNDING_PHASE = 5  # random stream of the stochastic rounding of Adam's second moments
INHERITED = ("classes", "licence", "vae", "text")  # what a generator's metadata take from its teacher's
RETURN_FACTOR = 0.5  # multiplies both learning rates at each return
PARTS = ("generator", "fake_score", "ema", "generator_updater", "fake_score_updater")  # of a state's file


def generator_steps(teacher: DenoiserModule, config: DistillationConfig) -> Steps:
    """Theta's steps. Errors: UserError naming --steps when the teacher knows too few noise levels for them."""
    assert config.init_sigma is not None
    levels = spaced_levels(teacher, config.init_sigma, config.steps, config.steps_shift)
    try:
        return Steps(levels, config.steps_noise)
    except ValueError:
        raise UserError(
            f"--steps={config.steps}: the teacher knows too few noise levels below --init_sigma={config.init_sigma:g};"
            " use fewer steps or a higher start"
        ) from None


def trained_copies(
    teacher: DenoiserModule, start: DenoiserModule | None, config: DistillationConfig, device: torch.device
) -> tuple[DenoiserModule, DenoiserModule]:
    """(theta, psi) as they start: copies of phi, theta with the weights of `start` if given. Only what is to learn
    requires a gradient.

    Errors: UserError when the teacher's weights are in half precision.
    """
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in teacher.parameters()):
        raise UserError("the teacher's weights are in half precision, perhaps from another run; load it in float32")
    overrides, rank = config.network_overrides(teacher), config.lora_rank
    made = []
    for i in range(2):  # one after the other, since low-rank updates need much less memory than a copy
        net, is_generator = zoo.clone_network(teacher, **overrides).to(device).requires_grad_(True), i == 0
        if is_generator and start is not None:
            net.load_state_dict(split_off(start.state_dict())[0])
        if is_generator or not config.augment:
            freeze_augment_mapping(net)
        if is_generator or not config.uncertainty:
            freeze_logvar(net)
        if rank:
            seeding.seed_at(config.seed, FACTORS_PHASE, i)
            base = None if is_generator and start is not None else teacher
            lora.adapt(net, rank, base, matrices_only=is_generator and not config.lora_vectors)
        else:
            normalize_weights(net)
        made.append(net)
    generator, fake_score = made
    return generator, fake_score


def updaters(
    generator: DenoiserModule, fake_score: DenoiserModule, config: DistillationConfig
) -> tuple[Updater, Updater]:
    """What applies the gradients of theta, and of psi."""
    fp16 = config.precision == "fp16"
    shared: dict[str, Any] = {"eps": EPSILON[fp16], "loss_scaling": fp16, "spike_guard": config.spike_guard}
    shared["optimizer"] = config.optimizer
    seeds = [(config.seed, ROUNDING_PHASE, i) if config.adam_state == "bf16" else None for i in range(2)]
    limit = GAN_LIMIT if config.gan else GRADIENT_LIMIT
    return (
        Updater.of("generator", generator, config.glr, config.g_beta1, rounding_seed=seeds[0], **shared),
        Updater.of("fake score", fake_score, config.lr, beta1=0, rounding_seed=seeds[1], limit=limit, **shared),
    )


def generator_record(teacher: DenoiserModule, steps: Steps, hashes: "WeightHashes") -> dict[str, Any]:
    """The metadata of a generator: its steps, what it inherits from its teacher, and what it was made from."""
    known = getattr(teacher, "metadata", {})
    inherited = {name: value for name, value in known.items() if name in INHERITED}
    record = {"kind": "sid-generator", **steps.record(), **inherited, "teacher_sha256": hashes.teacher}
    if known.get("name") is not None:
        record["teacher"] = known["name"]
    if hashes.guide:
        record["guide_sha256"] = hashes.guide
    return record


class DistillationState:
    """Generator theta, fake score psi and theta's moving average, all starting as copies of the teacher phi.

    teacher: the denoiser to distil, already on `device`. start: another denoiser whose weights theta starts from, if
    given. hashes: of the weights of both. moments: of the noise that theta starts from; None: plain noise.
    With config.lora_rank the networks share the teacher's weights (theta shares those of `start`, if given), and states
    hold only what is trained.
    Errors: UserError when the teacher's weights are in half precision.
    """

    def __init__(
        self,
        teacher: DenoiserModule,
        config: DistillationConfig,
        device: torch.device,
        start: DenoiserModule | None,
        hashes: "WeightHashes",
        moments: Moments | None = None,
    ):
        self.nimg = 0
        self.tick = 0
        self.elapsed_sec = 0.0
        self.at_snapshot = False  # whether this iteration ends with a snapshot and its metrics
        self.returns: list[dict[str, Any]] = []  # to earlier states, at which lower rates began (`sid.returns`)
        self.good: dict[str, Any] | None = None  # the last good snapshot, to which the run would return
        self.statistics = {}  # what a loaded state had collected since its last tick
        self.setting = {}  # the options and surroundings of a loaded state
        self._hashes = hashes
        self.generator, self.fake_score = trained_copies(teacher, start, config, device)
        self.steps = generator_steps(teacher, config)
        assert (moments is not None) == (config.init_noise == "moments"), "they are a part of the inputs"
        if moments is not None:
            attach(self.generator, moments.to(device))
        self.served = step_vectors.split(self.fake_score, len(self.steps)) if len(self.steps) > 1 else None
        for net in (self.generator, self.fake_score):
            distributed.broadcast_module(net)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.ema.metadata = generator_record(teacher, self.steps, hashes)
        self.generator_updater, self.fake_score_updater = updaters(self.generator, self.fake_score, config)

    def serve(self, step: int) -> None:
        """Makes psi the fake score of one step's images."""
        if self.served is not None:
            self.served.step = step

    @property
    def rate_factor(self) -> float:
        """What the returns so far have left of both learning rates."""
        return RETURN_FACTOR ** len(self.returns)

    def rates(self, config: DistillationConfig) -> dict[str, float]:
        """Both learning rates by option, before schedules."""
        return {"lr": config.lr * self.rate_factor, "glr": config.glr * self.rate_factor}

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The networks that must be equal on all processes."""
        return {"generator": self.generator, "fake score": self.fake_score, "average": self.ema}

    def contents(self, config: DistillationConfig, statistics: dict[str, Any]) -> dict[str, Any]:
        """The contents of a state's file. statistics: collected since the last tick (`Collector.state_dict`)."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        counters = {name: getattr(self, name) for name in checkpoint.PROGRESS}
        setting = checkpoint.setting(config.options(), next(self.generator.parameters()).device)
        hashes = {"teacher_hash": self._hashes.teacher}
        if self._hashes.rank:
            hashes["base_hash"] = self._hashes.base
        if self._hashes.guide:
            hashes["guide_hash"] = self._hashes.guide
        record = {"returns": self.returns, "good": self.good}
        return {**parts, **counters, **setting, **record, "statistics": statistics, **hashes}

    def load(self, saved: "SavedState | checkpoint.StateFile | Path") -> None:
        """Restores a saved state. Errors: UserError when it isn't a state of a distillation of this teacher."""
        if not isinstance(saved, SavedState):
            file = saved if isinstance(saved, checkpoint.StateFile) else checkpoint.StateFile(saved)
            saved = SavedState(file, self._hashes)
        state = saved.file.take()
        checkpoint.restore(self, self._parts(), state, saved.path)
        self.statistics = state["statistics"]
        self.returns, self.good = state.get("returns", []), state.get("good")  # which older ones lack
        self.setting = {name: state[name] for name in ("options", "surroundings")}

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in PARTS}


@dataclasses.dataclass(frozen=True)
class WeightHashes:
    """Identifies the weights that a distillation builds on but doesn't save; a resumed run needs the same.

    teacher: `zoo.network_hash` of phi. base: of what theta's low-rank updates are added to. rank: theirs, if any.
    guide: of the weaker network of --guide, if there is one.
    """

    teacher: str
    base: str
    rank: int | None
    guide: str | None = None

    @classmethod
    def of(
        cls,
        teacher: torch.nn.Module,
        start: torch.nn.Module | None,
        config: DistillationConfig,
        guide: torch.nn.Module | None = None,
    ) -> "WeightHashes":
        teacher_hash, rank = zoo.network_hash(teacher), config.lora_rank
        base = zoo.network_hash(start) if rank and start is not None else teacher_hash
        return cls(teacher_hash, base, rank, None if guide is None else zoo.network_hash(guide))


class SavedState:
    """A training state of a distillation, read and found to belong to the weights that this run builds on.

    options, surroundings: what that run was asked for and where it ran (`checkpoint.setting`).
    Errors: UserError when the file isn't a state of a distillation, or is one of other weights.
    """

    def __init__(self, file: checkpoint.StateFile, hashes: WeightHashes):
        state = file.read()
        _check_contents(state, hashes, file.path)
        self.file, self.path, self.hashes = file, file.path, hashes
        self.options: dict[str, Any] = state["options"]
        self.surroundings: dict[str, Any] = state["surroundings"]

    def start_moments(self, teacher: DenoiserModule) -> Moments | None:
        """The moments of the noise that the saved generator starts from; None if it starts from plain noise.

        Errors: UserError when they aren't moments of images such as the teacher's.
        """
        try:
            _, tensors = split_off(self.file.read()["generator"])
            return loaded(tensors, teacher) if tensors else None
        except (AttributeError, ValueError):
            raise UserError(
                f"--resume={self.path}: the moments of the noise that its generator starts from are damaged; resume"
                " from another state"
            ) from None


def _check_contents(state: dict[str, Any], hashes: WeightHashes, path: Path) -> None:
    sound = {*PARTS, "teacher_hash"} <= state.keys() and checkpoint.is_complete(state)
    if not sound or not _are_returns(state.get("returns", []), state.get("good")):
        raise UserError(f"--resume={path}: not the state of a distillation; name a training-state-*.pt of sid_train")
    if state["teacher_hash"] != hashes.teacher:
        raise UserError(f"--resume={path}: it distils another teacher; give the --edm_model it was started with")
    guide = state.get("guide_hash")
    if guide != hashes.guide:
        other, advice = ("another", "give the --guide it was started with") if guide else ("no", "leave --guide out")
        raise UserError(f"--resume={path}: its teacher was guided by {other} network; {advice}")
    rank = state["options"].get("lora_rank")
    if rank != hashes.rank:
        advice = f"has --lora-rank={rank!r}; give that" if rank else "has no --lora-rank; leave it out"
        raise UserError(f"--resume={path}: that run {advice}")
    if hashes.rank and state.get("base_hash") != hashes.base:  # the updates are only valid on these weights
        raise UserError(
            f"--resume={path}: its generator started from other weights; give the --transfer it was started with"
        )


def _are_returns(returns: Any, good: Any) -> bool:
    """Whether a state's record of returns and of the last good snapshot is one."""
    numbers = good is None or (
        isinstance(good, dict) and type(good.get("nimg")) is int and type(good.get("lowest")) is float
    )
    return numbers and isinstance(returns, list) and all(isinstance(line, dict) for line in returns)
