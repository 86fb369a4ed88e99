"""The steps of a generator that was distilled from a diffusion, as schedulers of the diffusers library make them.

The library's schedulers work on x = x0 + s n, as generators do, at the noise levels s of the steps. From the x of one
step they make that of the next, at level r. D is the clean image by the network's answer F, and n fresh noise:

    scheduler                       D                                                 next x
    EulerDiscreteScheduler          as here, of a prediction of the noise, v or x0    D + r (x - D) / s   ddim
    CMStochasticIterativeScheduler  x / (1 + s^2) + s F / sqrt(1 + s^2), so F is -v   D + r n             fresh

The library's other schedulers with fresh noise (LCM, TCD) start at x / sqrt(1 + s^2) = n instead of
s n / sqrt(1 + s^2), so they don't fit. All schedulers call the model at times of their own choice; `set_times` changes
the model so that it takes these for the times of the levels.
"""

import math
from typing import Any

import torch

from dnnlib import UserError
from training.parameterisations import WrappedDenoiser
from training.steps import Steps

from .diffusers_folder import library
from .one_step import ADVICE, NAMED, OneStep, set_times

LEAST_BETA = 2.0**-23  # the least noise in float32: sigma 3e-4
MOST_STEPS = 1000  # that a text-to-image pipeline may be asked for
LEVELS = 1_000_001  # of a consistency model's scheduler, from 0 to that of the first step; a step has the nearest one
RHO = 7.0  # their spacing
MAX_DIFFERENCE = 1e-3  # of a scheduler's noise level from the generator's, relative to it


def diffusion_steps(net: WrappedDenoiser, steps: Steps, model: Any) -> tuple[Any, str]:
    """(scheduler, the argument with which its pipeline is called: the number of steps, or their times) of a generator.

    net: the generator, of a diffusion. model: a copy of the library's model in it, whose weights are changed to fit the
         scheduler.
    Errors: UserError when the library has no such scheduler.
    """
    times = [OneStep(net, level).t for level in steps.levels]
    if len(steps) == 1 or steps.noise == "ddim":
        last = max(MOST_STEPS, math.ceil(times[0]))
        block = math.ceil((last + 1) / len(steps))
        called = [block * k - 1 for k in range(len(steps), 0, -1)]
        set_times(model, times, called)
        return euler_scheduler(net, called, steps.levels, "--to=diffusers"), f"num_inference_steps={len(steps)}"
    if steps.noise == "fresh" and net.prediction == "v":
        scheduler, call = _consistency_scheduler(steps.levels)
        scheduler.set_timesteps(timesteps=call)
        set_times(model, times, scheduler.timesteps.tolist())
        for parameter in model.conv_out.parameters():
            parameter.data.neg_()
        return scheduler, f"timesteps={call}"
    reason = " for a network that doesn't predict v" if steps.noise == "fresh" else ""
    raise UserError(
        f"--to=diffusers: the library has no scheduler for a generator of {len(steps)} steps with"
        f" --steps-noise={steps.noise}{reason}; distil with --steps-noise=ddim, or {ADVICE}"
    )


def euler_scheduler(net: WrappedDenoiser, times: list[int], levels: tuple[float, ...], option: str) -> Any:
    """An Euler scheduler that calls the model at `times` in len(times) steps, at these noise levels; both fall.

    Between two times, it has the noise level of the lower one, and hardly any below the last: asked for more steps, it
    changes images only at `times`, where it comes to them.

    option: named in messages.
    Errors: UserError when the scheduler, which computes in float32, has other noise levels than these.
    """
    signals = {0: 1 - LEAST_BETA} | {t: 1 / (1 + s**2) for t, s in zip(reversed(times), reversed(levels))}
    betas, product = [0.0] * (times[0] + 1), torch.ones(())
    for t, signal in signals.items():
        betas[t] = 1 - signal / product.double().item()
        product *= 1 - torch.tensor(betas[t])  # in float32, as the scheduler
        if not abs(product.item() / signal - 1) < 2 * MAX_DIFFERENCE:
            raise UserError(
                f"{option}: the library's scheduler can't start at noise level {levels[0]:g}, in float32; distil from a"
                f" lower --init_sigma, or {ADVICE}"
            )
    return library().EulerDiscreteScheduler(
        trained_betas=betas,
        num_train_timesteps=len(betas),
        prediction_type=NAMED[net.prediction],
        timestep_spacing="trailing",
        steps_offset=1,  # without effect; Stable Diffusion's pipelines warn of any other
    )


def _consistency_scheduler(levels: tuple[float, ...]) -> tuple[Any, list[int]]:
    """A scheduler of consistency models, and the `timesteps` at which it has these noise levels to within 1e-4."""
    scheduler = library().CMStochasticIterativeScheduler(
        num_train_timesteps=LEVELS, sigma_min=0.0, sigma_max=levels[0], sigma_data=1.0, rho=RHO, clip_denoised=False
    )
    # The scheduler's levels are levels[0] (1 - k / (LEVELS - 1))^RHO, and it takes the ks backwards.
    ks = [round((1 - (level / levels[0]) ** (1 / RHO)) * (LEVELS - 1)) for level in levels]
    return scheduler, ks[::-1]
