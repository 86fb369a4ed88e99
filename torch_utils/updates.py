"""One optimiser step over all processes, guarded against non-finite gradients; moving averages; schedules."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dnnlib import UserError

from . import distributed, finiteness
from .adam import CALLS, MomentumFreeAdam
from .muon import ORTHOGONAL, Muon
from .spike_guard import SpikeGuard

GRADIENT_LIMIT = 1e5  # gradients are clipped to this by value by default, as in the published trainings
MAX_SKIPPED_UPDATES = 10  # so many non-finite gradients in a row end the run
GROWTH_INTERVAL = 2000  # so many good updates in a row double the loss scale
COUNTS = ("skipped", "skipped_in_a_row", "longest_row", "good_in_a_row")


class DivergenceError(UserError):
    """Training repeatedly produced non-finite gradients, or weights or pictures that aren't finite.

    advice: what to do next, which the message adds to the reason.
    """

    exit_code = 3

    def __init__(self, reason: str, advice: str = ""):
        super().__init__(f"{reason}; {advice}" if advice else reason)
        self.reason = reason


def check_finite(networks: Mapping[str, torch.nn.Module], nimg: int) -> None:
    """Waits for the device. nimg: images seen so far, for the message.

    Errors: DivergenceError when a weight or a buffer of one of the networks isn't finite.
    """
    for name, net in networks.items():
        weight = finiteness.first_non_finite(net)
        if weight is not None:
            raise DivergenceError(f"{name}: {weight} holds NaN or infinity at {nimg / 1e3:g} kimg")


class Updater:
    """Applies the gradients of one network's trainable parameters: sums them over processes, clips, checks, steps.

    An update whose gradients are not all finite never reaches the weights: it is skipped and counted, on the device
    where that's possible, so that a GPU never waits for the host.

    loss_scaling: for half precision. `backward` multiplies the loss by `loss_scale`, which halves with every skipped
    update and doubles after GROWTH_INTERVAL good ones; `step` divides the gradients by it.
    limit: gradients are clipped to this by value.
    spike_guard: an update is skipped, too, if the norm of its gradient is more than so many times the median of those
    before (`SpikeGuard`).
    after_update: called after every update, even a skipped one, for instance to normalise weights.
    """

    def __init__(
        self,
        name: str,
        parameters: Iterable[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        loss_scaling: bool = False,
        limit: float = GRADIENT_LIMIT,
        spike_guard: float | None = None,
        after_update: Callable[[], None] | None = None,
    ):
        self.name = name
        self.optimizer = optimizer
        self.limit = limit
        self.parameters = list(parameters)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        device = self.parameters[0].device
        self._counts = dict.fromkeys(COUNTS, torch.zeros([], device=device))
        self.loss_scale = torch.ones([], device=device) if loss_scaling else None
        self._guard = SpikeGuard(spike_guard, device) if spike_guard else None
        self._after_update = after_update

    @classmethod
    def of(
        cls,
        name: str,
        net: torch.nn.Module,
        lr: float,
        beta1: float,
        beta2: float = 0.999,
        eps: float = 1e-8,
        loss_scaling: bool = False,
        limit: float = GRADIENT_LIMIT,
        spike_guard: float | None = None,
        rounding_seed: Sequence[int] | None = None,
        optimizer: str = "adam",
    ) -> "Updater":
        """Adam or Muon on the trainable parameters of `net`.

        A network with a method `normalize_weights` has it called after every update.
        optimizer: 'adam', which is one kernel where the device has it unless beta1 = 0; or 'muon', for beta1 = 0 only.
        rounding_seed: as MomentumFreeAdam has it, for beta1 = 0 only.
        """
        trainable = [p for p in net.parameters() if p.requires_grad]
        after_update: Any = getattr(net, "normalize_weights", None)
        chosen: torch.optim.Optimizer
        if optimizer == "muon":
            assert beta1 == 0
            chosen = Muon.of(net, lr, beta2=beta2, eps=eps, rounding_seed=rounding_seed)
        elif beta1 == 0:
            chosen = MomentumFreeAdam(trainable, lr, beta2, eps, rounding_seed)
        else:
            fused = all(p.device.type in ("cuda", "cpu") for p in trainable)
            chosen = torch.optim.Adam(trainable, lr=lr, betas=(float(beta1), beta2), eps=eps, fused=fused)
        return cls(name, trainable, chosen, loss_scaling, limit, spike_guard, after_update)

    def backward(self, loss: torch.Tensor, only: Iterable[torch.Tensor] | None = None, keep: bool = False) -> None:
        """Adds the gradients of a scalar loss to what `step` applies.

        only: the leaves that get them; None: all. keep: the graph, for another loss.
        """
        loss = loss if self.loss_scale is None else loss * self.loss_scale
        loss.backward(inputs=None if only is None else list(only), retain_graph=keep)

    def step(self, lr_factor: float = 1.0) -> torch.Tensor:
        """Updates the weights and clears the gradients; returns the gradient's norm before clipping, a scalar.

        lr_factor: multiplies every learning rate.
        """
        distributed.all_reduce_gradients(self.parameters)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale)
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        bad = (~norm.isfinite()).float()
        skip = bad if self._guard is None else bad + self._guard.check(norm)  # never both
        torch.nn.utils.clip_grad_value_(self.parameters, self.limit)
        for group, lr in zip(self.optimizer.param_groups, self._base_lrs):
            group["lr"] = lr * lr_factor
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        if fused or isinstance(self.optimizer, MomentumFreeAdam):
            optimizer: Any = self.optimizer
            optimizer.found_inf = skip  # leaves everything as it is where this is 1
            self.optimizer.step()
        elif not skip:
            self.optimizer.step()
        if self._after_update is not None:
            self._after_update()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(bad)
        return norm

    def _count(self, bad: torch.Tensor) -> None:
        counts = self._counts
        row = (counts["skipped_in_a_row"] + 1) * bad
        good = (counts["good_in_a_row"] + 1) * (1 - bad)
        if self.loss_scale is not None:
            grown = (good > 0) & (good % GROWTH_INTERVAL == 0)
            self.loss_scale = self.loss_scale * torch.where(bad > 0, 0.5, torch.where(grown, 2.0, 1.0))
        longest = counts["longest_row"].maximum(row)
        values = (counts["skipped"] + bad, row, longest, good)
        self._counts = dict(zip(COUNTS, values))

    def check(self, nimg: int) -> None:
        """Waits for the device. nimg: images seen so far, for the message.

        Errors: DivergenceError after MAX_SKIPPED_UPDATES skipped updates in a row.
        """
        if self._counts["longest_row"] >= MAX_SKIPPED_UPDATES:
            raise DivergenceError(
                f"{self.name}: {MAX_SKIPPED_UPDATES} updates in a row had non-finite gradients at {nimg / 1e3:g} kimg"
            )

    @property
    def skipped(self) -> int:
        """Updates skipped so far. Waits for the device."""
        return int(self._counts["skipped"])

    @property
    def spikes(self) -> int:
        """Updates that the spike guard skipped so far. Waits for the device."""
        return 0 if self._guard is None else self._guard.count

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """While open, no gradient is computed for the parameters; gradients still pass through the network."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(True)

    def state_dict(self) -> dict:
        counts = {name: float(count) for name, count in self._counts.items()}
        scale = None if self.loss_scale is None else float(self.loss_scale)
        guard = {} if self._guard is None else {"spike_guard": self._guard.state_dict()}
        return {"optimizer": self.optimizer.state_dict(), "counts": counts, "loss_scale": scale, **guard}

    def load_state_dict(self, state: dict) -> None:
        """Takes moments and counts; rates, betas and the kernel stay those of this run.

        Errors: ValueError when it is of another optimizer or holds other moments of Adam; others when it isn't of
        this network.
        """
        own = [{k: v for k, v in g.items() if k not in ("params", CALLS)} for g in self.optimizer.param_groups]
        former = state["optimizer"]["param_groups"]
        if [g.get(ORTHOGONAL) for g in former] != [g.get(ORTHOGONAL) for g in self.optimizer.param_groups]:
            raise ValueError("its optimizer was another one")
        momentum_free = isinstance(self.optimizer, MomentumFreeAdam)
        if any(("exp_avg" in moments) == momentum_free for moments in state["optimizer"]["state"].values()):
            raise ValueError("Adam's beta1 was 0 before or is now, not both")
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own):
            group.update(settings)
        for weight, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == weight.shape and moment.stride() != weight.stride():  # a fused kernel sees memory
                    moments[name] = torch.empty_like(weight, dtype=moment.dtype).copy_(moment)
        device = self.parameters[0].device
        self._counts = {name: torch.tensor(state["counts"][name], device=device) for name in COUNTS}
        if self.loss_scale is not None and state["loss_scale"] is not None:
            self.loss_scale = torch.tensor(state["loss_scale"], device=device)
        if self._guard is not None and "spike_guard" in state:
            self._guard.load_state_dict(state["spike_guard"])


def ema_beta(batch: int, nimg: float, halflife_img: float, rampup_ratio: float | None) -> float:
    """Weight of the old average after one batch; the half-life is at most `rampup_ratio` of the images seen."""
    if rampup_ratio is not None:
        halflife_img = min(halflife_img, nimg * rampup_ratio)
    return 0.5 ** (batch / halflife_img) if halflife_img > 0 else 0.0


@torch.no_grad()
def update_ema(ema: torch.nn.Module, net: torch.nn.Module, beta: float) -> None:
    """ema <- beta ema + (1 - beta) net; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)
    for average, value in zip(ema.buffers(), net.buffers()):
        average.copy_(value)


def lr_factor(
    nimg: int, total_img: float, rampup_img: float = 0, decay: str = "none", constant_img: float = 0
) -> float:
    """Learning-rate multiplier: linear from 0 over the first `rampup_img` images, times the decay.

    decay: 'none'; 'linear' or 'cosine', which end at 0 after `total_img` images; 'sqrt', the inverse square root of the
           images seen, which begins after `constant_img` images and doesn't depend on the length (EDM2).
    """
    factor = min(nimg / rampup_img, 1.0) if rampup_img > 0 else 1.0
    progress = min(nimg / total_img, 1.0) if total_img > 0 else 1.0
    if decay == "linear":
        factor *= 1 - progress
    elif decay == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * progress))
    elif decay == "sqrt":
        factor /= math.sqrt(max(nimg / constant_img, 1.0)) if constant_img > 0 else 1.0
    return factor


def power_function_exponent(std: float) -> float:
    """gamma of the power-function average whose profile has the relative standard deviation `std` (EDM2, section 3.1).

    std: of the ages in the average relative to the length of the training, in (0, 0.289). Errors: ValueError.
    """
    if not 0 < std < 12**-0.5:  # that of the plain mean of all weights, gamma = 0
        raise ValueError(f"a power-function average has a standard deviation above 0 and below {12**-0.5:.4f}")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])  # (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = std^2
    return float(roots.real.max())


def power_function_beta(batch: int, nimg: float, std: float) -> float:
    """Weight of the old average after one batch that follows `nimg` images (EDM2, section 3.1)."""
    return (nimg / (nimg + batch)) ** (power_function_exponent(std) + 1)
