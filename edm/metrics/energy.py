"""The energy distance between two sets of images, which needs no detector."""

import torch
from torch.nn import functional as F

SCALES = 3  # of the images, each half as large as the one before
SMALLEST = 4  # pixels


def energy_distance(images: torch.Tensor, reference: torch.Tensor) -> float:
    """How far the distribution of `images` is from that of `reference`, both uint8 [N, C, H, W], N > 1.

    2 E|x - y| - E|x - x'| - E|y - y'| over E|y - y'|, with Euclidean distances of pixels, averaged over the images'
    scales (Szekely and Rizzo 2013). Its expectation is 0 for equal distributions and positive for all others. Unlike
    features of a network, it notices every change of brightness and colour; fine detail matters less to it.
    """
    x, y = (part.to(torch.float32) / 127.5 - 1 for part in (images, reference))
    distances = []
    for _ in range(SCALES):
        distances.append(energy_distance_of_vectors(x.flatten(1), y.flatten(1)))
        if x.shape[-1] < 2 * SMALLEST:
            break
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return sum(distances) / len(distances)


def energy_distance_of_vectors(x: torch.Tensor, y: torch.Tensor, floor: float = 1e-6) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over E|y - y'|, at least `floor`, of vectors float32 [N, D] and [M, D]."""
    within_x, within_y = torch.pdist(x).mean(), torch.pdist(y).mean()
    return ((2 * torch.cdist(x, y).mean() - within_x - within_y) / within_y.clamp(min=floor)).item()
