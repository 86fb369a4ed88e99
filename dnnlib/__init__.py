"""Plumbing that needs no torch: dictionaries, class construction, downloads, logging, formatting."""

from .download import open_url
from .util import (
    EasyDict,
    FiniteRange,
    IntList,
    Logger,
    UserError,
    construct_class_by_name,
    format_time,
    write_atomically,
)

__all__ = [
    "EasyDict",
    "FiniteRange",
    "IntList",
    "Logger",
    "UserError",
    "construct_class_by_name",
    "format_time",
    "open_url",
    "write_atomically",
]
