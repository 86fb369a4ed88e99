"""How images differ to a teacher's own eyes: statistics of the activations inside its network."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from edm.metrics.frechet import frechet_distance

MAX_FEATURES = 128  # a random projection keeps so many; the covariance of 256 images knows no more
LEAST_DEVIATION = 0.01  # of a feature over the median one's: what hardly varies would count without limit
SPLITS = 8  # of the teacher's samples into halves, whose distance is the yardstick
ROUNDING = 1e-6  # of a feature over its mean: what varies less doesn't vary


class BlockFeatures:
    """Means and standard deviations over an image of what some blocks of a denoiser put out.

    At every resolution, or number of tokens, it is the block in the middle of the network's order of calls; a block is
    a module made of others. No architecture is assumed, but a network must call its parts as modules.

    net: the denoiser. call: calls it on a few images. Errors: LookupError when it has no such blocks.
    """

    def __init__(self, net: torch.nn.Module, call: Callable[[], Any]):
        with _recording(net, {n for n, m in net.named_modules() if n and any(m.children())}) as found:
            call()
            calls = [(name, _positions(output)) for name, output in found.items()]
        sizes = dict.fromkeys(size for _, size in calls)
        by_size = [[name for name, other in calls if other == size] for size in sizes]
        self.names = {names[len(names) // 2] for names in by_size}
        if not self.names:
            raise LookupError("no block of the network puts out a map or tokens")

    def read(self, net: torch.nn.Module, call: Callable[[], Any]) -> torch.Tensor:
        """Features of the images on which `call` calls the network, float32 [N, D] on the CPU."""
        with _recording(net, self.names) as found:
            call()
        parts = []
        for name in sorted(found):
            output = found[name].detach().to(torch.float32)
            maps = output.flatten(2) if output.ndim == 4 else output.transpose(1, 2)
            parts += [maps.mean(2), maps.std(2, correction=0)]
        return torch.cat(parts, 1).cpu()


class FeatureDistance:
    """Fréchet distance of features from those of a teacher's samples, over the distance of two sets of such samples.

    It is about 1 for other samples of the teacher, however few there are, and larger for everything else. The yardstick
    is the distance of halves of the samples, which is inversely proportional to their number.

    samples: features of the teacher's samples, float32 [N, D]. Errors: LookupError when none of them varies.
    """

    def __init__(self, samples: torch.Tensor):
        deviations = samples.std(0)
        if bool((deviations <= ROUNDING * samples.abs().mean(0)).all()):
            raise LookupError("no feature differs from sample to sample")
        self._scale = deviations.clamp(min=LEAST_DEVIATION * deviations.median().item() + 1e-12)
        generator = torch.Generator().manual_seed(0)
        size = samples.shape[1]
        # A projection, or a mere rotation of few features, which changes no distance.
        self._mix = torch.linalg.qr(torch.randn(size, min(size, MAX_FEATURES), generator=generator))[0]
        reduced, middle = self._reduce(samples), len(samples) // 2
        self._moments = _moments(reduced)
        orders = [torch.randperm(len(samples), generator=generator).numpy() for _ in range(SPLITS)]
        halves = [(reduced[order[:middle]], reduced[order[middle:]]) for order in orders]
        apart = [frechet_distance(*_moments(one), *_moments(other)) for one, other in halves]
        self._yardstick = sum(apart) / len(apart) / 2

    def __call__(self, features: torch.Tensor) -> float:
        """The distance of as many images as there are samples, by their features, float32 [N, D]."""
        return frechet_distance(*_moments(self._reduce(features)), *self._moments) / self._yardstick

    def _reduce(self, features: torch.Tensor) -> np.ndarray:
        return (features / self._scale @ self._mix).to(torch.float64).numpy()


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def _positions(output: torch.Tensor) -> int:
    """Pixels of a map [N, C, H, W], or tokens of [N, T, C]."""
    return output.shape[1] if output.ndim == 3 else output.shape[2] * output.shape[3]


@contextlib.contextmanager
def _recording(net: torch.nn.Module, names: set[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Records the last output of each named module that is a map or tokens, in the order of calls."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, tuple):
            output = output[0]
        if torch.is_tensor(output) and output.ndim in (3, 4) and output.is_floating_point():
            found.pop(name, None)
            found[name] = output

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: keep(name, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in net.named_modules() if name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
