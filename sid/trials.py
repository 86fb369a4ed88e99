"""Short trials of settings on the teacher at hand, of which the best goes on: `--trials`."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, write_atomically
from torch_utils import checkpoint, distributed
from torch_utils.records import is_figure, sound_records
from torch_utils.updates import DivergenceError
from training.training_loop import Stretch

from .config import DistillationConfig
from .distillation import Distillation
from .monitor.records import DISTANCES_FILE, STATS_FILE
from .report.progress import FIRST_PICTURE, Report
from .training_loop import training_loop

TRIALS = "trials"  # in the run folder: one folder per trial, as of a run of its own
RESULTS_FILE = "results.json"  # in it, once the best is known
RATES = ("lr", "glr")
# By optimizer, the fastest first. Each was the better one on some teachers (docs/ablations.md). Adam's are for networks
# up to REFERENCE_FAN_IN.
CANDIDATES = {
    "adam": {"equal-rates": {"lr": 4e-4, "glr": 4e-4}, "slow-generator": {"lr": 4e-4, "glr": 1e-4}},
    "muon": {"equal-rates": {"lr": 0.02, "glr": 0.02}, "slow-generator": {"lr": 0.02, "glr": 0.005}},
}
CLEARLY = 2.0  # how many times a distance must be smaller to count as such
NOISE = {"features": 0.2, "distance": 0.005}  # and by how much: differences of 256 images from as many others
REFERENCE_FAN_IN = 440.0  # of the demo's teacher; narrower networks take the same rates


@dataclasses.dataclass(frozen=True)
class Plan:
    """The trials of a run. configs: {name: settings of the whole run}. images: the length of each trial."""

    configs: dict[str, DistillationConfig]
    images: int

    @property
    def dropped_images(self) -> int:
        """The images of all trials but the one that goes on."""
        return (len(self.configs) - 1) * self.images

    def stretch(self, number: int, run_dir: Path) -> Stretch:
        """Which stretch of the run in `run_dir` a trial is, by its number from 0."""
        whole = int(next(iter(self.configs.values())).total_kimg * 1000) + self.dropped_images
        return Stretch(self.images, number * self.images, whole, run_dir)

    def fitting(self, options: dict[str, Any] | None, settled: Collection[str]) -> DistillationConfig:
        """The settings of the candidate that a state's options come from; the first one's if none fits."""
        configs, free = list(self.configs.values()), [rate for rate in RATES if rate not in settled]
        if options is None:
            return configs[0]
        return next((c for c in configs if all(getattr(c, rate) == options.get(rate) for rate in free)), configs[0])


def plan_trials(config: DistillationConfig, share: float, settled: Collection[str], teacher: torch.nn.Module) -> Plan:
    """The trials that fit into `share` of the run's length.

    config: what the user asked for; its length includes the trials. settled: names of options that the user has
    given, which no candidate changes.
    Errors: UserError when the run is too short, or the generator isn't trained in trials of that length.
    """
    scale = rate_scale(teacher) if config.optimizer == "adam" else 1.0
    known = CANDIDATES[config.optimizer]
    settings = {n: {k: v * scale for k, v in c.items() if k not in settled} for n, c in known.items()}
    different = {str(rates): name for name, rates in reversed(settings.items())}  # the first of equal ones
    candidates = {n: dataclasses.replace(config, **settings[n]) for n in known if n in different.values()}
    iterations = max(1, int(share * config.total_kimg * 1000 / (config.batch * len(candidates))))
    images = iterations * config.batch
    if config.gan and images <= 1000 * config.gan_freeze_kimg:
        raise UserError(
            f"--gan-freeze={config.gan_freeze_kimg:g}: the generator would learn nothing in its trials of"
            f" {images / 1000:g} kimg; give less than that, or --trials=0"
        )
    own_kimg = config.total_kimg - (len(candidates) - 1) * images / 1000  # of the run that goes on
    if own_kimg * 1000 <= images:
        raise UserError(
            f"--duration={config.total_kimg / 1000:g}: {len(candidates)} trials of {iterations} updates leave nothing"
            " to train; give a longer one, or --trials=0"
        )
    return Plan({name: dataclasses.replace(c, total_kimg=own_kimg) for name, c in candidates.items()}, images)


def rate_scale(teacher: torch.nn.Module) -> float:
    """By what the candidates' learning rates are multiplied: 1, or less for networks wider than the demo's.

    An update of Adam changes a layer's output in proportion to its fan-in (Yang et al. 2022, arXiv:2203.03466), so the
    rate goes with 1 / fan-in, of which this takes the geometric mean over all weights.
    """
    weights = [(w.numel(), w[0].numel()) for w in teacher.parameters() if w.ndim >= 2]
    total = sum(number for number, _ in weights)
    if not total:
        return 1.0
    fan_in = math.exp(sum(number * math.log(fan_in) for number, fan_in in weights) / total)
    return min(1.0, REFERENCE_FAN_IN / fan_in)


def has_begun(run_dir: Path) -> bool:
    """Whether a run folder holds trials but no training state yet."""
    return (run_dir / TRIALS).is_dir() and not checkpoint.states(run_dir)


def run_trials(
    trials: Plan,
    run_dir: Path,
    build: Callable[[DistillationConfig, checkpoint.StateFile | None], Distillation],
    report: Callable[[Path], Report],
) -> checkpoint.StateFile:
    """Runs the trials to their ends, from where they are, and moves the best one's state into the run folder.

    build: makes the distillation of a candidate, from a state if one is given. report: the report of a trial's folder.
    Returns the state to go on from. Every process must call it.
    Errors: DivergenceError when every candidate diverged; SystemExit when a signal asked to stop.
    """
    folder = run_dir / TRIALS
    results = distributed.from_process_0(_read_results(folder))
    if results is None:
        results = {}
        for number, (name, config) in enumerate(trials.configs.items()):
            distributed.print0(f"Trial of {name}: {trials.images / 1000:g} kimg with {_settings(config)}")
            results[name] = _trial(trials, number, config, folder / name, build, report)
        best = choose(results)
        if results[best]["distance"] == math.inf:
            raise DivergenceError("every trial diverged; give lower --lr and --glr, or another teacher")
        for name, result in results.items():
            result["best"] = name == best
    for line in table(results):
        distributed.print0(line)
    with distributed.shared_errors():
        if distributed.rank() == 0:
            _settle(folder, results, run_dir)
    return checkpoint.StateFile(checkpoint.states(run_dir)[0])


def choose(results: dict[str, dict[str, Any]]) -> str:
    """Which of the candidates goes on: the first, or the closest if that is clearly closer.

    results: {name: what `_trial` returns}, the candidate with the highest rates first. High rates are the farther away
    early and the closer at the end, unless they are too high. Distances in the teacher's features, of which 1 is as
    close as its own samples are, decide where they are known.
    """
    kind, away = _away(results)
    first, closest = next(iter(away)), min(away, key=away.__getitem__)
    return first if away[first] <= CLEARLY * max(away[closest], 0) + NOISE[kind] else closest


def _away(results: dict[str, dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """(the distance that decides, {name: by how much it is above the smallest possible one})."""
    finite = [result for result in results.values() if result["distance"] < math.inf]
    kind = "features" if all("features" in result for result in finite) else "distance"
    closest_possible = 1.0 if kind == "features" else 0.0
    return kind, {name: result.get(kind, math.inf) - closest_possible for name, result in results.items()}


def _trial(
    trials: Plan,
    number: int,
    config: DistillationConfig,
    folder: Path,
    build: Callable[[DistillationConfig, checkpoint.StateFile | None], Distillation],
    report: Callable[[Path], Report],
) -> dict[str, Any]:
    """What came of one candidate: its distances from the teacher (`TeacherDistance`), infinite if it diverged."""
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    distillation = build(config, checkpoint.newest_good_state(folder))
    record, images = {name: getattr(config, name) for name in RATES}, trials.images
    try:
        training_loop(distillation, folder, report(folder), trials.stretch(number, folder.parent.parent))
    except DivergenceError as error:
        distributed.print0(f"It diverged: {error.message}")
        return {**record, "kimg": distillation.state.nimg / 1000, "distance": math.inf}
    distances = distributed.from_process_0(sound_records(folder / DISTANCES_FILE, "kimg", "value"))
    found = [line for line in distances if line["kimg"] == images / 1000]
    if not found:  # a full disk, for instance
        raise UserError(f"{folder / DISTANCES_FILE}: lacks the trial's end; remove {folder} and start again")
    result = {**record, "kimg": images / 1000, "distance": found[-1]["value"]}
    features = found[-1].get("features")
    return {**result, "features": features} if is_figure(features) else result


def _settle(folder: Path, results: dict[str, dict[str, Any]], run_dir: Path) -> None:
    """Records the results, removes the other candidates' states and moves the best one's. Begins again if cut short."""
    with write_atomically(folder / RESULTS_FILE) as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    for name, result in results.items():
        for path in checkpoint.states(folder / name) if not result["best"] else ():
            path.unlink()
    best = folder / next(name for name, result in results.items() if result["best"])
    for name in (STATS_FILE, DISTANCES_FILE, FIRST_PICTURE):
        if (best / name).exists():
            shutil.copyfile(best / name, run_dir / name)
    states = checkpoint.states(best)
    if states:
        os.replace(states[0], run_dir / states[0].name)
        for older in states[1:]:
            older.unlink()
    elif not checkpoint.states(run_dir):
        raise UserError(f"{run_dir}: its trials are over, but no state is left; remove {folder} to begin again")


def _read_results(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The recorded results; None if they are missing or damaged, after which the trials are judged again."""
    try:
        results = json.loads((folder / RESULTS_FILE).read_text())
        [best] = [name for name, result in results.items() if result["best"]]
        sound = any(best in names for names in CANDIDATES.values()) and all(
            {"kimg", "distance", *RATES} <= result.keys() for result in results.values()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return results if sound else None


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines that say what came of the trials."""
    lines = []
    for name, result in results.items():
        distance = f"{result['distance']:.3f}" if result["distance"] < math.inf else "diverged"
        if "features" in result:
            distance += f", features {result['features']:.2f}"
        goes_on = "  <- goes on" if result["best"] else ""
        lines.append(f"{name:>15} after {result['kimg']:g} kimg: distance {distance}{goes_on}")
    _, away = _away(results)
    if any(away[name] > min(away.values()) for name, result in results.items() if result["best"]):
        lines.append(f"{'':>15} Not clearly farther away, and higher rates mostly end closer.")
    return lines


def _settings(config: DistillationConfig) -> str:
    return " ".join(f"--{name}={getattr(config, name):g}" for name in RATES)
