"""Turns images from many sources into the data sets that training reads: `python -m edm.dataset_tool --help`."""

import contextlib
import gzip
import io
import json
import math
import os
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from dnnlib import Command, UserError, WholeRange

MAX_ARRAY_BYTES = 1 << 28  # of an idx file or a CIFAR-10 batch; the real ones have 47 and 31 MB
MAX_TAR_BYTES = 1 << 29  # unpacked; CIFAR-10 takes some 190 MB
MAX_RESOLUTION = 8192
IDX_UINT8 = b"\x00\x00\x08"  # an idx file starts with this and its number of dimensions
GZIP_MAGIC = b"\x1f\x8b"


@dataclass
class Source:
    """Images by index, as PIL images of mode 'L' or 'RGB', and their classes if they have any."""

    image: Callable[[int], Image.Image]
    count: int
    labels: list[int] | None = None


def open_source(path: str | os.PathLike, labels_from_folders: bool = False) -> Source:
    """Opens a folder or zip of images, a CIFAR-10 tar, an MNIST idx file or an LMDB, told apart by their contents.

    labels_from_folders: the class of an image is the place of its folder's name among the sorted names.
    Errors: UserError naming --source; nothing in a source is trusted or executed.
    """
    path = Path(path)
    is_tree = not (path / "data.mdb").is_file() and (not path.is_file() or zipfile.is_zipfile(path))
    if labels_from_folders and not is_tree:
        raise UserError(f"--labels-from-folders works on folders and zips of images only, not on --source={path}")
    if is_tree:
        return _open_tree(path, labels_from_folders)
    if path.is_dir():
        return _open_lmdb(path)
    try:
        with _open_maybe_gzip(path) as file:
            is_idx = file.read(3) == IDX_UINT8
        return _open_mnist(path) if is_idx else _open_cifar10(path)
    except UserError:
        raise
    except Exception as error:  # broken archives raise whatever gzip, tarfile and pickle run into
        raise UserError(
            f"--source={path} is neither a folder, zip, CIFAR-10 tar.gz, MNIST idx.gz nor LMDB, or it is broken:"
            f" {' '.join(str(error).split())}"
        ) from None


def _open_tree(path: Path, labels_from_folders: bool) -> Source:
    from training.dataset import FileTree, image_names, read_labels  # takes torch with it, which --help can do without

    tree = FileTree(path, "--source")
    names = image_names(tree)
    if labels_from_folders:
        folders = [str(PurePosixPath(name).parent) for name in names]
        classes = {folder: i for i, folder in enumerate(sorted(set(folders)))}
        labels = [classes[folder] for folder in folders]
    else:
        labels = read_labels(tree, names)
    return Source(lambda i: tree.read_image(names[i]), len(names), labels)


def _open_mnist(path: Path) -> Source:
    images = _read_idx(path, dimensions=3)
    labels_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    labels = None
    if labels_path != path and labels_path.exists():
        labels = _read_idx(labels_path, dimensions=1).tolist()
        if len(labels) != len(images):
            raise UserError(f"--source={path} has {len(images)} images, but {labels_path.name} {len(labels)} labels")
    return Source(lambda i: Image.fromarray(images[i]), len(images), labels)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    with _open_maybe_gzip(path) as file:
        if file.read(4) != IDX_UINT8 + bytes([dimensions]):
            raise ValueError(f"{path.name} is not an idx file of bytes in {dimensions} dimensions")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        if not 0 < math.prod(shape) <= MAX_ARRAY_BYTES:
            raise ValueError(f"{path.name} claims the shape {shape}")
        data = file.read(math.prod(shape) + 1)
    if len(data) != math.prod(shape):
        raise ValueError(f"{path.name} doesn't hold the {shape} bytes that its header claims")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _open_maybe_gzip(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        is_gzip = file.read(2) == GZIP_MAGIC
    return gzip.open(path) if is_gzip else open(path, "rb")


class _Limited:
    """The beginning of a file, read by `read`; beyond `limit` bytes it is refused: the rest may have no end."""

    def __init__(self, file: BinaryIO, limit: int):
        self._file, self._left = file, limit

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("it holds more than CIFAR-10")
        return data


def _open_cifar10(path: Path) -> Source:
    from torch_utils.untrusted.inert_pickle import read_cifar10  # takes torch with it

    batches = {}
    with _open_maybe_gzip(path) as file, tarfile.open(fileobj=_Limited(file, MAX_TAR_BYTES), mode="r|") as tar:
        for member in tar:
            if re.fullmatch(r"(.*/)?data_batch_\d", member.name):
                if not member.isfile() or member.issparse() or member.size > MAX_ARRAY_BYTES:
                    raise ValueError(f"{member.name} is not a file or too large")
                pixels, labels = read_cifar10(tar.extractfile(member).read())
                batches[member.name] = np.frombuffer(pixels, np.uint8).reshape(len(labels), 3, 32, 32), labels
    if not batches:
        raise ValueError("no data_batch_1 to 5 in the tar file")
    images, labels = zip(*(batches[name] for name in sorted(batches)))
    labels = [label for batch in labels for label in batch]
    if not labels or any(type(label) is not int or not 0 <= label < 10 for label in labels):
        raise ValueError("its labels are not numbers from 0 to 9")
    pixels = np.concatenate(images).transpose(0, 2, 3, 1)  # [N, H, W, C]
    return Source(lambda i: Image.fromarray(np.ascontiguousarray(pixels[i])), len(labels), labels)


def _open_lmdb(path: Path) -> Source:
    from training.dataset import MAX_FILE_BYTES, decode_image

    try:
        import lmdb
    except ImportError:
        raise UserError(f"--source={path} is an LMDB; to read it, pip install lmdb") from None
    try:
        database = lmdb.open(str(path), readonly=True, lock=False, create=False)
        with database.begin() as transaction:
            keys = list(transaction.cursor().iternext(values=False))
    except lmdb.Error as error:
        raise UserError(f"--source={path} is not a readable LMDB: {error}") from None

    def image(i: int) -> Image.Image:
        with database.begin(buffers=True) as transaction:
            value = transaction.get(keys[i])
            data = bytes(value) if len(value) <= MAX_FILE_BYTES else b""
        return decode_image(data, f"--source={path}: entry {keys[i].decode(errors='replace')}")

    if not keys:
        raise UserError(f"--source={path} is empty")
    return Source(image, len(keys))


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
) -> str:
    """Writes the first `max_images` of `source` to the folder or zip `dest` and returns a line saying what was written.

    Equal input gives equal bytes. Images stay gray if all of the source are.
    Errors: UserError; then `dest` stays absent.
    """
    from training.dataset import LABELS_FILE

    dest = Path(dest)
    if (dest.is_file() and dest.stat().st_size) or (dest.is_dir() and any(dest.iterdir())):
        raise UserError(f"--dest={dest} exists already; remove it or choose another name")
    images = open_source(source, labels_from_folders)
    count = images.count if max_images is None else min(max_images, images.count)
    mode = "L" if all(images.image(i).mode == "L" for i in range(count)) else "RGB"
    names, size = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(count)], None
    with _writer(dest) as write:
        for i, name in enumerate(tqdm(names, unit="img", disable=None)):
            image = fit(images.image(i).convert(mode), resolution, transform)
            size = size or image.size
            if image.width != image.height or image.size != size:
                raise UserError(
                    f"--source={source}: image {i} is {image.width}x{image.height}, but all must be square and of one"
                    " size; use --resolution, and --transform=center-crop to keep their proportions"
                )
            file = io.BytesIO()
            image.save(file, "png", compress_level=0)
            write(name, file.getvalue())
        labels = images.labels and [[name, label] for name, label in zip(names, images.labels)]
        write(LABELS_FILE, json.dumps({"labels": labels}).encode())
    classes = f"{max(images.labels) + 1} classes" if images.labels else "no labels"
    return f"{dest}: {count} images, {size[0]}x{size[1]}, {'gray' if mode == 'L' else 'colour'}, {classes}"


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
    size = tuple(map(int, match.groups())) if match else (0, 0)
    if not all(1 <= side <= MAX_RESOLUTION for side in size):
        raise UserError(f"--resolution={value} must be WIDTHxHEIGHT in pixels up to {MAX_RESOLUTION}, such as 32x32")
    return size


@click.command(cls=Command)
@click.option(
    "--source", required=True, metavar="PATH", help="Folder or zip of images, CIFAR-10 tar.gz, MNIST idx.gz, or LMDB."
)
@click.option(
    "--dest", required=True, metavar="PATH", help="Data set to write: a zip if the name ends in .zip, else a folder."
)
@click.option("--max-images", type=WholeRange(min=1), help="Take the first so many images.  [default: all]")
@click.option(
    "--resolution", callback=_parse_resolution, metavar="WxH", help="Resize to so many pixels.  [default: keep]"
)
@click.option(
    "--transform",
    type=click.Choice(["none", "center-crop", "center-crop-wide"]),
    default="none",
    show_default=True,
    help="With --resolution: stretch, cut to its shape, or cut and add black bars above and below to make a square.",
)
@click.option("--labels-from-folders", is_flag=True, help="Folders are classes, in the order of their names.")
def main(
    source: str,
    dest: str,
    max_images: int | None,
    resolution: tuple[int, int] | None,
    transform: str,
    labels_from_folders: bool,
) -> None:
    """Turns images into a data set for training: square PNGs of one size and their labels in dataset.json.

    MNIST takes its labels from the labels file beside the images; folders and zips from dataset.json, if there is one.
    """
    if transform != "none" and resolution is None:
        raise UserError(f"--transform={transform} needs --resolution=WxH")
    if resolution and (
        resolution[0] < resolution[1] or (transform != "center-crop-wide" and resolution[0] != resolution[1])
    ):
        raise UserError("--resolution must be square, or wider than high with --transform=center-crop-wide")
    click.echo(convert(source, dest, max_images, resolution, transform, labels_from_folders))


if __name__ == "__main__":
    main()
