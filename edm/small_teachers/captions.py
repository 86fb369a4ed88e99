"""Pictures with captions, for small text-to-image teachers: emoji on coloured grounds."""

import itertools
import unicodedata
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from edm.metrics.caption_template import CaptionTemplate

from .pictures import EMOJI_CANVAS, EMOJI_FONT, EMOJI_SIZE, Picture, check_source

FOOD_AND_ANIMALS = ((0x1F32D, 0x1F380), (0x1F400, 0x1F43D))
GROUNDS = {
    "red": (200, 40, 40),
    "orange": (240, 150, 40),
    "yellow": (245, 225, 80),
    "green": (60, 160, 70),
    "blue": (50, 90, 200),
    "purple": (130, 60, 160),
    "white": (245, 245, 245),
    "black": (20, 20, 24),
}
PLACES = ("left", "middle", "right")
TEMPLATE = "{name} on {ground} ground, {place}"
# The pictures of the embedded text-to-image teacher, which is too small to learn all of them.
DEMO_PICTURES = (
    *("hot dog", "cactus", "tulip", "sunflower", "maple leaf", "four leaf clover", "mushroom", "tomato"),
    *("aubergine", "grapes", "watermelon", "lemon", "banana", "pineapple", "red apple", "green apple"),
    *("pear", "cherries", "strawberry", "hamburger", "slice of pizza", "french fries", "soft ice cream", "doughnut"),
    *("chocolate bar", "lollipop", "popcorn", "beer mug", "octopus", "snail", "lady beetle", "tropical fish"),
    *("turtle", "whale", "penguin", "pig face", "frog face", "panda face", "cat face", "tiger face"),
)
SHIFT = 1  # pixels that a picture may be off its place
SPRITE = 22  # pixels that a picture is wide
HELD_OUT = 10  # one pair of picture and ground in so many is kept out of training


class CaptionedEmoji:
    """Pictures of food and animals, each on a ground of one colour, with captions such as "a red apple on a blue
    ground, left".

    seed: of the draws. names: of the pictures, all of them if None. Errors: UserError when the font isn't there.
    """

    resolution = 32

    def __init__(self, seed: int = 0, names: Sequence[str] | None = None):
        check_source(EMOJI_FONT.is_file(), "apt install fonts-noto-color-emoji")
        font = ImageFont.truetype(str(EMOJI_FONT), EMOJI_SIZE)
        blank = font.getbbox("\uffff")
        self._sprites, self.names = [], []
        for character in (chr(code) for first, end in FOOD_AND_ANIMALS for code in range(first, end)):
            name = unicodedata.name(character, "").lower().replace("-", " ")
            if name and font.getbbox(character) != blank and (names is None or name in names):
                image = Image.new("RGBA", (EMOJI_CANVAS, EMOJI_CANVAS))
                ImageDraw.Draw(image).text((0, 4), character, font=font, embedded_color=True)
                self._sprites.append(image.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))
                self.names.append(name)
        self._draws = np.random.default_rng(seed)

    def captions(self, held_out: bool) -> list[str]:
        """All captions, of the pairs of picture and ground that are held out of training or of the others."""
        return [
            caption(name, ground, place)
            for name in self.names
            for ground in GROUNDS
            if is_held_out(name, ground) == held_out
            for place in PLACES
        ]

    def draw(self, n: int) -> tuple[torch.Tensor, list[str]]:
        """(pictures, float32 [n, 3, 32, 32] in [-1, 1]; their captions), none of them held out."""
        pictures, captions = [], []
        while len(pictures) < n:
            index, place = self._draws.integers(len(self.names)), self._draws.integers(len(PLACES))
            ground = list(GROUNDS)[self._draws.integers(len(GROUNDS))]
            if not is_held_out(self.names[index], ground):
                pictures.append(
                    self.picture(int(index), ground, PLACES[place], self._draws.integers(-SHIFT, SHIFT + 1, 2).tolist())
                )
                captions.append(caption(self.names[index], ground, PLACES[place]))
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return images.float() / 127.5 - 1, captions

    def all(self) -> Iterator[Picture]:
        """Every picture that isn't held out, once, with its name's number as the class."""
        for index, name in enumerate(self.names):
            for ground, place in itertools.product(GROUNDS, PLACES):
                if not is_held_out(name, ground):
                    for shift in itertools.product(range(-SHIFT, SHIFT + 1), repeat=2):
                        yield Image.fromarray(self.picture(index, ground, place, shift)), index

    def picture(self, index: int, ground: str, place: str, shift: Sequence[int] = (0, 0)) -> np.ndarray:
        """One picture, uint8 [32, 32, 3]. shift: of the sprite in pixels, right and down."""
        image = Image.new("RGBA", (self.resolution, self.resolution), (*GROUNDS[ground], 255))
        space = self.resolution - SPRITE
        left = PLACES.index(place) * space // (len(PLACES) - 1) + int(shift[0])
        over = Image.new("RGBA", image.size)
        over.paste(self._sprites[index], (left, space // 2 + int(shift[1])))
        return np.asarray(Image.alpha_composite(image, over).convert("RGB"))


def caption(name: str, ground: str, place: str) -> str:
    return TEMPLATE.format(name=_with_article(name), ground=_with_article(ground), place=place)


def template(names: Sequence[str]) -> CaptionTemplate:
    """How the captions of pictures with these names are built, for the metrics that look for parts of them."""
    grounds = {_with_article(ground): colour for ground, colour in GROUNDS.items()}
    return CaptionTemplate(TEMPLATE, [_with_article(name) for name in names], grounds)


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def is_held_out(name: str, ground: str) -> bool:
    return zlib.crc32(f"{name} {ground}".encode()) % HELD_OUT == 0
