"""Plumbing that needs no torch: commands and their options, errors, files, downloads, logs, numbers as text."""

from .commands import Command, Group, LongCommand
from .download import open_url
from .errors import UserError
from .files import check_new_file, locked_folder, open_plain, remove_unfinished, user_path, write_atomically
from .formats import format_count, format_figure, format_number, format_time, kimg_name
from .log_file import Logger
from .options import FiniteRange, IntList, WholeRange
from .passwords import without_password, without_passwords
from .util import EasyDict

__all__ = [
    "Command",
    "EasyDict",
    "FiniteRange",
    "Group",
    "IntList",
    "Logger",
    "LongCommand",
    "UserError",
    "WholeRange",
    "check_new_file",
    "format_count",
    "format_figure",
    "format_number",
    "format_time",
    "kimg_name",
    "locked_folder",
    "open_plain",
    "open_url",
    "remove_unfinished",
    "user_path",
    "without_password",
    "without_passwords",
    "write_atomically",
]
