"""The noise that a generator starts from, with the mean and the covariance of noisy images.

Images with mean m and covariance C, with noise of level sigma, have the mean m and the covariance C + sigma^2 I. To
noise with these two moments a denoiser's answers are much more like images than to plain noise (docs/ablations.md).
"""

from collections.abc import Mapping
from typing import Any

import torch

from dnnlib import UserError
from torch_utils.precision import without_autocast

ATTRIBUTE = "start_moments"  # of a generator that starts from such noise; its name in a network's file
ROUNDING = 1e-9  # of the sum of all variances: smaller ones are rounding errors
LEAST = 0.1  # of the noise's variance; directions in which images vary less are left out
MAX_VALUES = 1 << 25  # of all directions together, 128 MiB in every snapshot; large images have fewer directions


class Moments(torch.nn.Module):
    """What is known of some images' distribution; as a module, it turns plain noise into a generator's start.

    mean: [C, H, W]. directions: orthonormal rows [K, C * H * W]. variances: of the images along them, [K]; they don't
    vary in other directions.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor

    def __init__(self, mean: torch.Tensor, directions: torch.Tensor, variances: torch.Tensor):
        super().__init__()
        for name, value in (("mean", mean), ("directions", directions), ("variances", variances)):
            self.register_buffer(name, value.float())

    @classmethod
    def of(cls, images: torch.Tensor) -> "Moments":
        """The moments of images, float [N, C, H, W] with N > 1: at most N - 1 directions, by falling variance."""
        centred = images.flatten(1).to(torch.float64, copy=True)
        mean = centred.mean(dim=0)
        centred -= mean  # in place, since large images take much memory
        values, vectors = torch.linalg.eigh(centred @ centred.T / (len(images) - 1))
        values, vectors = values.flip(0), vectors.flip(1)
        kept = values > ROUNDING * values.sum()
        directions = vectors[:, kept].T @ centred
        directions /= directions.norm(dim=1, keepdim=True)
        return cls(mean.reshape(images.shape[1:]), directions, values[kept])

    def for_noise(self, sigma: float) -> "Moments":
        """The same without the directions that noise of this level hides, and with `most_directions` at most.

        The directions that stay are those of the largest variances.
        """
        kept = min(int((self.variances > LEAST * sigma**2).sum()), most_directions(self.mean.numel()))
        return type(self)(self.mean, self.directions[:kept].clone(), self.variances[:kept].clone())  # frees the others

    def forward(self, z: torch.Tensor, sigma: float) -> torch.Tensor:
        """Noise with the moments of images of noise level sigma, float32 [N, C, H, W]. z: standard normal, likewise."""
        with without_autocast(z.device):
            widths = (self.variances + sigma**2).sqrt() - sigma
            along = z.flatten(1) @ self.directions.T
            return self.mean + sigma * z + ((widths * along) @ self.directions).view_as(z)


def most_directions(size: int) -> int:
    """How many directions a generator of images of so many values keeps at most."""
    return MAX_VALUES // size


def start_of(net: Any) -> Moments | None:
    """The moments of the noise that a generator starts from; None for plain noise."""
    return getattr(net, ATTRIBUTE, None)


def refuse(net: Any, where: str, who: str) -> None:
    """Errors: UserError when `net` is a generator that starts from such noise, for programs that can't make it.

    where: how the message begins, such as an option. who: the programs and their verb, "the library's pipelines know".
    """
    if start_of(net) is not None:
        raise UserError(
            f"{where}: {who} plain noise only, and this generator starts from noise with the moments of images: save it"
            " as .safetensors, or distil with --init-noise=white"
        )


def attach(net: torch.nn.Module, moments: Moments) -> None:
    """Makes `net` a generator that starts from such noise; they are a part of its weights from then on."""
    setattr(net, ATTRIBUTE, moments)


def split_off(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(a network's own weights, the tensors of its moments by their names in `Moments`) in a state dict."""
    prefix = ATTRIBUTE + "."
    own = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return own, {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def loaded(tensors: Mapping[str, torch.Tensor], net: Any) -> Moments:
    """The moments that a file holds, for a generator whose images are those of the denoiser `net`.

    tensors: by their names in `Moments`.
    Errors: ValueError when they aren't moments of such images.
    """
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    if tensors.keys() != {"mean", "directions", "variances"}:
        raise ValueError("moments are a mean, directions and variances")
    mean, directions, variances = (tensors[name] for name in ("mean", "directions", "variances"))
    size = mean.numel()
    fits = mean.shape == shape and variances.ndim == 1 and directions.shape == (len(variances), size)
    if not fits or not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError(f"moments of images {list(shape)} have other shapes and types")
    if not bool((variances >= 0).all()) or len(variances) > size:
        raise ValueError("variances of images are at least 0, and no more than they have values")
    return Moments(mean, directions, variances)
