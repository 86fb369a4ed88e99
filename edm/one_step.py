"""One evaluation of a denoiser as the diffusers library's schedulers and models make it."""

from typing import Any

import torch

from dnnlib import UserError
from training.parameterisations import DiscreteTimes, WrappedDenoiser

from .diffusers_folder import library

NAMED = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # how every scheduler of a diffusion names them
LEAST_BETA = 2.0**-23  # the least noise in float32: sigma 3e-4
ADVICE = "save it as .safetensors"


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
    if isinstance(net.times, DiscreteTimes) and net.times.nearest:
        raise UserError(f"--to=diffusers: the pipelines call a model at times that aren't whole; {ADVICE}")


def set_time(model: Any, time: float, called: float, features_of_time: Any = None) -> None:
    """Makes a model that is called at one time answer what it answers at another.

    features_of_time: of the time that it should answer for, if they aren't the model's own.
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
        wanted = (features_of_time or features)(torch.tensor([time], dtype=torch.float32))
        difference = wanted - features(torch.tensor([float(called)]))
        first.bias.data += first.weight.data @ difference[0]


def one_step_scheduler(net: WrappedDenoiser, last: int, sigma: float) -> Any:
    """An Euler scheduler with hardly any noise before its last time, and with noise level `sigma` there."""
    return library().EulerDiscreteScheduler(
        **ending_at(torch.tensor([LEAST_BETA] + [0.0] * (last - 1)), 1 / (1 + sigma**2)),
        prediction_type=NAMED[net.prediction],
        timestep_spacing="trailing",
        steps_offset=1,  # without effect; Stable Diffusion's pipelines warn of any other
    )


def ending_at(betas: torch.Tensor, signal: float) -> dict[str, Any]:
    """Arguments of a scheduler with these betas and one more, after which alphas_cumprod is `signal`."""
    before = (1 - betas).cumprod(dim=0)[-1].double().item()  # in float32, as the scheduler
    trained_betas = [*betas.tolist(), 1 - signal / before]
    return {"trained_betas": trained_betas, "num_train_timesteps": len(trained_betas)}
