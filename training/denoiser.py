"""The denoiser: what a network must offer to be trained, sampled or distilled here.

A denoiser is called as `net(x, sigma, condition, augment_labels=None)` and predicts the clean image.
"""

import math
from typing import Any, Protocol

import torch

from dnnlib import UserError

from .conditions import Prompts, blank_condition


class Denoiser(Protocol):
    """D(x; sigma) of images x [N, C, H, W] at noise levels sigma [N, 1, 1, 1], both float32.

    img_resolution, img_channels   H = W, and C
    label_dim                      how many classes its condition names; 0 for a network without classes
    prompt_dim                     how many numbers its condition has if that is a prompt; 0 where it is missing
    sigma_min, sigma_max           between which its answers make sense; 0 and infinity where they are missing
    round_sigma                    gives the nearest noise levels that it knows; the identity where it is missing
    sigma_data                     standard deviation of the images; 0.5 where it is missing
    """

    img_resolution: int
    img_channels: int
    label_dim: int

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class DenoiserModule(torch.nn.Module):
    """A denoiser that is a torch module, for annotations: any module with these attributes will do.

    metadata   plain values that travel with its weights (`edm.zoo.load_network`); a user's own network may lack it
    prompts    what it is asked to make, set by whoever gives some to a text-to-image network
    """

    img_resolution: int
    img_channels: int
    label_dim: int
    metadata: dict[str, Any]
    prompts: Prompts


def check_denoiser(net: Any, source: Any) -> None:
    """Calls `net` once, on its own device, as training does. source: names it in messages.

    Errors: UserError when it lacks what a denoiser has, or its answer isn't an image.
    """
    name = type(net).__name__
    for attribute in ("img_resolution", "img_channels", "label_dim"):
        if type(getattr(net, attribute, None)) is not int:
            raise UserError(f"{source}: {name} is not a denoiser: it has no whole number {attribute}; add it")
    like = next(net.parameters(), torch.empty(0))
    x = torch.zeros([2, net.img_channels, net.img_resolution, net.img_resolution], device=like.device)
    condition = blank_condition(net, 2, like.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            answer = net(x, known_sigma(net, torch.ones([2, 1, 1, 1], device=like.device)), condition)
    except Exception as error:  # whatever a network raises on what it wasn't made for
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{source}: {name} is not a denoiser: it can't be called as net(x, sigma, class_labels): {reason}"
        ) from None
    if not isinstance(answer, torch.Tensor) or answer.shape != x.shape:
        shape = list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise UserError(f"{source}: {name} is not a denoiser: it answers {shape}, not images {list(x.shape)}")


SIGMA_DATA = 0.5  # of images in [-1, 1] (EDM, Table 1)


def sigma_data(net: Any) -> float:
    """Standard deviation of the images that a denoiser was trained on, by its own account."""
    return float(getattr(net, "sigma_data", SIGMA_DATA))


def noise_range(net: Any) -> tuple[float, float]:
    """The lowest and the highest noise level at which a denoiser's answers make sense, by its own account."""
    return float(getattr(net, "sigma_min", 0.0)), float(getattr(net, "sigma_max", math.inf))


def only_sigma(net: Any) -> float | None:
    """The noise level of a denoiser that was trained at no other, as its metadata tell; None for other denoisers."""
    return getattr(net, "metadata", {}).get("sigma")


def known_sigma(net: Any, sigma: torch.Tensor) -> torch.Tensor:
    """The noise levels nearest to `sigma` that a denoiser knows, in the same shape and dtype.

    Levels outside [sigma_min, sigma_max] move to the nearer end, then `round_sigma` rounds them. A level is never 0.
    """
    sigma = sigma.clamp(*noise_range(net))
    round_sigma = getattr(net, "round_sigma", None)
    return sigma if round_sigma is None else round_sigma(sigma).to(sigma)
