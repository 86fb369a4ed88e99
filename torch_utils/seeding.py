"""Random draws that depend on a place in the training, and on nothing that ran before."""

import numpy as np
import torch


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
