"""Settings of the machine that computes: its allocator, sums in half precision, the layout of weights."""

import ctypes
import os
import re
from collections.abc import Callable
from typing import Any

import torch

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


def to_channels_last(net: torch.nn.Module) -> None:
    """Stores the convolutions' weights channels last, in place; activations follow them."""
    convert: Callable[..., Any] = net.to  # PyTorch's annotations of it don't list memory_format
    convert(memory_format=torch.channels_last)
