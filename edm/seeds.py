"""What seeds draw: the noise and the class of an image, and of images on the way from one seed's to another's."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dnnlib import UserError
from training.conditions import Conditions

SEEDS = 2**32  # how many different seeds there are
SMALL_ANGLE = 1e-4  # radians between two noises, up to which the way between them is straight


@dataclasses.dataclass(frozen=True)
class Between:
    """A place on the way from one seed's image to another's. share: how far, from 0 at the start to 1 at the end."""

    start: int
    end: int
    share: float

    def __str__(self) -> str:
        return f"{self.start} to {self.end}"


Seeds: TypeAlias = Iterable[int | Between]  # all of one kind


def strips(seeds: Sequence[int], count: int) -> list[Between]:
    """`count` places, evenly spaced, from each seed to the next, both included."""
    return [Between(a, b, i / (count - 1)) for a, b in itertools.pairwise(seeds) for i in range(count)]


class SeededDraws:
    """One CPU generator per image, so that an image depends on its seed alone, not on the batch or the device."""

    def __init__(self, seeds: Iterable[int], device: torch.device):
        seeds = [int(seed) for seed in seeds]
        for seed in seeds:
            if not 0 <= seed < SEEDS:  # torch's generator has only these: 2**32 would repeat the image of seed 0
                raise UserError(f"--seeds: there is no seed {seed}; seeds go from 0 to {SEEDS - 1}")
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._seeds, self._device = seeds, device

    def randn(self, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape]"""
        draws = [torch.randn(*shape, generator=g, dtype=dtype) for g in self._generators]
        return torch.stack(draws).to(self._device)

    def randn_like(self, x: Tensor) -> Tensor:
        return self.randn(x.shape[1:], x.dtype)

    def randint(self, high: int) -> Tensor:
        """[N] int64"""
        return torch.cat([torch.randint(high, [1], generator=g) for g in self._generators]).to(self._device)

    def condition(self, conditions: Conditions) -> Tensor | None:
        """What each image shows, as its seed draws it."""
        return conditions.of_seeds(self._seeds, self._device, self.randint)


class BlendedDraws:
    """Draws of places between two seeds: noise on the arc from one's to the other's, and a mixture of both classes."""

    def __init__(self, places: Sequence[Between], device: torch.device):
        cpu = torch.device("cpu")  # every device has the same pictures, and not every one has float64
        self._starts = SeededDraws([place.start for place in places], cpu)
        self._ends = SeededDraws([place.end for place in places], cpu)
        self._shares, self._device = torch.tensor([place.share for place in places]), device

    def randn(self, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape]"""
        shape = list(shape)
        start, end = self._starts.randn(shape, dtype), self._ends.randn(shape, dtype)
        return on_arc(start, end, self._shares).to(self._device)

    def randn_like(self, x: Tensor) -> Tensor:
        return self.randn(x.shape[1:], x.dtype)

    def condition(self, conditions: Conditions) -> Tensor | None:
        """What each image shows."""
        start, end = self._starts.condition(conditions), self._ends.condition(conditions)
        if start is None or end is None:
            return None
        return torch.lerp(start, end, self._shares[:, None]).to(self._device)


def draws_of(seeds: Sequence[Any], device: torch.device) -> SeededDraws | BlendedDraws:
    """The draws of seeds, or of places between seeds. Errors: UserError when there is no such seed."""
    is_blended = bool(seeds) and isinstance(seeds[0], Between)
    return BlendedDraws(seeds, device) if is_blended else SeededDraws(seeds, device)


def on_arc(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Points on the arc from one noise to another, where its length stays typical.

    start, end: [N, ...]. shares: [N], 0 at the start and 1 at the end. Returns [N, ...].
    """
    a, b = start.flatten(1).double(), end.flatten(1).double()
    cosine = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    angle, shares = cosine.clamp(-1, 1).acos(), shares.double()
    straight = angle < SMALL_ANGLE
    of_a = torch.where(straight, 1 - shares, ((1 - shares) * angle).sin() / angle.sin())
    of_b = torch.where(straight, shares, (shares * angle).sin() / angle.sin())
    return (of_a[:, None] * a + of_b[:, None] * b).reshape(start.shape).to(start.dtype)
