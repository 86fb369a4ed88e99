"""Short trials of settings on the teacher at hand, of which the best goes on: `--trials`, `--recipe=auto`."""

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
from torch_utils.records import sound_records
from torch_utils.updates import DivergenceError

from .config import DistillationConfig
from .distillation import Distillation
from .monitor.records import DISTANCES_FILE, STATS_FILE
from .report.progress import FIRST_PICTURE, Report
from .training_loop import training_loop

TRIALS = "trials"  # in the run folder: one folder per trial, as of a run of its own
RESULTS_FILE = "results.json"  # in it, once the best is known
# Two settings, of which one served each of the teachers of docs/ablations.md. The first lets psi learn at the noise
# levels where theta is judged, with theta slower than psi. The second, the demo's, is faster where it doesn't diverge.
# The rates are those of networks up to REFERENCE_FAN_IN.
CANDIDATES: dict[str, dict[str, Any]] = {
    "same-levels": {
        "alpha": 1.0,
        "score_gradient": "on",
        "sigma_schedule": "karras",
        "fake_sigma_schedule": "karras",
        "share_noise": False,
        "lr": 4e-4,
        "glr": 1e-4,
    },
    "gradients-off": {
        "alpha": 1.2,
        "score_gradient": "off",
        "sigma_schedule": "lognormal",
        "fake_sigma_schedule": "lognormal",
        "share_noise": True,
        "lr": 4e-4,
        "glr": 4e-4,
    },
}
RATES = ("lr", "glr")
REFERENCE_FAN_IN = 440.0  # of the demo's teacher; narrower networks take the same rates


@dataclasses.dataclass(frozen=True)
class Plan:
    """The trials of a run. configs: {name: settings of the whole run}. images: the length of each trial."""

    configs: dict[str, DistillationConfig]
    images: int

    def fitting(self, options: dict[str, Any] | None, settled: Collection[str]) -> DistillationConfig:
        """The settings of the candidate that a state's options come from; the first one's if none fits."""
        configs = list(self.configs.values())
        if options is None:
            return configs[0]
        return next((c for c in configs if all(c.options()[n] == options.get(n) for n in varied(settled))), configs[0])


def varied(settled: Collection[str]) -> list[str]:
    """The options in which the candidates differ, without those that the user has settled."""
    return [name for name in CANDIDATES["same-levels"] if name not in settled]


def plan_trials(config: DistillationConfig, share: float, settled: Collection[str], teacher: torch.nn.Module) -> Plan:
    """The trials that fit into `share` of the run's length.

    config: what the user asked for; its length includes the trials. settled: names of options that the user has
    given, which no candidate changes.
    Errors: UserError when no candidate goes with the options that are settled.
    """
    scale = rate_scale(teacher)
    candidates, refused = {}, None
    for name, settings in CANDIDATES.items():
        own = {k: v * scale if k in RATES else v for k, v in settings.items() if k not in settled}
        try:
            candidates[name] = dataclasses.replace(config, **own)
        except UserError as error:
            refused = error
            distributed.print0(f"no trial of {name}: {error.message}")
    if not candidates:
        assert refused is not None
        raise refused
    unique = {str(candidate.options()): name for name, candidate in reversed(candidates.items())}
    candidates = {name: candidates[name] for name in reversed(unique.values())}
    iterations = max(1, int(share * config.total_kimg * 1000 / (config.batch * len(candidates))))
    images = iterations * config.batch
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
        for name, config in trials.configs.items():
            distributed.print0(f"Trial of {name}: {trials.images / 1000:g} kimg with {_settings(config)}")
            results[name] = _trial(config, trials.images, folder / name, build, report)
        best = min(results, key=lambda name: results[name]["distance"])
        if results[best]["distance"] == math.inf:
            raise DivergenceError("every trial diverged; give lower --lr and --glr, or another teacher")
        for name, result in results.items():
            result["best"] = name == best
    for line in table(results):
        distributed.print0(line)
    if distributed.rank() == 0:
        _settle(folder, results, run_dir)
    distributed.barrier()
    return checkpoint.StateFile(checkpoint.states(run_dir)[0])


def _trial(
    config: DistillationConfig,
    images: int,
    folder: Path,
    build: Callable[[DistillationConfig, checkpoint.StateFile | None], Distillation],
    report: Callable[[Path], Report],
) -> dict[str, Any]:
    """What came of one candidate: its distance from the teacher, infinite if it diverged."""
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    distillation = build(config, checkpoint.newest_good_state(folder))
    record = {name: config.options()[name] for name in CANDIDATES["same-levels"]}
    try:
        training_loop(distillation, folder, report(folder), images, folder.parent.parent)
    except DivergenceError as error:
        distributed.print0(f"It diverged: {error.message}")
        return {**record, "kimg": distillation.state.nimg / 1000, "distance": math.inf}
    distances = distributed.from_process_0(sound_records(folder / DISTANCES_FILE, "kimg", "value"))
    return {**record, "kimg": images / 1000, "distance": distances[-1]["value"]}


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
    state = checkpoint.states(best)[0]
    os.replace(state, run_dir / state.name)
    for older in checkpoint.states(best):
        older.unlink()


def _read_results(folder: Path) -> dict[str, dict[str, Any]] | None:
    try:
        return json.loads((folder / RESULTS_FILE).read_text())
    except (OSError, ValueError):
        return None


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines that say what came of the trials."""
    lines = []
    for name, result in results.items():
        distance = f"{result['distance']:.3f}" if result["distance"] < math.inf else "diverged"
        goes_on = "  <- goes on" if result["best"] else ""
        lines.append(f"{name:>15} after {result['kimg']:g} kimg: distance from the teacher {distance}{goes_on}")
    return lines


def _settings(config: DistillationConfig) -> str:
    options = config.options()
    return " ".join(f"--{name.replace('_', '-')}={options[name]}" for name in CANDIDATES["same-levels"])
