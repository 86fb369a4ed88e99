"""Plans a run before it has a folder: finds the state to go on from, measures the teacher, chooses start and trials."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import checkpoint, distributed, run_folder
from training.denoiser import DenoiserModule, only_sigma
from training.moments import Moments

from .calibration import choose_tmax
from .config import MEASURED, DistillationConfig, resolve
from .inputs import Inputs, guided_teacher
from .start import choose_start
from .state import SavedState
from .teacher_distance import TeacherDistance, teacher_samples
from .trials import Plan, has_begun, plan_trials

# Runs of at least this length measure the distance from the teacher's samples at every snapshot. Making the samples
# takes as long as half a kimg of training.
WORTH_SAMPLES_KIMG = 10
RECORDS = {"init_sigma": "starts", "tmax": "calibration"}  # what a folder records of how an option was chosen


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """How a run begins.

    config      its settings with the start chosen; with trials, the settings of the first candidate
    place       outdir, description and nosubdir of the run folder
    saved       the state to go on from; None at the beginning of a run
    trials      the trials that are still to be run, if any
    distance    measures how far images are from the teacher's, on process 0; None if the run doesn't
    starts      {noise level: distance from the teacher} of the starts that were measured now; None if none was to be
    calibration what the highest noise level follows from (`sid.calibration`); None if it wasn't measured now
    kept        what the run that goes on had recorded of both
    moments     of the noise that the generator starts from, on every process; None: plain noise
    dropped     images of the trials that don't go on, whether they are still to be run or not
    """

    config: DistillationConfig
    place: tuple[str, str, bool]
    saved: SavedState | None
    trials: Plan | None
    distance: TeacherDistance | None
    starts: dict[str, float] | None
    calibration: dict[str, Any] | None
    kept: dict[str, Any]
    moments: Moments | None
    dropped: int

    def summary(self) -> dict[str, Any]:
        """What the plan adds to the record of the run."""
        measured = {"starts": self.starts, "calibration": self.calibration}
        now = {name: value for name, value in measured.items() if value is not None}
        return {**self.config.options(), **self.kept, **now}


def make_plan(inputs: Inputs, config: DistillationConfig, options: dict[str, Any], device: torch.device) -> RunPlan:
    """Finds the state to go on from, measures the teacher, and chooses the start and the trials.

    config: what the user asked for. Errors: UserError when an option doesn't fit the teacher or the state.
    """
    with_trials = options["trials"] > 0
    place, file = find_place(options, describe(inputs.teacher, config, with_trials))
    saved = None if file is None else SavedState(file, inputs.weight_hashes(config))
    distance = measure_teacher(inputs, config, with_trials, device, saved_value(saved, "tmax") is None)
    starts, calibration, trials, dropped, kept = None, None, None, 0, {}
    if saved is not None:
        names = [name for option, name in RECORDS.items() if getattr(config, option) is None]
        kept = {name: value for name in names for value in run_folder.recorded(saved.path.parent, name)}
    moments = distance and distance.moments if saved is None and config.init_noise == "moments" else None
    if config.init_sigma is None:
        level, starts = settle("init_sigma", lambda: choose_start(inputs.teacher, distance, moments), saved)
        config = dataclasses.replace(config, init_sigma=level)
    if config.init_noise == "moments":
        moments = start_moments(moments, config, saved)
    if config.tmax is None:
        tmax, calibration = settle("tmax", lambda: choose_tmax(distance and distance.calibration), saved)
        config = dataclasses.replace(config, tmax=tmax)
    if with_trials:
        trials = plan_trials(config, options["trials"], options["given"], inputs.teacher)
        config = trials.fitting(saved and saved.options, options["given"])
        dropped = trials.dropped_images
        if len(trials.configs) == 1 or saved is not None:  # nothing to choose, or chosen already
            trials = None
    return RunPlan(config, place, saved, trials, distance, starts, calibration, kept, moments, dropped)


def start_moments(measured: Moments | None, config: DistillationConfig, saved: SavedState | None) -> Moments:
    """The moments of the noise that the generator starts from, for every process, without what noise hides.

    measured: of the teacher's samples, on process 0. saved: the state to go on from, whose moments stay.
    Errors: UserError when the state has none.
    """
    assert config.init_sigma is not None
    if saved is None:
        return distributed.from_process_0(measured and measured.for_noise(config.init_sigma))
    if saved.moments is None:
        raise UserError(f"--resume={saved.path}: its generator starts from plain noise; give --init-noise=white")
    return saved.moments


def find_place(options: dict[str, Any], description: str) -> tuple[tuple[str, str, bool], checkpoint.StateFile | None]:
    """(outdir, description, nosubdir) of the run folder and the state to go on from, None at the beginning of a run.

    A run that ended during its trials goes on in its folder, without a state of its own.
    """
    place = (options["outdir"], options["desc"] or description, options["nosubdir"])
    former = run_folder.find_run(options["resume"], *place, has_begun if options["trials"] else lambda folder: False)
    if former is None:
        return place, None
    return place if former.state is not None else (str(former.folder), "", True), former.state


def describe(teacher: DenoiserModule, config: DistillationConfig, with_trials: bool = False) -> str:
    """The run folder's description when --desc isn't given. with_trials: alpha and rates aren't chosen yet."""
    cond = "cond" if teacher.label_dim else "text" if getattr(teacher, "prompt_dim", 0) else "uncond"
    size = f"{teacher.img_resolution}x{teacher.img_resolution}"
    chosen = "auto" if with_trials else f"alpha{config.alpha:g}-glr{config.glr:g}"
    steps = f"-{config.steps}steps" if config.steps > 1 else ""
    return f"sid-{size}-{cond}-{chosen}-batch{config.batch}{steps}"


def measure_teacher(
    inputs: Inputs, config: DistillationConfig, with_trials: bool, device: torch.device, chooses_tmax: bool
) -> TeacherDistance | None:
    """The distance from the teacher's samples, on process 0, if the run wants it and the teacher makes any.

    A guided teacher makes guided samples. chooses_tmax: whether --tmax=auto has no value from a saved state.

    Errors: UserError when trials or the start need it and the teacher makes no samples.
    """
    teacher: Any = inputs.teacher
    has_moments = config.init_noise == "moments"
    if only_sigma(teacher) is not None:
        reason = "the teacher knows one noise level only, so it makes no samples; give"
        if with_trials:
            raise UserError(f"--trials: {reason} --trials=0")
        if has_moments:
            raise UserError(f"--init-noise=moments: {reason} --init-noise=white")
        return None
    measured = None in [getattr(config, name) for name in MEASURED]
    if not (with_trials or config.returns or has_moments or measured or config.total_kimg >= WORTH_SAMPLES_KIMG):
        return None
    teacher = guided_teacher(teacher, inputs.guide, config.guidance).to(device).eval()
    samples = teacher_samples(teacher)
    with distributed.shared_errors():
        if distributed.rank() != 0:
            return None
        changes = resolve(config, teacher, device).precision in ("bf16", "fp16")
        calibrates = chooses_tmax and config.tmax is None and config.has_karras_levels
        return TeacherDistance(teacher, samples=samples, keep=changes, calibrates=calibrates)


def saved_value(saved: SavedState | None, name: str) -> float | None:
    """The value that an option to be measured has in the state to go on from; None if there is none."""
    value = None if saved is None else saved.options.get(name)
    return float(value) if isinstance(value, float | int) else None


def settle(
    name: str, choose: Callable[[], tuple[float, dict[str, Any] | None]], saved: SavedState | None
) -> tuple[float, dict[str, Any] | None]:
    """(the value of an option that is to be measured, what was measured now).

    choose: returns both; it is called on process 0. saved: the state to go on from, whose value stays.
    """
    value = saved_value(saved, name)
    if value is not None:
        return value, None
    return distributed.from_process_0(choose() if distributed.rank() == 0 else None)
