"""The classes that a network has learnt: those of its label_dim classes that had images in its training.

A network says so in its metadata, as ranges such as "1-3,7", where some classes had no images. Without a word there,
as in files of other programs, it has learnt all of them.
"""

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch

from dnnlib import UserError


def as_ranges(classes: Iterable[int]) -> str:
    """Class numbers in ascending order as text: [1, 2, 3, 7] is "1-3,7"."""
    runs = (list(run) for _, run in groupby(enumerate(classes), lambda pair: pair[1] - pair[0]))
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs)


def metadata_of(classes: list[int], label_dim: int) -> dict[str, str]:
    """What the metadata of a network say that was trained on images of these classes."""
    return {"classes": as_ranges(classes)} if len(classes) < label_dim else {}


def learnt_classes(net: Any) -> list[int] | None:
    """The classes that a network has learnt, in ascending order; None for all of its label_dim classes.

    Errors: UserError when its metadata name none, or others than it has.
    """
    text = getattr(net, "metadata", {}).get("classes")
    if text is None or not net.label_dim:
        return None
    classes: list[int] = []
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not (classes[-1] if classes else -1) < first <= last < net.label_dim:
            raise UserError(f"the network's metadata say classes={str(text)[:80]!r}, but it has {net.label_dim}")
        classes += range(first, last + 1)
    return classes


class ClassDraws:
    """Draws classes for a network: every class that it has learnt is as likely, no other is drawn.

    Errors: UserError when the metadata of the network name no classes, or others than it has.
    """

    def __init__(self, net: Any, device: torch.device):
        self._label_dim = net.label_dim
        learnt = learnt_classes(net)
        self._learnt = None if learnt is None else torch.tensor(learnt, device=device)

    def one_hot(self, randint: Callable[[int], torch.Tensor]) -> torch.Tensor | None:
        """Labels float32 [N, label_dim]; None for an unconditional network.

        randint: gives whole numbers [N] int64 from 0 to below its argument, on the device of this object.
        """
        if not self._label_dim:
            return None
        if self._learnt is None:
            classes = randint(self._label_dim)
        else:
            classes = self._learnt[randint(len(self._learnt))]
        return torch.nn.functional.one_hot(classes, self._label_dim).float()


def check_class(net: Any, class_idx: int) -> None:
    """Errors: UserError naming --class when the network has no such class, or hasn't learnt it."""
    if not net.label_dim:
        raise UserError("--class: this network is unconditional; leave the option out")
    if not 0 <= class_idx < net.label_dim:
        raise UserError(f"--class={class_idx}: the network's classes are 0 to {net.label_dim - 1}")
    classes = learnt_classes(net)
    if classes is not None and class_idx not in classes:
        raise UserError(f"--class={class_idx} had no images in training; choose one of {as_ranges(classes)}")
