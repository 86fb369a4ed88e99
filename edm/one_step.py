"""One evaluation of a denoiser as the diffusers library's schedulers and models make it."""

from collections.abc import Sequence
from typing import Any

import torch

from dnnlib import UserError
from training.parameterisations import DiscreteTimes, WrappedDenoiser

NAMED = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # how every scheduler of a diffusion names them
ADVICE = "save it as .safetensors"
LEAST_DIFFERENCE = 1e-4  # of embedded times that are told apart: their smallest singular value to the largest


class OneStep:
    """The numbers of p z - q F(b z, t), which a wrapped network answers for sigma z at noise level sigma."""

    def __init__(self, net: WrappedDenoiser, sigma: float):
        level = torch.tensor(sigma, dtype=torch.float64)
        a, self.b = (value.item() for value in net.times.scales(level))
        self.t = net.times.time(level[None])[0].item()
        sign = -1 if net.times.is_reversed else 1
        self.p, self.q = {
            "epsilon": (sigma, self.b / a),
            "v": (a * self.b, self.b),
            "flow": (self.b, sign * self.b),
            "x0": (0.0, -1.0),
        }[net.prediction]


def refuse_whole_times(net: WrappedDenoiser) -> None:
    """Errors: UserError when a network takes whole times only, between which pipelines call it."""
    if isinstance(net.times, DiscreteTimes) and net.times.nearest:
        raise UserError(f"--to=diffusers: the pipelines call a model at times that aren't whole; {ADVICE}")


def set_times(model: Any, times: Sequence[float], called: Sequence[float], features_of_time: Any = None) -> None:
    """Makes a model that is called at some times answer at each what it answers at another.

    The first layer of its time embedding, W e(t) + b, changes: b by the mean of W (e(time) - e(called)), and W by a
    matrix that makes up for the rest at all of `called`. With one time, W stays as it is.

    times, called:    as many; those of `called` differ from each other.
    features_of_time: e of the times that it should answer for, if it isn't the model's own.

    Errors: UserError when e(t) has too few numbers to tell the times of `called` apart.
    """
    if hasattr(model, "time_embedding"):
        embeddings = [(model.time_proj, model.time_embedding.linear_1)]
    elif hasattr(model, "time_text_embed"):
        embeddings = [(model.time_text_embed.time_proj, model.time_text_embed.timestep_embedder.linear_1)]
    elif hasattr(model, "time_embed"):
        embeddings = [(model.time_embed.emb.time_proj, model.time_embed.emb.timestep_embedder.linear_1)]
    else:
        parts = [block.norm1.emb for block in model.transformer_blocks]
        embeddings = [(part.time_proj, part.timestep_embedder.linear_1) for part in parts]
    for features, first in embeddings:
        at = features(torch.tensor(called, dtype=torch.float32)).double()  # [n, number of features]
        wanted = (features_of_time or features)(torch.tensor(times, dtype=torch.float32)).double()
        mean, others = (wanted - at).mean(dim=0), at - at.mean(dim=0)
        if torch.linalg.matrix_rank(others, rtol=LEAST_DIFFERENCE) < len(called) - 1:
            raise UserError(f"--to=diffusers: its embedding of time is too small for {len(called)} steps; {ADVICE}")
        change = torch.linalg.pinv(others) @ (wanted - at - mean)  # [features, features]: others @ change = the rest
        weight = first.weight.data.double()
        first.bias.data += (weight @ (mean - at.mean(dim=0) @ change)).to(first.bias)
        first.weight.data += (weight @ change.T).to(first.weight)


def ending_at(betas: torch.Tensor, signal: float) -> dict[str, Any]:
    """Arguments of a scheduler with these betas and one more, after which alphas_cumprod is `signal`."""
    before = (1 - betas).cumprod(dim=0)[-1].double().item()  # in float32, as the scheduler
    trained_betas = [*betas.tolist(), 1 - signal / before]
    return {"trained_betas": trained_betas, "num_train_timesteps": len(trained_betas)}
