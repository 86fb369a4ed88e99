"""The result of a distillation: noise in, images out, one network evaluation, or one per step."""

import os
from collections.abc import Callable, Mapping

import torch

from dnnlib import UserError
from edm import zoo
from edm.sampler import generate_all
from training.steps import Steps


class OneStepGenerator:
    """A distilled generator; `generator(n, seed)` makes n images. The noise levels at which
    its steps start are stored with the weights.

        generator = OneStepGenerator.from_pretrained("network-snapshot-000035.safetensors")
        images = generator(16, seed=0)    # uint8 [16, C, H, W]
    """

    def __init__(self, net: torch.nn.Module):
        if Steps.of(net) is None:
            what = "is a diffusion model (use python -m edm.generate) or a renamed generator (give init_sigma=2.5)"
            raise UserError(f"this network records no init_sigma: it {what}")
        self.net = net

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        device: torch.device | str | None = None,
        init_sigma: float | None = None,
        classes: Mapping[str, Callable] | None = None,
    ) -> "OneStepGenerator":
        """Loads a generator.

        source: short name, path or URL of a generator (`edm.zoo.load_network`); published SiD files included.
        device: None takes a GPU if there is one.
        init_sigma: only for a file that doesn't record it.
        classes: of your own, that the file may name, {name: class} (`edm.zoo.load_network`).
        Errors: UserError when it can't be loaded or is no one-step generator.
        """
        net = zoo.load_denoiser(source, classes)
        if init_sigma is not None:
            net.metadata |= Steps((init_sigma,)).record()
        return cls(net).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def to(self, device: torch.device | str) -> "OneStepGenerator":
        self.net.to(device)
        return self

    def __call__(self, n: int, seed: int = 0, class_idx: int | None = None, batch: int = 64) -> torch.Tensor:
        """uint8 [n, C, H, W] on the CPU. Image i depends on the seed `seed + i` alone, not on n, batch or device.

        class_idx: the class of all images; None draws one per image. Errors: UserError when there's no such class.
        """
        return generate_all(self.net, range(seed, seed + n), batch=batch, class_idx=class_idx)
