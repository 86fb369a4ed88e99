"""Leaves users, passwords and tokens out of what is printed and recorded."""

import re
from typing import Any


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
