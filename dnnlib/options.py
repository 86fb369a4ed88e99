"""Options of a command line as a table: name, help text, type and default in one line each."""

from typing import Any

import click

from .util import FiniteRange, WholeRange

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
