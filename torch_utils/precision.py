"""How a network is computed: the dtype of its layers (weights and losses stay float32), recomputation, compilation."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnnlib import UserError

from . import devices, distributed

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_up(precision: str, device: torch.device) -> None:
    """Decides whether float32 products may use TF32, and that those in float16 are summed in float32.

    Errors: UserError when the device lacks the precision.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision=fp16 needs a GPU; a CPU takes fp32 or bf16")
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision=tf32 needs an NVIDIA GPU; here take fp32 or bf16")
    devices.sum_float16_in_float32()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def set_compute_dtype(net: Any, dtype: torch.dtype | None) -> bool:
    """Makes a denoiser of training/networks.py work in `dtype`; False for any other class, which `autocast` serves."""
    if not hasattr(type(net), "compute_dtype"):
        return False
    net.compute_dtype = dtype
    return True


@contextlib.contextmanager
def same_dtype(net: torch.nn.Module, other: torch.nn.Module) -> Iterator[None]:
    """While open, `net` works in the dtype of `other`, a network of the same class."""
    own = getattr(net, "compute_dtype", None)
    set_compute_dtype(net, getattr(other, "compute_dtype", None))
    try:
        yield
    finally:
        set_compute_dtype(net, own)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """torch.autocast to `dtype`, or nothing for float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Computes as usual inside an autocast, where the device has one; MPS has none before PyTorch 2.5."""
    has_autocast = torch.amp.autocast_mode.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()


def compute_in(dtype: torch.dtype, networks: Iterable[torch.nn.Module]) -> torch.dtype:
    """Makes denoisers of one class work in `dtype`; returns the dtype of the autocast that they are to be called under.

    That is float32, no autocast, for the classes of training/networks.py. Any other class answers in float32 from then
    on whatever its last layer does, because losses take differences of answers.
    """
    networks = list(networks)
    native = [set_compute_dtype(net, dtype) for net in networks]
    if all(native) or dtype == torch.float32:
        return torch.float32
    for net in networks:
        net.register_forward_hook(_to_float32)
    return dtype


def _to_float32(_net: torch.nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.to(torch.float32)


def store_weights(net: torch.nn.Module, dtype: torch.dtype, call: Callable[[], torch.Tensor]) -> None:
    """Keeps those weights of a frozen network in `dtype` that it only ever casts to `dtype`: half the memory, and the
    same results, bit by bit.

    call: calls `net` as it is going to be, and gives the same every time. Should it fail or give anything else
          afterwards (a network may ask for the dtype of its weights), they are as before.
    """
    before = call()
    wide = {parameter: parameter.data for parameter in only_cast(net, dtype, call)}
    for parameter in wide:
        parameter.data = parameter.data.to(dtype)
    try:
        same = torch.equal(call(), before)
    except Exception:
        same = False
    if not same:
        for parameter, values in wide.items():
            parameter.data = values


def only_cast(net: torch.nn.Module, dtype: torch.dtype, call: Callable[[], object]) -> list[torch.nn.Parameter]:
    """The matrices among the frozen float32 parameters of `net` that `call`, which calls it, only casts to `dtype`.

    None of a network that can't be watched. Vectors (biases, norms) aren't worth it, and compiled code may never round
    theirs.
    """
    large = {id(p): p for p in net.parameters() if p.ndim > 1 and p.dtype == torch.float32 and not p.requires_grad}
    try:
        with _Uses(dtype) as uses:
            call()
    except Exception:  # the network's own, of any kind
        return []
    return [p for key, p in large.items() if key in uses.casts and key not in uses.others]


class _Uses(TorchDispatchMode):
    """Collects the ids of the tensors that are cast to `dtype`, and of those that are used in any other way."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype, self.casts, self.others = dtype, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_cast = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == self._dtype
        if func.namespace != "prim":  # those ask what a tensor is like, no more
            used = {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
            (self.casts if is_cast else self.others).update(used)
        return func(*args, **kwargs)


def checkpoint_blocks(net: torch.nn.Module) -> None:
    """Makes a network recompute its blocks' activations instead of keeping them.

    A block is a module whose class has an attribute `checkpoint` that is False or True, as UNetBlock of
    training/networks.py has. Errors: UserError when the network has none.
    """
    blocks: list[Any] = [
        module for module in net.modules() if isinstance(getattr(type(module), "checkpoint", None), bool)
    ]
    if not blocks:
        raise UserError(
            f"--checkpoint=1: {type(net).__name__} has no blocks that can recompute their activations; leave the option"
            " out and save memory with --chunk or a smaller --batch-gpu"
        )
    for module in blocks:
        module.checkpoint = True


class Compiled:
    """A network that torch.compile makes faster; where that fails, the network itself, after a line that says why.

    two_losses: its graph serves two backward passes, so the first mustn't overwrite what it keeps. Attributes are the
    network's.
    """

    def __init__(self, net: torch.nn.Module, two_losses: bool = False):
        if two_losses:
            from torch._functorch import config  # not loaded before something is compiled

            if hasattr(config, "donated_buffer"):  # PyTorch 2.4 frees nothing early
                config.donated_buffer = False
        self._net = net
        self._fast: Callable | None = torch.compile(net, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._fast is not None:
            try:
                return self._fast(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:  # pyright: ignore[reportAttributeAccessIssue]
                self._fast = None
                distributed.print0(f"--compile: goes on without ({str(error).strip().splitlines()[0]})")
        return self._net(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)
