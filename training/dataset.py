"""Images and class labels from a folder or zip. Neither is trusted: sizes, names and values are checked."""

import io
import json
import os
import stat
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from dnnlib import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")  # PIL knows formats that start other programs
LABELS_FILE = "dataset.json"
MAX_FILE_BYTES = 1 << 28  # of an image file
MAX_LABELS_BYTES = 1 << 26  # of dataset.json; ImageNet's is 45 MB
MAX_LABEL_BYTES = 1 << 10  # of dataset.json for each image; parsed, a byte can take more than twenty
MAX_PIXELS = 1 << 26
MAX_CLASSES = 1 << 16
MAX_CACHE_BYTES = 2 << 30  # per process; every process of a multi-GPU run keeps its own cache


class DatasetError(UserError):
    """A UserError that stays one line when it comes out of a data-loader worker.

    There torch rebuilds the exception from its printed traceback; the message is what follows the class name.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.rpartition("DatasetError: ")[2].split()))


class FileTree:
    """The files of a folder or zip, read by relative name with forward slashes, also in data-loader workers.

    option: the command-line option that errors name.
    Errors: DatasetError, here and in `read`, when the path or a file isn't there, is broken or too large.
    """

    def __init__(self, path: str | os.PathLike, option: str = "--data"):
        self.path, self.what = Path(path), f"{option}={path}"
        self._zip, self._zip_pid = None, None
        if self.path.is_dir():
            self.is_zip = False
        elif self.path.is_file() and zipfile.is_zipfile(self.path):
            self.is_zip = True
        else:
            found = "is neither a folder nor a zip file" if self.path.exists() else "doesn't exist"
            raise DatasetError(f"{self.what} {found}; give a folder or zip of images")

    def names(self) -> list[str]:
        """All file names, sorted. Hidden files are left out, and links to folders aren't followed."""
        if self.is_zip:
            names = [info.filename for info in self._open_zip().infolist()]
            names = [name for name in names if name and not name.endswith("/")]
        else:
            names = []
            for folder, _, files in os.walk(self.path):
                parent = Path(folder).relative_to(self.path)
                names += [(parent / file).as_posix() for file in files]
        return sorted(name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))

    def has(self, name: str) -> bool:
        return name in self._open_zip().NameToInfo if self.is_zip else (self.path / name).is_file()

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The contents of one of `names()`, at most `max_bytes`, by default MAX_FILE_BYTES."""
        max_bytes = MAX_FILE_BYTES if max_bytes is None else max_bytes
        try:
            if not self.is_zip and not stat.S_ISREG(os.stat(self.path / name).st_mode):
                raise ValueError("it is not a plain file")  # to open a pipe would wait for ever
            with self._open_zip().open(name) if self.is_zip else open(self.path / name, "rb") as file:
                size = self._open_zip().getinfo(name).file_size if self.is_zip else os.fstat(file.fileno()).st_size
                if size > max_bytes:
                    raise ValueError(f"it is larger than {max_bytes / 2**20:.4g} MiB")
                return file.read(size)
        except Exception as error:  # zipfile passes on what its decompressors raise
            raise DatasetError(f"{self.what}: can't read {name}: {str(error) or type(error).__name__}") from None

    def read_image(self, name: str) -> Image.Image:
        """The image file `name`, as `decode_image` gives it."""
        return decode_image(self.read(name), f"{self.what}: {name}")

    def _open_zip(self) -> zipfile.ZipFile:
        if self._zip_pid != os.getpid():  # a forked worker would share the parent's file position
            try:
                self._zip, self._zip_pid = zipfile.ZipFile(self.path), os.getpid()
            except Exception as error:  # zipfile passes on what parsing a broken directory raises
                raise DatasetError(f"{self.what} is not a readable zip: {str(error) or type(error).__name__}") from None
        return self._zip

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None, "_zip_pid": None}


def decode_image(data: bytes, what: str) -> Image.Image:
    """Decodes an image file to mode 'L' if it is gray and else to 'RGB'; transparency is dropped.

    what: names the file in the DatasetError of a broken, huge or 16-bit image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd files: they are read, or refused in one line
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are too many")
                if image.mode.startswith(("I", "F")):
                    raise ValueError("more than 8 bits per channel; convert it to 8")
                return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:  # what PIL's decoders raise on broken files has no common type
        raise DatasetError(f"{what} is not a usable image: {str(error) or type(error).__name__}") from None


def image_names(tree: FileTree) -> list[str]:
    """The names of a tree's images, sorted. Errors: DatasetError when there is none."""
    names = [name for name in tree.names() if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise DatasetError(f"{tree.what} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return names


def read_labels(tree: FileTree, images: list[str]) -> list[int] | None:
    """The class of each of `images` by dataset.json = {"labels": [[name, class], …] or null}; None if it has no labels.

    Errors: DatasetError when the file is malformed or its names aren't exactly `images`.
    """
    if not tree.has(LABELS_FILE):
        return None
    what = f"{tree.what}: {LABELS_FILE}"
    try:
        content = json.loads(tree.read(LABELS_FILE, min(MAX_LABELS_BYTES, MAX_LABEL_BYTES * (len(images) + 64))))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{what} is not valid JSON: {str(error) or type(error).__name__}") from None
    entries = content.get("labels") if isinstance(content, dict) else "malformed"
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise DatasetError(f'{what} must be {{"labels": [[file name, class number], …]}}')
    labels = {}
    for entry in entries:
        match entry:
            case [str() as name, int() as label] if type(label) is int and 0 <= label < MAX_CLASSES:
                labels[name] = label
            case _:
                raise DatasetError(f"{what}: {str(entry)[:80]} is not [file name, class below {MAX_CLASSES}]")
    for name in sorted(labels.keys() - set(images))[:1]:
        raise DatasetError(f"{what} labels {name}, which isn't there")
    for name in sorted(set(images) - labels.keys())[:1]:
        raise DatasetError(f"{what} has no label for {name}")
    return [labels[name] for name in images]


class ImageFolderDataset(torch.utils.data.Dataset):
    """Square images of one size from a folder or zip; items are (uint8 [C, H, W], float32 one-hot [label_dim]).

    max_size: keep so many images, a subset drawn with `seed`.
    use_labels: read classes from dataset.json; without, label_dim is 0.
    xflip: append a mirrored copy of every image, which doubles the length.
    cache: keep the decoded images in memory if they take at most MAX_CACHE_BYTES; workers share them.
    option: the command-line option that errors name.
    Errors: DatasetError (one line naming `option`), also from items, for all that can be wrong with the files.
    """

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
        self.label_dim = max(self._labels) + 1 if use_labels else 0
        if max_size is not None and max_size < 1:
            raise DatasetError(f"{self._tree.what}: can't take {max_size} images; use at least 1")
        if max_size is not None and max_size < len(self._names):
            kept = sorted(np.random.default_rng(seed).permutation(len(self._names))[:max_size])
            self._names = [self._names[i] for i in kept]
            self._labels = [self._labels[i] for i in kept] if use_labels else None
        self._xflip = xflip
        self._shape = None
        self._shape = self._read(0).shape
        self.num_channels, self.resolution, _ = self._shape
        # A tensor, not an array: forked workers see the same memory, spawned ones get it as shared memory.
        self._cache = self._load() if cache and len(self._names) * np.prod(self._shape) <= MAX_CACHE_BYTES else None

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

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
        image = np.array(self._tree.read_image(name))
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
        images = torch.empty(len(self._names), *self._shape, dtype=torch.uint8)
        for i, image in enumerate(images.numpy()):
            image[:] = self._read(i)
        return images
