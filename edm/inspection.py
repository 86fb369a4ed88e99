"""What a network is, and whether its answers are those of the denoiser that it is declared as.

The test needs no data. A denoiser's own samples are noised and denoised again. An exact denoiser leaves at most the
error of the best linear one, sigma^2 v / (sigma^2 + v) per pixel for samples of variance v; on images, far less at some
noise levels. A network whose prediction or time is declared wrongly leaves more than it does when declared rightly, is
no better than the linear one anywhere (as the exact denoiser of white noise), or makes samples that are no images.
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from edm.sampler import heun_sampler
from training.conditions import as_ranges, conditions_of, learnt_classes
from training.denoiser import SIGMA_DATA, known_sigma, noise_range, sigma_data
from training.moments import start_of
from training.networks_edm2 import Precond
from training.parameterisations import DiscreteTimes, WrappedDenoiser
from training.steps import Steps

NUM_IMAGES, STEPS = 32, 12
LEVELS = (0.3, 1.0, 3.0, 10.0)  # at which samples are noised, where they lie in the network's range
# Multiples of the linear denoiser's error. Exact networks of four images leave 0.2 on average over LEVELS and 0.9 at
# most; a teacher that had seen 22 thousand digits 1.0, and 2.2 when its epsilon was read as v.
SURE_MEAN, SURE_MOST = 0.6, 1.25  # below both, no other declaration is tried
MOST_MEAN, LEAST = 1.5, 0.9  # on average over the levels, and at the best of them: what any teacher must reach
BETTER = 1.5  # how many times smaller the error of another declaration must be
MIN_VARIANCE, MAX_VARIANCE = 1e-3, 2.0  # of images with values in [-1, 1], with some room
MIN_LATENT_VARIANCE, MAX_LATENT_VARIANCE = 1e-4, 1e3  # of latents, which may not have been scaled


def facts(net: Any) -> dict[str, str]:
    """{what: text}, for people to read."""
    inner = f" around a {type(net.net).__name__}" if isinstance(net, WrappedDenoiser) else ""
    inner = " of EDM2" if isinstance(net, Precond) else inner
    metadata = getattr(net, "metadata", {})
    low, high = noise_range(net)
    steps, size = Steps.of(net), net.img_resolution
    made = "latents" if "vae" in metadata else "images"
    classes, text = learnt_classes(net), _text(net)
    learnt = f", of which {as_ranges(classes)} had images in training" if classes is not None else ""
    parameters = sum(parameter.numel() for parameter in net.parameters())
    told = {
        "kind": metadata.get("kind", "generator" if steps else "teacher"),
        "class": f"{type(net).__name__}{inner}",
        "predicts": prediction(net) if isinstance(net, WrappedDenoiser) else "the clean image",
        "noise levels": f"{low:g} to {high:g}",
        "starts at": ", ".join(f"{level:.4g}" for level in steps.levels) if steps else None,
        "starts from": "noise with the moments of the teacher's images" if start_of(net) is not None else None,
        "step noise": steps.noise if steps and len(steps) > 1 else None,
        "sigma_data": f"{sigma_data(net):g}",
        made: f"{net.img_channels} x {size} x {size}",
        "VAE": _vae(metadata.get("vae")),
        "classes": f"{net.label_dim}{learnt}" if net.label_dim else None if text else "none",
        "prompts": text,
        "parameters": f"{parameters / 1e6:.2f} million",
        "licence": metadata.get("licence", "not recorded"),
    }
    return {name: str(text) for name, text in told.items() if text is not None}


def _text(net: Any) -> str | None:
    """What encodes the prompts of a text-to-image network; None for others."""
    record = getattr(net, "metadata", {}).get("text")
    if record is None or not getattr(net, "prompt_dim", 0):
        return None
    return f"{net.prompt_dim} numbers each, by the text encoders of {record['source']} ({record['pipeline']})"


def _vae(record: Any) -> str | None:
    if record is None:
        return None
    scale = record["scale"] if isinstance(record["scale"], list) else [record["scale"]]
    return f"{record['source']}, latents scaled by {', '.join(f'{value:.4g}' for value in scale)}"


def prediction(net: WrappedDenoiser) -> str:
    """What a wrapped network predicts, and its times, in words."""
    times: Any = net.times
    if isinstance(times, DiscreteTimes):
        return f"{net.prediction}, at times 0 to {times.last}"
    return f"{net.prediction}, at times {'1 to 0' if times.is_reversed else '0 to 1'}, times {times.scale:g}"


@torch.no_grad()
def denoising_errors(net: Any, seed: int = 0) -> dict[float, float]:
    """{noise level: squared error on the network's own samples, over that of the best linear denoiser}.

    Infinite where the samples are no images. Empty where the network knows none of LEVELS.
    """
    samples, condition, draws = own_samples(net, NUM_IMAGES, seed)
    device, (low, high) = samples.device, noise_range(net)
    variance = samples.var(dim=0).mean().item()
    errors = {}
    for level in LEVELS:
        if not low <= level <= high:
            continue
        sigma = known_sigma(net, torch.full([NUM_IMAGES, 1, 1, 1], level, device=device))
        x = samples + sigma * torch.randn(samples.shape, generator=draws).to(device)
        error = (net(x, sigma, condition) - samples).square().mean().item()
        linear = level**2 * variance / (level**2 + variance)
        errors[level] = error / linear if _sound(net, variance) and math.isfinite(error) else math.inf
    return errors


@torch.no_grad()
def own_samples(net: Any, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Generator]:
    """(samples, float32 [number, C, H, W] on the network's device; their condition; the generator that drew both)."""
    device = next(net.parameters()).device
    draws = torch.Generator().manual_seed(seed)
    conditions = conditions_of(net)
    condition = conditions.draw(number, device, lambda high: torch.randint(high, [number], generator=draws).to(device))
    z = torch.randn([number, net.img_channels, net.img_resolution, net.img_resolution], generator=draws)
    return heun_sampler(net, z.to(device), condition, num_steps=STEPS).float(), condition, draws


def _sound(net: Any, variance: float) -> bool:
    """Whether images, or latents, can have this variance."""
    in_units = variance * (SIGMA_DATA / sigma_data(net)) ** 2
    if "vae" in getattr(net, "metadata", {}):
        return MIN_LATENT_VARIANCE < in_units < MAX_LATENT_VARIANCE
    return MIN_VARIANCE < in_units < MAX_VARIANCE


class _OtherTimes(torch.nn.Module):
    """The times of a network, changed before it sees them."""

    def __init__(self, times: Any, change: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.of, self.change = times, change
        self.is_flow, self.is_reversed = times.is_flow, times.is_reversed
        self.signal, self.scales, self.round_sigma = times.signal, times.scales, times.round_sigma

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.change(self.of.time(sigma))


def alternatives(net: Any) -> dict[str, WrappedDenoiser]:
    """{how: the same network declared otherwise}; empty for networks that aren't wrapped."""
    if not isinstance(net, WrappedDenoiser):
        return {}
    times: Any = net.times
    is_discrete = isinstance(times, DiscreteTimes)
    last = times.last if is_discrete else times.scale
    steps = last + 1 if is_discrete else 1000
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "": lambda t: t,
        "time running the other way": lambda t: last - t,
    }
    if not (is_discrete and times.nearest):  # whole numbers
        changes[f"times divided by {steps}"] = lambda t: t / steps
        changes[f"times multiplied by {steps}"] = lambda t: t * steps
    predictions = ("flow", "reversed flow", "x0") if times.is_flow else ("epsilon", "v", "x0")
    found = {}
    for name, (how, change) in itertools.product(predictions, changes.items()):
        other: Any = copy.copy(net)
        other._modules = dict(net._modules)
        other.prediction = name.removeprefix("reversed ")
        other.times = _OtherTimes(times, change)
        if name == "reversed flow":
            other.times.is_reversed = not times.is_reversed
        found[" with ".join(filter(None, (name, how)))] = other
    found.pop(net.prediction, None)
    return found


def mean(errors: dict[float, float]) -> float:
    """The geometric mean of `denoising_errors`."""
    return math.prod(errors.values()) ** (1 / len(errors))


def _is_possible(errors: dict[float, float]) -> bool:
    return mean(errors) <= MOST_MEAN and min(errors.values()) <= LEAST


def misfit(net: Any) -> str | None:
    """What is wrong with a denoiser's declaration; None if its answers fit, or none of LEVELS is in its range."""
    errors = denoising_errors(net)
    if not errors or (mean(errors) <= SURE_MEAN and max(errors.values()) <= SURE_MOST):
        return None
    others = {how: denoising_errors(other) for how, other in alternatives(net).items()}
    means = {how: mean(errors) for how, errors in others.items() if _is_possible(errors)}
    best = min(means, key=means.__getitem__, default=None)
    if _is_possible(errors) and (best is None or mean(errors) < BETTER * means[best]):
        return None
    found = f"it leaves {mean(errors):.3g} times a linear denoiser's error on its own samples"
    if not math.isfinite(mean(errors)):
        found = "its samples are no images"
    elif mean(errors) <= MOST_MEAN and best is None:
        found = "it denoises its own samples no better than a linear denoiser"
    if best is not None:
        return f"its answers don't fit {net.prediction} ({found}); they fit {best}"
    if not isinstance(net, WrappedDenoiser):
        return f"it doesn't denoise as a teacher should: {found}"
    return f"its answers don't fit {net.prediction} ({found}), nor another prediction that was tried"
