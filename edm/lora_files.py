"""LoRA files of the diffusers library: the difference of a text-to-image generator from its teacher.

The pipeline of the teacher makes the generator's images when it has loaded the file by `load_lora_weights` and calls
its model once, at the time at which the generator starts.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dnnlib import UserError
from training.parameterisations import DiscreteTimes
from training.steps import Steps

from . import network_files
from .diffusers_pipelines import OneStep, one_step_scheduler
from .text_models import TEXT_MODELS, TextDenoiser

FILE = "pytorch_lora_weights.safetensors"  # that the library looks for in a folder
MAX_RESIDUAL = 1e-3  # of what the factors leave of a matrix's change, relative to the change
WHOLE = 0.01  # how near a whole time the start must be
OVERSAMPLED, POWER_ITERATIONS = 8, 4  # of the randomised decomposition


def write(net: Any, base: Any, path: Path) -> str:
    """Writes the LoRA file of a generator, and the scheduler that it is run with, in a new folder.

    net: a one-step generator that was distilled with --lora-rank and --lora-vectors=0. base: its teacher.
    Returns how to call the pipeline from Python.
    Errors: UserError when the generator differs from its teacher by more than updates of low rank.
    """
    metadata: dict[str, Any] = getattr(net, "metadata", {})
    if not isinstance(net, TextDenoiser) or type(net.net) is not type(getattr(base, "net", None)):
        raise UserError("--to=lora: is for generators and teachers of the library's text-to-image models")
    steps, rank = Steps.of(net), metadata.get("lora_rank")
    if steps is None or len(steps) > 1 or not rank:
        raise UserError("--to=lora: is for generators of one step that were distilled with --lora-rank")
    if not isinstance(net.times, DiscreteTimes):
        raise UserError("--to=lora: the pipelines of flows have no scheduler that starts where the generator does")
    step = OneStep(net, steps.levels[0])
    if abs(step.t - round(step.t)) > WHOLE:
        level = net.times.sigma(torch.tensor([float(round(step.t))], dtype=torch.float64)).item()
        raise UserError(
            f"--to=lora: the generator starts at time {step.t:.4g}, and the library at whole times only; distil with"
            f" --init_sigma={level:.8g}"
        )
    part, factors = TEXT_MODELS[type(net.net).__name__], {}
    theirs = base.net.state_dict()
    for name, weight in net.net.state_dict().items():
        change = weight - theirs[name]
        if change.any():
            module, _, kind = name.rpartition(".")
            if kind != "weight" or weight.ndim < 2:
                raise UserError(
                    f"--to=lora: {name} differs from the teacher's, and a LoRA file holds matrices only; distil with"
                    " --lora-vectors=0"
                )
            a, b = factorised(change, rank, name)
            factors[f"{part}.{module}.lora_A.weight"], factors[f"{part}.{module}.lora_B.weight"] = a, b
    if not factors:
        raise UserError("--to=lora: the generator has its teacher's weights")
    scheduler = one_step_scheduler(net, round(step.t), steps.levels[0])
    with network_files.new_folder(path) as folder:
        save_file(factors, folder / FILE, {"format": "pt"})
        scheduler.save_pretrained(folder / "scheduler")
    return (
        f'pipeline.load_lora_weights("{path}"); pipeline.scheduler ='
        f' EulerDiscreteScheduler.from_pretrained("{path}/scheduler"); pipeline(prompt="...", num_inference_steps=1,'
        " guidance_scale=1)"
    )


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
