"""Options of a command line as a table: name, help text, type and default in one line each."""

from typing import Any

import click

from .util import FiniteRange, WholeRange

POSITIVE = FiniteRange(0, min_open=True)
NOT_NEGATIVE = FiniteRange(0)
PROBABILITY = FiniteRange(0, 1)
COUNT = WholeRange(1)
FLAG = object()  # the type of an option that takes no value


def option(name: str, text: str, kind: Any = None, default: Any = None, **attributes: Any) -> click.Option:
    """An option with its help text, type and default; a help text with [default: ...] hides the latter.

    name: `--name`, or `-n/--name`. kind: a click type, a list of choices, or FLAG.
    """
    if kind is FLAG:
        return click.Option(name.split("/"), help=text, is_flag=True, **attributes)
    if isinstance(kind, tuple | list):
        kind = click.Choice(kind)
    shown = {} if default is not None or "[default:" in text else {"show_default": False}
    return click.Option([name], help=text, type=kind, default=default, **shown, **attributes)
