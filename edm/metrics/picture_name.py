"""Whether images have the picture that their prompts ask for: "a red apple on a blue ground, left".

An image is compared, by a model such as CLIP, with its own prompt and with the prompts of all other pictures on the
same ground at the same place. So neither colour nor place helps to find its own.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

import dnnlib
from edm.small_teachers.captions import DEMO_PICTURES, caption

from .measure import IMAGES, Collection, Rows
from .metric import ENCODER, Metric, TextImageEncoder, Tools
from .sources import ImageSource
from .text_alignment import align

PROMPT = re.compile(r"an? (.+) on an? (\w+) ground, (\w+)")


def parsed(prompts: Sequence[str]) -> list[tuple[str, str, str]]:
    """(name of the picture, ground, place) of each prompt. Errors: UserError naming the first that has none."""
    found = [PROMPT.fullmatch(prompt) for prompt in prompts]
    if None in found:
        prompt = prompts[found.index(None)]
        raise dnnlib.UserError(
            f"--metrics: {prompt[:80]!r} isn't like 'a red apple on a blue ground, left'; this metric ranks names of"
            " pictures in such prompts only"
        )
    return [(match[1], match[2], match[3]) for match in found if match]


class NamedImages(Rows):
    """The embeddings of images, and what their prompts ask for; `names` are those of all pictures.

    Errors: UserError naming the first prompt that names no picture.
    """

    def __init__(self, encoder: TextImageEncoder, prompts: Sequence[str]):
        self.asked = parsed(prompts)
        self.names = list(dict.fromkeys([*DEMO_PICTURES, *(name for name, _, _ in self.asked)]))
        super().__init__(len(prompts), encoder.embedding_dim, encoder.embed_images)

    def ranks(self, num: int, encoder: TextImageEncoder) -> torch.Tensor:
        """Where the own prompts of the first `num` images rank among those of all names, from 1; float64 [num]."""
        scenes: dict[tuple[str, str], list[int]] = {}
        for image, (_, ground, place) in enumerate(self.asked[:num]):
            scenes.setdefault((ground, place), []).append(image)
        ranks = torch.zeros(num, dtype=torch.float64)
        for (ground, place), images in scenes.items():
            prompts = [caption(name, ground, place) for name in self.names]
            own = torch.tensor([self.names.index(self.asked[image][0]) for image in images])
            texts = encoder.embed_texts(prompts)
            ranks[images] = align(self.values[images].to(texts.device), texts, prompts, own).ranks
        return ranks


class NameMetric(Metric):
    """The share of images whose own prompt ranks first among those of all names, and its mean rank."""

    kind, needs = "name", (ENCODER,)

    @property
    def shares(self) -> str:
        return self.kind

    def collect(self, source: ImageSource, tools: Tools) -> Collection:
        assert tools.encoder is not None
        texts, own = self.prompts_of(source)
        return Collection(self.num, IMAGES, NamedImages(tools.encoder, [texts[number] for number in own]))

    def values(self, found: NamedImages, tools: Tools) -> dict[str, float]:
        assert tools.encoder is not None
        ranks = found.ranks(self.num, tools.encoder)
        return {"name": (ranks <= 1).double().mean().item(), "mean_rank": ranks.mean().item()}

    def details(self, found: NamedImages) -> dict[str, Any]:
        return {"ranked_among": len(found.names)}
