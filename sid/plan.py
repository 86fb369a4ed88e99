"""Plans a run before it has a folder: finds the state to go on from, measures the teacher, chooses start and trials."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from edm.snapshot_metrics import MultiStepFid
from torch_utils import checkpoint, distributed, run_folder
from torch_utils.records import is_figure
from training.denoiser import DenoiserModule
from training.moments import Moments
from training.training_loop import Stretch

from .calibration import choose_tmax
from .config import DROPPED, MEASURED, DistillationConfig, resolve
from .inputs import Inputs, guided_teacher, makes_samples
from .run_options import RunOptions
from .start import choose_start
from .state import SavedState
from .teacher_distance import TeacherDistance
from .teacher_fid import teacher_fid
from .teacher_samples import teacher_samples
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
    measured    how options were chosen that were to be measured, for the record: `starts` (`sid.start`) and
                `calibration` (`sid.calibration`); what the run that goes on had recorded stays
    moments     of the noise that the generator starts from, on every process; None: plain noise
    goal        the teacher's FID, if it is known
    total_kimg  length of the whole run, trials included
    dropped     images of the trials that don't go on, whether they are still to be run or not; recorded as DROPPED
    """

    config: DistillationConfig
    place: tuple[str, str, bool]
    saved: SavedState | None
    trials: Plan | None
    distance: TeacherDistance | None
    measured: dict[str, Any]
    moments: Moments | None
    goal: MultiStepFid | None
    total_kimg: float
    dropped: int

    def summary(self) -> dict[str, Any]:
        """What the plan adds to the record of the run."""
        goal = {} if self.goal is None else {"teacher_fid": dataclasses.asdict(self.goal)}
        dropped = {DROPPED: self.dropped / 1000} if self.dropped else {}
        return {**goal, **self.config.options(), **self.measured, **dropped}

    def after_trials(self) -> Stretch:
        """The stretch of the run that comes after its trials; the whole run where there are none."""
        return Stretch(before_img=self.dropped, total_img=int(self.config.total_kimg * 1000) + self.dropped)


def make_plan(inputs: Inputs, config: DistillationConfig, options: RunOptions, device: torch.device) -> RunPlan:
    """Finds the state to go on from, measures the teacher, and chooses the start and the trials.

    config: what the user asked for. Errors: UserError when an option doesn't fit the teacher or the state.
    """
    with_trials = options.trials > 0
    place, file = find_place(options, describe(inputs.teacher, config, with_trials))
    saved = None if file is None else SavedState(file, inputs.weight_hashes(config))
    distance = measure_teacher(inputs, config, with_trials, device, saved_value(saved, "tmax") is None)
    asked, measured, trials, dropped = config, {}, None, 0
    has_moments = config.init_noise == "moments"
    moments = None if distance is None or saved is not None or not has_moments else distance.moments
    choices = {
        "init_sigma": lambda: choose_start(inputs.teacher, distance, moments),
        "tmax": lambda: choose_tmax(distance and distance.calibration),
    }
    for option in MEASURED:
        if getattr(config, option) is None:
            value, record = settle(option, choices[option], saved)
            config = dataclasses.replace(config, **{option: value})
            measured |= record
    start = start_moments(moments, inputs.teacher, config, saved) if has_moments else None
    if with_trials and not (saved is not None and had_no_trials(saved)):
        trials = plan_trials(config, options.trials, options.given, inputs.teacher)
        config, dropped = trials.fitting(saved and saved.options, options.given), trials.dropped_images
        if saved is None:
            refuse_other_lengths(place, asked.total_kimg, options.trials)
        else:
            dropped = former_dropped(saved, dropped)
            config = dataclasses.replace(config, total_kimg=asked.total_kimg - dropped / 1000)
        if len(trials.configs) == 1 or saved is not None:  # nothing to choose, or chosen already
            trials = None
    goal = teacher_fid(inputs, asked, options.edm_model, options.measure_teacher, device)
    return RunPlan(config, place, saved, trials, distance, measured, start, goal, asked.total_kimg, dropped)


def start_moments(
    measured: Moments | None, teacher: DenoiserModule, config: DistillationConfig, saved: SavedState | None
) -> Moments:
    """The moments of the noise that the generator starts from, for every process, without what noise hides.

    measured: of the teacher's samples, on process 0. saved: the state to go on from, whose moments stay.
    Errors: UserError when the state has none, or damaged ones.
    """
    assert config.init_sigma is not None
    if saved is None:
        return distributed.from_process_0(measured and measured.for_noise(config.init_sigma))
    moments = saved.start_moments(teacher)
    if moments is None:
        raise UserError(f"--resume={saved.path}: its generator starts from plain noise; give --init-noise=white")
    return moments


def find_place(options: RunOptions, description: str) -> tuple[tuple[str, str, bool], checkpoint.StateFile | None]:
    """(outdir, description, nosubdir) of the run folder and the state to go on from, None at the beginning of a run.

    A run that ended during its trials goes on in its folder, without a state of its own.
    """
    place = (options.outdir, options.desc or description, options.nosubdir)
    former = run_folder.find_run(options.resume, *place, has_begun if options.trials else lambda folder: False)
    if former is None:
        return place, None
    return place if former.state is not None else (str(former.folder), "", True), former.state


def had_no_trials(saved: SavedState) -> bool:
    """Whether the run that goes on was begun without trials, so that there are none to choose from now."""
    return distributed.from_process_0(run_folder.recorded(saved.path.parent, "trials")) == (0,)


def former_dropped(saved: SavedState, planned: int) -> int:
    """The images of the trials that the run dropped which goes on.

    planned: as many as trials of this command line drop, which stands for what older runs didn't record.
    """
    found = distributed.from_process_0(run_folder.recorded(saved.path.parent, DROPPED))
    return round(1000 * found[0]) if found and is_figure(found[0]) else planned


def refuse_other_lengths(place: tuple[str, str, bool], total_kimg: float, share: float) -> None:
    """Errors: UserError when trials that go on, in the folder that `place` names, were begun with other lengths.

    total_kimg: of the whole run, trials included. share: of it, for the trials.
    """

    def problem() -> str | None:
        folder = Path(place[0])
        own, dropped, former = (run_folder.recorded(folder, name) for name in ("total_kimg", DROPPED, "trials"))
        if not (place[2] and has_begun(folder) and all(map(is_figure, [*own, *dropped, *former])) and own and dropped):
            return None
        whole = own[0] + dropped[0]
        if (round(1000 * whole), *former) == (round(1000 * total_kimg), share):
            return None
        return (
            f"--duration={total_kimg / 1000:g} --trials={share:g}: the trials in {folder} were begun with"
            f" --duration={whole / 1000:g} --trials={former[0]:g}; give those, or another --outdir"
        )

    with distributed.shared_errors():
        if distributed.rank() == 0 and (text := problem()):
            raise UserError(text)


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

    Errors: UserError when trials or the start need it and the teacher makes no samples, or all of them are the same.
    """
    teacher: Any = inputs.teacher
    has_moments = config.init_noise == "moments"
    needed_by = {"--trials": "--trials=0"} if with_trials else {}
    if has_moments:
        needed_by["--init-noise=moments"] = "--init-noise=white"
    if not makes_samples(teacher, needed_by):
        return None
    measured = None in [getattr(config, name) for name in MEASURED]
    if not (with_trials or config.returns or has_moments or measured or config.total_kimg >= WORTH_SAMPLES_KIMG):
        return None
    teacher = guided_teacher(teacher, inputs.guide, config.guidance).to(device).eval()
    samples = teacher_samples(teacher, inputs.identity(config))
    with distributed.shared_errors():
        if distributed.rank() != 0:
            return None
        refuse_equal_images(samples[1])
        changes = resolve(config, teacher, device).precision in ("bf16", "fp16")
        calibrates = chooses_tmax and config.tmax is None and config.has_karras_levels
        finds = {"calibrates": calibrates, "finds_moments": has_moments}
        return TeacherDistance(teacher, samples=samples, keep=changes, **finds)


def refuse_equal_images(images: torch.Tensor) -> None:
    """Errors: UserError when a teacher's samples, uint8 [N, C, H, W], look the same, whatever its seeds."""
    if int((images.amax(0) - images.amin(0)).max()) <= 1:
        raise UserError(
            f"--edm_model: all {len(images)} samples of the teacher are one and the same image, from which no generator"
            " can learn anything; look at them with edm.generate, and give a snapshot that makes others"
        )


def saved_value(saved: SavedState | None, name: str) -> float | None:
    """The value that an option to be measured has in the state to go on from; None if there is none."""
    value = None if saved is None else saved.options.get(name)
    return float(value) if isinstance(value, float | int) else None


def settle(
    option: str, choose: Callable[[], tuple[float, dict[str, Any] | None]], saved: SavedState | None
) -> tuple[float, dict[str, Any]]:
    """(the value of an option that is to be measured, {name in RECORDS: what was measured}, empty if nothing was).

    choose: returns the value and what was measured; it is called on process 0. saved: the state to go on from, whose
    value stays.
    """
    value, name = saved_value(saved, option), RECORDS[option]
    if saved is not None and value is not None:
        found = run_folder.recorded(saved.path.parent, name)
        return value, {name: found[0]} if found else {}
    value, record = distributed.from_process_0(choose() if distributed.rank() == 0 else None)
    return value, {} if record is None else {name: record}
