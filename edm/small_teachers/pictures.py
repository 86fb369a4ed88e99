"""Small pictures that come with packages: fonts, an icon theme, scikit-learn, scikit-image, Fashion-MNIST.

Each source yields the same pictures in the same order wherever the same version of its package is installed.
Errors: UserError, before the first picture, naming the missing package.
"""

import gzip
import importlib.util
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dnnlib import UserError

FASHION = Path("/usr/share/datasets/fashion-mnist")
FONTS = Path("/usr/share/fonts")
EMOJI_FONT = FONTS / "truetype/noto/NotoColorEmoji.ttf"
EMOJI_SIZE, EMOJI_CANVAS = 109, 136  # the only size of the font's bitmaps; their width in pixels
EMOJI_RANGES = ((0x1F300, 0x1F650), (0x1F680, 0x1F6FD), (0x1F7E0, 0x1F7EC), (0x1F90C, 0x1FA00), (0x1FA70, 0x1FAF9))
ICONS, ICON_SIZE = Path("/usr/share/icons/oxygen/base/32x32"), 32
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "rocket.jpg")
CROPS = 6000
DARK, WHITE = (18, 18, 26), (255, 255, 255)
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Picture = tuple[Image.Image, int | None]  # an image and its class


def fashion(resolution: int) -> Iterator[Picture]:
    """The 60 000 training images of Fashion-MNIST, gray on black, with their 10 classes."""
    files = [FASHION / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    check_source(all(file.is_file() for file in files), "apt install dataset-fashion-mnist")
    pixels, labels = (gzip.decompress(file.read_bytes()) for file in files)
    for image, label in zip(np.frombuffer(pixels[16:], np.uint8).reshape(-1, 28, 28), labels[8:]):
        yield _resized(Image.fromarray(image), resolution), label


def digits(resolution: int) -> Iterator[Picture]:
    """The 1797 handwritten digits of scikit-learn, 8x8 pixels, gray on black, with their 10 classes."""
    check_source(importlib.util.find_spec("sklearn") is not None, "pip install scikit-learn")
    from sklearn.datasets import load_digits

    data: Any = load_digits()  # scikit-learn has no annotations
    for image, label in zip(data["images"], data["target"]):
        yield _resized(Image.fromarray((image * (255 / 16)).astype(np.uint8)), resolution), int(label)


def letters(resolution: int) -> Iterator[Picture]:
    """The capital letters of all installed fonts that have them, white on black, with their 26 classes."""
    size = 4 * resolution
    usable = [font for path in sorted(FONTS.rglob("*")) if (font := _latin_font(path, size * 3 // 4))]
    check_source(bool(usable), "apt install fonts-dejavu fonts-liberation fonts-urw-base35")
    for font in usable:
        for label, letter in enumerate(CAPITALS):
            image = Image.new("L", (size, size))
            ImageDraw.Draw(image).text((size / 2, size / 2), letter, 255, font, anchor="mm")
            yield _resized(image, resolution), label


def _latin_font(path: Path, size: int) -> ImageFont.FreeTypeFont | None:
    """The font in a file; None unless it has 26 different capital letters."""
    if path.suffix not in (".ttf", ".otf", ".t1"):
        return None
    try:
        font = ImageFont.truetype(str(path), size)
        blank = [font.getmask(absent).getbbox() for absent in "\uffff\ufffe"]
        masks = [font.getmask(letter) for letter in CAPITALS]
    except OSError:
        return None
    if len({bytes(mask) for mask in masks}) < len(CAPITALS):  # type: ignore[reportArgumentType]
        return None
    return None if any(mask.getbbox() in (None, *blank) for mask in masks) else font


def emoji(resolution: int) -> Iterator[Picture]:
    """Colour emoji on a dark ground, without classes."""
    check_source(EMOJI_FONT.is_file(), "apt install fonts-noto-color-emoji")
    font = ImageFont.truetype(str(EMOJI_FONT), EMOJI_SIZE)
    blank = font.getbbox("\uffff")

    def drawn() -> Iterator[Image.Image]:
        for character in (chr(code) for first, end in EMOJI_RANGES for code in range(first, end)):
            if font.getbbox(character) != blank:
                image = Image.new("RGBA", (EMOJI_CANVAS, EMOJI_CANVAS))
                ImageDraw.Draw(image).text((0, 4), character, font=font, embedded_color=True)
                yield image

    yield from ((_on(DARK, image, resolution), None) for image in _different(drawn()))


def icons(resolution: int) -> Iterator[Picture]:
    """The icons of the Oxygen theme on white, without classes."""
    check_source(ICONS.is_dir(), "apt install oxygen-icon-theme")

    def opened() -> Iterator[Image.Image]:
        for path in sorted(ICONS.rglob("*.png")):
            with Image.open(path) as image:
                if image.size == (ICON_SIZE, ICON_SIZE):
                    yield image.convert("RGBA")

    yield from ((_on(WHITE, image, resolution), None) for image in _different(opened()))


def crops(resolution: int) -> Iterator[Picture]:
    """Random crops of the photographs that scikit-image ships, reduced to half their size, without classes."""
    spec = importlib.util.find_spec("skimage")
    paths = [Path(str(spec and spec.origin)).parent / "data" / name for name in PHOTOGRAPHS]
    check_source(all(path.is_file() for path in paths), "pip install scikit-image")
    photographs = [Image.open(path).convert("RGB").reduce(2) for path in paths]
    draws = np.random.default_rng(0)
    for _ in range(CROPS):
        photograph = photographs[draws.integers(len(photographs))]
        left, top = (int(draws.integers(extent - resolution)) for extent in photograph.size)
        yield photograph.crop((left, top, left + resolution, top + resolution)), None


def check_source(is_there: bool, remedy: str) -> None:
    if not is_there:
        raise UserError(f"its pictures aren't on this machine: {remedy}")


def _resized(image: Image.Image, resolution: int) -> Image.Image:
    size = (resolution, resolution)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _on(ground: tuple[int, int, int], image: Image.Image, resolution: int) -> Image.Image:
    """An RGBA image over a background colour, as RGB, scaled to `resolution`."""
    under = Image.new("RGBA", image.size, (*ground, 255))
    return _resized(Image.alpha_composite(under, image).convert("RGB"), resolution)


def _different(images: Iterator[Image.Image]) -> Iterator[Image.Image]:
    """The images without empty ones and duplicates."""
    seen = set()
    for image in images:
        pixels = image.tobytes()
        if image.getbbox() is not None and pixels not in seen:
            seen.add(pixels)
            yield image


def write_data(pictures: Iterable[Picture], dest: Path) -> None:
    """Writes pictures as a data set, as `edm.dataset_tool` does; equal pictures give equal bytes."""
    from dnnlib.progress import ProgressBar
    from edm.images import zip_writer
    from training.dataset import LABELS_FILE

    labels = []
    with zip_writer(dest) as write, ProgressBar() as bar:
        for i, (image, label) in enumerate(pictures):
            name, file = f"{i // 1000:05d}/img{i:08d}.png", io.BytesIO()
            image.save(file, "png")
            write(name, file.getvalue())
            if label is not None:
                labels.append([name, label])
            bar.update()
        write(LABELS_FILE, json.dumps({"labels": labels or None}).encode())
