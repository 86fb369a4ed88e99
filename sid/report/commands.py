"""What a run's page says about its options, and the commands that go on with the run and use its result."""

import functools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dnnlib import UserError, format_number
from dnnlib.errors import printable
from torch_utils.records import is_figure

from ..config import COMMAND_LINE, DROPPED, MEASURED
from ..options import SECTIONS, parse
from ..recipes import RECIPES
from .run_record import RunRecord

# As COMMAND_LINE, for the rest of the options that the config has under another name.
LATER_NAMES = {
    "kimg_per_tick": ("tick", 1),
    "snapshot_ticks": ("snap", 1),
    "state_ticks": ("dump", 1),
    "save_minutes": ("save_every", 1),
    "keep_states": ("keep", 1),
}
PLACES = ("outdir", "nosubdir", "resume", "override", "dry_run", "device", "cache", "workers")
MAX_TEXT = 300  # characters of a value
KEPT_TEACHER = "teacher.safetensors"  # sid.inputs.TEACHER_FILE, which loads torch; a test compares

USE = """from edm.images import save_grid
from sid import OneStepGenerator
generator = OneStepGenerator.from_pretrained({run})
images = generator(64, seed=0)  # uint8 [64, C, H, W]
save_grid(images, "grid.png")"""


@functools.lru_cache
def defaults(recipe: str | None = None) -> dict[str, Any]:
    """The options of sid_train.py by the names that a run records, without or with a recipe."""
    config, options = parse([] if recipe is None else [f"--recipe={recipe}"])
    return {**config.options(), **options.record()}


def recipe_of(options: dict[str, Any]) -> str | None:
    """The recipe that a run was started with, if it is recorded and known."""
    recipe = options.get("recipe")
    return recipe if isinstance(recipe, str) and recipe in RECIPES else None


def changed_options(options: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (option, its value, the default, the recipe's value if the run has one) where the run's value differs."""
    usual, recipe = defaults(), recipe_of(options)
    others = [usual] if recipe is None else [usual, defaults(recipe)]
    own, dropped = options.get("total_kimg"), options.get(DROPPED)
    if is_figure(own) and is_figure(dropped):
        options = {**options, "total_kimg": own + dropped}
    rows = []
    for name in usual:
        if name in PLACES or name not in options:
            continue
        values = [options[name], *(other[name] for other in others)]
        texts = [value_text(name, value) for value in values]
        if len(set(texts)) > 1:
            rows.append((option_name(name), *texts))
    return rows


def option_name(name: str) -> str:
    """What the command line calls an option that a run records."""
    parameter = (COMMAND_LINE | LATER_NAMES).get(name, (name, 1))[0].replace("-", "_")
    spelled = {option.name: option.opts[-1] for options in SECTIONS.values() for option in options}
    return spelled.get(parameter, f"--{parameter}")


def value_text(name: str, value: Any) -> str:
    """The recorded value of an option of sid_train.py as the command line has it."""
    if value is None and name in MEASURED:
        return "auto"
    return typed_text(value, (COMMAND_LINE | LATER_NAMES).get(name, (name, 1))[1])


def typed_text(value: Any, unit: float = 1) -> str:
    """A recorded value as a command line has it. unit: how many of the record's units its unit is."""
    if value is None or value == []:
        text = "none"
    elif isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        text = ",".join(map(str, value))
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif is_figure(value):
        text = format_number(float(f"{value / unit:.12g}"))
    elif isinstance(value, str):
        text = value
    else:
        try:
            text = json.dumps(value)
        except RecursionError:  # it was nested just less deeply than json.loads refuses
            text = "?"
    return printable(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …")


def continuing(record: RunRecord) -> tuple[str, str | None]:
    """(a sentence, a command or call if there is one) about how to go on with the run."""
    options, place = record.options, str(record.run_dir)
    arguments = options.get("arguments")
    if not (isinstance(arguments, list) and all(isinstance(argument, str) for argument in arguments)):
        kept = options.get("nosubdir") and str(options.get("edm_model", "")).endswith(KEPT_TEACHER)
        if kept:
            return "The call that started the run goes on with it:", f"sid.distil(teacher, config, {place!r})"
        return f"The command that started the run goes on with it, with --resume={shlex.quote(place)} added.", None
    arguments = without_resume(arguments)
    command = [*launcher(options.get("processes")), *arguments, f"--resume={place}"]
    if record.state != "finished":
        return "From the folder where the run was started:", shlex.join(command)
    longer = _longer(options)
    if longer is None:
        return "The run has come to its end.", None
    return "The run has come to its end. To train it for twice as long:", shlex.join([*command, *longer])


def _longer(options: dict[str, Any]) -> list[str] | None:
    """The options that double a run's length, as its command line counts it, with its trials."""
    try:
        config = parse(without_resume(options["arguments"]))[0]
    except (click.ClickException, UserError):
        return None
    override = [] if config.lr_decay == "none" else ["--override"]  # the decay reaches to the end
    return [f"--duration={format_number(2 * config.total_kimg / 1000)}", *override]


def without_resume(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line without --resume and its value."""
    former = ["", *arguments]
    return [a for last, a in zip(former, arguments) if last != "--resume" and a.partition("=")[0] != "--resume"]


def launcher(processes: Any, module: str = "sid_train") -> list[str]:
    """The words that start a module in as many processes."""
    if isinstance(processes, int) and processes > 1:
        return ["torchrun", "--standalone", f"--nproc_per_node={processes}", "-m", module]
    return ["python", "-m", module]


def using(run_dir: Path) -> tuple[str, str]:
    """(lines of Python, a command) that make images with a run's generator."""
    place = str(run_dir)
    command = ["python", "-m", "edm.generate", f"--network={place}", "--outdir=out", "--seeds=0-63"]
    return USE.format(run=json.dumps(place, ensure_ascii=False)), shlex.join(command)
