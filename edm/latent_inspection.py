"""Whether a network's latents have the scale that they are declared to have. The test needs no data.

A VAE gives back the latents that it was trained to decode: encoded again, images of the right scale leave a few per
cent of the latents' variance. Latents of another scale come back nearer to the right one, because a decoder's
normalisation strengthens weak latents and images saturate with strong ones. On a VAE of digits, twice the right scale
leaves 30 per cent and half of it 66 per cent; samples of a teacher at the right scale 6, white noise 29.
"""

import math
from typing import Any

import torch

from dnnlib import UserError
from training.decoder import LatentDecoder
from training.denoiser import sigma_data

from .inspection import own_samples
from .latents import checked_record, decoder_of

NUM_LATENTS = 8
SURE = 0.1  # of the latents' variance: at a smaller error, no other scale is tried
BETTER = 1.5  # how many times smaller the error at another scale must be
NAMED = 0.3  # at a smaller error, the other scale is named; with the wrong shift or VAE, no scale has one
MOST = 1.0  # beyond this, the VAE can't be the right one even for a bad teacher
OCTAVES, REFINEMENTS = range(-5, 6), (-0.5, -0.25, 0.25, 0.5)  # scales that are tried, as powers of 2
MAX_RATIO = 3.0  # of the samples' standard deviation to sigma_data, and the other way round


def latents_misfit(net: Any, seed: int = 0) -> str | None:
    """What is wrong with the scale of a network's latents; None if nothing is, or it makes images.

    Errors: UserError when its VAE isn't available.
    """
    decoder = decoder_of(net)
    if not isinstance(decoder, LatentDecoder):
        return None
    samples, _, _ = own_samples(net, NUM_LATENTS, seed)
    record = net.metadata["vae"]
    wrong = vae_misfit(decoder.vae, record, samples)
    std, declared = samples.var(dim=0).mean().sqrt().item(), sigma_data(net)
    if wrong is None and not 1 / MAX_RATIO < std / declared < MAX_RATIO:
        wrong = (
            f"its latents have a standard deviation of {std:.2g}, and one of {declared:g} is expected: it was trained"
            " on latents that weren't scaled, so noise levels and loss weights don't suit it"
        )
    return wrong


def vae_misfit(vae: Any, record: dict[str, Any], samples: torch.Tensor) -> str | None:
    """How a VAE contradicts the record of scale and shift, by what it gives back of samples [N, C, h, w]."""
    record = checked_record(record, "the VAE")
    error = round_trip_error(vae, record, samples)
    if error <= SURE:
        return None
    errors = {octave: round_trip_error(vae, record, samples, 2.0**octave) for octave in OCTAVES if octave}
    best = min(errors, key=errors.__getitem__)
    if errors[best] < NAMED and errors[best] * BETTER < error:
        near = {best: errors[best]}
        near |= {best + part: round_trip_error(vae, record, samples, 2.0 ** (best + part)) for part in REFINEMENTS}
        factor = 2.0 ** min(near, key=near.__getitem__)
        scale = record["scale"] if isinstance(record["scale"], list) else [record["scale"]]
        declared, fitting = (", ".join(f"{value * by:.2g}" for value in scale) for by in (1, 1 / factor))
        return (
            f"its latents aren't scaled by {declared}, as declared, but by about {fitting}: correct the scale in the"
            f" VAE's config.json (decoded and encoded again, they lose {error:.2g} and {min(near.values()):.2g} times"
            " their variance)"
        )
    if error > MOST or errors[best] * BETTER < error:
        return (
            f"its latents don't fit its VAE (decoded and encoded again, they lose {error:.2g} times their variance):"
            " the shift or the scale in the VAE's config.json is wrong, or it was trained with another VAE"
        )
    return None


def round_trip_error(vae: Any, record: dict[str, Any], samples: torch.Tensor, factor: float = 1.0) -> float:
    """Mean squared error of latents that were decoded and encoded again, over their variance.

    factor: by which the VAE's own latents are stronger than the record says.
    """
    scale = torch.tensor(record["scale"]) / factor
    decoder = LatentDecoder(vae, scale.tolist(), record["shift"])
    try:
        back = decoder.from_images(decoder.to_images(samples))
    except UserError:  # neither decodes to images
        return math.inf
    return ((back - samples).square().mean() / samples.var(dim=0).mean()).item()
