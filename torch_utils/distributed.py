"""Processes and devices, resolved once. Without torchrun everything here works as a group of one process."""

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dnnlib import UserError

from . import devices

T = TypeVar("T")
BUCKET_BYTES = 64 << 20  # one message carries, or one kernel works on, about this much
progress = {"messages": 0, "signs": 0}  # counted here for watchdog.py: messages entered, other signs of life
waiting = threading.Event()  # set while this process is inside a message


def init(device: str | None = None, timeout_sec: float = 1800, keep_memory: bool = True) -> torch.device:
    """Joins torchrun's process group (nccl on CUDA, else gloo) and returns this process's device.

    device: 'cuda', 'mps' or 'cpu'; None takes the first of cuda, mps, cpu that is there.
    keep_memory: whether a CPU's freed memory is kept (`devices.keep_freed_memory`); other devices keep theirs anyway.
    Errors: UserError when the device isn't there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = device or next(name for name, there in available.items() if there)
    if not available.get(kind):
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise UserError(f"--device={kind} is not available here; available: {there}")
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"{local_rank + 1} processes but {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    resolved = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(resolved)
    devices.sum_float16_in_float32()
    if kind == "cpu" and keep_memory:
        devices.keep_freed_memory()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        _join("nccl" if kind == "cuda" else "gloo", datetime.timedelta(seconds=timeout_sec))
    return resolved


def _join(backend: str, timeout: datetime.timedelta) -> None:
    """Joins torchrun's group, under keys of this attempt: after a restart its store still holds the addresses of the
    processes that died, and gloo would wait for those."""
    store, rank, processes = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(f"joined/{rank}", "")
    start = time.monotonic()
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timeout)
    except RuntimeError as error:
        if time.monotonic() - start < timeout.total_seconds():
            raise  # something else than waiting in vain
        absent = ", ".join(str(r) for r in range(processes) if not store.check([f"joined/{r}"])) or "one"
        seconds = timeout.total_seconds()
        raise UserError(
            f"--timeout: process {absent} of {processes} did not start within {seconds:g} seconds"
        ) from error


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process in the group, from 0 up."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the group has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args: Any, **kwargs: Any) -> None:
    """Prints on process 0 only."""
    if rank() == 0:
        print(*args, **kwargs)
        sys.stdout.flush()


def alive() -> None:
    """Long work between two messages calls it now and then, so that it isn't taken for a hang."""
    progress["signs"] += 1


@contextlib.contextmanager
def _message() -> Iterator[None]:
    """Counts a message to the other processes, and shows that this process is inside it while open."""
    progress["messages"] += 1
    waiting.set()
    try:
        yield
    finally:
        waiting.clear()


@_message()
def barrier() -> None:
    """Waits for all processes; every process must call it."""
    if dist.is_initialized():
        dist.barrier()


@_message()
def from_process_0(value: T | None) -> T:
    """What process 0 passes, a picklable object; every process must call it, and the others may pass None."""
    box: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


@_message()
def from_every_process(value: T) -> list[T]:
    """What each process passes, picklable objects by rank; every process must call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """A UserError that any process raises while this is open is raised on every process when it closes.

    Otherwise the other processes would wait for one that has failed. Every process must open it.
    """
    own = None
    try:
        yield
    except UserError as error:
        own = error
    errors = [error for error in from_every_process(own) if error is not None]
    if errors:
        raise errors[0]


def communication_device() -> torch.device:
    """Where tensors must be to be summed over processes: on this process's GPU for nccl, otherwise on the CPU."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@_message()
def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over all processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@_message()
def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum of `tensor` over all processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The equally shaped tensors of all processes, stacked by rank: [processes, ...]."""
    everyone = tensor.new_zeros([world_size(), *tensor.shape])
    everyone[rank()] = tensor
    return all_reduce_sum(everyone)


@_message()
def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sums the gradients of all processes, in place, in few large messages.

    Parameters without a gradient must be so on every process (frozen ones are).
    """
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for bucket in buckets(gradients):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for g, part in zip(bucket, parts)])


@_message()
def broadcast_module(module: torch.nn.Module) -> None:
    """Gives every process the parameters and buffers of process 0."""
    if dist.is_initialized():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


def buckets(tensors: Sequence[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """`tensors` in their order, in lists of one dtype that end when they reach BUCKET_BYTES."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and (size >= BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
