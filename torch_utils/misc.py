"""Seeds, batch arithmetic, and settings of the allocator and of half precision, shared by all that computes."""

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dnnlib import UserError


def seed_at(*coordinates: int) -> None:
    """Makes every following draw a function of `coordinates`, for instance (seed, phase, index of the first image).

    Training seeds each micro-batch by its place in the global batch, so the draws depend neither on the number of
    processes nor on what ran before: a resumed run needs no generator state.
    """
    seed = seed_from(*coordinates)
    # Not torch.manual_seed: it also asks backends that aren't in use, and each of them formats the call stack, which
    # takes milliseconds.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def seed_from(*coordinates: int) -> int:
    """One seed for one place: `coordinates` are integers from 0 up."""
    words = np.random.SeedSequence(coordinates).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def to_channels_last(net: torch.nn.Module) -> None:
    """Stores the convolutions' weights channels last, in place; activations follow them."""
    convert: Callable[..., Any] = net.to  # PyTorch's annotations of it don't list memory_format
    convert(memory_format=torch.channels_last)


def first_non_finite(net: torch.nn.Module) -> str | None:
    """The name of a parameter or buffer of `net` that holds NaN or infinity; None if all are finite.

    Infinity is allowed in buffers that aren't saved with the network, such as attention masks.
    """
    saved = net.state_dict().keys()
    tensors = {name: t for name, t in (*net.named_parameters(), *net.named_buffers()) if t.is_floating_point()}
    if not tensors:
        return None
    bad = [t.isfinite().all().logical_not() if name in saved else t.isnan().any() for name, t in tensors.items()]
    bad = (
        torch.stack([flag.cpu() for flag in bad]) if len({t.device for t in tensors.values()}) > 1 else torch.stack(bad)
    )
    return next((name for name, is_bad in zip(tensors, bad.tolist()) if is_bad), None)


def split_batch(batch: int, batch_gpu: int | None, processes: int) -> tuple[int, int]:
    """(batch_gpu, rounds): images per process and round, and rounds to accumulate, with the product `batch`.

    Errors: UserError naming --batch or --batch-gpu when the batch can't be split so.
    """
    if batch < 1 or batch % processes:
        raise UserError(f"--batch={batch} must be a positive multiple of the number of processes ({processes})")
    per_process = batch // processes
    if batch_gpu is None or batch_gpu > per_process:
        batch_gpu = per_process
    if batch_gpu < 1 or per_process % batch_gpu:
        raise UserError(
            f"--batch-gpu={batch_gpu} must divide the {per_process} images per process"
            f" (--batch={batch} over {processes} processes)"
        )
    return batch_gpu, per_process // batch_gpu


# Parameters of glibc's mallopt (malloc.h) and their values here: nothing is given back, no allocation is a mapping of
# its own, and the heap grows by 64 MiB.
MALLOC_OPTIONS = {-1: -1, -4: 0, -2: 64 << 20}  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_TOP_PAD
MALLOC_VARIABLES = re.compile("MALLOC_(TRIM_THRESHOLD|MMAP_MAX|MMAP_THRESHOLD|TOP_PAD)_|GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Has the C library keep what a step frees for the next one, which asks for as much again.

    By default glibc gives large blocks back to the system, which clears each page again: a tenth of a step's time on a
    CPU. The highest memory stays as it is. Nothing happens with other libraries, or where the environment has settings.
    """
    if any(map(MALLOC_VARIABLES.fullmatch, os.environ)):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in MALLOC_OPTIONS.items():
        mallopt(parameter, value)


def sum_float16_in_float32() -> None:
    """Makes GPUs sum products of float16 matrices in float32 throughout, as the published results were computed."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


class InfiniteSampler(torch.utils.data.Sampler):
    """Endless shuffled indices of a data set; process `rank` takes every `processes`-th of them.

    start: how many indices (over all processes) were taken already, so that a resumed run goes on where it was.
    """

    def __init__(self, size: int, rank: int = 0, processes: int = 1, seed: int = 0, start: int = 0):
        assert size > 0
        self._size, self._rank, self._processes, self._seed, self._start = size, rank, processes, seed, start

    def __iter__(self) -> Iterator[int]:
        position, epoch, order = self._start + self._rank, -1, np.empty(0, dtype=np.int64)
        while True:
            if position // self._size != epoch:
                epoch = position // self._size
                order = np.random.default_rng([self._seed, epoch]).permutation(self._size)
            yield int(order[position % self._size])
            position += self._processes
