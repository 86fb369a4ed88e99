"""Image sources: uint8 batches in a fixed order, shared out over processes by whole batches.

Process r of P takes batches r, r + P, …: whichever process a batch falls to, it holds the same images, so the
features don't depend on the number of processes.
"""

import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

import dnnlib
from torch_utils import persistence
from training.conditions import Prompts, conditions_of

from .npz import read_arrays

PREFETCHED_BATCHES = 4
MAX_ARRAY_BYTES = 4 << 30  # of images in an .npz; OpenAI's reference batches have up to 2 GB


class ImageSource(ABC):
    """Gives `num` images, in an order of their own, as uint8 batches.

    size: how many images there are; None if there is no limit.
    channels, resolution: of every image; None if they are only known once the images arrive.
    """

    size: int | None = None
    channels: int | None = None
    resolution: int | None = None

    @abstractmethod
    def batches(self, num: int, batch: int, rank: int = 0, processes: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
        """This process's share: (index of the first image, uint8 [N, C, H, W])."""

    def prompts(self, num: int) -> tuple[Sequence[str], list[int]] | None:
        """(all prompts of the source, which of them each of the first `num` images has); None for images without."""
        return None

    @abstractmethod
    def describe(self, num: int) -> dict[str, Any]:
        """Plain values that describe `num` images of this source in a metric's record."""


class FolderSource(ImageSource):
    """The images of a folder or zip, in the order of their names.

    max_size: keep this many images, a subset drawn with `seed`. option: the command-line option that errors name.
    """

    def __init__(self, path: str | os.PathLike, max_size: int | None = None, seed: int = 0, option: str = "--images"):
        from training.dataset import ImageFolderDataset

        self._dataset = ImageFolderDataset(path=path, max_size=max_size, seed=seed, option=option)
        self._path, self._seed = os.path.normpath(path), seed
        self.size = len(self._dataset)
        self.channels, self.resolution = self._dataset.num_channels, self._dataset.resolution

    def batches(self, num, batch, rank=0, processes=1):
        return _prefetched(self._read(num, batch, rank, processes))

    def describe(self, num):
        return {"images": os.path.basename(self._path), "seeds": None, "subset_seed": self._seed}

    def _read(self, num, batch, rank, processes):
        for start, stop in _share(num, batch, rank, processes):
            yield start, torch.from_numpy(np.stack([self._dataset[i][0] for i in range(start, stop)]))


class NetworkSource(ImageSource):
    """Images that a network makes: image i from seed `seed + i`, in one step or by Heun as its metadata says.

    net: a loaded or live network; it is used as it is (in eval mode, if it should be).
    name, sha256: where it came from and the hash of its weights (`edm.zoo.network_hash`), for the record.
    class_idx, steps and sampler_options: as `edm.sampler.generate_images` takes them.
    """

    def __init__(
        self,
        net: Any,
        seed: int = 0,
        class_idx: int | None = None,
        steps: int | None = None,
        name: str | None = None,
        sha256: str | None = None,
        **sampler_options: Any,
    ):
        from edm.latents import image_shape

        self._net, self._seed, self._name, self._sha256 = net, seed, name, sha256
        self._options = {"class_idx": class_idx, "steps": steps, **sampler_options}
        self.channels, self.resolution = image_shape(net)

    def batches(self, num, batch, rank=0, processes=1):
        images = self._generate(num, batch, rank, processes)
        device = next(self._net.parameters()).device
        return _prefetched(_on_own_stream(images, device)) if device.type == "cuda" else images

    def prompts(self, num):
        conditions = conditions_of(self._net)
        if not isinstance(conditions, Prompts):
            return None
        return conditions.texts, conditions.numbers_of_seeds(range(self._seed, self._seed + num))

    def describe(self, num):
        half = getattr(self._net, "use_fp16", False) and next(self._net.parameters()).device.type != "cpu"
        return {
            "network": self._name,
            "network_sha256": self._sha256,
            "dtype": "float16" if half else "float32",
            "seeds": [self._seed, self._seed + num - 1],
            **{name: value for name, value in self._options.items() if value is not None},
        }

    def _generate(self, num, batch, rank, processes):
        from edm.sampler import generate_images

        shares = list(_share(num, batch, rank, processes))
        seeds = [self._seed + i for start, stop in shares for i in range(start, stop)]
        images = generate_images(self._net, seeds, batch=batch, **self._options)  # only the last batch may be short
        for (start, stop), part in zip(shares, images):
            assert len(part) == stop - start
            yield start, part


class TensorSource(ImageSource):
    """Uint8 tensors [N, C, H, W] of any lengths from an iterable that is the same on every process.

    Only a list or tuple tells the number and shape of its images in advance. name: for the record.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], name: str = "tensors"):
        self._tensors, self._name = tensors, name
        if isinstance(tensors, list | tuple):
            self.size = sum(len(images) for images in tensors)
            self.channels, self.resolution = tensors[0].shape[1:3]

    def batches(self, num, batch, rank=0, processes=1):
        shares, waiting, held, taken = set(_share(num, batch, rank, processes)), [], 0, 0
        for images in self._tensors:
            waiting.append(images)
            held += len(images)
            while taken < num and held >= min(batch, num - taken):
                pool, count = torch.cat(waiting), min(batch, num - taken)
                if (taken, taken + count) in shares:
                    yield taken, pool[:count]
                taken, waiting, held = taken + count, [pool[count:]], held - count
            if taken == num:
                return
        raise dnnlib.UserError(f"{num} images are asked for but {self._name} holds {taken + held}; ask for fewer")

    def describe(self, num):
        return {"images": self._name, "seeds": None}


def data_path(source: str | os.PathLike) -> str | os.PathLike:
    """The local path of --data: published images are downloaded, anything else stays as it is."""
    from edm import zoo

    entry = zoo.FILES.get(str(source))
    return source if entry is None or entry.kind != "images" else zoo.resolve(source, "images")


def open_data(path: str | os.PathLike) -> ImageSource:
    """The real images of --data: a folder, a zip, or an `.npz` as `array_source` reads it; published ones by name."""
    path = data_path(path)
    return array_source(path) if str(path).endswith(".npz") else FolderSource(path, option="--data")


def array_source(path: str | os.PathLike) -> TensorSource:
    """The images of an `.npz` as OpenAI publishes reference batches: `arr_0`, uint8 [N, H, W, C]."""
    try:
        images = read_arrays(path, {"arr_0": "u"}, MAX_ARRAY_BYTES)["arr_0"]
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] != images.shape[2] or 0 in images.shape:
            raise ValueError(f"{images.dtype} of shape {images.shape}, not uint8 [N, H, H, C]")
        if images.shape[3] not in (1, 3):
            raise ValueError(f"{images.shape[3]} channels, not 1 or 3")
    except (ValueError, KeyError) as error:
        reason = persistence.one_line(error)
        raise dnnlib.UserError(f"--data={path} is not an .npz with images in arr_0: {reason}") from None
    return TensorSource([torch.from_numpy(images).permute(0, 3, 1, 2)], name=os.path.basename(path))


def _share(num: int, batch: int, rank: int, processes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every batch of process `rank`."""
    for start in range(rank * batch, num, processes * batch):
        yield start, min(start + batch, num)


def _on_own_stream(items: Iterator, device: torch.device) -> Iterator:
    """Runs a generator's work on a CUDA stream of its own, after the work queued so far, alongside later work."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def run() -> Iterator:
        with torch.cuda.stream(stream):
            yield from items

    return run()


def _prefetched(items: Iterator) -> Iterator:
    """Runs an iterator in a thread of its own, a few items ahead, so that reading and measuring overlap."""
    waiting: queue.Queue = queue.Queue(PREFETCHED_BATCHES)
    abandoned = threading.Event()
    end = object()

    def put(item) -> bool:
        while not abandoned.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        abandoned.set()
