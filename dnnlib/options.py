"""Options of a command line: their types, and name, help text, type and default of each in one line."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from .errors import UserError

MAX_NUMBER = 1e30  # of options: its products with the thousand images of a kimg are finite too
MAX_WHOLE_NUMBER = 2**31 - 1


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


POSITIVE = FiniteRange(0, min_open=True)
NOT_NEGATIVE = FiniteRange(0)
PROBABILITY = FiniteRange(0, 1)
COUNT = WholeRange(1)
AS_TEXT, AS_JSON = "text", "json"  # how --dry-run shows a run
FLAG = object()  # the type of an option that takes no value


def dry_run_option(text: str) -> click.Option:
    """-n, --dry-run or --dry-run=json. text: what it shows."""
    text = f"{text}, then stop; as text, or all options as json"
    return option("-n/--dry-run", text, [AS_TEXT, AS_JSON], is_flag=False, flag_value=AS_TEXT)


def option(name: str, text: str, kind: Any = None, default: Any = None, **attributes: Any) -> click.Option:
    """An option with its help text, type and default; a help text with [default: ...] hides the latter.

    name: `--name`, or `-n/--name`. kind: a click type, a list of choices, or FLAG.
    """
    names = name.split("/")
    if kind is FLAG:
        return click.Option(names, help=text, is_flag=True, **attributes)
    if isinstance(kind, tuple | list):
        kind = click.Choice(kind)
    shown = {} if default is not None or "[default:" in text else {"show_default": False}
    return click.Option(names, help=text, type=kind, default=default, **shown, **attributes)


def is_given(context: click.Context, name: str) -> bool:
    """Whether the command line itself has the option, which a default or a recipe may set, too."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


@dataclasses.dataclass(frozen=True)
class Idle:
    """A check of a `Command`: options that do nothing in some company are refused there.

    names: of the options, as Python has them. where: the company, for the message, such as "without --gan".
    is_idle: tells it by the values of all options.

    Options with their default values pass, so that a command line may spell out everything. So do a recipe's, since
    another option may have overridden what they belong to.
    """

    names: tuple[str, ...]
    where: str
    is_idle: Callable[[dict[str, Any]], bool]

    def __call__(self, context: click.Context) -> None:
        for option in context.command.params:
            name = option.name or ""
            if name not in self.names or not is_given(context, name) or context.params[name] == option.default:
                continue
            if self.is_idle(context.params):
                raise UserError(f"{option.opts[-1]} means nothing {self.where}; leave it out")
