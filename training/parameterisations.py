"""Denoisers around the networks of other Gaussian diffusion models, by a change of variables.

Such a network sees a scaled image x_s = a x0 + b n at a time t. In the variables of a denoiser, sigma = b / a and
x = x_s / a = x0 + sigma n.

    process                               a                      b
    variance preserving (DDPM)            1 / sqrt(1 + sigma^2)  sigma / sqrt(1 + sigma^2)
    flow (rectified flow, interpolants)   1 / (1 + sigma)        sigma / (1 + sigma)

    prediction   what the network answers             the clean image
    epsilon      n                                    (x_s - b answer) / a
    v            a n - b x0 (variance preserving)     a x_s - b answer
    flow         n - x0 (flow)                        x_s - b answer
    x0           x0                                   answer
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from .denoiser import SIGMA_DATA

PREDICTIONS = ("epsilon", "v", "flow", "x0")
MAX_BETA = 0.999  # of the cosine schedule (arXiv:2102.09672)


class DiscreteTimes(torch.nn.Module):
    """Times 0 ... T-1 of a variance-preserving process, one noise level each (DDPM).

    sigmas: the levels [T], rising; the last may be infinite (zero terminal signal-to-noise ratio). A denoiser's x is
            infinite there too, so `sigma_max` is the highest finite level; only `WrappedDenoiser.scaled` reaches it.
    nearest: whether only the times of the levels themselves are used, as whole numbers. Otherwise times between two
             levels are interpolated linearly in ln sigma.
    """

    is_flow = is_reversed = False

    def __init__(self, sigmas: torch.Tensor, nearest: bool = False):
        super().__init__()
        if sigmas.ndim != 1 or len(sigmas) < 3 or not sigmas[0] > 0 or not (sigmas.diff() > 0).all():
            raise ValueError("noise levels must be positive, rise from time to time and be three or more")
        levels = sigmas[sigmas.isfinite()].to(torch.float64)
        self.levels: torch.Tensor
        self.register_buffer("levels", levels, persistent=False)  # [T], or T - 1 without the infinite one
        slopes = levels.log().diff().reciprocal()
        lines = torch.stack([torch.arange(len(slopes)) - levels[:-1].log() * slopes, slopes], dim=1)
        self.lines: torch.Tensor
        self.register_buffer("lines", lines, persistent=False)  # [T - 1, 2]: t = lines[i] @ [1, ln sigma] above level i
        self.last, self.nearest = len(sigmas) - 1, nearest
        self.sigma_min, self.sigma_max = levels[0].item(), levels[-1].item()

    def scales(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b, in the shape of sigma; 0 and 1 where sigma is infinite."""
        return self.signal(sigma), (1 + sigma**-2).rsqrt()

    def signal(self, sigma: torch.Tensor) -> torch.Tensor:
        """a, in the shape of sigma."""
        return (1 + sigma**2).rsqrt()

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The times of noise levels [N]: float, or int64 with `nearest`; [N]."""
        known, inner = sigma.to(self.levels.dtype).contiguous(), self.levels[1:-1]
        number = self.levels.shape[0]
        if torch.compiler.is_compiling():  # ONNX has no search
            below = (known[:, None] >= inner).sum(dim=1)
        else:
            below = torch.searchsorted(inner, known, right=True)
        offset, slope = self.lines.index_select(0, below).unbind(dim=1)
        t = torch.addcmul(offset, slope, known.log()).clamp(0, number - 1)
        if self.last == number:  # the level of the last time is infinite
            t = torch.where(sigma.isinf(), self.last, t)
        return t.round().to(torch.int64) if self.nearest else t.to(sigma.dtype)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise levels of times, in the shape of t; the inverse of `time`."""
        levels = self.levels.to(t.dtype)
        below = t.floor().to(torch.int64).clamp(0, len(levels) - 2)
        finite = levels[below] * (levels[below + 1] / levels[below]) ** (t - below)
        return torch.where(t > len(levels) - 1, math.inf, finite)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """The levels that the network is called at: of the nearest times, or `sigma` itself if times aren't rounded."""
        sigma = torch.as_tensor(sigma)
        if not self.nearest:
            return sigma
        asked = sigma.to(self.levels)
        return self.levels[self.time(asked.flatten())].reshape(asked.shape).to(sigma)


class FlowTimes(torch.nn.Module):
    """The continuous time t = b of a flow, for which a + b = 1.

    scale:       what the network is called with at t = 1 (1000 in the diffusers library, 1 in SiT).
    is_reversed: the network's time is 0 for noise and `scale` for images, and its velocity is x0 - n (SiT).
    t_min, t_max: the times between which the network was trained. At t = 1 sigma and a denoiser's x are infinite; only
                  `WrappedDenoiser.scaled` reaches it.
    A time shift changes which times a sampler visits, not what the network answers at one of them.
    """

    is_flow = True

    def __init__(self, scale: float = 1000.0, is_reversed: bool = False, t_min: float = 0.001, t_max: float = 0.999):
        super().__init__()
        if not 0 < t_min < t_max < 1:
            raise ValueError("the times of a flow go from above 0 to below 1")
        self.scale, self.is_reversed = scale, is_reversed
        self.sigma_min, self.sigma_max = t_min / (1 - t_min), t_max / (1 - t_max)

    def scales(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b, in the shape of sigma; 0 and 1 where sigma is infinite."""
        return self.signal(sigma), self._noise(sigma)

    def signal(self, sigma: torch.Tensor) -> torch.Tensor:
        """a, in the shape of sigma."""
        return (1 + sigma).reciprocal()

    def _noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return (1 + sigma.reciprocal()).reciprocal()

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The network's times of noise levels, in the same shape."""
        return self.scale * (self.signal(sigma) if self.is_reversed else self._noise(sigma))

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise levels of the network's times, in the same shape; the inverse of `time`."""
        t = t / self.scale
        return (1 - t) / t if self.is_reversed else t / (1 - t)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(sigma)


class WrappedDenoiser(torch.nn.Module):
    """The denoiser (`training.denoiser`) of a network that sees scaled images and times.

    net:        called as net(x_s [N, C, H, W], t [N]), or with classes as net(x_s, t, condition). Channels of its
                answer beyond C, such as a learned variance, are ignored.
    prediction: one of PREDICTIONS.
    times:      the noise levels that it was trained at, `DiscreteTimes` or `FlowTimes`.
    sigma_data: standard deviation of the images, for the weight of the fake score's loss.
    """

    def __init__(
        self,
        net: Callable[..., torch.Tensor],
        prediction: str,
        times: DiscreteTimes | FlowTimes,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        sigma_data: float = SIGMA_DATA,
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is one of {', '.join(PREDICTIONS)}, not {prediction!r}")
        if (prediction == "flow" and not times.is_flow) or (prediction == "v" and times.is_flow):
            raise ValueError(f"a network that predicts {prediction!r} isn't trained at {type(times).__name__}")
        self.net, self.prediction, self.times = net, prediction, times
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data = sigma_data
        self.sigma_min, self.sigma_max = times.sigma_min, times.sigma_max

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.times.round_sigma(sigma)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        sigma = torch.as_tensor(sigma).to(x).reshape(-1, 1, 1, 1)
        a = self.times.signal(sigma)
        x_s = a * x
        answer = self._answer(x_s, sigma, class_labels)
        if self.prediction == "epsilon":
            return torch.addcmul(x, sigma, answer, value=-1)
        return self._clean(x_s, answer, a, sigma * a)

    def scaled(self, x_s: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """The clean image [N, C, H, W] of scaled images a x0 + b n of the same shape.

        sigma: [N, 1, 1, 1]; it may be infinite (x_s is noise alone), except for a prediction of the noise, which says
        nothing about the image there.
        """
        a, b = self.times.scales(sigma)
        answer = self._answer(x_s, sigma, class_labels)
        return (x_s - b * answer) / a if self.prediction == "epsilon" else self._clean(x_s, answer, a, b)

    def _answer(self, x_s: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """What the network predicts, [N, C, H, W] in the dtype of x_s."""
        t = self.times.time(sigma.flatten()).expand(x_s.shape[0])
        answer = self.answer(x_s, t, class_labels)
        return (answer if answer.shape == x_s.shape else answer[:, : self.img_channels]).to(x_s.dtype)

    def _clean(self, x_s: torch.Tensor, answer: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The clean image by an answer that isn't the noise."""
        if self.prediction == "x0":
            return answer
        if self.prediction == "v":
            return a * x_s - b * answer
        return torch.addcmul(x_s, b, answer, value=1 if self.times.is_reversed else -1)

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """The weight with which the clean image's squared error is that of what the network predicts; as sigma."""
        if self.prediction == "x0":
            return torch.ones_like(sigma)
        _, b = self.times.scales(sigma)
        return sigma**-2 if self.prediction == "epsilon" else b**-2

    def answer(self, x_s: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """What the network answers. Overridden for networks that are called in another way."""
        net: Any = self.net
        return net(x_s, t) if not self.label_dim else net(x_s, t, class_labels)


def ddpm_sigmas(
    schedule: str = "linear",
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_snr: bool = False,
) -> torch.Tensor:
    """The noise levels of DDPM's times, float64 [steps], rising.

    schedule: linear (DDPM), scaled_linear (latent diffusion), squaredcos_cap_v2 (iDDPM's cosine) or sigmoid, as the
              diffusers library names them.
    zero_snr: rescaled to zero terminal signal-to-noise ratio (arXiv:2305.08891): the last level is infinite.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if schedule == "linear":
        betas = beta_start + ramp * (beta_end - beta_start)
    elif schedule == "scaled_linear":
        betas = (math.sqrt(beta_start) + ramp * (math.sqrt(beta_end) - math.sqrt(beta_start))) ** 2
    elif schedule == "squaredcos_cap_v2":
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        squares = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - squares[1:] / squares[:-1]).clamp(max=MAX_BETA)
    elif schedule == "sigmoid":
        betas = (12 * ramp - 6).sigmoid() * (beta_end - beta_start) + beta_start
    else:
        raise ValueError(f"the schedule is linear, scaled_linear, squaredcos_cap_v2 or sigmoid, not {schedule!r}")
    signal = (1 - betas).cumprod(dim=0).sqrt()  # a of each time
    if zero_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return (1 - signal**2).sqrt() / signal
