"""Improved precision and recall (arXiv:1904.06991): shares of points inside the other set's k-nearest manifold."""

from collections.abc import Iterator

import torch

from .kid import finite_features
from .real_images import RealImagesMetric

NEIGHBOUR = 3
MAX_CHUNK_ELEMENTS = 1 << 25  # of a block of distances: 256 MiB
ROUNDING = 1e-12  # squared distances below this share of the squared norms are rounding errors of equal points


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = NEIGHBOUR) -> tuple[float, float]:
    """(precision, recall) of generated features [M, D] against real ones [N, D], with N, M > k.

    A point's radius is the distance to its k-th nearest other point of its own set; a query is covered if it lies
    within the radius of any point. Precision is the covered share of generated points, recall that of real ones.
    All pairs are compared, in float64 on the features' device (on the CPU for mps), in blocks of bounded memory.
    Errors: ValueError when a feature isn't finite.
    """
    real, generated = finite_features(real), finite_features(generated)
    device = "cpu" if real.device.type == "mps" else real.device
    real, generated = real.to(device, torch.float64), generated.to(device, torch.float64)
    center = real.mean(0)  # smaller norms have smaller rounding errors
    real, generated = real - center, generated - center
    precision = _covered(generated, real, _squared_radii(real, k)).mean().item()
    recall = _covered(real, generated, _squared_radii(generated, k)).mean().item()
    return precision, recall


def _squared_radii(points: torch.Tensor, k: int) -> torch.Tensor:
    # The nearest point of all is the point itself, so the k-th other one is number k + 1.
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in _squared_distances(points, points)])


def _covered(queries: torch.Tensor, points: torch.Tensor, squared_radii: torch.Tensor) -> torch.Tensor:
    """1. for every query within the radius of any point, else 0."""
    return torch.cat([(block <= squared_radii).any(1) for block in _squared_distances(queries, points)]).double()


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks of rows of the squared distances [len(x), len(y)]; exactly zero between equal points."""
    y_norms = y.square().sum(1)
    for rows in x.split(max(MAX_CHUNK_ELEMENTS // len(y), 1)):
        norms = rows.square().sum(1, keepdim=True) + y_norms
        distances = torch.addmm(norms, rows, y.T, alpha=-2)
        yield distances.masked_fill_(distances < ROUNDING * norms, 0)


class PrecisionRecallMetric(RealImagesMetric):
    """Precision and recall, with the neighbour that the name gives (`pr50k3`) or the usual one."""

    kind, default_k = "pr", NEIGHBOUR

    @property
    def least(self) -> int:
        return self.k + 1

    def compare(self, real: torch.Tensor, generated: torch.Tensor) -> dict[str, float]:
        precision, recall = precision_recall(real, generated, self.k)
        return {"precision": precision, "recall": recall}
