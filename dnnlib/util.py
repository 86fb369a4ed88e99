"""Small helpers without torch."""

import contextlib
import errno
import importlib
import io
import math
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import click

from . import terminal

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes that aren't UTF-8
MAX_MESSAGE = 2000  # characters; longer ones, of overlong options, lose their middle
MAX_NUMBER = 1e30  # of options: its products with the thousand images of a kimg are finite too
MAX_WHOLE_NUMBER = 2**31 - 1
LOCK_FILE = ".lock"
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a full or broken disk


class UserError(click.ClickException):
    """Something the user can mend. The command lines print it as one line and exit with code 2.

    The message names the option (or file) at fault and the remedy. What it quotes may come from strangers: control
    characters are shown as escapes, and user and password of an address are left out.
    """

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` in one line of bounded length without passwords; what a terminal would obey, or can't show, is escaped."""
    if len(text) > 4 * MAX_MESSAGE:  # before the search for passwords, which takes time
        text = text[: 2 * MAX_MESSAGE] + text[-2 * MAX_MESSAGE :]
    text = without_password(text)
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} … {text[-MAX_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _encoded(plain: str, code: str) -> str:
    """A pattern for a character, plain or percent-encoded any number of times."""
    return f"(?:{plain}|%(?:25)*(?:{code}))"


_AT, _COLON, _EQUALS = _encoded("@", "40"), _encoded(":", "3a"), _encoded("=", "3d")
_SCHEME = _COLON + _encoded(r"[/\\]", "2f|5c") + "+"
_NO_PORT = r"(?!\d{1,5}(?:[/\\?#\s'\"]|$))(?=\S|\s\S*@)"
_USERS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"({_SCHEME})[^\s/\\?#]{{0,1000}}{_AT}",
        # no address, strictly: a password that holds / ? # or a space
        rf"({_SCHEME})(?!\[)[^\s/\\?#@:]{{0,1000}}:{_NO_PORT}[^\n]{{0,1000}}{_AT}",
        rf"()(?<![\w.+~%*-])[\w.+~%-]{{1,300}}?{_COLON}{_NO_PORT}[^\s@'\"/\\]\S{{0,1000}}{_AT}(?=[\w\[])",
    )
]
_VALUE = re.compile(
    rf"({_encoded('[?&#;]', '3f|26|23|3b')}[\w.~\[\]-]{{1,100}}{_EQUALS})(?!(?:true|false)(?:\W|$))([^\s&#;]+)",
    re.IGNORECASE,
)
_QUERY = re.compile(rf"({_SCHEME}[^\s?#]{{0,1000}}[?#])(\S+)", re.IGNORECASE)


def without_password(text: str) -> str:
    """`text` with the user, password and query of every address in it replaced by asterisks.

    A query may hold a token under any name, so all its values but true and false are replaced. So is what only looks
    like `user:password@host`.
    """
    for pattern in _USERS if re.search(_AT, text) else []:
        text = pattern.sub(r"\1***@", text)
    text = _VALUE.sub(lambda found: f"{found[1]}***{_sentence_end(found[2])}", text)
    return _QUERY.sub(_hide_nameless, text)


def _hide_nameless(found: re.Match) -> str:
    end = _sentence_end(found[2])
    query = found[2].removesuffix(end) if end else found[2]
    return found[1] + re.sub(r"[^&#;]+", lambda item: item[0] if "=" in item[0] else "***", query) + end


def _sentence_end(text: str) -> str:
    """What follows an address that ends `text`: a bracket, a quote, a full stop."""
    return text[len(text.rstrip(")]}>'\":,;.")) :]


def without_passwords(value: Any) -> Any:
    """`without_password` of every text in nested dicts and lists, tuples becoming lists as in JSON."""
    if isinstance(value, dict):
        return {key: without_passwords(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_passwords(item) for item in value]
    return without_password(value) if isinstance(value, str) else value


def user_path(path: str | os.PathLike) -> Path:
    """`path` with its `~` replaced. Errors: UserError when there is no such user, or no path can be so named."""
    try:
        found = Path(path).expanduser()
        found.is_file()
    except UnicodeEncodeError:
        raise UserError(f"{path}: {_locale_problem()}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}: check the file name") from None
    return found


def _locale_problem() -> str:
    encoding = sys.getfilesystemencoding()
    return f"this locale takes {encoding} names only: set PYTHONUTF8=1 (or LC_ALL=C.UTF-8) and try again"


def _is_utf8_in_another_locale(arg: str) -> bool:
    """Whether an argument of the command line is UTF-8 that Python took for ASCII, since the locale says so."""
    try:
        return not arg.isascii() and os.fsencode(arg).decode() != arg
    except UnicodeError:
        return False


class Command(click.Command):
    """A command that prints every error in one line, including those of the operating system, such as a full disk.

    Its context keeps the words of the command line as `meta["arguments"]`. Characters that the terminal's encoding
    lacks are printed as escapes.

    sections: its options under the headings that --help gives them, in place of `params`.
    checks: called with the context of a parsed command line; they refuse options that don't go together.
    """

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Sequence[click.Parameter]] | None = None,
        checks: Sequence[Callable[[click.Context], None]] = (),
        **kwargs: Any,
    ):
        self.sections, self.checks = sections or {}, checks
        if self.sections:
            kwargs["params"] = [parameter for section in self.sections.values() for parameter in section]
        super().__init__(*args, **kwargs)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        terminal.open_closed_streams()
        for stream in (sys.stdout, sys.stderr):
            reconfigure = getattr(stream, "reconfigure", None)  # which only streams that are files have
            if reconfigure is not None:
                reconfigure(errors="backslashreplace")
        with terminal.short_warnings(), terminal.tidy_end():
            return super().main(*args, **kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rest = [parameter for parameter in self.get_params(ctx) if parameter not in self.params]  # --help
        for heading, parameters in ({**self.sections, "Other": rest} if self.sections else {}).items():
            with formatter.section(heading):
                formatter.write_dl([record for p in parameters if (record := p.get_help_record(ctx))])
        if not self.sections:
            super().format_options(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for arg in args:
            if _is_utf8_in_another_locale(arg):
                raise UserError(f"{os.fsencode(arg).decode()}: {_locale_problem()}")
            if CONTROL.search(arg):
                raise UserError(f"{arg}: holds a control character, or one that isn't UTF-8: leave it out")
            if arg == "" or re.fullmatch(r"--[\w-]+=", arg):
                raise UserError(f"{arg or repr(arg)}: is empty: give a value, or leave the option out")
        ctx.meta["arguments"] = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            error.message = printable(error.message)  # pyright: ignore[reportAttributeAccessIssue]
            raise
        for check in self.checks:
            check(ctx)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except OSError as error:
            if error.filename is not None:
                raise UserError(f"{error.filename}: {error.strerror}: check the name and permissions") from None
            if error.errno not in OUTPUT_ERRORS:  # of a broken pipe, click ends the command quietly
                raise
            terminal.drop_unwritable_output()
            raise UserError(f"the output can't be written: {error.strerror}: make room, or name another file") from None


class LongCommand(Command):
    """A command whose results are files. If its output can no longer be written, it still runs to its end."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        terminal.open_closed_streams()
        with terminal.lossy_output():
            return super().main(*args, **kwargs)


class Group(Command, click.Group):
    """A group of commands, of which each is a `Command`."""

    command_class = Command


class EasyDict(dict):
    """A dict whose items are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


class IntList(click.ParamType):
    """Comma-separated whole numbers, `1,2,2`, or one of `words`, which stay as they are."""

    name = "list"

    def __init__(self, *words: str):
        self.words = words

    def convert(self, value: Any, param: Any, ctx: Any) -> "list[int] | str":
        if isinstance(value, list) or value in self.words:
            return value
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", value):
            words = "".join(f" or {word}" for word in self.words)
            self.fail(f"{value!r} is not a comma-separated list of whole numbers, such as 2,2,2{words}", param, ctx)
        return [int(v) for v in value.split(",")]


class FiniteRange(click.FloatRange):
    """A number within bounds that is neither nan nor beyond MAX_NUMBER, with `or_inf` perhaps infinite."""

    def __init__(self, *args: Any, or_inf: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.or_inf = or_inf

    def _describe_range(self) -> str:
        """For --help; click would call a range without bounds `x<=None`."""
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not abs(number) <= MAX_NUMBER and not (self.or_inf and number == math.inf):
            self.fail(f"{value!r} is not a finite number of at most {MAX_NUMBER:g}", param, ctx)
        return number


class WholeRange(click.IntRange):
    """A whole number within bounds, of at most MAX_WHOLE_NUMBER."""

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        number = super().convert(value, param, ctx)
        if number > MAX_WHOLE_NUMBER:
            self.fail(f"{value!r} is more than {MAX_WHOLE_NUMBER}", param, ctx)
        return number


def construct_class_by_name(*args: Any, class_name: str, **kwargs: Any) -> Any:
    """Calls `package.module.Name(*args, **kwargs)`; `class_name` is that dotted path."""
    module_name, _, name = class_name.rpartition(".")
    return getattr(importlib.import_module(module_name), name)(*args, **kwargs)


def kimg_name(nimg: int, batch: int = 1) -> str:
    """Whole kimg in six digits, with the images beyond them unless this is the first iteration of that kimg.

    So no two iterations of a run share a name, names sort by images, and ticks of whole kimg have EDM's names:
    10 240 images in batches of 256 are '000010', the 10 496 after them '000010.496'.
    """
    kimg, beyond = divmod(nimg, 1000)
    return f"{kimg:06d}" if beyond < batch else f"{kimg:06d}.{beyond:03d}"


def format_number(value: float) -> str:
    """The shortest usual text of exactly this number: 2 for 2.0, 1e-05 for 0.00001."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def format_figure(value: float) -> str:
    """A measured number with three digits, as a reader writes it: 0.0123, 4.3, 4300."""
    return format_number(float(f"{value:.3g}"))


def format_count(count: float) -> str:
    """A large count in thousands or millions, with three digits: 189k, 1.2M."""
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count / 1e3:.3g}k"


def format_time(seconds: float) -> str:
    """Seconds as the shortest of `45s`, `12m 03s`, `5h 09m 00s`, `2d 07h 15m`."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // 3600}h {s // 60 % 60:02}m {s % 60:02}s"
    return f"{s // 86400}d {s // 3600 % 24:02}h {s // 60 % 60:02}m"


class Logger:
    """While open, every line printed to stdout and stderr is also appended to a file, as plain text.

    Progress bars and escape codes are left out of the file. If the disk is full, the file misses lines and the run goes
    on. Errors: OSError when the file can't be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self._file = terminal.lossy_text(terminal.LossyFile(path, "a"), "utf-8", "strict")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Logger":
        self._stack.enter_context(self._file)
        for name in ("stdout", "stderr"):
            tee = self._stack.enter_context(contextlib.closing(_Tee(getattr(sys, name), self._file)))
            self._stack.enter_context(getattr(contextlib, f"redirect_{name}")(tee))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()


class _Tee:
    def __init__(self, stream: Any, file: Any):
        self._stream, self._file, self._lines = stream, file, terminal.WholeLines()

    def write(self, text: str) -> int:
        self._log(self._lines.add(text))
        return self._stream.write(text)

    def _log(self, text: str) -> None:
        if text:
            self._file.write(terminal.without_escapes(text))
            self._file.flush()  # a run that is killed keeps its last line

    def close(self) -> None:
        """Logs the rest of the output, which has no newline. The stream itself stays open."""
        self._log(self._lines.rest)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_plain(path: str | os.PathLike, max_bytes: int | None = None) -> io.BufferedReader:
    """Opens a plain file of at most `max_bytes` bytes for reading; links to plain files are followed.

    Other kinds of files are refused, because a pipe can block and a device such as /dev/zero has no end.
    Errors: OSError (its strerror says what is wrong) when the file isn't there, isn't plain, or is larger.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(status.st_mode) else "not a plain file"
            raise OSError(errno.EINVAL, reason, os.fspath(path))
        if max_bytes is not None and status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"larger than {max_bytes / 2**20:.4g} MiB", os.fspath(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` on success and leaves nothing behind on failure.

    The file and its name are on the disk then, so neither a kill nor a power cut leaves half a file under `path`.
    """
    path = Path(path)
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        error.filename = str(path)  # not of the temporary file, which says nothing to anybody
        raise
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private; a result is as readable as any file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def check_new_file(path: str | os.PathLike, option: str = "") -> None:
    """Makes sure, before long work, that a new file can be written at `path`; leaves nothing behind.

    option: that gives the path, for messages; empty for an argument. Errors: UserError.
    """
    named, path = f"{option}={path}" if option else str(path), Path(path)
    if os.path.lexists(path):
        raise UserError(f"{named} exists already; remove it or choose another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{named}: there is no folder {path.parent}; make it first")
    try:
        with tempfile.TemporaryFile(prefix=f".{path.name}.", suffix=".part", dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{named} can't be written ({error.strerror}); choose another folder") from None


def _sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, where the system supports that (Windows doesn't)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes what a killed `write_atomically` has left in a folder; nothing may be writing there."""
    for path in Path(folder).glob(".*.part"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps a second run out of a folder while open; the lock ends with the process, however that ends.

    Errors: UserError naming --outdir when another run has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(Path(folder) / LOCK_FILE, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--outdir={folder}: another run is at work there; wait for its end or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield
