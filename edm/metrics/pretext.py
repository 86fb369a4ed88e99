"""What a detector learns from images without labels: what an image looks like, and what was done to it."""

import torch
from torch.nn import functional as F

from .clusters import k_means, thumbnails

TURNS = 4  # quarter turns
DAMAGES = 4  # none, blurred, noisy, made of parts of several images
BLUR_PIXELS = (0.5, 1.1)  # standard deviation of the blur, lowest and highest
NOISE_LEVELS = (6.0, 32.0)  # standard deviation of the noise, of 255
PARTS = (2, 4)  # per side
CLUSTERS = 16
CLUSTER_IMAGES = 10  # on average at least
THUMBNAIL_PIXELS = 4


class Pretext:
    """Three questions about an image: which cluster it belongs to, how it was rotated, and how it was damaged.

    The clusters make the features sensitive to colour, composition and missing kinds of images; rotations make them
    sensitive to shapes; damage makes them sensitive to blur, noise and incoherent images.

    sizes: the number of answers to each question.
    """

    def __init__(self, images: torch.Tensor, seed: int = 0):
        """images: uint8 [N, C, H, W], to be clustered. seed: of the clustering."""
        self._centres = find_clusters(images, max(1, min(CLUSTERS, len(images) // CLUSTER_IMAGES)), seed)
        self.sizes = [len(self._centres), TURNS, DAMAGES]

    def clusters(self, images: torch.Tensor) -> torch.Tensor:
        """int64 [N]: the cluster of each image, uint8 [N, C, H, W]."""
        return torch.cdist(thumbnails(images, THUMBNAIL_PIXELS), self._centres).argmin(1)

    def ask(self, images: torch.Tensor, clusters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(uint8 images, rotated and damaged at random; answers, int64 [N, 3]).

        images: uint8 [N, C, H, W] with H = W. clusters: their clusters, int64 [N].
        """
        turns, damages = torch.randint(TURNS, [len(images)]), torch.randint(DAMAGES, [len(images)])
        return damaged(turned(images, turns), damages), torch.stack([clusters, turns, damages], dim=1)


def turned(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W], with H = W, each rotated by its number of quarter turns, int64 [N]."""
    result = images.clone()
    for number in turns.unique().tolist():
        result[turns == number] = images[turns == number].rot90(number, (2, 3))
    return result


def damaged(images: torch.Tensor, damages: torch.Tensor) -> torch.Tensor:
    """uint8 images [N, C, H, W], each damaged by its kind, int64 [N]: 0 not at all, 1 blurred, 2 noisy, 3 mixed."""
    result = images.clone()
    for number, damage in enumerate((_blurred, _noisy, _mixed), start=1):
        chosen = damages == number
        if chosen.any():
            result[chosen] = damage(images[chosen].to(torch.float32)).clamp(0, 255).round().to(torch.uint8)
    return result


def _blurred(images: torch.Tensor) -> torch.Tensor:
    deviation = torch.empty(1).uniform_(*BLUR_PIXELS)
    weights = torch.exp(-((torch.arange(-3, 4) / deviation) ** 2) / 2)
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, 7)
    images = F.pad(images, [3] * 4, mode="replicate")
    rows = F.conv2d(images, weights, groups=images.shape[1])
    return F.conv2d(rows, weights.transpose(2, 3), groups=images.shape[1])


def _noisy(images: torch.Tensor) -> torch.Tensor:
    return images + torch.empty(len(images), 1, 1, 1).uniform_(*NOISE_LEVELS) * torch.randn_like(images)


def _mixed(images: torch.Tensor) -> torch.Tensor:
    """Cuts each image into square parts and replaces each part by the same part of another image."""
    parts = PARTS[int(torch.randint(len(PARTS), [1]))]
    parts = min(parts, images.shape[-1])
    size = images.shape[-1] // parts
    result = images.clone()
    for row in range(0, parts * size, size):
        for column in range(0, parts * size, size):
            others = torch.randperm(len(images))
            result[..., row : row + size, column : column + size] = images[
                others, :, row : row + size, column : column + size
            ]
    return result


def find_clusters(images: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Centres [count, C * THUMBNAIL_PIXELS²] of clusters of uint8 images [N, C, H, W], N >= count.

    Images are compared by their thumbnails, that is by the places and colours of bright regions.
    """
    return k_means(thumbnails(images, THUMBNAIL_PIXELS), count, seed)
