"""What conditions a network: its class, or a prompt. The losses, guidance and sampling pass conditions on without
looking inside; they are float32, one row per image.

A network says in its metadata which of its classes had images in its training, as ranges such as "1-3,7", where some
had none. Where the metadata say nothing, as in files of other programs, it has learnt them all.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, TypeAlias

import torch

from dnnlib import UserError

SHUFFLE_SEED = 0  # of the order in which seeds meet prompts


class Classes:
    """Classes as one-hot vectors, float32 [N, label_dim]; the condition of an unconditional network is None.

    label_dim: how many classes there are; 0 for an unconditional network.
    learnt:    the classes that are drawn, in ascending order; None for all of them.
    """

    def __init__(self, label_dim: int, learnt: list[int] | None = None):
        self.label_dim = label_dim
        self._learnt = None if learnt is None else torch.tensor(learnt)

    @classmethod
    def of(cls, net: Any) -> "Classes":
        """The classes that a network has learnt.

        Errors: UserError when its metadata name none, or others than it has.
        """
        return cls(net.label_dim, learnt_classes(net))

    def draw(
        self,
        n: int,
        device: torch.device | str = "cpu",
        randint: Callable[[int], torch.Tensor] | None = None,
    ) -> torch.Tensor | None:
        """Conditions of n images: every class that was learnt is as likely, no other is drawn.

        randint: gives whole numbers [n] int64 from 0 to below its argument, on `device`; None: torch's generator.
        """
        if not self.label_dim:
            return None
        randint = randint or (lambda high: torch.randint(high, [n], device=device))
        if self._learnt is None:
            return self.one_hot(randint(self.label_dim))
        self._learnt = self._learnt.to(device)
        return self.one_hot(self._learnt[randint(len(self._learnt))])

    def one_hot(self, classes: torch.Tensor) -> torch.Tensor:
        """The conditions that stand for class numbers [N]."""
        return torch.nn.functional.one_hot(classes, self.label_dim).float()

    def of_seeds(
        self, seeds: Sequence[int], device: torch.device | str, randint: Callable[[int], torch.Tensor]
    ) -> torch.Tensor | None:
        """The conditions of the images of these seeds: drawn by `randint`, which depends on the seeds."""
        return self.draw(len(seeds), device, randint)

    def null(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """The conditions of n images with which a network answers without knowing the class."""
        return torch.zeros([n, self.label_dim], device=device) if self.label_dim else None

    @staticmethod
    def null_like(condition: torch.Tensor) -> torch.Tensor:
        """The conditions with which a network answers without knowing the class: zeros, as in EDM's label dropout."""
        return torch.zeros_like(condition)

    @staticmethod
    def drop(condition: torch.Tensor | None, probability: float) -> torch.Tensor | None:
        """Replaces each image's condition by the null condition with the given probability; 0 draws nothing."""
        if condition is None or not probability:
            return condition
        return condition * (torch.rand([len(condition), 1], device=condition.device) >= probability)

    @staticmethod
    def groups(condition: torch.Tensor | None) -> torch.Tensor | None:
        """Which class each image belongs to, one-hot, for statistics by class."""
        return condition


class Prompts:
    """Prompts as a text encoder gives them, float32 [N, prompt_dim] (`edm.text_encoders`).

    encoded: [P, prompt_dim] float32, of all prompts; rows are read when they are drawn, so a mapped file will do.
    null:    [prompt_dim], with which a network answers without knowing the prompt, usually the empty prompt's.
    texts:   the prompts themselves, P of them.
    in_order: whether seeds meet the prompts in their own order, or shuffled.
    """

    label_dim = 0

    def __init__(self, encoded: Any, null: torch.Tensor, texts: Sequence[str], in_order: bool = False):
        self._encoded, self._null, self.texts = encoded, null, texts
        order = torch.arange(len(texts))
        if not in_order:
            order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
        self._order = order

    def __deepcopy__(self, _memo: Any) -> "Prompts":
        return self  # it never changes, and may be large

    @property
    def prompt_dim(self) -> int:
        return len(self._null)

    def draw(
        self,
        n: int,
        device: torch.device | str = "cpu",
        randint: Callable[[int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Conditions of n images: every prompt is as likely. randint: as for `Classes.draw`."""
        randint = randint or (lambda high: torch.randint(high, [n], device=device))
        return self._rows(randint(len(self.texts)), device)

    def all(self) -> torch.Tensor:
        """The conditions of all prompts, [P, prompt_dim], in the order of `texts`."""
        return self._rows(torch.arange(len(self.texts)), "cpu")

    def of_seeds(
        self, seeds: Sequence[int], device: torch.device | str, _randint: Callable[[int], torch.Tensor]
    ) -> torch.Tensor:
        """The conditions of the images of these seeds. P seeds in a row have each of P prompts once."""
        return self._rows(torch.tensor(self.numbers_of_seeds(seeds)), device)

    def numbers_of_seeds(self, seeds: Sequence[int]) -> list[int]:
        """Which prompts the images of these seeds have, from 0."""
        return [int(self._order[seed % len(self.texts)]) for seed in seeds]

    def _rows(self, numbers: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        return torch.as_tensor(self._encoded[numbers.cpu().numpy()], dtype=torch.float32).to(device)

    def null(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The conditions of n images with which a network answers without knowing the prompt."""
        return self._null.to(device).expand(n, -1)

    def null_like(self, condition: torch.Tensor) -> torch.Tensor:
        """The conditions with which a network answers without knowing the prompt."""
        return self.null(len(condition), condition.device)

    def drop(self, condition: torch.Tensor | None, probability: float) -> torch.Tensor | None:
        """Replaces each image's prompt by the null condition with the given probability; 0 draws nothing."""
        if condition is None or not probability:
            return condition
        kept = torch.rand([len(condition), 1], device=condition.device) >= probability
        return torch.where(kept, condition, self.null_like(condition))

    @staticmethod
    def groups(_condition: torch.Tensor | None) -> None:
        """Prompts have no classes."""
        return


Conditions: TypeAlias = Classes | Prompts


def conditions_of(net: Any) -> Conditions:
    """What a network is conditioned on: its classes, or the prompts in its attribute `prompts`.

    Errors: UserError when it was trained on prompts and has none, or its metadata name classes that it hasn't.
    """
    if not getattr(net, "prompt_dim", 0):
        return Classes.of(net)
    prompts = getattr(net, "prompts", None)
    if prompts is None:
        raise UserError("this network makes images of prompts: give some with --prompts=FILE")
    return prompts


def blank_condition(net: Any, n: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
    """Zeros in the shape of n conditions of a network; None for an unconditional one."""
    width = net.label_dim or getattr(net, "prompt_dim", 0)
    return torch.zeros([n, width], device=device) if width else None


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


def check_class(net: Any, class_idx: int) -> None:
    """Errors: UserError naming --class when the network has no such class, or hasn't learnt it."""
    if not net.label_dim:
        raise UserError("--class: this network is unconditional; leave the option out")
    if not 0 <= class_idx < net.label_dim:
        raise UserError(f"--class={class_idx}: the network's classes are 0 to {net.label_dim - 1}")
    classes = learnt_classes(net)
    if classes is not None and class_idx not in classes:
        raise UserError(f"--class={class_idx} had no images in training; choose one of {as_ranges(classes)}")
