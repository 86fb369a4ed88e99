"""One optimiser step over all processes, guarded against non-finite gradients; moving averages; schedules."""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch

from dnnlib import UserError

from . import distributed

GRADIENT_LIMIT = 1e5  # gradients are clipped to this by value, SPEC §2
MAX_SKIPPED_UPDATES = 10  # so many non-finite gradients in a row end the run


class DivergenceError(UserError):
    """Training produced non-finite gradients time and again; the weights are still the last finite ones."""

    exit_code = 3


class Updater:
    """Applies the gradients of one network's trainable parameters: sums them over processes, clips, checks, steps.

    An update whose gradients are not all finite never reaches the weights: it is skipped and counted.
    """

    def __init__(self, name: str, parameters: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer):
        self.name = name
        self.optimizer = optimizer
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._parameters = list(parameters)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]

    @classmethod
    def adam(
        cls, name: str, net: torch.nn.Module, lr: float, beta1: float, beta2: float = 0.999, eps: float = 1e-8
    ) -> "Updater":
        """Adam on the trainable parameters of `net`."""
        trainable = [p for p in net.parameters() if p.requires_grad]
        return cls(name, trainable, torch.optim.Adam(trainable, lr=lr, betas=(float(beta1), beta2), eps=eps))

    def step(self, nimg: int, lr_factor: float = 1.0) -> float:
        """Updates the weights and clears the gradients; returns the gradient's norm (before clipping).

        nimg: images seen so far, for the message. lr_factor: multiplies every learning rate.
        Errors: DivergenceError after MAX_SKIPPED_UPDATES skipped updates in a row.
        """
        distributed.all_reduce_gradients(self._parameters)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.stack([g.float().norm() for g in gradients]).norm().item()
        if math.isfinite(norm):
            self._skipped_in_a_row = 0
            for gradient in gradients:
                gradient.clamp_(-GRADIENT_LIMIT, GRADIENT_LIMIT)
            for group, lr in zip(self.optimizer.param_groups, self._base_lrs):
                group["lr"] = lr * lr_factor
            self.optimizer.step()
        else:
            self.skipped += 1
            self._skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self._skipped_in_a_row >= MAX_SKIPPED_UPDATES:
            raise DivergenceError(
                f"{self.name}: {MAX_SKIPPED_UPDATES} updates in a row had non-finite gradients"
                f" at {nimg / 1e3:.1f} kimg; the last saved state is good: resume from it with a lower --lr and --glr"
            )
        return norm

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """While open, no gradient is computed for the parameters; gradients still pass through the network."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(True)

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.skipped = state["skipped"]


def ema_beta(batch: int, nimg: int, halflife_img: float, rampup_ratio: float | None) -> float:
    """Weight of the old average after one batch; the half-life is at most `rampup_ratio` of the images seen."""
    if rampup_ratio is not None:
        halflife_img = min(halflife_img, nimg * rampup_ratio)
    return 0.5 ** (batch / halflife_img) if halflife_img > 0 else 0.0


@torch.no_grad()
def update_ema(ema: torch.nn.Module, net: torch.nn.Module, beta: float) -> None:
    """ema <- beta ema + (1 - beta) net; buffers are copied."""
    for average, value in zip(ema.parameters(), net.parameters()):
        average.lerp_(value, 1 - beta)
    for average, value in zip(ema.buffers(), net.buffers()):
        average.copy_(value)


def lr_factor(nimg: int, total_img: float, rampup_img: float = 0, decay: str = "none") -> float:
    """Learning-rate multiplier: linear from 0 over the first `rampup_img` images, times the decay over the whole run.

    decay: 'none', 'linear' or 'cosine' (both end at 0).
    """
    factor = min(nimg / rampup_img, 1.0) if rampup_img > 0 else 1.0
    progress = min(nimg / total_img, 1.0) if total_img > 0 else 1.0
    if decay == "linear":
        factor *= 1 - progress
    elif decay == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * progress))
    return factor
