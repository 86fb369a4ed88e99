"""What a run is asked for besides the settings of its training. Importing it doesn't load torch."""

import dataclasses
from typing import Any

COMMAND = ("given", "recipe", "arguments")  # fields that describe the command, not what it asks for


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options of sid_train.py that aren't part of a `DistillationConfig`, under the same names.

    They say where files are, what is measured, how the run is resumed and where it computes. The types are those of
    parsed values; None stands for an option that isn't given. `sid.options` explains each option and checks its value.

    given:     names of the options that the user has given, as opposed to defaults and those of a recipe
    recipe:    the name that --recipe gives; None without one
    arguments: the words of the command line; None for a run that is started from Python
    """

    edm_model: str = "edm-cifar10-32x32-uncond-vp"
    classes: str | None = None
    prompts: str | None = None
    outdir: str = "training-runs"
    data: str | None = None
    data_stat: str | None = None
    detector: str | None = None
    metrics: str | None = None
    measure_teacher: bool | None = None
    transfer: str | None = None
    resume: str | None = None
    override: bool = False
    trials: float = 0.0
    guide: str | None = None
    xflip: bool = False
    cache: bool = True
    bench: bool = True
    metrics_batch: int = 64
    timeout: float = 30.0
    log: str | None = None
    device: str | None = None
    desc: str | None = None
    nosubdir: bool = False
    dry_run: str | None = None
    cond: bool | None = None
    arch: str | None = None
    precond: str | None = None
    cbase: int | None = None
    cres: list[int] | None = None
    workers: int = 1
    given: tuple[str, ...] = ()
    recipe: str | None = None
    arguments: list[str] | None = None

    def record(self) -> dict[str, Any]:
        """The options as plain values for the run's record, without the fields that describe the command."""
        return {name: value for name, value in vars(self).items() if name not in COMMAND}
