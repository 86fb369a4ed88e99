"""Sources of images for a data set: folders, zips, CIFAR-10 and MNIST archives, LMDBs, recognised by their contents."""

import gzip
import io
import itertools
import math
import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dnnlib import UserError, open_plain
from torch_utils.untrusted.bounds import MAX_ENTRIES

MAX_ARRAY_BYTES = 1 << 28  # of an idx file or a CIFAR-10 batch; the real ones have 47 and 31 MB
MAX_TAR_BYTES = 1 << 29  # unpacked; CIFAR-10 takes some 190 MB
IDX_UINT8 = b"\x00\x00\x08"  # an idx file starts with this and its number of dimensions
MAX_TAR_MEMBERS = 1000
MAX_EXTENSION_BYTES = 4096
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENSIONS += (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
GZIP_MAGIC = b"\x1f\x8b"
NAMED = 5  # names of left-out files that one line lists


@dataclass
class Source:
    """Images by index, as PIL images of mode 'L' or 'RGB', and their classes if they have any.

    folders: the folder of each class, if the classes are folders.
    notes: one line for each kind of file that was found in the source and left out.
    """

    image: Callable[[int], Image.Image]
    count: int
    labels: list[int] | None = None
    folders: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_source(path: str | os.PathLike, labels_from_folders: bool = False) -> Source:
    """Opens a folder or zip of images, a CIFAR-10 tar, an MNIST idx file or an LMDB, recognised by its contents.

    labels_from_folders: folders are classes, as `training.labels.labels_from_folders` numbers them.
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
    from training import labels as labelling  # take torch with them, which --help can do without
    from training.dataset import FileTree, image_names, read_image

    tree = FileTree(path, "--source")
    names = image_names(tree)
    labels, folders = labelling.labels_from_folders(tree, names) if labels_from_folders else (None, {})
    if not labels_from_folders:
        labels = labelling.read_labels(tree, names)
    other = [name for name in set(tree.names()) - set(names) if name.split("/")[-1] != labelling.LABELS_FILE]
    notes = [
        *_left_out(other, "not images by their suffixes"),
        *_left_out(tree.hidden(), "hidden"),
        *_left_out([f"{name}/" for name in tree.empty_folders()], "empty folders"),
    ]
    inside = {str(PurePosixPath(name).parent) for name in names}
    if labels is None and len(inside) > 1:
        notes.append(f"the images lie in {len(inside)} folders, which are classes only with --labels-from-folders")
    return Source(lambda i: read_image(tree, names[i]), len(names), labels, folders, notes)


def _left_out(names: Iterable[str], why: str) -> list[str]:
    """A line that names the first files that were left out; no line if there are none."""
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"left out ({why}): {', '.join(names[:NAMED])}{more}"] if names else []


def _open_mnist(path: Path) -> Source:
    images = _read_idx(path, dimensions=3)
    source = Source(lambda i: Image.fromarray(images[i]), len(images))
    labels_path = _labels_of_mnist(path)
    if labels_path is None:
        source.notes.append("no file next to the images has their name with labels-idx1 for images-idx3")
        return source
    labels: list[int] = _read_idx(labels_path, dimensions=1).tolist()
    if len(labels) != len(images):
        raise UserError(f"--source={path} has {len(images)} images, but {labels_path.name} {len(labels)} labels")
    source.labels = labels
    return source


def _labels_of_mnist(path: Path) -> Path | None:
    """The labels file that belongs to a file of images, compressed or not; `images.idx3` is common, too."""
    name = re.sub(r"images([-.])idx3", r"labels\1idx1", path.name)
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    found = [path.with_name(n) for n in (name, other) if n != path.name and path.with_name(n).is_file()]
    return found[0] if found and name != path.name else None


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    with _open_maybe_gzip(path) as file:
        if file.read(4) != IDX_UINT8 + bytes([dimensions]):
            raise ValueError(f"{path.name} is not an idx file of bytes in {dimensions} dimensions")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        if not 0 < math.prod(shape) <= MAX_ARRAY_BYTES or shape[0] > MAX_ENTRIES:
            raise ValueError(f"{path.name} claims the shape {shape}")
        data = file.read(math.prod(shape) + 1)
    if len(data) != math.prod(shape):
        raise ValueError(f"{path.name} doesn't hold the {shape} bytes that its header claims")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _open_maybe_gzip(path: Path) -> io.BufferedIOBase:
    file = open_plain(path)
    is_gzip = file.read(2) == GZIP_MAGIC
    file.seek(0)
    return gzip.open(file) if is_gzip else file


class _Limited(io.BufferedIOBase):
    """The beginning of a file, read by `read`; beyond `limit` bytes it is refused: the rest may have no end."""

    def __init__(self, file: io.BufferedIOBase, limit: int):
        self._file, self._left = file, limit

    def read(self, size: int | None = -1, /) -> bytes:
        most = self._left + 1
        data = self._file.read(most if size is None or size < 0 else min(size, most))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("it holds more than CIFAR-10")
        return data


class _Member(tarfile.TarInfo):
    """A header in a tar. One that extends the next holds a long name; some versions of Python take quadratic time."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in EXTENSIONS and member.size > MAX_EXTENSION_BYTES:
            raise ValueError("it has a header that is too long")
        return member


def _open_tar(file: io.BufferedIOBase) -> tarfile.TarFile:
    return tarfile.open(fileobj=_Limited(file, MAX_TAR_BYTES), mode="r|", tarinfo=_Member)


def _open_cifar10(path: Path) -> Source:
    from torch_utils.untrusted.inert_pickle import read_cifar10  # takes torch with it

    batches, other = {}, []
    with _open_maybe_gzip(path) as file, _open_tar(file) as tar:
        for number, member in enumerate(tar, start=1):
            if number > MAX_TAR_MEMBERS:
                raise ValueError(f"it holds more than {MAX_TAR_MEMBERS} files")
            name = PurePosixPath(member.name).name
            if not re.fullmatch(r"data_batch_\d", name):
                other += [] if member.isdir() else [member.name]
                continue
            if not member.isfile() or member.issparse() or member.size > MAX_ARRAY_BYTES:
                raise ValueError(f"{member.name} is not a file or too large")
            if name in batches:
                raise ValueError(f"it holds two files with the name {name}")
            batch = tar.extractfile(member)
            assert batch is not None  # a regular file has contents
            images, labels = batches[name] = read_cifar10(batch.read())
            if len(images) != len(labels):
                raise ValueError(f"{member.name} has {len(images)} images, but {len(labels)} labels")
    if not batches:
        raise ValueError("no data_batch_1 to 5 in the tar file")
    pixels = np.concatenate([batches[name][0] for name in sorted(batches)]).reshape(-1, 3, 32, 32)
    pixels = pixels.transpose(0, 2, 3, 1)  # [N, H, W, C]
    labels = [label for name in sorted(batches) for label in batches[name][1]]
    if not labels or any(type(label) is not int or not 0 <= label < 10 for label in labels):
        raise ValueError("its labels are not numbers from 0 to 9")
    notes = _left_out(other, "not data_batch_1 to 5")
    return Source(lambda i: Image.fromarray(np.ascontiguousarray(pixels[i])), len(labels), labels, notes=notes)


def _open_lmdb(path: Path) -> Source:
    from training.dataset import decode_image
    from training.file_tree import MAX_FILE_BYTES

    try:
        import lmdb  # pyright: ignore[reportMissingImports]  an optional package
    except ImportError:
        raise UserError(f"--source={path} is an LMDB; to read it, pip install lmdb") from None
    try:
        database = lmdb.open(str(path), readonly=True, lock=False, create=False)
        with database.begin() as transaction:
            keys = list(itertools.islice(transaction.cursor().iternext(values=False), MAX_ENTRIES + 1))
    except lmdb.Error as error:
        raise UserError(f"--source={path} is not a readable LMDB: {error}") from None

    def image(i: int) -> Image.Image:
        with database.begin(buffers=True) as transaction:
            value = transaction.get(keys[i])
            data = bytes(value) if len(value) <= MAX_FILE_BYTES else b""
        return decode_image(data, f"--source={path}: entry {keys[i].decode(errors='replace')}")

    if not 0 < len(keys) <= MAX_ENTRIES:
        raise UserError(f"--source={path} {f'holds more than {MAX_ENTRIES} images' if keys else 'is empty'}")
    return Source(image, len(keys))
