"""Commands that end every error in one line, whatever happens to their output."""

import errno
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from . import terminal
from .errors import CONTROL, UserError, printable
from .files import locale_problem

OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a full or broken disk


class Command(click.Command):
    """A command that prints every error in one line, including operating-system errors such as a full disk.

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
                raise UserError(f"{os.fsencode(arg).decode()}: {locale_problem()}")
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


def _is_utf8_in_another_locale(arg: str) -> bool:
    """Whether an argument of the command line is UTF-8 that Python took for ASCII, since the locale says so."""
    try:
        return not arg.isascii() and os.fsencode(arg).decode() != arg
    except UnicodeError:
        return False
