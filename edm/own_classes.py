"""--classes: networks of your own classes on the command line. It doesn't import torch, so that --help is quick."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from dnnlib import UserError

HELP = (
    "Classes of your own that a network's file may name: module:Class[,module:Class], or Class=module:function for a"
    " function without arguments that builds the network. Modules are also looked for in the current directory"
)
ENTRY = re.compile(r"(?:(?P<name>\w+)=)?(?P<module>[\w.]+):(?P<attribute>\w+)")


def classes_option(function: Any) -> Any:
    """Adds --classes to a command; its value arrives as the argument `classes`."""
    return click.option("--classes", metavar="MODULE:CLASS", help=HELP)(function)


def own_classes(text: str | None) -> dict[str, Callable[..., Any]]:
    """{class name: class or function} of an option --classes, imported; empty for None.

    Errors: UserError when a module can't be imported, has no such attribute, or the attribute makes no network.
    """
    return dict(_imported(entry.strip()) for entry in text.split(",")) if text is not None else {}


def _imported(entry: str) -> tuple[str, Callable[..., Any]]:
    import torch

    found = ENTRY.fullmatch(entry)
    if found is None:
        raise UserError(f"--classes={entry}: give module:Class, such as mynets.unet:UNet")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        module = importlib.import_module(found["module"])
    except (Exception, SystemExit) as error:  # a module may raise anything
        reason = " ".join(str(error).split())[:300] or "no reason given"
        raise UserError(
            f"--classes={entry}: {found['module']} can't be imported ({type(error).__name__}: {reason}); run this"
            " in the folder that holds it, or install it"
        ) from None
    place = getattr(module, "__file__", None) or "a package without a file"
    try:
        made = getattr(module, found["attribute"])
    except AttributeError:
        raise UserError(
            f"--classes={entry}: {found['module']} ({place}) has no {found['attribute']}; name one of its classes"
        ) from None
    if inspect.isclass(made) and issubclass(made, torch.nn.Module):
        return found["name"] or made.__name__, made
    if inspect.isclass(made) or not callable(made):
        raise UserError(f"--classes={entry}: is no class of networks (torch.nn.Module); name one")
    if found["name"] is None:
        raise UserError(f"--classes={entry}: is a function; give the class that it builds too: Class={entry}")
    return found["name"], made
