"""Processes that watch each other: one that hangs ends the run, weights that drift apart are found."""

import contextlib
import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from dnnlib import UserError

from . import distributed

HANG_EXIT_CODE = 5
SPARE_SEC = 60.0  # how much longer messages wait, so that the process that keeps them waiting is named first
START_SPARE_SEC = SPARE_SEC / 2  # the same until training begins, since processes start at different speeds
PREPARING, WAITING, TRAINING = range(3)  # a process works by itself, waits in a message for others, trains
PERIOD_SEC = 5.0  # how often a process shows that it is alive and looks at the others


class RanksDisagreeError(UserError):
    """Weights that must be equal on all processes are not: memory or a device is faulty."""

    exit_code = 4


def check_equal_weights(networks: Mapping[str, torch.nn.Module], nimg: int) -> None:
    """Compares the bits of the networks over all processes, in one small message; every process must call it.

    Errors: RanksDisagreeError naming network and processes, on all of them.
    """
    if distributed.world_size() == 1:
        return
    own = torch.stack([fingerprint(net) for net in networks.values()])  # int64 [networks]
    everyone = distributed.gather(own)  # [processes, networks]
    wrong = everyone != everyone[0]
    if wrong.any():
        names = [name for name, differs in zip(networks, wrong.any(0).tolist()) if differs]
        ranks = [str(rank) for rank, differs in enumerate(wrong.any(1).tolist()) if differs]
        raise RanksDisagreeError(
            f"{', '.join(names)}: the weights on process {', '.join(ranks)} are not those on process 0 at"
            f" {nimg / 1e3:g} kimg; the last saved state is good: continue with --resume, and suspect that machine"
        )


@torch.no_grad()
def fingerprint(net: torch.nn.Module) -> torch.Tensor:
    """An int64 scalar made of all bits of the parameters; integer sums, so no order of summing changes it."""
    total = torch.zeros([], dtype=torch.int64, device=next(net.parameters()).device)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for i, tensor in enumerate(net.parameters(), start=1):
        bits = tensor.contiguous().reshape(-1).view(words[tensor.element_size()])
        total += (2 * i + 1) * bits.sum(dtype=torch.int64).to(total.device)
    return total


@contextlib.contextmanager
def watching(timeout_sec: float) -> Iterator[threading.Event]:
    """While open, ends all processes of the run when none has made progress for `timeout_sec`; names those behind.

    Open it as soon as the process group is there; gives the event to set when training begins. Until then processes
    load and compile for as long as they need, and only one that keeps another waiting in a message is behind.
    Works through torchrun's store, so it needs its environment; without, or with one process, it does nothing.
    """
    training = threading.Event()
    if distributed.world_size() == 1 or "MASTER_PORT" not in os.environ:
        yield training
        return
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(done, training, timeout_sec), daemon=True)
    thread.start()
    try:
        yield training
        distributed.barrier()  # who holds the store stays until all are here
    finally:
        done.set()
        thread.join(2 * PERIOD_SEC)


def _watch(done: threading.Event, training: threading.Event, timeout_sec: float) -> None:
    try:
        _look_around(done, training, timeout_sec)
    except RuntimeError as error:  # the store is gone, so the process that held it is dead
        if not done.wait(timeout_sec):  # in which this one may still save its state and end by itself
            _tell(f"lost touch with the other processes ({error})".splitlines()[0])
            os._exit(HANG_EXIT_CODE)


def _look_around(done: threading.Event, training: threading.Event, timeout_sec: float) -> None:
    rank, processes = distributed.rank(), distributed.world_size()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"watchdog/{attempt}/{r}" for r in range(processes)]
    seen, since = None, time.monotonic()
    store = dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_sec))
    while True:
        phase = TRAINING if training.is_set() else WAITING if distributed.waiting.is_set() else PREPARING
        store.set(keys[rank], "{messages} {signs} {phase}".format(**distributed.progress, phase=phase))
        # A process that stopped before its first sign has entered no message at all.
        found = [store.get(key) if store.check([key]) else b"-1 0 0" for key in keys]
        phase = max(int(value.split()[2]) for value in found)
        if found != seen:
            seen, since = found, time.monotonic()
        elif phase != PREPARING and time.monotonic() - since > timeout_sec + START_SPARE_SEC * (phase != TRAINING):
            _end([int(value.split()[0]) for value in found], rank, timeout_sec)
        if done.wait(min(PERIOD_SEC, timeout_sec / 5)):
            return


def _end(messages: list[int], rank: int, timeout_sec: float) -> None:
    """messages: how many each process has entered; those with the fewest keep the others waiting."""
    behind = [r for r, count in enumerate(messages) if count == min(messages)]
    if len(behind) == len(messages):
        who, teller = "all processes wait in the same message (see to the network)", 0
    else:
        teller = next(r for r in range(len(messages)) if r not in behind)
        who = f"process {', '.join(map(str, behind))} keeps the others waiting"
    if rank == teller:
        _tell(f"no progress for {timeout_sec:g} seconds: {who}; the run ends here")
    if rank in behind:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # there may be no stderr any more
            if sys.__stderr__ is not None:
                faulthandler.dump_traceback(file=sys.__stderr__)
    os._exit(HANG_EXIT_CODE)


def _tell(error: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"Error: {error}", file=sys.stderr, flush=True)
