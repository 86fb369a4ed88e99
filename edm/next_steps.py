"""What to do with a trained teacher, as commands quoted for a shell. Works without torch."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_STEPS = 18  # of Heun's sampler, 35 evaluations, as EDM's figures for 32x32 images
METRIC = "fid5k"  # for data sets of a few thousand images, too


def report(run_dir: Path) -> str:
    """The command that makes the page of a run."""
    return shlex.join([*_program("sid.report", "sid-report"), str(run_dir)])


def distil(run_dir: Path, options: Mapping[str, Any]) -> str:
    """The command that distils a run's newest snapshot.

    options: of edm.train, by name; those that aren't known may be missing.
    """
    outdir = options.get("outdir") or run_dir
    arguments = ["--recipe=auto", f"--edm_model={run_dir}", f"--outdir={outdir}-sid"]
    reference = _given(options, data_stat="data_stat", detector="detector") if options.get("data_stat") else []
    program = ["python", "sid_train.py"] if Path("sid_train.py").is_file() else ["sid-train"]
    return shlex.join([*program, *arguments, *(reference or ["--metrics=none"])])


def measure(run_dir: Path, options: Mapping[str, Any], data: str) -> str:
    """The command that measures FID of a run's newest snapshot. options: as for `distil`. data: the training images."""
    metrics = options.get("metrics") or METRIC
    program = ["python", "fid.py"] if Path("fid.py").is_file() else ["sid-fid"]
    reference = _given(options, data_stat="ref", detector="detector")
    reference += [] if options.get("data_stat") else [f"--data={data}"]
    arguments = [f"--network={run_dir}", *reference, f"--metrics={METRIC if metrics == 'none' else metrics}"]
    return shlex.join([*program, "eval", *arguments, f"--steps={METRICS_STEPS}"])


def generate(run_dir: Path) -> str:
    """The command that makes a picture of images of a run's newest snapshot."""
    arguments = [f"--network={run_dir}", "--grid=samples.png", "--seeds=0-63", f"--steps={METRICS_STEPS}"]
    return shlex.join([*_program("edm.generate", "edm-generate"), *arguments])


def _given(options: Mapping[str, Any], **names: str) -> list[str]:
    """Those options that have a value, under new names."""
    return [f"--{name}={options[old]}" for old, name in names.items() if options.get(old)]


def _program(module: str, command: str) -> list[str]:
    """How to call a module: as such in a checkout, by its command where the package is installed."""
    return ["python", "-m", module] if Path("sid_train.py").is_file() else [command]
