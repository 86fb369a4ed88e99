"""Samplers, and images of a network by their seeds.

Every sampler is called as `sampler(net, latents, class_labels=None, randn_like=torch.randn_like, ...)`:

    net           a denoiser as training/networks.py describes it; it is called with float32 tensors
    latents       [N, C, H, W], standard normal, of any float type
    class_labels  [N, label_dim] or None
    randn_like    draws noise like a tensor; only stochastic samplers call it
    returns       [N, C, H, W], images in about [-1, 1]; float64, and float32 from the one-step sampler
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError
from training.conditions import Classes, check_class, conditions_of
from training.generator import Generator
from training.moments import Moments
from training.steps import INIT_SIGMA, ONE_STEP, Steps

from .diffusion_samplers import ablation_sampler, heun_sampler
from .latents import decoder_of
from .seeds import Seeds, draws_of


@torch.no_grad()
def one_step_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    init_sigma: float = INIT_SIGMA,
    moments: Moments | None = None,
) -> Tensor:
    """One network evaluation at noise level `init_sigma` (SiD, arXiv:2404.04057).

    moments: of the noise that it starts from; None: the network's own.
    """
    return few_step_sampler(net, latents, class_labels, randn_like, Steps((init_sigma,)), moments)


@torch.no_grad()
def few_step_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    generator_steps: Steps = ONE_STEP,
    moments: Moments | None = None,
) -> Tensor:
    """One network evaluation per step of a distilled generator. moments: as of `one_step_sampler`."""
    return Generator(net, generator_steps, moments).sample(latents.to(torch.float32), class_labels, randn_like)


SAMPLERS: dict[str, Callable] = {
    "heun": heun_sampler,
    "ablation": ablation_sampler,
    "one-step": one_step_sampler,
    "few-step": few_step_sampler,
}


def default_sampler(net: Any, steps: int | None = None) -> str:
    """'one-step', 'few-step' for as many steps as a generator was trained for (its metadata hold them), or 'heun'.

    steps: how many are wanted; None: the generator's own.
    """
    recorded = Steps.of(net)
    own = None if recorded is None else len(recorded)
    wanted = own if steps is None else steps
    if wanted == 1:
        return "one-step"
    return "heun" if own is None or wanted != own else "few-step"


def draw_starts(net: Any, seeds: Sequence[Any]) -> tuple[Any, Tensor, Tensor | None]:
    """(the draws of some seeds, the latents [N, C, H, W] and the conditions that they begin with)."""
    draws = draws_of(seeds, next(net.parameters()).device)
    latents = draws.randn([net.img_channels, net.img_resolution, net.img_resolution])
    return draws, latents, draws.condition(conditions_of(net))


def sample(net: Any, seeds: Seeds, sampler: str | None = None, class_idx: int | None = None, **options) -> Tensor:
    """One image per seed, [N, C, H, W] float, on the network's device.

    seeds: numbers, or places between two of them (`edm.seeds`). sampler: a key of SAMPLERS; None takes
    `default_sampler`. class_idx: the class of all images; None draws one per image, of those that the network has
    learnt (`training.conditions`). options: those of the sampler.
    Each image draws its latents, then its class, then what the sampler needs.
    """
    draws, latents, labels = draw_starts(net, list(seeds))
    if class_idx is not None:
        check_class(net, class_idx)
        labels = Classes(net.label_dim).one_hot(torch.full([len(latents)], class_idx, device=latents.device))
    name = sampler or default_sampler(net)
    recorded = Steps.of(net) or ONE_STEP
    if name == "one-step":
        options.setdefault("init_sigma", recorded.levels[0])
    elif name == "few-step":
        options.setdefault("generator_steps", recorded)
    return SAMPLERS[name](net, latents, labels, randn_like=draws.randn_like, **options)


class NonFiniteImagesError(UserError):
    """A network made images that hold NaN or infinity."""


def check_finite(images: Tensor, seeds: Sequence[Any]) -> None:
    """Raises NonFiniteImagesError if an image of [N, C, H, W] holds NaN or infinity. seeds: of the images."""
    if images.isfinite().all():
        return
    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    wrong = [seed for seed, is_finite in zip(seeds, finite) if not is_finite]
    raise NonFiniteImagesError(
        f"the network's image of seed {wrong[0]} holds NaN or infinity, as {len(wrong)} of {len(seeds)} images of this"
        " batch do: the network has diverged, or overflows at these noise levels or in this precision; use another"
        " snapshot, or other --init_sigma, --sigma_min, --sigma_max, --steps"
    )


def generate_images(
    net: Any,
    seeds: Seeds,
    batch: int = 64,
    class_idx: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    **options,
) -> Iterator[Tensor]:
    """uint8 batches [n, C, H, W] on the CPU, one image per seed in order. Other arguments are those of `sample`.

    steps: how many steps the Heun or the ablation sampler takes. Without a sampler, 1 means the one-step sampler, and a
    generator's own number means its own steps.
    Latents are decoded (`edm.latents`).
    Errors: UserError when the network has no such class, or hasn't learnt it, a seed is out of range, or its VAE can't
    be had; NonFiniteImagesError.
    """
    if steps is not None:
        sampler = sampler or default_sampler(net, steps)
        if sampler in ("heun", "ablation"):
            options["num_steps"] = steps
    seeds, decoder = list(seeds), decoder_of(net)
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        images = sample(net, part, sampler, class_idx, **options)
        check_finite(images, part)
        yield decoder.to_images(images).cpu()


def generate_all(net: Any, seeds: Seeds, **options: Any) -> Tensor:
    """The images of `generate_images` in one tensor, uint8 [N, C, H, W] on the CPU."""
    return torch.cat(list(generate_images(net, seeds, **options)))
