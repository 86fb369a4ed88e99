"""Clusters of images that look alike: k-means of their thumbnails."""

import torch
from torch.nn import functional as F

ROUNDS = 20  # of Lloyd's algorithm


def thumbnails(images: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 images [N, C, H, W] as points [N, C * width²] between -1 and 1; smaller images keep their size."""
    width = min(width, images.shape[-1])
    parts = [F.adaptive_avg_pool2d(part.to(torch.float32) / 127.5 - 1, width) for part in images.split(64)]
    return torch.cat(parts).flatten(1)


def k_means(points: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Centres [count, D] of clusters of points [N, D], N >= count, by Lloyd's algorithm. seed: of the first centres."""
    centres = _first_centres(points, count, torch.Generator().manual_seed(seed))
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centres).argmin(1)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        means = torch.zeros_like(centres).index_add_(0, nearest, points) / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return centres


def _first_centres(points: torch.Tensor, count: int, draws: torch.Generator) -> torch.Tensor:
    """Points far from each other, drawn as in k-means++ (Arthur and Vassilvitskii 2007)."""
    chosen = [int(torch.randint(len(points), [1], generator=draws))]
    squared = torch.full([len(points)], torch.inf)
    while len(chosen) < count:
        squared = torch.minimum(squared, (points - points[chosen[-1]]).square().sum(1))
        chosen.append(int(torch.multinomial(squared + 1e-12, 1, generator=draws)))  # also where all points are equal
    return points[chosen]
