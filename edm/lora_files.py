"""LoRA files of the diffusers library: the difference of a text-to-image generator from its teacher.

The pipeline of the teacher makes the generator's images when it has loaded the file by `load_lora_weights` and calls
its model at the times of the generator's steps.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dnnlib import UserError
from training import moments
from training.steps import Steps

from . import network_files
from .diffusion_steps import euler_scheduler
from .one_step import OneStep
from .text_models import TextDenoiser
from .text_pipelines import LATEST, WHOLE, flow_call, flow_scheduler

FILE = "pytorch_lora_weights.safetensors"  # that the library looks for in a folder
MAX_RESIDUAL = 1e-3  # of what the factors leave of a matrix's change, relative to the change
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of the teacher's weights, with --lora-base=half
OVERSAMPLED, POWER_ITERATIONS = 8, 4  # of the randomised decomposition


def write(net: Any, base: Any, path: Path) -> str:
    """Writes the LoRA file of a generator, and the scheduler that it is run with, in a new folder.

    net: a generator that was distilled with --lora-rank and --lora-vectors=0.
    base: its teacher.
    Returns how to call the pipeline from Python.
    Errors: UserError when the generator differs from its teacher by more than updates of low rank.
    """
    metadata: dict[str, Any] = getattr(net, "metadata", {})
    if not isinstance(net, TextDenoiser) or type(net.net) is not type(getattr(base, "net", None)):
        raise UserError("--to=lora: is for generators and teachers of the library's text-to-image models")
    moments.refuse(net, "--to=lora", "the library's pipelines know")
    steps, rank = Steps.of(net), metadata.get("lora_rank")
    is_flow = net.times.is_flow
    if steps is None or not rank:
        raise UserError("--to=lora: is for generators that were distilled with --lora-rank")
    scheduler, arguments = _flow_scheduler(net, steps) if is_flow else _diffusion_scheduler(net, steps)
    part, factors = net.family.folder, {}
    theirs, stored = base.net.state_dict(), STORED.get(metadata.get("lora_base", ""))
    for name, weight in net.net.state_dict().items():
        if not torch.equal(weight, theirs[name]):
            module, _, kind = name.rpartition(".")
            if kind != "weight" or weight.ndim < 2:
                raise UserError(
                    f"--to=lora: {name} differs from the teacher's, and a LoRA file holds matrices only; distil with"
                    " --lora-vectors=0"
                )
            a, b = _updates(weight, theirs[name], rank, name, stored)
            if not b.any():  # it is the teacher's, rounded
                continue
            factors[f"{part}.{module}.lora_A.weight"], factors[f"{part}.{module}.lora_B.weight"] = a, b
    if not factors:
        raise UserError("--to=lora: the generator has its teacher's weights")
    with network_files.new_folder(path) as folder:
        save_file(factors, folder / FILE, {"format": "pt"})
        scheduler.save_pretrained(folder / "scheduler")
    rounding = "" if stored is None else f"pipeline.to({stored}); "
    return (
        f'{rounding}pipeline.load_lora_weights("{path}"); pipeline.scheduler ='
        f' {type(scheduler).__name__}.from_pretrained("{path}/scheduler"); pipeline({arguments})'
    )


def _diffusion_scheduler(net: TextDenoiser, steps: Steps) -> tuple[Any, str]:
    """(scheduler, arguments of the pipeline) for the steps of a diffusion.

    Errors: UserError when the library has no such scheduler, or a step is at a time that isn't whole.
    """
    if len(steps) > 1 and steps.noise != "ddim":
        raise UserError(
            f"--to=lora: the library has no scheduler for {len(steps)} steps with --steps-noise={steps.noise} at a"
            " diffusion's own times; distil with --steps-noise=ddim"
        )
    times = [OneStep(net, level).t for level in steps.levels]
    whole = [round(t) for t in times]
    between = [t for t, near in zip(times, whole) if abs(t - near) > WHOLE]
    if between:
        start = net.times.sigma(torch.tensor([float(whole[0])], dtype=torch.float64)).item()
        raise UserError(
            f"--to=lora: a step of the generator is at time {between[0]:.4g}, and the library's at whole times only;"
            f" distil with --init_sigma={start:.8g}"
        )
    arguments = "num_inference_steps=1" if len(steps) == 1 else f"timesteps={whole}"
    return euler_scheduler(net, whole, steps.levels, "--to=lora"), f'prompt="...", {arguments}, guidance_scale=1'


def _flow_scheduler(net: TextDenoiser, steps: Steps) -> tuple[Any, str]:
    """(scheduler, arguments of the pipeline) for the steps of a flow, which start at time 1.

    Errors: UserError when the generator starts clearly below.
    """
    level = steps.levels[0]
    if level / (1 + level) < LATEST:
        raise UserError(
            f"--to=lora: the generator starts at noise level {level:g}, and flows in the library at pure noise; write"
            " it by --to=diffusers, or distil with --init_sigma=999"
        )
    return flow_scheduler(net, steps, "--to=lora"), flow_call(net, steps)


def _updates(
    weight: torch.Tensor, theirs: torch.Tensor, rank: int, name: str, stored: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a matrix's change from the teacher's, which training may have rounded to `stored`."""
    if stored is not None:
        try:
            return factorised(weight - theirs.to(stored).to(weight.dtype), rank, name)
        except UserError:  # not this one
            pass
    return factorised(weight - theirs, rank, name)


def factorised(change: torch.Tensor, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in, ...] and B [out, rank, ...] with B A = change [out, in, ...].

    Errors: UserError when the change has a higher rank.
    """
    matrix = change.flatten(1).double()
    rank = min(rank, *matrix.shape)
    q = min(rank + OVERSAMPLED, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q, POWER_ITERATIONS)
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:, :rank].T, u[:, :rank] * root
    if (matrix - b @ a).norm() > MAX_RESIDUAL * matrix.norm() + 1e-7 * math.sqrt(matrix.numel()):
        raise UserError(f"--to=lora: {name} differs from the teacher's by more than a matrix of rank {rank}")
    ones = [1] * (change.ndim - 2)
    return a.float().reshape(rank, *change.shape[1:]).contiguous(), b.float().reshape(-1, rank, *ones).contiguous()
