"""One pass over images, on all processes, for everything that metrics want to know of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import dnnlib
from dnnlib.progress import ProgressBar
from torch_utils import distributed

from .detector import Detector
from .sources import ImageSource

DEFAULT_BATCH = 64
GATHERED_ROWS = 4096  # in one message
IMAGES, FEATURES, PROBABILITIES = "images", "features", "probabilities"


class Accumulator(Protocol):
    """Adds up what it gets of images, in batches; on several processes, each has its share of them."""

    def append(self, batch: torch.Tensor, start: int, /) -> None:
        """Adds a batch [N, ...] of the images `start`, `start + 1`, …"""
        ...

    def merge_processes(self) -> None:
        """Gives every process what all have seen; every process must call it."""
        ...

    def is_finite(self) -> bool:
        """Whether all that was added is finite."""
        ...


@dataclass(frozen=True)
class Collection:
    """What a pass over images collects about the first `num` of them.

    of:   what it takes of each batch: the IMAGES, uint8 [N, C, H, W], or the FEATURES, float32 [N, D], or
          PROBABILITIES, float32 [N, K], that the detector gives them
    into: takes it
    """

    num: int
    of: str
    into: Accumulator


class Rows:
    """The rows that a function makes of images, in the order of the images.

    make: gives float32 [N, width] of a batch; by default a row is what `append` gets. values: [num, width] on the CPU.
    """

    def __init__(self, num: int, width: int, make: Callable[[torch.Tensor], torch.Tensor] = lambda batch: batch):
        self.values, self._make = torch.zeros(num, width), make

    def append(self, batch: torch.Tensor, start: int) -> None:
        self.values[start : start + len(batch)].copy_(self._make(batch))

    def merge_processes(self) -> None:
        if distributed.world_size() == 1:
            return
        device = distributed.communication_device()
        for rows in self.values.split(GATHERED_ROWS):  # each row is zero on all processes but one
            rows.copy_(distributed.all_reduce_sum(rows.to(device, copy=True)))

    def is_finite(self) -> bool:
        return bool(self.values.isfinite().all())


def measure(
    source: ImageSource,
    collections: Iterable[Collection],
    detector: Detector | None = None,
    batch: int = DEFAULT_BATCH,
    progress: bool = False,
) -> None:
    """Fills the collections in one pass over the images of all processes, which all must call it and get the same.

    detector: may be None where images are all that is collected.
    Errors: UserError when the source has too few images, they don't fit the detector, or its features aren't finite.
    """
    collections = list(collections)
    num_images = max(collection.num for collection in collections)
    if source.size is not None and source.size < num_images:
        raise dnnlib.UserError(
            f"{num_images} images are asked for but there are only {source.size}; ask for at most that many by --num"
            " or in the name of the metric"
        )
    if detector is not None and source.channels is not None and source.resolution is not None:
        detector.check(source.channels, source.resolution)
    wanted = {collection.of for collection in collections}
    rank, processes = distributed.rank(), distributed.world_size()
    bar = ProgressBar(num_images, hidden=not progress or rank > 0, desc="measuring")
    with distributed.shared_errors(), bar:
        for start, images in source.batches(num_images, batch, rank, processes):
            distributed.alive()
            found: dict[str, Any] = {IMAGES: images}
            if detector is not None:
                found[FEATURES], found[PROBABILITIES] = detector.measure(
                    images, FEATURES in wanted, PROBABILITIES in wanted
                )
            for collection in collections:
                rows = found[collection.of][: max(collection.num - start, 0)]
                if len(rows):
                    collection.into.append(rows, start)
            bar.update(min(len(images) * processes, num_images - bar.n))
    for collection in collections:
        collection.into.merge_processes()
    detected = [collection.into for collection in collections if collection.of != IMAGES]
    if detector is not None and not all(into.is_finite() for into in detected):
        raise dnnlib.UserError(
            f"--detector={detector.path}: its features or probabilities of some images are NaN or infinite: it is"
            " damaged, or overflows on them; use another detector"
        )
