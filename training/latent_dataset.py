"""Data sets of latents: one .safetensors file with the means and standard deviations that a VAE gives of images.

latents   float32 [N, 2, C, h, w], as the VAE makes them
labels    int64 [N], the classes; missing without labels
header    "latents": JSON of the VAE's record, {"source", "sha256", "scale", "shift"}, as in a network's metadata

A denoiser is trained on (latents - shift) scale. `edm.dataset_tool --vae` writes such files.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_utils.untrusted.bounds import parse_json

from .dataset import ImageFolderDataset
from .file_tree import DatasetError
from .labels import MAX_CLASSES

SUFFIX = ".safetensors"
RECORD = "latents"  # in the header
MAX_HEADER_BYTES, MAX_RECORD_VALUES = 1 << 20, 10_000


class LatentDataset(torch.utils.data.Dataset):
    """Latents; items are (float32 [2, C, h, w] mean and standard deviation, float32 one-hot [label_dim]).

    `training.decoder.clean_samples` draws a latent from an item. The attributes are those of `ImageFolderDataset`, and
    `metadata`: what networks trained on it say about their VAE.
    Errors: DatasetError (one line naming `option`) for all that can be wrong with the file.
    """

    def __init__(self, path: str | os.PathLike, use_labels: bool = False, option: str = "--data"):
        self.path, self.what = Path(path), f"{option}={path}"
        self.name = self.path.resolve().stem
        shape, self._labels, record = self._open()
        self._size, _, self.num_channels, self.resolution, _ = shape
        self._shape, self._memory, self._pid = shape, None, None
        if use_labels and self._labels is None:
            raise DatasetError(f"{self.what} has no labels (edm.train --cond=0 needs none)")
        if not use_labels:
            self._labels = None
        self.label_dim = int(max(self._labels)) + 1 if self._labels is not None else 0
        self.metadata: dict[str, Any] = {"vae": record}
        self._scale, self._shift = (self._per_channel(record, name) for name in ("scale", "shift"))

    @property
    def classes(self) -> list[int]:
        """The classes that have latents here, in ascending order; none without labels."""
        return sorted(map(int, set(self._labels.tolist()))) if self._labels is not None else []

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        index = range(self._size)[index]
        mean, std = np.array(self._latents()[index])  # a copy
        item = np.stack([(mean - self._shift) * self._scale, std * np.abs(self._scale)])
        if not np.isfinite(item).all():
            raise DatasetError(f"{self.what}: latent {index} holds NaN or infinity; make the file again")
        return item, self.get_label(index)

    def get_label(self, index: int) -> np.ndarray:
        """The one-hot label of item `index`: float32 [label_dim], so empty without labels."""
        label = np.zeros(self.label_dim, dtype=np.float32)
        if self._labels is not None:
            label[self._labels[index]] = 1
        return label

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_memory": None}

    def _latents(self) -> np.ndarray:
        """The file in memory as the system sees fit, opened by each process for itself."""
        if self._memory is None or self._pid != os.getpid():
            self._memory, self._pid = np.memmap(self.path, "<f4", "r", self._offset, self._shape), os.getpid()
        return self._memory

    def _open(self) -> tuple[tuple[int, ...], np.ndarray | None, dict[str, Any]]:
        """(shape, labels, record) of the file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="np") as file:
                record = parse_json((file.metadata() or {})[RECORD], MAX_RECORD_VALUES)
                part = file.get_slice("latents")
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                labels = file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._offset = 8 + length + json.loads(file.read(length))["latents"]["data_offsets"][0]
        except OSError as error:
            raise DatasetError(
                f"{self.what}: {error.strerror or error}; give a folder, zip or file of latents"
            ) from None
        except (SafetensorError, LookupError, TypeError, ValueError, MemoryError, RecursionError):
            raise DatasetError(
                f"{self.what} is no data set of latents, or damaged; make it by edm.dataset_tool --vae"
            ) from None
        if dtype != "F32" or len(shape) != 5 or shape[1] != 2 or shape[3] != shape[4] or 0 in shape:
            raise DatasetError(f"{self.what}: its latents are {dtype} {list(shape)}, not F32 [N, 2, C, h, h]")
        if labels is not None and (
            labels.dtype != np.int64 or labels.shape != shape[:1] or not 0 <= labels.min() <= labels.max() < MAX_CLASSES
        ):
            raise DatasetError(f"{self.what}: its labels aren't a class number for each latent")
        if type(record) is not dict:
            raise DatasetError(f"{self.what}: its header doesn't say which VAE made the latents")
        return shape, labels, record

    def _per_channel(self, record: dict[str, Any], name: str) -> np.ndarray:
        """scale or shift, float32 [1 or C, 1, 1]."""
        try:
            values = np.asarray(record[name], dtype=np.float32).reshape(-1, 1, 1)
        except (LookupError, TypeError, ValueError):
            values = np.empty(0)
        if len(values) not in (1, self.num_channels) or not np.isfinite(values).all():
            raise DatasetError(f"{self.what}: its header doesn't give the {name} of the latents; make the file again")
        return values


def open_dataset(
    path: str | os.PathLike,
    use_labels: bool = False,
    xflip: bool = False,
    cache: bool = False,
    option: str = "--data",
) -> ImageFolderDataset | LatentDataset:
    """The images of a folder or zip, or the latents of a file.

    Errors: DatasetError naming `option`.
    """
    if Path(path).suffix != SUFFIX:
        return ImageFolderDataset(path, use_labels=use_labels, xflip=xflip, cache=cache, option=option)
    if xflip:
        raise DatasetError(f"{option}={path}: latents can't be mirrored; leave --xflip out")
    return LatentDataset(path, use_labels, option)
