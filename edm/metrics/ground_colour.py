"""Whether images have the ground that their prompts ask for: "a red apple on a blue ground, left".

The ground of an image is the median colour of its two top and two bottom rows of pixels, which the captioned pictures
of `edm.small_teachers.captions` leave free. It is right if no other ground of those pictures is nearer to it than the
one that the prompt names.
"""

import re
from collections.abc import Sequence

import torch

import dnnlib
from edm.small_teachers.captions import GROUNDS

from .measure import IMAGES, Collection, Rows
from .metric import Metric, Tools
from .sources import ImageSource

FREE_ROWS = 2  # at the top, and at the bottom
NAMED = re.compile(rf"\b({'|'.join(GROUNDS)}) ground\b")


def colours(images: torch.Tensor) -> torch.Tensor:
    """The grounds of uint8 images [N, C, H, W] with 1 or 3 channels: red, green and blue, float32 [N, 3]."""
    rows = torch.cat([images[:, :, :FREE_ROWS], images[:, :, -FREE_ROWS:]], dim=2)
    return rows.float().flatten(2).median(dim=2).values.expand(-1, 3)


def named(prompts: Sequence[str]) -> list[int]:
    """Which of GROUNDS each prompt names. Errors: UserError naming the first that names none."""
    found = [NAMED.search(prompt) for prompt in prompts]
    if None in found:
        prompt = prompts[found.index(None)]
        raise dnnlib.UserError(
            f"--metrics: {prompt[:80]!r} names no ground; this metric is for prompts such as 'a red apple on a"
            f" blue ground', with {', '.join(GROUNDS)}"
        )
    return [list(GROUNDS).index(match[1]) for match in found if match]


def share_right(found: torch.Tensor, prompts: Sequence[str]) -> float:
    """The share of the images that have the ground of their prompt. found: their colours, [N, 3]."""
    nearest = torch.cdist(found, torch.tensor(list(GROUNDS.values()), dtype=torch.float32)).argmin(dim=1)
    return (nearest == torch.tensor(named(prompts))).double().mean().item()


class Grounds(Rows):
    """The colours of the grounds of images, and their prompts.

    Errors: UserError naming the first prompt that names no ground.
    """

    def __init__(self, prompts: Sequence[str]):
        named(prompts)
        super().__init__(len(prompts), 3, colours)
        self.prompts = prompts


class GroundMetric(Metric):
    """The share of images whose ground is right."""

    kind, needs = "ground", ()

    @property
    def least(self) -> int:
        return 1

    @property
    def shares(self) -> str:
        return self.kind

    def collect(self, source: ImageSource, tools: Tools) -> Collection:
        texts, own = self.prompts_of(source)
        return Collection(self.num, IMAGES, Grounds([texts[number] for number in own]))

    def values(self, found: Grounds, tools: Tools) -> dict[str, float]:
        return {"ground": share_right(found.values[: self.num], found.prompts[: self.num])}
