"""Turns images from many sources into the data sets that training reads: `python -m edm.dataset_tool --help`."""

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from PIL import Image

from dnnlib import LongCommand, UserError, WholeRange
from dnnlib.errors import printable
from dnnlib.progress import ProgressBar

from .dataset_sources import open_source

MAX_RESOLUTION = 8192


def fit(image: Image.Image, resolution: tuple[int, int] | None, transform: str = "none") -> Image.Image:
    """Brings an image to `resolution` (width, height) with a Lanczos filter; None leaves it as it is.

    transform: 'none' stretches the whole image, 'center-crop' first cuts the largest centred part of the right shape,
    'center-crop-wide' also adds black bars above and below, to a square of the width.
    """
    if resolution is None:
        return image
    if transform != "none":
        shape = resolution[0] / resolution[1]
        width = max(1, min(image.width, round(image.height * shape)))
        height = max(1, min(image.height, round(image.width / shape)))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    image = image.resize(resolution, Image.Resampling.LANCZOS)
    if transform == "center-crop-wide":
        square = Image.new(image.mode, (resolution[0], resolution[0]))
        square.paste(image, (0, (resolution[0] - resolution[1]) // 2))
        image = square
    return image


def convert(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    max_images: int | None = None,
    resolution: tuple[int, int] | None = None,
    transform: str = "none",
    labels_from_folders: bool = False,
    vae: str | None = None,
    scaled_by: str = "data",
) -> str:
    """Writes the first `max_images` of `source` to the folder or zip `dest` and returns a text saying what was written.

    vae: encodes the images; `dest` is a file of latents then. scaled_by: as `edm.latent_writer.write_latents`.
    Equal input gives equal bytes. Images stay gray if all images of the source are gray. The text lists what was left
    out, then the classes in a table, and ends with one line about the data set.
    Errors: UserError; `dest` isn't created then.
    """
    from training.dataset import LABELS_FILE

    dest = Path(dest)
    if (dest.is_file() and dest.stat().st_size) or (dest.is_dir() and any(dest.iterdir())):
        raise UserError(f"--dest={dest} exists already; remove it or choose another name")
    images = open_source(source, labels_from_folders)
    count = images.count if max_images is None else min(max_images, images.count)
    mode = "L" if all(images.image(i).mode == "L" for i in range(count)) else "RGB"
    labels = images.labels and images.labels[:count]
    size = None

    def fitted() -> Iterator[Image.Image]:
        nonlocal size
        for i in range(count):
            image = fit(images.image(i).convert(mode), resolution, transform)
            size = size or image.size
            if image.width != image.height or image.size != size:
                raise UserError(
                    f"--source={source}: image {i} is {image.width}x{image.height}, but all must be square and of one"
                    " size; use --resolution, and --transform=center-crop to keep their proportions"
                )
            yield image

    made = ""
    if vae is None:
        names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(count)]
        with _writer(dest) as write, ProgressBar(count) as bar:
            for name, image in zip(names, fitted()):
                file = io.BytesIO()
                image.save(file, "png", compress_level=0)
                write(name, file.getvalue())
                bar.update()
            listed = labels and [[name, label] for name, label in zip(names, labels)]
            write(LABELS_FILE, json.dumps({"labels": listed}).encode())
    else:
        from .latent_writer import write_latents

        channels, width, scale = write_latents(fitted(), count, labels, vae, dest, scaled_by)
        made = f", as latents of {channels} x {width} x {width} (scale {scale:.3g})"
    assert size is not None  # a source holds at least one image
    classes = _counted(len(set(labels)), "class", "classes") if labels else "no labels"
    colours = "gray" if mode == "L" else "colour"
    notes = [*images.notes, *_class_table(labels or [], images.folders)]
    summary = f"{dest}: {_counted(count, 'image', 'images')}, {size[0]}x{size[1]}, {colours}, {classes}{made}"
    return "\n".join(map(printable, [*notes, summary]))


def _counted(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


def _class_table(labels: list[int], folders: dict[int, str]) -> list[str]:
    """One row per class: its number, how many images it has, its folder if classes were folders.

    Classes up to the largest that have no images share a row; none of them is drawn when the network is sampled.
    """
    if not labels:
        return []
    counts, rows, expected = Counter(labels), [("class", "images", "folder" if folders else "")], 0
    for label in sorted(counts):
        if label > expected:
            gap = f"{expected}-{label - 1}" if label - 1 > expected else f"{expected}"
            rows.append((gap, "0", "(such a class is never drawn)"))
        rows.append((f"{label}", f"{counts[label]}", folders.get(label, "")))
        expected = label + 1
    width = max(len(row[0]) for row in rows)
    return [f"{number:>{width}}  {images:>7}  {name}".rstrip() for number, images, name in rows]


@contextlib.contextmanager
def _writer(dest: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yields write(name, data) into a folder, or a zip by the suffix, that appears as `dest` once all is written."""
    from edm.images import zip_writer

    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with zip_writer(dest) if dest.suffix == ".zip" else _folder_writer(dest) as write:
            yield write
    except OSError as error:
        raise UserError(f"--dest={dest} can't be written: {error}") from None


@contextlib.contextmanager
def _folder_writer(dest: Path) -> Iterator[Callable[[str, bytes], None]]:
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", suffix=".part", dir=dest.parent) as temporary:
        whole = Path(temporary) / "whole"  # a folder inside, since the temporary one is private to its owner

        def write(name: str, data: bytes) -> None:
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).write_bytes(data)

        yield write
        if dest.is_dir():
            dest.rmdir()
        shutil.move(whole, dest)


def _parse_resolution(_context: Any, _parameter: Any, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", value)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= MAX_RESOLUTION for side in size):
        raise UserError(f"--resolution={value} must be WIDTHxHEIGHT in pixels up to {MAX_RESOLUTION}, such as 32x32")
    return size


@click.command(cls=LongCommand)
@click.option(
    "--source", required=True, metavar="PATH", help="Folder or zip of images, CIFAR-10 tar.gz, MNIST idx.gz, or LMDB."
)
@click.option(
    "--dest", required=True, metavar="PATH", help="Data set to write: a zip if the name ends in .zip, else a folder."
)
@click.option("--max-images", type=WholeRange(min=1), help="Take only the first N images.  [default: all]")
@click.option(
    "--resolution", callback=_parse_resolution, metavar="WxH", help="Resize to this many pixels.  [default: keep]"
)
@click.option(
    "--transform",
    type=click.Choice(["none", "center-crop", "center-crop-wide"]),
    default="none",
    show_default=True,
    help="With --resolution: stretch, cut to its shape, or cut and add black bars above and below to make a square.",
)
@click.option(
    "--labels-from-folders",
    is_flag=True,
    help="Folders are classes: a folder's number is its class if all have numbers, else the order of names decides.",
)
@click.option("--vae", metavar="NAME", help="Encode by this VAE: a diffusers folder or Hub name; --dest=X.safetensors.")
@click.option(
    "--vae-scale",
    type=click.Choice(["vae", "edm2"]),
    is_flag=False,
    flag_value="vae",
    help="With --vae: scale latents as the VAE's own configuration says, or =edm2, as EDM2's published networks expect."
    "  [default: mean 0, standard deviation 0.5]",
)
def main(
    source: str,
    dest: str,
    max_images: int | None,
    resolution: tuple[int, int] | None,
    transform: str,
    labels_from_folders: bool,
    vae: str | None,
    vae_scale: str | None,
) -> None:
    """Turns images into a data set for training: square PNGs of one size and their labels in dataset.json.

    MNIST takes its labels from the labels file in the same folder; folders and zips from dataset.json, if there is one.
    Photos are turned upright by their EXIF orientation; transparent images are laid on white. The output ends with what
    was left out, a table of the classes and their numbers of images, and a line about the whole.
    """
    if transform != "none" and resolution is None:
        raise UserError(f"--transform={transform} needs --resolution=WxH")
    if resolution and (
        resolution[0] < resolution[1] or (transform != "center-crop-wide" and resolution[0] != resolution[1])
    ):
        raise UserError("--resolution must be square, or wider than high with --transform=center-crop-wide")
    if vae_scale is not None and vae is None:
        raise UserError("--vae-scale means nothing without --vae; leave it out")
    if vae is not None:
        from .latent_writer import check_dest

        check_dest(Path(dest))
    click.echo(convert(source, dest, max_images, resolution, transform, labels_from_folders, vae, vae_scale or "data"))


if __name__ == "__main__":
    main()
