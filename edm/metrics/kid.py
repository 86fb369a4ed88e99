"""Kernel distance (KID: arXiv:1801.01401): squared MMD with a cubic kernel, unbiased, averaged over random subsets."""

import numpy as np
import torch

from .real_images import RealImagesMetric

SUBSETS = 100
MAX_SUBSET_SIZE = 1000


def kernel_distance(
    real: torch.Tensor,
    generated: torch.Tensor,
    subsets: int = SUBSETS,
    max_subset_size: int = MAX_SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """(mean, standard deviation) over subsets of the unbiased squared MMD with the kernel (xᵀy/D + 1)³.

    real, generated: features [N, D], [M, D], N, M ≥ 2; computed in float64 on their device (on the CPU for mps).
    Every subset draws min(N, M, max_subset_size) rows of each without replacement, first of the generated ones.
    Errors: ValueError when a feature isn't finite.
    """
    real, generated = finite_features(real), finite_features(generated)
    device = "cpu" if real.device.type == "mps" else real.device
    size = min(len(real), len(generated), max_subset_size)
    rng = np.random.RandomState(seed)  # published values depend on this generator's draws
    distances = []
    for _ in range(subsets):
        y = generated[torch.from_numpy(rng.choice(len(generated), size, replace=False)).to(generated.device)]
        x = real[torch.from_numpy(rng.choice(len(real), size, replace=False)).to(real.device)]
        distances.append(_unbiased_mmd2(x.to(device, torch.float64), y.to(device, torch.float64)))
    values = torch.stack(distances)
    return values.mean().item(), values.std(correction=0).item()


def finite_features(features: torch.Tensor) -> torch.Tensor:
    """The features, if they are finite. Errors: ValueError."""
    features = torch.as_tensor(features)
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinity")
    return features


def _unbiased_mmd2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))  # of distinct pairs only
    return within / (len(x) * (len(x) - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class KernelMetric(RealImagesMetric):
    """The kernel distance, and its standard deviation over the subsets."""

    kind = "kid"

    def compare(self, real: torch.Tensor, generated: torch.Tensor) -> dict[str, float]:
        mean, std = kernel_distance(real, generated)
        return {"kid": mean, "kid_std": std}
