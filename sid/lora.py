"""Low-rank training (LoRA, arXiv:2106.09685): networks that share one frozen copy of the large weights.

A weight of shape [out, ...], seen as a matrix [out, in], becomes W + s B A with W frozen and shared, A [r, in] and
B [out, r] trained. A starts as N(0, 1/in), B as zero, so the network starts unchanged. Biases and norms are trained
whole, and so is a matrix whose two factors would hold at least as many numbers as the matrix itself: with a large
enough rank, this is ordinary training. W may be stored in half precision (`store_bases`); the sum is float32.

The scale s = sqrt(in/r), in LoRA's terms alpha = sqrt(in r), keeps the meaning of learning rates: Adam's first
step moves every number in B by lr, hence every number in s B A by lr in root mean square, whatever the rank.

peft isn't used: it replaces layers of classes that it knows (torch.nn.Linear, Conv2d, ...), but training/layers.py
and foreign denoisers have their own layers. Its networks wouldn't keep their class and names either.
"""

import copy
import math
from typing import Any, TypeVar

import torch

from torch_utils.computed import compute_parameters
from torch_utils.precision import without_autocast

Network = TypeVar("Network", bound=torch.nn.Module)

SUFFIX = "_update"  # `weight` is computed by the module `weight_update`


class _Shared:
    """Holds a tensor that belongs to another network. It is no parameter of the module and isn't copied with it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


class LowRank(torch.nn.Module):
    """W + s B A as a tensor in the shape of W; its parameters are A and B. base: W, [out, ...], frozen from here on."""

    def __init__(self, base: torch.nn.Parameter, rank: int):
        super().__init__()
        rows, columns = _matrix(base)
        like = {"device": base.device, "dtype": base.dtype}
        self.a = torch.nn.Parameter(torch.randn([rank, columns], **like) / math.sqrt(columns))
        self.b = torch.nn.Parameter(torch.zeros([rows, rank], **like))
        self.scale = math.sqrt(columns / rank)
        self._base = _Shared(base.requires_grad_(False))

    @property
    def base(self) -> torch.Tensor:
        return self._base.tensor

    def forward(self) -> torch.Tensor:
        base = self.base
        with without_autocast(base.device):  # half precision would lose small updates
            return base.float() + (self.scale * self.b @ self.a).view_as(base)  # in the memory layout of the base


def adapt(net: torch.nn.Module, rank: int, base: torch.nn.Module | None = None, matrices_only: bool = False) -> None:
    """Turns the trainable matrices of `net` into low-rank updates of the matrices of `base`, in place.

    net:  any module on the device where it stays; parameters that are frozen remain as they are.
    base: a network with the same parameter names, whose matrices are frozen and shared; None: the present weights of
          `net` itself. Copies (`copy.deepcopy`) of an adapted network share them, too.
    matrices_only: trains what a LoRA file can hold alone: gives the weight of every layer its two factors, however
          small, and freezes biases, norms, tables and convolutions in groups.
    """

    def large(weight: torch.nn.Parameter) -> bool:
        rows, columns = _matrix(weight) if weight.ndim > 1 else (1, 1)
        return weight.requires_grad and (rank * (rows + columns) < rows * columns or matrices_only)

    if matrices_only:
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_matrix = name == "weight" and parameter.ndim > 1 and getattr(module, "groups", 1) == 1
                parameter.requires_grad_(parameter.requires_grad and is_matrix)
    bases = dict((net if base is None else base).named_parameters(remove_duplicate=False))
    made = {parameter: LowRank(bases[name], rank) for name, parameter in net.named_parameters() if large(parameter)}
    compute_parameters(net, made, SUFFIX)


def store_bases(net: torch.nn.Module, stored: torch.nn.Module) -> None:
    """Stores the frozen weights below the updates of `net` in the precision that `stored` has its weights in.

    stored: a network with the same parameter names as `net` before `adapt`.
    """
    dtypes = {name: p.dtype for name, p in stored.named_parameters(remove_duplicate=False)}
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, LowRank):
            module.base.data = module.base.data.to(dtypes[name.removesuffix(SUFFIX)])


def merge(net: Network) -> Network:
    """An ordinary frozen network with the weights of an adapted one: same classes, names and order as before `adapt`.

    Shares nothing with `net`. A network that isn't adapted comes back as it is.
    """
    if not any(isinstance(module, LowRank) for module in net.modules()):
        return net
    net = copy.deepcopy(net).requires_grad_(False)
    made: dict[LowRank, torch.nn.Parameter] = {}
    for module in list(net.modules()):
        for name in getattr(type(module), "computed_names", ()):
            update = module._modules.pop(name + SUFFIX)
            assert isinstance(update, LowRank)
            if update not in made:
                made[update] = torch.nn.Parameter(update().contiguous(), requires_grad=False)
            module._parameters[name] = made[update]
        if hasattr(type(module), "computed_names"):
            (module.__class__,) = type(module).__bases__
    return net


def _matrix(weight: torch.Tensor) -> tuple[int, int]:
    """(out, in) of a weight [out, ...]."""
    return weight.shape[0], weight[0].numel()
