"""Mean and covariance of features that come in batches, on any number of processes."""

import numpy as np
import torch

from torch_utils import distributed


class FeatureStatistics:
    """Streaming mean and covariance in float64; memory depends on the number of features only.

    Deviations from the running mean are summed (Chan, Golub and LeVeque 1983), not squares of the features
    themselves, so a large common offset costs no digits.

    feature_dim: D. device: where to add up; 'mps', which has no float64, stands for the CPU.
    """

    def __init__(self, feature_dim: int, device: torch.device | str = "cpu"):
        self._device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.n = 0
        self._mean = torch.zeros(feature_dim, dtype=torch.float64, device=self._device)
        self._scatter = torch.zeros(feature_dim, feature_dim, dtype=torch.float64, device=self._device)

    @property
    def feature_dim(self) -> int:
        return len(self._mean)

    def is_finite(self) -> bool:
        """Whether all features were finite."""
        return bool(self._mean.isfinite().all() and self._scatter.isfinite().all())

    def append(self, features: torch.Tensor, start: int = 0) -> None:
        """Adds features [N, D]. start: number of the first image, which makes no difference here."""
        features = torch.as_tensor(features).detach().to(self._device).to(torch.float64)
        if len(features):
            mean = features.mean(0)
            deviations = features - mean
            self._add(len(features), mean, deviations.T @ deviations)

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the features that another instance has seen."""
        if other.n:
            self._add(other.n, other._mean.to(self._device), other._scatter.to(self._device))

    def merge_processes(self) -> None:
        """Gives every process what all have seen; every process must call it."""
        if distributed.world_size() == 1:
            return
        counts = torch.tensor([self.n], dtype=torch.int64, device=self._device)
        total = int(distributed.all_reduce_sum(counts))
        if total == 0:
            return
        mean = distributed.all_reduce_sum(self._mean * (self.n / total))
        offset = self._mean - mean
        self._scatter = distributed.all_reduce_sum(self._scatter + torch.outer(offset, offset) * self.n)
        self._mean, self.n = mean, total

    @property
    def mu(self) -> np.ndarray:
        """Mean, float64 [D]."""
        return self._mean.cpu().numpy()

    @property
    def sigma(self) -> np.ndarray:
        """Unbiased covariance, float64 [D, D]. Errors: ValueError with fewer than two images."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two images, there are {self.n}")
        return (self._scatter / (self.n - 1)).cpu().numpy()

    def _add(self, n: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self.n + n
        offset = mean - self._mean
        self._scatter += scatter + torch.outer(offset, offset) * (self.n * n / total)
        self._mean += offset * (n / total)
        self.n = total
