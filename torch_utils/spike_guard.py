"""Skips updates whose gradient is much larger than those before: on the device, without waiting for the host."""

from typing import Any

import torch

REMEMBERED = 64  # norms; the guard begins to act when it has so many, and takes a lasting change after half of them


class SpikeGuard:
    """Recognises spikes: gradient norms above `factor` times the median of the last REMEMBERED finite norms.

    Spikes are remembered, too: a norm that stays larger soon becomes the median, so no run is held up for ever.
    The median, unlike a mean, isn't moved by the spikes themselves.
    """

    def __init__(self, factor: float, device: torch.device):
        self.factor = factor
        self._norms = torch.full([REMEMBERED], torch.nan, device=device)  # oldest first
        self._count = torch.zeros([], device=device)

    def check(self, norm: torch.Tensor) -> torch.Tensor:
        """1 if the norm, a scalar on the device, is a spike, else 0: a scalar. Call it once an update."""
        spike = norm > self.factor * self._norms.median()  # no median, hence no spike, while one of them is NaN
        spike = (spike & norm.isfinite()).float()  # the updater itself skips the others
        self._count = self._count + spike
        self._norms = torch.where(norm.isfinite(), torch.cat([self._norms[1:], norm[None]]), self._norms)
        return spike

    @property
    def count(self) -> int:
        """Spikes so far. Waits for the device."""
        return int(self._count)

    def state_dict(self) -> dict[str, torch.Tensor | float]:
        return {"norms": self._norms.cpu(), "count": float(self._count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave. Errors: ValueError when it holds another number of norms."""
        if state["norms"].shape != self._norms.shape:
            raise ValueError(f"the spike guard remembers {REMEMBERED} norms, not {list(state['norms'].shape)}")
        self._norms = state["norms"].to(self._norms)
        self._count = torch.full_like(self._count, state["count"])
