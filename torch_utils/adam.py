"""Adam without a first moment, for beta1 = 0: the same updates with half the state."""

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import distributed, seeding

CALLS = "calls"
AT_ONCE = {"cpu"}  # devices whose results the host has without waiting


class MomentumFreeAdam(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980) with beta1 = 0, where the first moment is the gradient itself and need not be kept.

    Keeps one tensor per weight instead of two. `found_inf`, a scalar on the weights' device, may be set before `step`:
    where it is 1 nothing changes, whatever the gradients are, and the host doesn't wait to know. `step` may overwrite
    the gradients; those of a group must have been there at the same steps: one count serves the bias correction.

    rounding_seed: integers from 0 up; with them the second moment of float32 weights is kept in bfloat16, half the
                   bytes, rounded at random so that its mean is exact: rounding to nearest would undo every change below
                   1/512, and 1 - beta2 is 1/1000. What is drawn depends on these integers and the count of calls of
                   `step`, which is in the state, alone.
    """

    # Without the wrapper that imports all of torch.compile first, which takes seconds.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    _load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        beta2: float = 0.999,
        eps: float = 1e-8,
        rounding_seed: Sequence[int] | None = None,
    ):
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps})
        self.found_inf: torch.Tensor | None = None
        self._rounding_seed = rounding_seed
        self._start_count()

    @torch.no_grad()
    def step(self) -> None:
        draws, good = self._next_draws(), None
        if self.found_inf is not None and self.found_inf.device.type in AT_ONCE:
            if self.found_inf:
                return
        elif self.found_inf is not None:
            good = 1 - self.found_inf
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for part in distributed.buckets(weights):  # all at once would take a copy of the weights for a moment
                gradients = [p.grad for p in part if p.grad is not None]
                if good is not None:
                    for gradient in gradients:
                        gradient.nan_to_num_(0, 0, 0)  # 0 times these wouldn't be 0
                self._step(group, part, gradients, draws, good)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state saved with either precision of the second moment."""
        self._load_state_dict(state_dict)  # in the dtype of the weights, which holds either
        self._start_count()
        if self._rounding_seed is not None:
            for moments in self.state.values():
                moments["exp_avg_sq"] = moments["exp_avg_sq"].to(torch.bfloat16)

    def _start_count(self) -> None:
        """The calls of `step` are counted in the first group, hence in the state, where they are needed."""
        if self._rounding_seed is None:
            self.param_groups[0].pop(CALLS, None)
        else:
            self.param_groups[0].setdefault(CALLS, 0)

    def _next_draws(self) -> torch.Generator | None:
        """For the rounding of one step; the same on every process, whatever else is drawn there."""
        if self._rounding_seed is None:
            return None
        group = self.param_groups[0]
        seed = seeding.seed_from(*self._rounding_seed, group[CALLS])
        group[CALLS] += 1
        return torch.Generator(group["params"][0].device).manual_seed(seed)

    def _step(
        self,
        group: dict[str, Any],
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        draws: torch.Generator | None,
        good: torch.Tensor | None,
    ) -> None:
        """Updates some weights of a group. good: a scalar, 0 where nothing may change; None: all may."""
        beta2, device = group["beta2"], weights[0].device
        for weight in weights:
            if not self.state[weight]:
                square = torch.zeros_like(weight, dtype=None if draws is None else torch.bfloat16)
                self.state[weight] = {"updates": torch.zeros([], device=device), "exp_avg_sq": square}
        states = [self.state[weight] for weight in weights]
        stored, updates = ([state[name] for state in states] for name in ("exp_avg_sq", "updates"))
        squares = stored if draws is None else [square.to(torch.float32) for square in stored]
        if good is None:
            torch._foreach_mul_(squares, beta2)
            torch._foreach_add_(updates, 1)
        else:
            torch._foreach_mul_(gradients, good)
            torch._foreach_mul_(squares, 1 - (1 - beta2) * good)
            torch._foreach_add_(updates, [good] * len(updates))  # not one tensor: some devices would ask for its value
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        correction = -torch.expm1(updates[0].clamp(min=1) * math.log(beta2))  # 1 - beta2^t, exact in float32 too
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_mul_(denominators, correction.rsqrt())
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(weights, gradients, denominators, value=-group["lr"])
        if draws is not None:
            for square, value in zip(stored, squares):
                square.copy_(round_to_bfloat16(value, draws))


def round_to_bfloat16(values: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Overwrites finite float32 `values` with one of the two neighbours in bfloat16, drawn so that the mean is exact.

    bfloat16 is the upper half of float32: a random number below 2^16, added to the bits, carries into it as often as it
    should. What bfloat16 holds already stays as it is.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=draws)
    values.view(torch.int32).add_(noise).bitwise_and_(-1 << 16)
    return values
