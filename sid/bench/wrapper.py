"""What wrapping a network as a denoiser costs: a network alone and inside `WrappedDenoiser`, call by call in turn."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from training.denoiser import DenoiserModule
from training.parameterisations import PREDICTIONS, DiscreteTimes, FlowTimes, WrappedDenoiser, ddpm_sigmas
from training.steps import INIT_SIGMA

from .measure import synchronize


@torch.no_grad()
def measure_wrappers(
    denoiser: DenoiserModule, images: int, rounds: int, seconds: float, calls: int | None, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """{prediction: (seconds of the network alone, seconds inside its wrapper) of each round}, medians over the calls.

    denoiser: EDM's, whose inner network is called as one that predicts each of PREDICTIONS.
    images:   in a call.
    seconds:  of a round, all predictions together, unless `calls` is given.
    calls:    of either in a round; None: as many as `seconds` allow.
    """
    net: Any = denoiser.to(device).eval()
    label_dim, size = net.label_dim, net.img_resolution
    labels = torch.eye(label_dim, device=device)[torch.arange(images) % label_dim] if label_dim else None
    x = torch.randn([images, net.img_channels, size, size], device=device) * INIT_SIGMA
    sigma = torch.full([images, 1, 1, 1], INIT_SIGMA, device=device)
    pairs = {}
    for prediction in PREDICTIONS:
        times = FlowTimes() if prediction == "flow" else DiscreteTimes(ddpm_sigmas())
        wrapped = WrappedDenoiser(net.model, prediction, times, size, net.img_channels, label_dim).to(device)
        x_s, t = times.signal(sigma) * x, times.time(sigma.flatten())
        pairs[prediction] = (
            lambda wrapped=wrapped, x_s=x_s, t=t: wrapped.answer(x_s, t, labels),
            lambda wrapped=wrapped: wrapped(x, sigma, labels),
        )
    found: dict[str, list[tuple[float, float]]] = {prediction: [] for prediction in PREDICTIONS}
    for _ in range(rounds):
        for prediction, pair in pairs.items():
            found[prediction].append(_in_turn(pair, seconds / len(pairs), calls, device))
    return found


def _in_turn(
    pair: tuple[Callable[[], Any], Callable[[], Any]], seconds: float, calls: int | None, device: torch.device
) -> tuple[float, float]:
    """The median seconds of two functions that are called in turn, each first as often as the other.

    seconds, calls: as for `measure_wrappers`, of this pair; at least one call of each.
    """
    for function in pair:
        function()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds

    def is_over() -> bool:
        done = len(times[0])
        return done >= calls if calls is not None else done > 0 and time.perf_counter() >= end

    while not is_over():
        order = (0, 1) if len(times[0]) % 2 else (1, 0)
        for index in order:
            start = _now(device)
            pair[index]()
            times[index].append(_now(device) - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _now(device: torch.device) -> float:
    """Seconds: of the processor in a single thread, which other load affects little, otherwise by the clock."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time()
    synchronize(device)
    return time.perf_counter()
