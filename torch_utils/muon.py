"""Muon: every weight matrix moves by its orthogonalised gradient, or by that of a moving average of gradients."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .adam import MomentumFreeAdam

ORTHOGONAL = "orthogonal"  # a group's entry: whether it holds the matrices
DECAY = 0.1  # of matrices, with momentum
VECTOR_RATE = 0.04  # Adam's learning rate for biases and gains, as a fraction of the matrices' rate
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that Muon iterates
ITERATIONS = 5
SMALLEST = 1e-30  # a gradient of zeros stays one


class Muon(MomentumFreeAdam):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), by default without momentum.

    The gradient of a matrix is replaced by the nearest semi-orthogonal matrix O, so that its weak directions count as
    much as its strong ones.

    A matrix W [out, in], or a kernel [out, in, h, w] as a matrix of in * h * w columns, changes by
    lr sqrt(out) max(rms(W), 1 / sqrt(in)) O: relative to its own size, or to the usual size of a random start where it
    is smaller. By this scaling one rate should serve all widths (Bernstein and Newhouse 2024, arXiv:2409.20325;
    measured here up to 64 channels only) and all scales at which networks keep their weights.

    vectors: biases, gains and tables of embeddings, which Adam updates at VECTOR_RATE times the rate.
    momentum: 0 for SiD, where matrices need no state; 0.95 (Nesterov's, a tensor per matrix) for training teachers.
    These take many more updates, whose gradients agree, and at sizes relative to W the weights would grow
    exponentially: with momentum sizes are relative to the first W, and weights decay at DECAY times the rate.
    The other arguments are those of `MomentumFreeAdam`.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        vectors: Iterable[torch.nn.Parameter],
        lr: float,
        beta2: float = 0.999,
        eps: float = 1e-8,
        rounding_seed: Sequence[int] | None = None,
        momentum: float = 0.0,
    ):
        groups = (
            {"params": list(matrices), "lr": lr, ORTHOGONAL: True, "momentum": momentum},
            {"params": list(vectors), "lr": lr * VECTOR_RATE, ORTHOGONAL: False},
        )
        super().__init__([group for group in groups if group["params"]], lr, beta2, eps, rounding_seed)

    @classmethod
    def of(cls, net: torch.nn.Module, lr: float, **options: Any) -> "Muon":
        """For the trainable weights of a network. options: as the constructor has them."""
        return cls(*split(net), lr, **options)

    def _step(
        self,
        group: dict[str, Any],
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        draws: torch.Generator | None,
        good: torch.Tensor | None,
    ) -> None:
        if not group[ORTHOGONAL]:
            super()._step(group, weights, gradients, draws, good)
            return
        if group.get("momentum"):  # states of old runs have none
            sizes, gradients = self._with_momentum(group, weights, gradients, good)
        else:
            sizes = [usual_size(weight) for weight in weights]
        share = 1.0 if good is None else good
        alike: dict[torch.Size, list[int]] = {}
        for i, gradient in enumerate(gradients):
            alike.setdefault(gradient.flatten(1).shape, []).append(i)
        for (rows, _), members in alike.items():  # in one batch each
            updates = orthogonalise(torch.stack([gradients[i].flatten(1).to(torch.float32) for i in members]))
            for i, update in zip(members, updates):
                size = group["lr"] * math.sqrt(rows) * sizes[i] * share
                weights[i].sub_((size * update).view_as(weights[i]))

    def _with_momentum(
        self,
        group: dict[str, Any],
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        good: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(`usual_size` of the weights before their first update, the gradients' averages one step ahead).

        Lets the weights decay. `good` gradients alone change anything.
        """
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {"momentum_buffer": torch.zeros_like(weight), "size": usual_size(weight)}
        sizes, averages = ([self.state[weight][name] for weight in weights] for name in ("size", "momentum_buffer"))
        share = 1.0 if good is None else good
        for weight, average, gradient in zip(weights, averages, gradients):
            average.lerp_(gradient, (1 - group["momentum"]) * share)
            weight.mul_(1 - DECAY * group["lr"] * share)
        return sizes, list(torch._foreach_lerp(gradients, averages, group["momentum"]))


def usual_size(weight: torch.Tensor) -> torch.Tensor:
    """rms(W) or, where it is smaller, that of a random start, of a matrix or a kernel: a scalar."""
    return weight.square().mean(dtype=torch.float32).sqrt().clamp(min=weight[0].numel() ** -0.5)


def split(net: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(matrices, vectors) among the trainable weights of a network, as `Muon` has them."""
    tables = {id(m.weight) for m in net.modules() if isinstance(m, torch.nn.Embedding)}
    trainable = [p for p in net.parameters() if p.requires_grad]
    is_matrix = [p.ndim >= 2 and id(p) not in tables for p in trainable]
    return [p for p, m in zip(trainable, is_matrix) if m], [p for p, m in zip(trainable, is_matrix) if not m]


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """About U V^T of each matrix U S V^T, [N, rows, columns], by five iterations; singular values are 0.7 to 1.2.

    Those below about 0.01 of the matrix's Frobenius norm come out smaller.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=SMALLEST)[:, None, None]
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
