"""How a network is computed: the dtype of its layers (weights and losses stay float32), recomputation, compilation."""

import contextlib
from collections.abc import Callable

import torch

from dnnlib import UserError

from . import distributed

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_up(precision: str, device: torch.device) -> None:
    """Lets float32 matrix products use TF32 or not. Errors: UserError when the device lacks the precision."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision=fp16 needs a GPU; a CPU takes fp32 or bf16")
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision=tf32 needs an NVIDIA GPU; here take fp32 or bf16")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def set_compute_dtype(net: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Makes a denoiser of training/networks.py work in `dtype`; False for any other class, which `autocast` serves."""
    if not hasattr(type(net), "compute_dtype"):
        return False
    net.compute_dtype = dtype
    return True


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """torch.autocast to `dtype`, or nothing for float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def store_convolutions(net: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keeps the convolutions' weights of a frozen denoiser in the dtype they work in: half the memory, same results.

    Only for networks whose convolutions cast their weights where they are used (training/networks.py).
    """
    for module in net.modules():
        if module.__class__.__name__ == "Conv2d" and not any(p.requires_grad for p in module.parameters()):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def checkpoint_blocks(net: torch.nn.Module) -> None:
    """Makes a U-Net of training/networks.py recompute its blocks' activations instead of keeping them."""
    for module in net.modules():
        if hasattr(type(module), "checkpoint"):
            module.checkpoint = True


def compiled(net: torch.nn.Module) -> Callable:
    """`net` as torch.compile makes it; where that fails, `net` itself and a word why."""
    fast = torch.compile(net, dynamic=False)
    works = True

    def call(*args, **kwargs):
        nonlocal works
        if works:
            try:
                return fast(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                works = False
                distributed.print0(f"--compile: goes on without ({str(error).strip().splitlines()[0]})")
        return net(*args, **kwargs)

    return call
