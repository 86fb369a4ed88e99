"""Means and deviations of training statistics, over images and processes, between two ticks."""

import math

import torch

from . import distributed


class Collector:
    """Collects named values; `collect()` gives the mean and deviation of each since the last call, over all processes.

    Values stay on their device until `collect()`, so reporting costs no synchronisation.
    """

    def __init__(self):
        self._moments: dict[str, torch.Tensor] = {}  # name -> [count, sum, sum of squares], float64 (float32 on mps)

    @torch.no_grad()
    def report(self, name: str, values: torch.Tensor | float, device: torch.device | None = None) -> None:
        values = torch.as_tensor(values, device=device).detach()
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        values = values.reshape(-1).to(wide)
        moments = torch.stack([torch.full_like(values[0], values.numel()), values.sum(), values.square().sum()])
        self._moments[name] = self._moments[name] + moments if name in self._moments else moments

    def collect(self) -> dict[str, dict[str, float]]:
        """{name: {'num', 'mean', 'std'}} with finite means only; every process must have reported the same names."""
        names = sorted(self._moments)
        if not names:
            return {}
        moments = distributed.all_reduce_sum(torch.stack([self._moments[name] for name in names])).tolist()
        self._moments.clear()
        result = {}
        for name, (count, total, squares) in zip(names, moments):
            mean = total / count
            if math.isfinite(mean):
                result[name] = {"num": int(count), "mean": mean, "std": math.sqrt(max(squares / count - mean**2, 0.0))}
        return result
