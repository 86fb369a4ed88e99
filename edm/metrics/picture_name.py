"""Whether images have the picture that their prompts ask for: "a red apple on a blue ground, left".

An image is compared, by a model such as CLIP, with its own prompt and with those that differ from it in the name of the
picture alone. So nothing else in the prompt, such as a colour or a place, helps to find its own.
"""

from collections.abc import Sequence
from typing import Any

import torch

import dnnlib

from .caption_template import CAPTIONS_FILE, CaptionTemplate
from .measure import IMAGES, Collection, Rows
from .metric import CAPTIONS, ENCODER, Metric, TextImageEncoder, Tools
from .sources import ImageSource
from .text_alignment import align

NAME = "name"  # the slot in a template of captions


class NamedImages(Rows):
    """The embeddings of images, and what their prompts ask for; `names` are those of all pictures.

    Errors: UserError when captions have no name, or naming the first prompt that isn't built as they are.
    """

    def __init__(self, encoder: TextImageEncoder, prompts: Sequence[str], captions: CaptionTemplate):
        if not captions.names:
            raise dnnlib.UserError(f"--metrics: {CAPTIONS_FILE} lists no names; add them, or leave that metric out")
        self.captions, self.asked = captions, [captions.parts(prompt) for prompt in prompts]
        self.names = list(dict.fromkeys([*captions.names, *(parts[NAME] for parts in self.asked)]))
        super().__init__(len(prompts), encoder.embedding_dim, encoder.embed_images)

    def ranks(self, num: int, encoder: TextImageEncoder) -> torch.Tensor:
        """Where the own prompts of the first `num` images rank among those of all names, from 1; float64 [num]."""
        scenes: dict[str, list[int]] = {}  # images by the rest of their prompts
        for image, parts in enumerate(self.asked[:num]):
            scenes.setdefault(self.captions.caption({**parts, NAME: ""}), []).append(image)
        ranks = torch.zeros(num, dtype=torch.float64)
        for images in scenes.values():
            rest = self.asked[images[0]]
            prompts = [self.captions.caption({**rest, NAME: name}) for name in self.names]
            own = torch.tensor([self.names.index(self.asked[image][NAME]) for image in images])
            texts = encoder.embed_texts(prompts)
            ranks[images] = align(self.values[images].to(texts.device), texts, prompts, own).ranks
        return ranks


class NameMetric(Metric):
    """The share of images whose own prompt ranks first among those of all names, and its mean rank."""

    kind, needs = "name", (ENCODER, CAPTIONS)

    @property
    def shares(self) -> str:
        return self.kind

    def collect(self, source: ImageSource, tools: Tools) -> Collection:
        assert tools.encoder is not None
        assert tools.captions is not None
        texts, own = self.prompts_of(source)
        images = NamedImages(tools.encoder, [texts[number] for number in own], tools.captions)
        return Collection(self.num, IMAGES, images)

    def values(self, found: NamedImages, tools: Tools) -> dict[str, float]:
        assert tools.encoder is not None
        ranks = found.ranks(self.num, tools.encoder)
        return {"name": (ranks <= 1).double().mean().item(), "mean_rank": ranks.mean().item()}

    def details(self, found: NamedImages) -> dict[str, Any]:
        return {"ranked_among": len(found.names)}
