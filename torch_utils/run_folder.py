"""Run folders: `00003-description/` with training_options.json and log.txt, each of one run at a time."""

import contextlib
import dataclasses
import json
import os
import re
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dnnlib import Logger, UserError, locked_folder, remove_unfinished, write_atomically

from . import checkpoint, distributed

MAX_NAME_BYTES = 255  # on all usual disks
OPTIONS_FILE = "training_options.json"
LOG_FILE = "log.txt"
LAUNCH = "launch"  # in OPTIONS_FILE: what `_launch` says


@dataclasses.dataclass(frozen=True)
class ResumeRules:
    """What a resumed run may change, and what its command line calls the options.

    free            names of options that may change
    rounding        names of options that change how sums are rounded or how draws are split, which may change too
    override        whether every other option may change as well
    command_line    {name: (its option on the command line, how many units one of the option's units is)}; other
                    options have the same name there
    added           {name: how much more, in our units, the command line's value of an option is}
    """

    free: Collection[str] = ()
    rounding: Collection[str] = ()
    override: bool = False
    command_line: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    added: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def text(self, name: str, value: Any) -> str:
        """An option as it would be typed."""
        option, unit = self.command_line.get(name, (name.replace("_", "-"), 1))
        if value is None or value is False:
            return f"no --{option}"
        if isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        elif isinstance(value, float):
            value = f"{(value + self.added.get(name, 0)) / unit:g}"
        return f"--{option}={value}"


@dataclasses.dataclass(frozen=True)
class FormerRun:
    """A run to go on with: its folder, and the state to start from. state: None if the run hasn't saved one yet."""

    folder: Path
    state: checkpoint.StateFile | None


def find_run(
    resume: str | None,
    outdir: str,
    description: str,
    nosubdir: bool,
    goes_on_without_state: Callable[[Path], bool] = lambda folder: False,
) -> FormerRun | None:
    """The run that this command line goes on with, the same on every process; None to start a new one.

    resume: a state file; a run folder, of which the newest undamaged state is taken; 'auto', which is the run folder
            that this command line makes, if it is there already: `outdir` itself with `nosubdir`, else the last one
            with this description; None: 'auto' with `nosubdir`. After torchrun has restarted the processes, it is
            the folder that they had made, if they got that far. A run in `outdir` that this `resume` began counts, too.
    goes_on_without_state: whether a run folder without a state holds something else to go on from.
    Errors: UserError naming --resume or --outdir.
    """
    found = None

    def find() -> tuple[Path, Path | None] | None:
        nonlocal found
        found = _find_run(resume, Path(outdir), description, nosubdir, goes_on_without_state)
        return found and (found.folder, found.state and found.state.path)

    place = _on_process_0(find)
    if place is None:
        return None
    folder, path = place
    run = found or FormerRun(folder, path and checkpoint.StateFile(path))
    if run.state is not None and distributed.world_size() > 1:
        _check_same_everywhere(run.state)
    return run


def record_options(run_dir: Path, options: dict[str, Any]) -> None:
    """Writes the options of a run into its folder, on process 0."""
    with write_atomically(run_dir / OPTIONS_FILE) as file:
        file.write((json.dumps({**options, LAUNCH: _launch()}, indent=2) + "\n").encode())


def _check_same_everywhere(file: checkpoint.StateFile) -> None:
    """Errors: UserError, on every process, if any process can't read the state that process 0 reads."""
    host = socket.gethostname()
    try:
        state = file.read()
        own = (host, None, [state[name] for name in checkpoint.COUNTERS])  # with a clock that no two states share
    except UserError as error:
        own = (host, error.message, None)
    everyone = distributed.from_every_process(own)
    first_host, problem, first = everyone[0]
    if problem:
        raise UserError(problem)
    for rank, (host, _, counters) in enumerate(everyone):
        if counters != first:
            raise UserError(
                f"--resume={file.path}: process {rank} on {host} doesn't find the state that process 0 on {first_host}"
                " reads; keep the run folder on a shared file system, or copy it to every node"
            )


def _find_run(
    resume: str | None, outdir: Path, description: str, nosubdir: bool, goes_on_without_state: Callable[[Path], bool]
) -> FormerRun | None:
    given = None if resume in (None, "auto") else Path(resume)
    folder = _own_folder(resume, given, outdir, description, nosubdir, goes_on_without_state)
    if folder is not None:
        own = _run_in(folder, goes_on_without_state)
        if own is not None or given is None:
            return own
    if given is None:
        return None
    if given.is_dir():
        run = _run_in(given, goes_on_without_state)
        if run is None:
            raise UserError(f"--resume={resume}: no training-state-*.pt in this folder")
        if run.state is None and not _belongs(given, outdir, nosubdir):
            raise UserError(
                f"--resume={resume}: this run has no training state yet, so it can't move to --outdir={outdir}; give"
                f" --outdir={given.parent}"
            )
        return run
    if not given.is_file():
        raise UserError(f"--resume={resume}: no such file; name a training-state-*.pt or a run folder")
    return FormerRun(given.parent, checkpoint.StateFile(given))


def _own_folder(
    resume: str | None,
    given: Path | None,
    outdir: Path,
    description: str,
    nosubdir: bool,
    goes_on_without_state: Callable[[Path], bool],
) -> Path | None:
    """The folder in which this command line began a run before; None if there is none, or if it should start a new one.

    given: the state or folder that `resume` names. Errors: UserError when the folder holds another run.
    """
    given_folder = given if given is None or given.is_dir() else given.parent
    is_elsewhere = given_folder is not None and not _belongs(given_folder, outdir, nosubdir)
    folders = [outdir] if nosubdir else _folders(outdir, description)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        candidates = folders if given_folder is None or is_elsewhere else [given_folder]
        launched = next((folder for folder in candidates if recorded(folder, LAUNCH) == (_launch(),)), None)
        if launched is not None:
            return launched
    if resume != "auto" and not (nosubdir and (given is None or is_elsewhere)):
        return None
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        return None
    has_states, has_snapshots = bool(checkpoint.states(folder)), bool(checkpoint.snapshots(folder))
    is_begun = has_states or has_snapshots or goes_on_without_state(folder)
    if given is not None and is_begun and recorded(folder, "resume") != (resume,):
        raise UserError(
            f"--resume={resume}: --outdir={folder} holds another run; name another folder, or --resume={folder} to go"
            " on with that one"
        )
    if given is None and has_snapshots and not has_states:
        raise UserError(f"--outdir={folder} holds a run without a training state to go on from; name another folder")
    return folder


def _run_in(folder: Path, goes_on_without_state: Callable[[Path], bool]) -> FormerRun | None:
    """The run in a folder, with its newest undamaged state; None if there is nothing to go on from."""
    state = checkpoint.newest_good_state(folder)
    return FormerRun(folder, state) if state is not None or goes_on_without_state(folder) else None


def _belongs(folder: Path, outdir: Path, nosubdir: bool) -> bool:
    """Whether a run folder is the one that --outdir asks for, or one of those in it."""
    folder, outdir = folder.resolve(), outdir.resolve()
    return folder == outdir or (not nosubdir and folder.parent == outdir)


def refuse_changes(path: Path, old: dict[str, Any], new: dict[str, Any], rules: ResumeRules) -> list[str]:
    """The names of the options that differ between `old`, of the state at `path`, and `new`, of this run.

    Errors: UserError naming the first option that must not differ but does, both values, and the remedy.
    """
    changed = [name for name in old if name in new and new[name] != old[name] and name not in rules.free]
    refused = [] if rules.override else [name for name in changed if name not in rules.rounding]
    if refused:
        name = refused[0]
        here, there = (rules.text(name, options[name]) for options in (new, old))
        remedy = "leave it out" if old[name] is None or old[name] is False else "give that"
        raise UserError(f"{here}: the run in {path} has {there}; {remedy}, or --override to change it")
    return changed


def check_setting(
    path: Path, saved: dict[str, dict[str, Any]], current: dict[str, dict[str, Any]], rules: ResumeRules
) -> None:
    """Compares a resumed run's options with those in its state, and prints what it changes.

    saved, current: 'options' and 'surroundings' (`checkpoint.setting`) of the state at `path` and of this run.
    Errors: as for `refuse_changes`.
    """
    old, new = saved["options"], current["options"]
    changed = refuse_changes(path, old, new, rules)
    for name in changed:
        if name not in rules.rounding:
            distributed.print0(f"{rules.text(name, new[name])} from here on, instead of {rules.text(name, old[name])}")
    differing = [f"{rules.text(name, new[name])} instead of {old[name]}" for name in changed if name in rules.rounding]
    differing += [
        f"{name} {current['surroundings'].get(name)} instead of {value}"
        for name, value in saved["surroundings"].items()
        if current["surroundings"].get(name) != value
    ]
    if differing:
        distributed.print0(f"Resumed with {', '.join(differing)}: as good, but no longer bit-equal to an unbroken run")


@contextlib.contextmanager
def create(outdir: str, description: str, nosubdir: bool, options: dict, resume: Path | None) -> Iterator[Path]:
    """Makes the run folder on process 0, writes the options there, logs to log.txt while open; gives its path.

    A resumed run goes on in the folder of its state if --outdir asks for that one; newer states there are set aside.
    Otherwise it goes on in a new folder and leaves the old one as it is. With `nosubdir` the folder is `outdir` itself.
    Errors: UserError, on every process, when that folder can't be made or written to, or another run is at work in it.
    """
    if any(separator in description for separator in "/\\"):
        raise UserError(f"--desc={description}: becomes part of a folder's name, so it can't hold / or \\")
    with contextlib.ExitStack() as stack:
        yield _on_process_0(lambda: _open_folder(stack, Path(outdir), description, nosubdir, options, resume))


def _open_folder(
    stack: contextlib.ExitStack, outdir: Path, description: str, nosubdir: bool, options: dict, resume: Path | None
) -> Path:
    """Makes and locks the folder and opens its log until `stack` closes."""
    own_state = resume if resume is not None and _belongs(resume.parent, outdir, nosubdir) else None
    path = own_state.parent if own_state is not None else _new_folder(outdir, description, nosubdir)
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:  # seen here, before folders are made
        raise UserError(f"--outdir={outdir} with --desc: the name {path.name} is too long")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outdir={outdir}: can't make {path} ({error.strerror}); name another folder") from None
    for file in path.iterdir():
        if (file.suffix in (".json", ".jsonl") or file.name == LOG_FILE) and file.exists() and not file.is_file():
            raise UserError(f"{file}: is not a plain file, so the run can't write there; remove it")
    try:
        stack.enter_context(locked_folder(path))
        remove_unfinished(path)
        if own_state is not None:
            checkpoint.set_aside_later(own_state)
        record_options(path, options)
        stack.enter_context(Logger(path / LOG_FILE))
    except OSError as error:
        raise UserError(f"--outdir={outdir}: can't write to {path} ({error.strerror}); name another folder") from None
    if resume is not None and own_state is None:
        print(f"Continues from {resume} in a folder of its own; {resume.parent} stays as it is", flush=True)
    return path


def _new_folder(outdir: Path, description: str, nosubdir: bool) -> Path:
    if outdir.exists() and not outdir.is_dir():
        raise UserError(f"--outdir={outdir} is a file; name a folder")
    if nosubdir:
        return outdir
    taken = [int(m[1]) for p in outdir.glob("*") if (m := re.match(r"(\d{5})-", p.name))]
    return outdir / f"{max(taken, default=-1) + 1:05d}-{description}"


def _folders(outdir: Path, description: str) -> list[Path]:
    """The run folders with this description, newest first."""
    folders = [p for p in outdir.glob("*") if re.fullmatch(rf"\d{{5}}-{re.escape(description)}", p.name)]
    return sorted(folders, reverse=True)


def _launch() -> str | None:
    """What identifies one launch by torchrun, restarts after a fault included; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()}:{os.getppid()}" if run_id == "none" else run_id


def recorded(folder: Path, name: str) -> tuple[Any, ...]:
    """(value,) of an option that the run in `folder` recorded; () if it recorded none."""
    try:
        return (json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8"))[name],)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ()


def _on_process_0(action: Callable[[], Any]) -> Any:
    """The result of `action` on process 0. Its UserError or OSError is raised on every process, as a UserError."""
    result, error = None, None
    if distributed.rank() == 0:
        try:
            result = action()
        except UserError as problem:
            error = problem.message
        except OSError as problem:
            error = f"{problem.filename}: {problem.strerror}: check the name and permissions"
    result, error = distributed.from_process_0((result, error))
    if error is not None:
        raise UserError(error)
    return result
