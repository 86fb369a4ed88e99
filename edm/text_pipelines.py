"""Generators from prompts as text-to-image pipelines of the diffusers library.

Pipelines of diffusions take the steps of `edm.diffusion_steps`. A generator of a flow answers
t z - t F(t z, t) for standard normal noise z, where t is the time at which it starts and F the model inside. The
library starts at z and time 1, and makes z - F of it. So the pipeline works on y = x_s / t: its first layer has t as a
factor, and so has the divisor of its result, the scale of the VAE, 1 / t.

Step k of n starts at time t s with s = 1 - k/n, at x_s = (1 - t s) x0 + t s n for fresh noise n. The scheduler's
stochastic sampling makes y = (1 - s) x0 / t + s n of it, in which the clean image has the weight 1 - s instead of
1 - t s. At t = 0.999, where generators of several steps start, it is 0.3 per cent less before the second of four
steps, and less than that before the others.
"""

import copy
import inspect
from typing import Any

from dnnlib import UserError
from training.steps import Steps

from .diffusers_folder import library
from .diffusion_steps import diffusion_steps
from .one_step import OneStep, refuse_whole_times, set_times
from .text_encoders import TextEncoder, checked_record

GUIDANCE_FEATURES = 8  # width of the embedded guidance scale, which the model receives and ignores
WHOLE = 0.01  # how near a whole time the start must be
LATEST = 0.998  # the earliest start of several steps of a flow, for which 1 - s is about 1 - t s
EVEN = 1e-3  # how evenly spaced its times must be


def pipeline_of_prompts(net: Any, steps: Steps | None, vae: Any) -> tuple[Any, str]:
    """(pipeline of a generator, how it is called). vae: with its scale and shift as the library uses them.

    Errors: UserError when the library has none.
    """
    if steps is None:
        raise UserError("--to=diffusers: a teacher from prompts is a pipeline already; only generators are written")
    encoders = TextEncoder(checked_record(net.metadata.get("text"), "the network"))
    if net.times.is_flow:
        return _flow_pipeline(net, steps, vae, encoders)
    return _diffusion_pipeline(net, steps, vae, encoders)


def _diffusion_pipeline(net: Any, steps: Steps, vae: Any, encoders: TextEncoder) -> tuple[Any, str]:
    """The pipeline of one step makes the same images with its default arguments, since further steps change nothing.

    Its model takes the guidance scale as a condition, as those of latent consistency models do, and ignores it.
    """
    refuse_whole_times(net)
    config = {**net.net.config, "time_cond_proj_dim": GUIDANCE_FEATURES}
    model = type(net.net).from_config(config)
    missing = model.load_state_dict(net.net.state_dict(), strict=False).missing_keys
    for name in missing:
        model.get_parameter(name).data.zero_()
    scheduler, arguments = diffusion_steps(net, steps, model)
    parts = {**encoders.pipeline.components, "vae": vae, "unet": model.eval(), "scheduler": scheduler}
    return type(encoders.pipeline)(**parts, **encoders.settings), f'prompt="...", {arguments}'


def _flow_pipeline(net: Any, steps: Steps, vae: Any, encoders: TextEncoder) -> tuple[Any, str]:
    step, model = OneStep(net, steps.levels[0]), copy.deepcopy(net.net)
    scheduler = flow_scheduler(net, steps, "--to=diffusers")
    model.get_submodule(net.family.first_layer).weight.data *= step.b
    if len(steps) == 1:
        scale = model.config.get("timestep_scale", 1.0)
        set_times(model, [scale * step.t], [scale * scheduler.config.num_train_timesteps])
    vae.register_to_config(scaling_factor=vae.config.scaling_factor / step.b)
    parts = {**encoders.pipeline.components, "vae": vae, "transformer": model, "scheduler": scheduler}
    return type(encoders.pipeline)(**parts, **encoders.settings), flow_call(net, steps)


def flow_scheduler(net: Any, steps: Steps, option: str) -> Any:
    """The library's scheduler of a generator's steps, which start at its time 1. option: named in messages.

    Errors: UserError when the library has none.
    """
    n, times = len(steps), [level / (1 + level) for level in steps.levels]
    start = OneStep(net, steps.levels[0]).t
    whole = round(start)
    if n == 1:
        return library().FlowMatchEulerDiscreteScheduler(num_train_timesteps=max(whole, 1))
    reason = None
    if steps.noise != "fresh":
        reason = f"with --steps-noise={steps.noise}"
    elif any(abs(time - times[0] * (1 - k / n)) > EVEN for k, time in enumerate(times)):
        reason = "whose times aren't evenly spaced (--steps-shift)"
    elif times[0] < LATEST or abs(start - whole) > WHOLE:
        reason = f"that starts at noise level {steps.levels[0]:g}; distil with --init_sigma=999"
    cls = library().FlowMatchEulerDiscreteScheduler
    if reason is None and "stochastic_sampling" not in inspect.signature(cls).parameters:
        reason = "before its stochastic sampling; update diffusers"
    if reason is not None:
        raise UserError(f"{option}: the library has no scheduler for a generator of {n} steps {reason}")
    return cls(num_train_timesteps=whole, shift_terminal=1 / n, stochastic_sampling=True)


def flow_call(net: Any, steps: Steps) -> str:
    """The arguments of a flow's pipeline."""
    family, text = net.family, f'prompt="...", num_inference_steps={len(steps)}'
    if family.runs_twice:
        text += ", guidance_scale=1"
    if family.image_size not in (None, net.image_size):
        text += f", height={net.image_size}, width={net.image_size}"
    return text
