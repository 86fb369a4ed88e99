"""How images are dealt out: a batch among processes and rounds, a data set among processes."""

from collections.abc import Iterator

import numpy as np
import torch

from dnnlib import UserError


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
