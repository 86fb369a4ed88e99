"""What a sweep file asks for: settings, seeds, and the options of each run. docs/sweeps.md has the format."""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dnnlib import UserError, open_plain, user_path, without_passwords
from edm.published import FILES
from sid.options import SECTIONS, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]  a package that only Python 3.10 needs

PROGRAM = ("-m", "sid_train")  # what the runs execute: a file of a checkout or of an installed package
KEYS = {"title", "include", "seeds", "common", "teachers", "settings"}  # of a sweep file
OWN = {"outdir", "nosubdir", "seed", "desc", "resume", "override", "dry-run"}  # options that the sweep sets
NAME = re.compile(r"[A-Za-z0-9_][\w.=+-]{0,99}", re.ASCII)  # of a setting: becomes part of a folder's name
SOURCE = re.compile(r"\{(.*)\}")  # transfer = "{NAME}": from the generator of setting NAME
MAX_RUNS = 10_000
MAX_FILE_BYTES = 1 << 18
MAX_DOTS = 64  # in a line: long dotted keys take quadratic time


@dataclasses.dataclass(frozen=True)
class Run:
    """One distillation.

    options, common    options of its setting and options of all settings, as in the file
    arguments          of sid_train.py, except the output folder
    recorded           what the run folder's training_options.json will say about them
    """

    setting: str
    seed: int
    options: dict[str, Any]
    common: dict[str, Any]
    arguments: tuple[str, ...]
    recorded: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.setting}-seed{self.seed}"

    @property
    def source(self) -> str | None:
        """Name of the run, of the same seed, whose last snapshot it starts from; None if it needs no other run."""
        setting = source_setting(self.recorded["transfer"])
        return None if setting is None else f"{setting}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep.

    runs    ordered by seed, so that an interrupted sweep has results for every setting; the first is the baseline
    stem    names the files with the results
    teachers  {teacher: {setting as the file names it: setting of the runs}}; one teacher "" if the file names none
    """

    title: str
    stem: str
    seeds: list[int]
    runs: list[Run]
    teachers: dict[str, dict[str, str]]

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(run.setting for run in self.runs))


def load_plan(path: str, detector: str | None = None) -> Plan:
    """Reads a sweep file and checks every run in it against the options of sid_train.py.

    detector: one that the user names; a sweep file alone must not name a program.
    Errors: UserError naming the file, the setting, and the option that is wrong.
    """
    content = _read(user_path(path))
    seeds, common, tables = content.get("seeds", [0]), content["common"], content.get("settings")
    if not _is_list_of(int, seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds = {seeds}: give a list of different whole numbers, such as [0, 1, 2]")
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"{path}: needs tables [settings.NAME], each with options of sid_train.py")
    settings: dict[str, dict[str, Any]] = {}
    teachers: dict[str, dict[str, str]] = {}
    for teacher, setting, options in _all_settings(path, content.get("teachers"), tables):
        name = f"{teacher}-{setting}" if teacher else setting
        if not NAME.fullmatch(name) or name in settings:
            raise UserError(f"{path}: setting {name!r}: give a unique name of letters, digits, _ . = + -")
        settings[name] = options
        teachers.setdefault(teacher, {})[setting] = name
        if len(settings) * len(seeds) > MAX_RUNS:
            raise UserError(f"{path}: more than {MAX_RUNS} runs; shorten its lists")
    detectors = {name: {**common, **options}.get("detector") for name, options in settings.items()}
    for name, asked in detectors.items():
        _check_detector(path, name, asked, detector)
    if detector is not None and detector not in detectors.values():
        raise UserError(f"--detector={detector}: no setting in {path} asks for it; leave the option out")
    _check_sources(path, {name: {**common, **own} for name, own in settings.items()})
    runs = [_make_run(path, name, seed, common, own) for seed in seeds for name, own in settings.items()]
    stem = Path(path).stem
    return Plan(str(content.get("title", stem)), stem, seeds, runs, teachers)


def _read(path: Path, may_include: bool = True) -> dict[str, Any]:
    """The tables of a file, merged with the tables of the file that it includes, if any (relative to its own path)."""
    try:
        with open_plain(path, MAX_FILE_BYTES) as file:
            text = file.read().decode("utf-8-sig")  # editors on Windows write a byte-order mark
        if max((line.count(".") for line in text.splitlines()), default=0) > MAX_DOTS:
            raise ValueError(f"a line with more than {MAX_DOTS} dots")
        content = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a sweep file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a sweep file in TOML ({error}); docs/sweeps.md has the format") from None
    unknown = sorted(content.keys() - KEYS)
    if unknown:
        raise UserError(f"{path}: {unknown[0]}: not one of {', '.join(sorted(KEYS))}")
    if not isinstance(content.setdefault("common", {}), dict):
        raise UserError(f"{path}: common = …: write a table [common] with options of sid_train.py")
    if "include" in content:
        if not may_include:
            raise UserError(f"{path}: include: an included file can't include another; move its options there")
        included = _read(path.parent / str(content.pop("include")), may_include=False)
        content = {**included, **content, "common": {**included["common"], **content["common"]}}
    return content


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _all_settings(path: str, teachers: Any, tables: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(teacher, setting, options) of every setting with every teacher; without teachers, the teacher is ""."""
    if teachers is not None and not (isinstance(teachers, dict) and teachers):
        raise UserError(f"{path}: teachers: write tables [teachers.NAME], each with options of sid_train.py")
    for teacher, given in (teachers or {"": {}}).items():
        if not isinstance(given, dict):
            raise UserError(f"{path}: teachers.{teacher}: not a table of options")
        for name, table in tables.items():
            for setting, own in _expand(path, name, table):
                options = {**given, **own}
                source = source_setting(options.get("transfer"))
                if teacher and source is not None:
                    options["transfer"] = f"{{{teacher}-{source}}}"
                yield teacher, setting, options


def _expand(path: str, name: str, table: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, options) of the settings that a table stands for: an option with a list stands for each of its values."""
    if not isinstance(table, dict):
        raise UserError(f"{path}: settings.{name}: not a table of options")
    lists = {option: values for option, values in table.items() if isinstance(values, list)}
    if [] in lists.values():
        raise UserError(f"{path}: setting {name}: an empty list makes no runs; give it values")
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values))
        yield "-".join([name, *(f"{option}={_text(value)}" for option, value in chosen.items())]), {**table, **chosen}


def source_setting(transfer: Any) -> str | None:
    """NAME of "{NAME}", which is what `transfer` may be in a sweep file; None for anything else."""
    match = SOURCE.fullmatch(transfer) if isinstance(transfer, str) else None
    return None if match is None else match[1]


def _check_sources(path: str, settings: dict[str, dict[str, Any]]) -> None:
    """A setting may only start from one above it, so that its source has run before."""
    above: list[str] = []
    for name, options in settings.items():
        source = source_setting(options.get("transfer"))
        if source is not None and source not in above:
            why = "isn't above it" if source in settings else "isn't in this file"
            raise UserError(
                f"{path}: setting {name}: transfer = {{{source}}}: setting {source!r} {why}; name one that stands above"
            )
        above.append(name)


def _check_detector(path: str, name: str, asked: Any, by_user: str | None) -> None:
    """Raises UserError if a setting's detector may be a program (TorchScript) that the user hasn't named."""
    is_data = asked is None or asked in FILES or str(asked).endswith(".safetensors")
    if not is_data and asked != by_user:
        raise UserError(
            f"{path}: setting {name}: detector = {asked}: may be a program (TorchScript), which runs as you: if you"
            f" trust it, name it yourself by --detector={asked}"
        )


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _make_run(path: str, name: str, seed: int, common: dict[str, Any], own: dict[str, Any]) -> Run:
    try:
        arguments = command_line(common, own, seed)
        recorded = recorded_options(arguments)
    except click.ClickException as error:
        raise UserError(f"{path}: setting {name}: {error.format_message()}") from None
    metrics = recorded["metrics"]
    if metrics is not None and not any(metric.strip().startswith("fid") for metric in metrics.split(",")):
        raise UserError(f"{path}: setting {name}: metrics = {metrics}: a sweep compares FID; name one, such as fid5k")
    return Run(name, seed, own, common, arguments, recorded)


def command_line(common: dict[str, Any], own: dict[str, Any], seed: int) -> tuple[str, ...]:
    """A run's arguments of sid_train.py. Errors: UserError naming an option that isn't one."""
    return (*_arguments({**common, **own}), f"--seed={seed}")


def _arguments(options: dict[str, Any]) -> Iterator[str]:
    """Options of sid_train.py as on its command line."""
    parameters = [parameter for section in SECTIONS.values() for parameter in section]
    known = {name.lstrip("-"): p for p in parameters for name in p.opts if name.startswith("--")}
    for name, value in options.items():
        if name in OWN:
            raise UserError(f"{name}: the sweep sets it; leave it out")
        if name not in known:
            raise UserError(f"{name}: not an option of sid_train.py, which --help lists")
        if not isinstance(value, bool | int | float | str) or value == "":
            raise UserError(f"{name} = {value!r}: give a text, a number, true or false")
        if getattr(known[name], "is_flag", False):
            yield from [f"--{name}"] if value else []
        else:  # floats with all digits, unlike in names
            yield f"--{name}={_text(value) if isinstance(value, bool) else value}"


def recorded_options(arguments: tuple[str, ...]) -> dict[str, Any]:
    """What training_options.json will say about a command line of sid_train.py, without values known only at run time.

    `given`, which it won't, holds the names of the options on the command line.
    Errors: click.ClickException when sid_train.py would refuse it.
    """
    config, options = parse(arguments)
    return without_passwords(json.loads(json.dumps({**config.options(), **options.record(), "given": options.given})))
