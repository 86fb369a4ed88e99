"""The networks of the recipes, built with random weights, and their settings. torch is imported only to build."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sid import recipes

if TYPE_CHECKING:
    from training.denoiser import DenoiserModule

PUBLISHED_GPUS = 4  # of the published results; the benchmark does the share of one
WEIGHT_NOISE = 0.01
# Options that a step of SiD depends on; the second group has other names in DistillationConfig.
OPTIONS = (
    "batch",
    "batch_gpu",
    "alpha",
    "lr",
    "glr",
    "g_beta1",
    "ls",
    "lsg",
    "dropout",
    "augment",
    "tmax",
    "init_sigma",
)
RENAMED = {"fp16": "use_fp16", "ema_rampup": "ema_rampup_ratio"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """network: arguments of EDMPrecond. config: settings of the distillation; its `batch` is for all GPUs together."""

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


def _config(name: str) -> dict[str, Any]:
    """The recipe's settings of the step, without the demo's deviations from SiD's own step."""
    recipe = recipes.RECIPES[name]
    config = {option: recipe[option] for option in OPTIONS if option in recipe}
    config |= {field: recipe[option] for option, field in RENAMED.items() if option in recipe}
    if "ema" in recipe:
        config["ema_halflife_kimg"] = 1000.0 * recipe["ema"]
    return config


_ADM = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"}
_SMALL = {"img_channels": 1, "model_type": "SongUNet"}

RECIPES = {
    "cifar10-uncond": Recipe(_ddpmpp(32, [2, 2, 2]), _config("cifar10-uncond")),
    "cifar10-cond": Recipe(_ddpmpp(32, [2, 2, 2], label_dim=10), _config("cifar10-cond")),
    "imagenet64-cond": Recipe(
        {**_ADM, "model_channels": 192, "channel_mult": [1, 2, 3, 4]}, _config("imagenet64-cond")
    ),
    "ffhq64": Recipe(_ddpmpp(64, [1, 2, 2, 2]), _config("ffhq64")),
    "afhq64-v2": Recipe(_ddpmpp(64, [1, 2, 2, 2]), _config("afhq64-v2")),
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
        _config("demo"),
        gpus=1,
        detector=recipes.DEMO / "detector.safetensors",
    ),
    # Too small to show anything except that the benchmark itself works.
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


def build_network(recipe: Recipe, seed: int = 0) -> "DenoiserModule":
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
    return cast("DenoiserModule", net)
