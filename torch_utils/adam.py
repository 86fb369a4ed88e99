"""Adam without a first moment, for beta1 = 0: the same updates with half the state."""

import math
from collections.abc import Iterable

import torch

from . import distributed

AT_ONCE = {"cpu"}  # devices whose results the host has without waiting


class MomentumFreeAdam(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980) with beta1 = 0, where the first moment is the gradient itself and need not be kept.

    Keeps one tensor per weight instead of two. `found_inf`, a scalar on the weights' device, may be set before `step`:
    where it is 1 nothing changes, whatever the gradients are, and the host doesn't wait to know. `step` may overwrite
    the gradients; those of a group must have been there at the same steps: one count serves the bias correction.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, beta2: float = 0.999, eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps})
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for part in distributed.buckets(weights):  # all at once would take a copy of the weights for a moment
                self._step(group, part, [p.grad for p in part])

    def _step(self, group: dict, weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        beta2, device, found_inf = group["beta2"], weights[0].device, self.found_inf
        if found_inf is not None and device.type in AT_ONCE:
            if found_inf:
                return
            found_inf = None
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {"updates": torch.zeros([], device=device), "exp_avg_sq": torch.zeros_like(weight)}
        states = [self.state[weight] for weight in weights]
        squares, updates = ([state[name] for state in states] for name in ("exp_avg_sq", "updates"))
        if found_inf is None:
            torch._foreach_mul_(squares, beta2)
            torch._foreach_add_(updates, 1)
        else:
            good = 1 - found_inf
            for gradient in gradients:
                gradient.nan_to_num_(0, 0, 0)  # 0 times these wouldn't be 0
            torch._foreach_mul_(gradients, good)
            torch._foreach_mul_(squares, 1 - (1 - beta2) * good)
            torch._foreach_add_(updates, [good] * len(updates))  # not one tensor: some devices would ask for its value
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        correction = -torch.expm1(updates[0].clamp(min=1) * math.log(beta2))  # 1 - beta2^t, exact in float32 too
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_mul_(denominators, correction.rsqrt())
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(weights, gradients, denominators, value=-group["lr"])
