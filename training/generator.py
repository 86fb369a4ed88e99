"""The generator: a network with the noise levels at which it starts."""

from collections.abc import Sequence
from typing import Any

import torch

INIT_SIGMA = 2.5  # SiD's


class Generator:
    """A denoiser that makes samples from noise, one evaluation per start level.

    Training, monitoring, sampling, metrics and export all use this object, so that they can't disagree.

    net:     the denoiser, or what calls it; it tells the shape of a sample.
    levels:  the noise levels at which the evaluations start. One step is the list [2.5]; more aren't there yet.
    """

    def __init__(self, net: Any, levels: Sequence[float] = (INIT_SIGMA,)):
        assert len(levels) == 1
        self.net, self.levels = net, list(levels)

    def latents(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Standard normal noise for n samples, [n, C, H, W], from torch's default generator."""
        net = self.net
        return torch.randn([n, net.img_channels, net.img_resolution, net.img_resolution], device=device)

    def sample(self, z: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """f(sigma z; sigma) of standard normal noise z, float32 [N, C, H, W]; the same shape."""
        (level,) = self.levels
        sigma = torch.full([z.shape[0], 1, 1, 1], level, dtype=torch.float32, device=z.device)
        return self.net(level * z, sigma, condition)


def start_levels(net: Any) -> list[float] | None:
    """The start levels that a network's metadata record; None for a denoiser that is no generator."""
    level = getattr(net, "metadata", {}).get("init_sigma")
    return None if level is None else [level]
