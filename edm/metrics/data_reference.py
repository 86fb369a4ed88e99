"""Reference statistics of a data set, measured once and kept in the cache folder by content."""

import hashlib
import os
from pathlib import Path

import dnnlib
from dnnlib.download import cache_folder, hash_file
from torch_utils import distributed
from training.dataset import FileTree, image_names

from .detector import Detector
from .measure import DEFAULT_BATCH, FEATURES, Collection, measure
from .reference import Reference, load_reference, save_reference
from .sources import ImageSource, data_path, open_data
from .statistics import FeatureStatistics


def data_reference(
    path: str | os.PathLike, detector: Detector, batch: int = DEFAULT_BATCH, progress: bool = False
) -> Reference:
    """Reference statistics of the images of a folder, zip or `.npz` with arr_0; every process must call it.

    What was measured before with the same detector comes from the cache folder, wherever the same images lie now. A
    damaged file there is made again.
    Errors: UserError when there are no two usable images, or the cache folder can't be written.
    """
    path = data_path(path)
    source = open_data(path)
    file = None
    if distributed.rank() == 0:
        file = cache_folder() / "references" / f"{content_hash(path)[:32]}-{detector.sha256[:16]}.npz"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise dnnlib.UserError(
                f"{file.parent} can't be made ({error.strerror}); let DNNLIB_CACHE_DIR name another folder"
            ) from None
    found = distributed.from_process_0(None if file is None else _kept(file))
    if found is not None:
        return found
    make_reference(source, file, detector, batch, progress)
    return distributed.from_process_0(None if file is None else load_reference(file))


def _kept(file: Path) -> Reference | None:
    """The statistics in a file of the cache folder; None if there are none, or the file is damaged."""
    try:
        return load_reference(file) if file.is_file() else None
    except dnnlib.UserError:
        return None


def make_reference(
    source: ImageSource,
    dest: str | os.PathLike | None,
    detector: Detector,
    batch: int = DEFAULT_BATCH,
    progress: bool = False,
) -> FeatureStatistics:
    """Measures all images of `source`, on all processes, and writes them on process 0 as reference statistics.

    dest: may be None on the other processes.
    Errors: UserError when there's only one image or `dest` can't be written.
    """
    size, channels, resolution = source.size, source.channels, source.resolution
    if size is None or channels is None or resolution is None:
        raise ValueError("a data set knows how many images it has and of which shape; this source doesn't")
    if size < 2:
        raise dnnlib.UserError("--data holds one image; a covariance needs at least two")
    statistics = FeatureStatistics(detector.feature_dim, detector.device)
    measure(source, [Collection(size, FEATURES, statistics)], detector, batch, progress)
    if distributed.rank() == 0:
        assert dest is not None
        name = source.describe(size)["images"]
        try:
            save_reference(dest, statistics, detector, name, channels, resolution)
        except OSError as error:
            raise dnnlib.UserError(f"{dest} can't be written ({error.strerror}); choose another folder") from None
    return statistics


def content_hash(path: str | os.PathLike) -> str:
    """sha256, in hex, that identifies the images of a data set: by name, size and CRC of each image file.

    A folder and a zip of the same files have the same hash; of a zip only its directory is read. Of an `.npz`: the
    file's hash.
    """
    if str(path).endswith(".npz"):
        return hash_file(path)
    tree = FileTree(path)
    digest = hashlib.sha256()
    for name in image_names(tree):
        size, crc = tree.size_and_crc(name)
        digest.update(name.encode(errors="surrogateescape") + f"\0{size} {crc:08x}\n".encode())
    return digest.hexdigest()
