"""The networks and settings of run_sid.sh's recipes, to be built with random weights. Names load no torch."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PUBLISHED_GPUS = 4  # of the published results: a benchmark's process does the share of one
DEMO = Path(__file__).resolve().parents[2] / "assets" / "fashion-mnist-16"  # the folder of the embedded teacher
WEIGHT_NOISE = 0.01


@dataclasses.dataclass(frozen=True)
class Recipe:
    """network: arguments of EDMPrecond. config: settings of the distillation, `batch` being that of all GPUs."""

    network: dict[str, Any]
    config: dict[str, Any]
    gpus: int = PUBLISHED_GPUS
    detector: Path | None = None

    @property
    def batch(self) -> int:
        """Images per step of one process."""
        return self.config["batch"] // self.gpus


def _ddpmpp(resolution: int, mult: list[int], label_dim: int = 0) -> dict[str, Any]:
    shape = {"img_resolution": resolution, "img_channels": 3, "label_dim": label_dim}
    return {**shape, "model_type": "SongUNet", "model_channels": 128, "channel_mult": mult, "augment_dim": 9}


_CIFAR10 = {"batch": 256, "batch_gpu": 16, "use_fp16": False, "dropout": 0.13, "augment": 0.12}
_ADM = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"}
_SMALL = {"img_channels": 1, "model_type": "SongUNet"}
_64 = {"batch": 512, "batch_gpu": 32, "use_fp16": True, "dropout": 0.05, "augment": 0.15}

RECIPES = {
    "cifar10-uncond": Recipe(_ddpmpp(32, [2, 2, 2]), _CIFAR10),
    "cifar10-cond": Recipe(_ddpmpp(32, [2, 2, 2], label_dim=10), _CIFAR10),
    "imagenet64-cond": Recipe(
        {**_ADM, "model_channels": 192, "channel_mult": [1, 2, 3, 4]},
        {
            "batch": 8192,
            "batch_gpu": 16,
            "lr": 4e-6,
            "glr": 4e-6,
            "use_fp16": True,
            "dropout": 0.10,
            "augment": 0.0,
            "ema_halflife_kimg": 2000.0,
        },
    ),
    "ffhq64": Recipe(_ddpmpp(64, [1, 2, 2, 2]), {**_64, "g_beta1": 0.9}),
    "afhq64-v2": Recipe(_ddpmpp(64, [1, 2, 2, 2]), {**_64, "alpha": 1.0, "lr": 5e-6, "glr": 5e-6}),
    "demo": Recipe(
        {
            **_SMALL,
            "img_resolution": 16,
            "label_dim": 10,
            "label_dropout": 0.1,
            "model_channels": 16,
            "channel_mult": [1, 2, 4],
            "num_blocks": 2,
            "attn_resolutions": [8],
            "dropout": 0.0,
        },
        # With gradients through the score networks, which run_sid.sh leaves out: the modes measure SiD's own step.
        {"batch": 32, "batch_gpu": 16, "lr": 4e-4, "glr": 4e-4, "ema_rampup_ratio": 0.5},
        gpus=1,
        detector=DEMO / "detector.safetensors",
    ),
    # Too small to tell anything but that the benchmark itself works.
    "micro": Recipe(
        {
            **_SMALL,
            "img_resolution": 8,
            "model_channels": 8,
            "channel_mult": [1],
            "num_blocks": 1,
            "attn_resolutions": [8],
        },
        {"batch": 4, "batch_gpu": 2},
        gpus=1,
    ),
}


def build_network(recipe: Recipe, seed: int = 0) -> "torch.nn.Module":
    """The recipe's network with random weights, on the CPU. Draws from torch's default generator after seeding it.

    Layers that start at (almost) zero get noise as well: products with zeros would time other arithmetic (tiny
    numbers are slow on a CPU) than a trained network's.
    """
    import torch

    from training.networks import EDMPrecond

    torch.manual_seed(seed)
    net = EDMPrecond(**recipe.network, use_fp16=recipe.config.get("use_fp16", False))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(WEIGHT_NOISE * torch.randn_like(parameter))
    return net
