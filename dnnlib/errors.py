"""Errors that the user can mend, in one line that a terminal can show."""

import re

import click

from .passwords import without_password

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes that aren't UTF-8
MAX_MESSAGE = 2000  # characters; longer ones, of overlong options, lose their middle


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
