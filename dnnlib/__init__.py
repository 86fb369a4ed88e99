"""Plumbing that needs no torch: dictionaries, class construction, downloads, logging, formatting."""

from .download import open_url
from .util import (
    Command,
    EasyDict,
    FiniteRange,
    Group,
    IntList,
    Logger,
    UserError,
    WholeRange,
    construct_class_by_name,
    format_time,
    kimg_name,
    locked_folder,
    open_plain,
    remove_unfinished,
    user_path,
    without_password,
    write_atomically,
)

__all__ = [
    "Command",
    "EasyDict",
    "FiniteRange",
    "Group",
    "IntList",
    "Logger",
    "UserError",
    "WholeRange",
    "construct_class_by_name",
    "format_time",
    "kimg_name",
    "locked_folder",
    "open_plain",
    "open_url",
    "remove_unfinished",
    "user_path",
    "without_password",
    "write_atomically",
]
