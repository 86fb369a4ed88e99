"""The generator: a network and its steps, from noise to samples."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from .denoiser import known_sigma, sigma_data
from .moments import Moments, start_of
from .steps import ONE_STEP, Steps

Noise = Callable[[torch.Tensor], torch.Tensor]


def spaced_levels(net: Any, init_sigma: float, steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Noise levels of `steps` steps, evenly spaced in time from that of `init_sigma` to 0 (arXiv:2505.12674).

    Time is the network's own where it has one (`training.parameterisations`: whole times of a diffusion, t of a flow),
    and otherwise sigma / (sigma + sigma_data), that of a flow of data with standard deviation 1.
    shift: s in u -> s u / (1 + (s - 1) u), where u falls from 1 to 0: above 1 the levels are higher.
    The levels are rounded to those that the network knows; the first is `init_sigma` itself.
    """
    shares = [1 - k / steps for k in range(1, steps)]
    shares = [shift * u / (1 + (shift - 1) * u) for u in shares]
    levels = [init_sigma]
    for share in shares:
        level = torch.tensor([_at_share(net, init_sigma, share)], dtype=torch.float64)
        levels.append(known_sigma(net, level).item())
    return tuple(levels)


def _at_share(net: Any, init_sigma: float, share: float) -> float:
    """The noise level at a share of the time of `init_sigma`."""
    times = getattr(net, "times", None)
    if times is None or times.is_flow:
        scale = sigma_data(net) if times is None else 1.0
        t = share * init_sigma / (init_sigma + scale)
        return scale * t / (1 - t)
    start = times.time(torch.tensor([init_sigma], dtype=torch.float64)).item()
    # The published code takes whole times; 1e-6 because a whole time may come out of the table slightly lower.
    return times.sigma(torch.tensor([math.floor(start * share + 1e-6)], dtype=torch.float64)).item()


class Generator:
    """A denoiser that makes samples from noise, one evaluation per step.

    Training, monitoring, sampling, metrics and export all use this object, so that they can't disagree.

    net: the denoiser, or what calls it; it tells the shape of a sample.
    moments: of the noise that it starts from; None: the network's own, which are plain noise for most.
    """

    def __init__(self, net: Any, steps: Steps = ONE_STEP, moments: Moments | None = None):
        self.net, self.steps = net, steps
        self.moments = moments or start_of(net)

    def latents(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Standard normal noise for n samples, [n, C, H, W], from torch's default generator."""
        net = self.net
        return torch.randn([n, net.img_channels, net.img_resolution, net.img_resolution], device=device)

    def sample(
        self,
        z: torch.Tensor,
        condition: torch.Tensor | None = None,
        randn_like: Noise = torch.randn_like,
        step: int | None = None,
    ) -> torch.Tensor:
        """The samples of standard normal noise z, float32 [N, C, H, W]; the same shape.

        One step is f(sigma z; sigma), or f of noise with the moments of noisy images.
        randn_like: draws the fresh noise of further steps.
        step: the one to stop after, from 0; None: the last. Only its own evaluation has a gradient.
        """
        levels = self.steps.levels[: None if step is None else step + 1]
        x, noise = levels[0] * z if self.moments is None else self.moments(z, levels[0]), z
        for level, following in itertools.pairwise(levels):
            with torch.no_grad():
                clean = self._evaluate(x, level, condition)
                if self.steps.noise == "fresh":
                    noise = randn_like(z)
                elif self.steps.noise == "ddim":
                    noise = (x - clean) / level
                x = clean + following * noise
        return self._evaluate(x, levels[-1], condition)

    def _evaluate(self, x: torch.Tensor, level: float, condition: torch.Tensor | None) -> torch.Tensor:
        sigma = torch.full([x.shape[0], 1, 1, 1], level, dtype=torch.float32, device=x.device)
        return self.net(x, sigma, condition)
