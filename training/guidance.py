"""Denoisers that are guided away from a weaker answer, for sampling and as teachers."""

import math
from collections.abc import Callable
from typing import Any

import torch

from dnnlib import UserError

from .conditions import Conditions, as_ranges, conditions_of, learnt_classes
from .denoiser import known_sigma, noise_range, sigma_data
from .steps import Steps

SAMPLED = (0.002, 80.0)  # noise levels between which EDM's sampler and losses call a denoiser


def autoguided(net: Callable, guide: Callable | None, weight: float) -> Callable:
    """D_guide + weight (D - D_guide), autoguidance (arXiv:2406.02507); with a weight of 1 the denoiser itself.

    guide: a weaker denoiser of the same images, called with the same arguments; None for no guidance.
    """
    if guide is None or weight == 1:
        return net

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        strong, weak = net(*args, **kwargs), guide(*args, **kwargs)
        return weak + weight * (strong - weak)

    return call


def class_guided(net: Callable, weight: float, conditions: Conditions) -> Callable:
    """D_null + weight (D - D_null), classifier-free guidance; with a weight of 1 the denoiser itself, with 0 D_null.

    The network is called once with the images' conditions and then once with null conditions. Each call has as many
    images as without guidance, so --batch-gpu and --chunk keep their meaning.
    """
    if weight == 1:
        return net

    def call(x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if weight == 0:
            return net(x, sigma, conditions.null_like(condition), **kwargs)
        strong, weak = net(x, sigma, condition, **kwargs), net(x, sigma, conditions.null_like(condition), **kwargs)
        return weak + weight * (strong - weak)

    return call


class GuidedDenoiser(torch.nn.Module):
    """A denoiser with guidance: by a weaker denoiser, or without one by its own answer without the class.

    net: the denoiser, whose attributes this one has. guide: the weaker denoiser (`check_guide`); None for
    classifier-free guidance (`check_class_guidance`). weight: 1 changes nothing, more pushes further away.
    """

    def __init__(self, net: Any, guide: Any, weight: float):
        super().__init__()
        self.net, self.guide, self.weight = net, guide, weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.guide is not None:
            return autoguided(self.net, self.guide, self.weight)(x, sigma, class_labels)
        return class_guided(self.net, self.weight, conditions_of(self.net))(x, sigma, class_labels)


def check_guide(guide: Any, net: Any) -> str | None:
    """A warning if the guide can't change anything, otherwise None.

    Errors: UserError naming --guide when it doesn't denoise the same images, classes and noise levels as `net`.
    """
    if Steps.of(guide) is not None:
        raise UserError("--guide: is a generator, which doesn't denoise; name a diffusion model")
    for what, of in (
        ("images", lambda n: f"{n.img_channels} x {n.img_resolution} x {n.img_resolution}"),
        ("classes", lambda n: str(n.label_dim)),
        ("prompts", lambda n: f"{getattr(n, 'prompt_dim', 0)} numbers each"),
        ("sigma_data", lambda n: f"{sigma_data(n):g}"),
    ):
        if of(guide) != of(net):
            raise UserError(
                f"--guide: its {what} are {of(guide)}, but the guided network's are {of(net)}; name a weaker network"
                " that was trained on the same images"
            )
    unknown = set(learnt_classes(net) or range(net.label_dim)) - set(learnt_classes(guide) or range(net.label_dim))
    if unknown:
        raise UserError(
            f"--guide: has never seen class {as_ranges(sorted(unknown))}, which the guided network makes; name one"
            " that was trained on the same images"
        )
    low, high = (max(min(bound, SAMPLED[1]), SAMPLED[0]) for bound in noise_range(net))
    own_low, own_high = noise_range(guide)
    if own_low > low or own_high < high:
        raise UserError(
            f"--guide: knows noise levels from {own_low:g} to {own_high:g}, but the guided network is called at"
            f" {low:g} to {high:g}; name one with the same levels"
        )
    levels = known_sigma(net, torch.logspace(math.log10(low), math.log10(high), 64))
    if not torch.allclose(known_sigma(guide, levels), levels, rtol=1e-3):
        raise UserError("--guide: rounds noise levels in another way than the guided network; name one of its kind")
    ours, theirs = net.state_dict(), guide.state_dict()
    if ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours):
        return "--guide holds the guided network's own weights, so that it changes nothing"
    return None


def check_class_guidance(net: Any, option: str, name: str = "the network") -> str | None:
    """A warning if the network was never trained without labels, otherwise None.

    name: of the network in messages.
    Errors: UserError naming `option` for a network without classes, or without a way to be called without them.
    """
    if getattr(net, "prompt_dim", 0):
        return None
    if not net.label_dim:
        raise UserError(f"{option}: {name} has neither classes nor prompts to guide with; leave the option out")
    if getattr(net, "null_class", 0) is None:
        raise UserError(f"{option}: {name} has no class that stands for none; leave the option out")
    if getattr(getattr(net, "model", None), "label_dropout", None) == 0:
        return (
            f"--guidance calls {name} without labels, which it was never trained for;"
            " edm.train --label-dropout=0.1 makes one that did"
        )
    return None
