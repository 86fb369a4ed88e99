"""Kinds of images that a generator may lack: clusters of a teacher's samples, and how many images fall into each.

They are clusters of thumbnails, which lay the kinds of images apart better than the features do in which
`sid.teacher_features` measures a distance (docs/ablations.md).
"""

import dataclasses

import torch

from edm.metrics.clusters import k_means, thumbnails

PER_CLUSTER = 25  # of the teacher's samples, on average
PIXELS = 16  # width of the thumbnails
STARTS = 4  # of k-means, of which the tightest clusters count


@dataclasses.dataclass(frozen=True)
class ClusterCounts:
    """Images per cluster. teacher: of the teacher's samples. generator: of the images compared with them."""

    teacher: tuple[int, ...]
    generator: tuple[int, ...]


class SampleClusters:
    """Clusters of a teacher's samples, which other images are counted into.

    A sample draws the centre of its cluster towards itself, so samples lie closer to the centres than other images of
    their kind, and even other samples of the teacher might seem to lack a cluster. So each sample is counted by where
    the centre of its own cluster is without it.

    samples: points [N, D], as of `points_of`.
    """

    def __init__(self, samples: torch.Tensor):
        self.samples = samples
        found = [k_means(samples, max(len(samples) // PER_CLUSTER, 1), seed) for seed in range(STARTS)]
        self.centres = min(found, key=lambda centres: squares(samples, centres).amin(1).sum().item())
        self._teacher = _counts(without_own(squares(samples, self.centres)))

    def __call__(self, points: torch.Tensor) -> ClusterCounts:
        """How many images each cluster has. points: of the images, [M, D]."""
        return ClusterCounts(self._teacher, _counts(squares(points, self.centres)))

    def nearest(self, points: torch.Tensor, cluster: int, num: int) -> torch.Tensor:
        """The indices of the `num` points that are nearest to a cluster's centre, the nearest first."""
        return squares(points, self.centres[[cluster]])[:, 0].argsort(stable=True)[:num]


def points_of(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, C, H, W] on the CPU as points that are near each other where images look alike, [N, D]."""
    return thumbnails(images, PIXELS)


def squares(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances, [N, D] and [K, D] to [N, K]."""
    return torch.cdist(points, centres).square()


def without_own(distances: torch.Tensor) -> torch.Tensor:
    """Squared distances [N, K] of points from the means of their clusters, each from its own mean as without itself.

    The mean of n points without one of them is n / (n - 1) times as far from that point. Who is alone has no mean.
    """
    own = distances.argmin(1)
    sizes = torch.bincount(own, minlength=distances.shape[1])[own]
    growth = torch.where(sizes > 1, (sizes / (sizes - 1).clamp(min=1)).square(), torch.inf)
    found, rows = distances.clone(), torch.arange(len(distances))
    found[rows, own] = growth * found[rows, own].clamp(min=1e-12)
    return found


def _counts(distances: torch.Tensor) -> tuple[int, ...]:
    """Points by the centre that each is nearest to, from distances [N, K]."""
    return tuple(torch.bincount(distances.argmin(1), minlength=distances.shape[1]).tolist())
