"""Images and class labels from a folder or zip. Neither is trusted: sizes, names and values are checked."""

import os
import warnings
from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from torch_utils.untrusted.images import open_image

from .file_tree import DatasetError, FileTree
from .labels import LABELS_FILE, read_labels

IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif"),
    *(".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
}
# Formats of photographs that are not read. Leaving these out would leave out a part of the data.
OTHER_IMAGE_SUFFIXES = {".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".tga", ".exr", ".psd", ".dng"}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "PPM", "TIFF")  # PIL knows some that start other programs
BACKGROUND = (255, 255, 255)  # white, on which transparent images are laid
MAX_PIXELS = 1 << 26
MAX_CACHE_BYTES = 2 << 30  # per process; every process of a multi-GPU run keeps its own cache


def decode_image(data: bytes, what: str) -> Image.Image:
    """Decodes an image file to mode 'L' if it is gray and else to 'RGB', as a viewer shows it on a white page.

    It is turned upright as its EXIF orientation says, and transparent pixels let the white show through.
    what: names the file in the DatasetError of a broken, huge, 16-bit or animated image.
    """
    try:
        if not data:
            raise ValueError("the file is empty; remove it or replace it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd files: they are read, or refused in one line
            with open_image(data, IMAGE_FORMATS, MAX_PIXELS) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError("more than 8 bits per channel; convert it to 8")
                if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo and its preview
                    raise ValueError("it holds several pictures; save the one that is meant as a PNG")
                image.load()
                gray = image.mode in ("1", "L", "LA", "La")
                return _without_alpha(_upright(image)).convert("L" if gray else "RGB")
    except UnidentifiedImageError:
        raise DatasetError(
            f"{what} is not a usable image: it is damaged, or in none of the formats {', '.join(IMAGE_FORMATS)};"
            " remove it or replace it"
        ) from None
    except Exception as error:  # what PIL's decoders raise on broken files has no common type
        raise DatasetError(f"{what} is not a usable image: {str(error) or type(error).__name__}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: viewers show such an image as it is stored
        return image


def _without_alpha(image: Image.Image) -> Image.Image:
    if "transparency" not in image.info and image.mode not in ("RGBA", "LA", "PA", "RGBa", "La"):
        return image
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    page = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")


def image_names(tree: FileTree) -> list[str]:
    """The names of a tree's images, sorted.

    Errors: DatasetError when there is none, or when there are images in a format that isn't read.
    """
    names = []
    for name in tree.names():
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in OTHER_IMAGE_SUFFIXES:
            raise DatasetError(f"{tree.what}: {name} is an image in a format that isn't read; convert it to PNG")
        if suffix in IMAGE_SUFFIXES:
            names.append(name)
    if not names:
        raise DatasetError(f"{tree.what} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return names


def read_image(tree: FileTree, name: str) -> Image.Image:
    """The image `name` of a tree, as `decode_image` gives it."""
    return decode_image(tree.read(name), f"{tree.what}: {name}")


class ImageFolderDataset(torch.utils.data.Dataset):
    """Square images of one size from a folder or zip; items are (uint8 [C, H, W], float32 one-hot [label_dim]).

    max_size: keep this many images, a subset drawn with `seed`.
    use_labels: read classes from dataset.json; without, label_dim is 0.
    xflip: append a mirrored copy of every image, which doubles the length.
    cache: keep the decoded images in memory if they take at most MAX_CACHE_BYTES; workers share them.
    option: the command-line option that errors name.
    label_dim is the largest class plus one; `classes` says which of them have images. metadata: of networks trained on
    them; nothing here (`training.latent_dataset`).
    Errors: DatasetError (one line naming `option`), also from items, for all that can be wrong with the files.
    """

    metadata: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        path: str | os.PathLike,
        max_size: int | None = None,
        use_labels: bool = False,
        xflip: bool = False,
        seed: int = 0,
        cache: bool = False,
        option: str = "--data",
    ):
        self._tree = FileTree(path, option)
        self.name = self._tree.path.resolve().stem
        self._names = image_names(self._tree)
        self._labels = read_labels(self._tree, self._names) if use_labels else None
        if use_labels and self._labels is None:
            raise DatasetError(
                f"{self._tree.what} has no labels in {LABELS_FILE}; add them (edm.train --cond=0 needs none)"
            )
        self.label_dim = max(self._labels) + 1 if self._labels is not None else 0
        if max_size is not None and max_size < 1:
            raise DatasetError(f"{self._tree.what}: can't take {max_size} images; use at least 1")
        if max_size is not None and max_size < len(self._names):
            kept = sorted(np.random.default_rng(seed).permutation(len(self._names))[:max_size])
            self._names = [self._names[i] for i in kept]
            self._labels = [self._labels[i] for i in kept] if self._labels is not None else None
        self._xflip = xflip
        self._shape: tuple[int, ...] | None = None
        self._shape = shape = self._read(0).shape
        self.num_channels, self.resolution, _ = shape
        # A tensor, not an array: forked workers see the same memory, spawned ones get it as shared memory.
        self._cache = self._load() if cache and len(self._names) * np.prod(shape) <= MAX_CACHE_BYTES else None

    @property
    def classes(self) -> list[int]:
        """The classes that have images here, in ascending order; none without labels."""
        return sorted(set(self._labels or []))

    def __len__(self) -> int:
        return len(self._names) * (2 if self._xflip else 1)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        flip, file = divmod(range(len(self))[index], len(self._names))
        image = self._read(file) if self._cache is None else self._cache[file].numpy()
        return (image[:, :, ::-1] if flip else image).copy(), self.get_label(index)

    def get_label(self, index: int) -> np.ndarray:
        """The one-hot label of item `index`: float32 [label_dim], so empty without labels."""
        label = np.zeros(self.label_dim, dtype=np.float32)
        if self._labels is not None:
            label[self._labels[range(len(self))[index] % len(self._names)]] = 1
        return label

    def _read(self, file: int) -> np.ndarray:
        name = self._names[file]
        image = np.array(read_image(self._tree, name))
        image = image[np.newaxis] if image.ndim == 2 else image.transpose(2, 0, 1)  # [C, H, W]
        channels, height, width = image.shape
        if height != width:
            raise DatasetError(f"{self._tree.what}: {name} is {width}x{height}, not square; see edm.dataset_tool")
        if self._shape not in (None, image.shape):
            expected = "x".join(map(str, self._shape[::-1]))
            raise DatasetError(
                f"{self._tree.what}: {name} is {width}x{height}x{channels}, the first image {expected}"
                " (width, height, channels); bring them to one size with edm.dataset_tool"
            )
        return image

    def _load(self) -> torch.Tensor:
        images = torch.empty(len(self._names), self.num_channels, self.resolution, self.resolution, dtype=torch.uint8)
        for i, image in enumerate(images.numpy()):
            image[:] = self._read(i)
        return images
