"""Whether images have the ground that their prompts ask for: "a red apple on a blue ground, left".

The ground of an image is the median colour of its two top and two bottom rows of pixels, for pictures that leave those
free. It is right if the colour of no other ground that prompts may ask for (`edm.metrics.caption_template`) is nearer.
"""

from collections.abc import Sequence

import torch

import dnnlib

from .caption_template import CAPTIONS_FILE, CaptionTemplate
from .measure import IMAGES, Collection, Rows
from .metric import CAPTIONS, Metric, Tools
from .sources import ImageSource

FREE_ROWS = 2  # at the top, and at the bottom


def colours(images: torch.Tensor) -> torch.Tensor:
    """The grounds of uint8 images [N, C, H, W] with 1 or 3 channels: red, green and blue, float32 [N, 3]."""
    rows = torch.cat([images[:, :, :FREE_ROWS], images[:, :, -FREE_ROWS:]], dim=2)
    return rows.float().flatten(2).median(dim=2).values.expand(-1, 3)


def asked_grounds(prompts: Sequence[str], captions: CaptionTemplate) -> list[int]:
    """Which of `captions.grounds` each prompt asks for.

    Errors: UserError when there are none, or naming the first prompt that asks for none of them.
    """
    if not captions.grounds:
        raise dnnlib.UserError(f"--metrics: {CAPTIONS_FILE} lists no grounds; add them, or leave that metric out")
    numbers, found = {text: number for number, text in enumerate(captions.grounds)}, []
    for prompt in prompts:
        ground = captions.parts(prompt)["ground"]
        if ground not in numbers:
            raise dnnlib.UserError(
                f"--metrics: {prompt[:80]!r} asks for no ground that {CAPTIONS_FILE} lists: {', '.join(numbers)[:200]}"
            )
        found.append(numbers[ground])
    return found


def share_right(found: torch.Tensor, prompts: Sequence[str], captions: CaptionTemplate) -> float:
    """The share of the images that have the ground of their prompt. found: their colours, [N, 3]."""
    grounds = torch.tensor(list(captions.grounds.values()), dtype=torch.float32)
    nearest = torch.cdist(found, grounds).argmin(dim=1)
    return (nearest == torch.tensor(asked_grounds(prompts, captions))).double().mean().item()


class Grounds(Rows):
    """The colours of the grounds of images, and their prompts. Errors: UserError as for `asked_grounds`."""

    def __init__(self, prompts: Sequence[str], captions: CaptionTemplate):
        asked_grounds(prompts, captions)
        super().__init__(len(prompts), 3, colours)
        self.prompts = prompts


class GroundMetric(Metric):
    """The share of images whose ground is right."""

    kind, needs = "ground", (CAPTIONS,)

    @property
    def least(self) -> int:
        return 1

    @property
    def shares(self) -> str:
        return self.kind

    def collect(self, source: ImageSource, tools: Tools) -> Collection:
        assert tools.captions is not None
        texts, own = self.prompts_of(source)
        return Collection(self.num, IMAGES, Grounds([texts[number] for number in own], tools.captions))

    def values(self, found: Grounds, tools: Tools) -> dict[str, float]:
        assert tools.captions is not None
        return {"ground": share_right(found.values[: self.num], found.prompts[: self.num], tools.captions)}
