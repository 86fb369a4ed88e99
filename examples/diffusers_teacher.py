"""Trains a small teacher by the diffusers library's own classes, as its tutorial does, to be distilled afterwards.

    pip install '.[diffusers]' scikit-learn
    python -m edm.small_teachers --only=digits --outdir=small --kimg=1    # small/digits/data.zip
    python examples/diffusers_teacher.py --data=small/digits/data.zip --classes --prediction=flow --out=TEACHER
    python sid_train.py --recipe=auto --edm_model=TEACHER --outdir=RUN --nosubdir

TEACHER is a folder of the library: a model with its scheduler's configuration, and the VAE if it learnt latents
(--vae). Nothing here but the reading of images comes from this project.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

from training.dataset import ImageFolderDataset

BATCH, WARMUP, LEARNING_RATE = 64, 100, 1e-3
LATENT_CHANNELS, KL_WEIGHT = 4, 1e-3
SCHEDULERS = {
    "epsilon": lambda: DDPMScheduler(),
    "v_prediction": lambda: DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
}


def unet(size: int, channels: int, classes: int, width: int) -> UNet2DModel:
    """A U-Net of two levels for 8x8 images, of three for larger ones, with attention at the lower ones."""
    levels = 2 if size < 16 else 3
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(width, *[2 * width] * (levels - 1)),
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["AttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=classes or None,
    )


def dit(size: int, channels: int, classes: int, width: int) -> DiTTransformer2DModel:
    """A transformer of six layers on patches of 2x2 pixels. It always has classes, and one that stands for none."""
    return DiTTransformer2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        patch_size=2,
        num_layers=6,
        num_attention_heads=width // 8,
        attention_head_dim=32,
        norm_num_groups=1,  # of no use to it, but it must divide the channels
        num_embeds_ada_norm=classes,
    )


def vae(size: int, channels: int) -> AutoencoderKL:
    """A VAE whose latents are half as wide as the images."""
    return AutoencoderKL(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def noised(scheduler, prediction: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy images, times, what the network should answer) of images x [N, C, H, W]."""
    noise = torch.randn_like(x)
    if prediction == "flow":
        t = torch.randn(len(x)).sigmoid()  # the logit-normal of Stable Diffusion 3
        share = t.reshape(-1, 1, 1, 1)
        return (1 - share) * x + share * noise, 1000 * t, noise - x
    t = torch.randint(0, scheduler.config.num_train_timesteps, [len(x)])
    x_t = scheduler.add_noise(x, noise, t)
    return x_t, t, noise if prediction == "epsilon" else scheduler.get_velocity(x, noise, t)


def train(net: torch.nn.Module, loss: Callable[[], torch.Tensor], kimg: float) -> None:
    """Takes steps along the gradients of `loss`, and leaves the average of the weights in the network."""
    steps = max(1, round(kimg * 1000 / BATCH))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    rates = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    average = EMAModel(net.parameters(), decay=0.999, use_ema_warmup=True, power=3 / 4)
    name, size = type(net).__name__, sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{name}: {size:.2f} million parameters, {steps} steps of {BATCH}", flush=True)
    start, total = time.time(), 0.0
    for step in range(1, steps + 1):
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(net.parameters())
        total += value.item()
        if step % 200 == 0 or step == steps:
            print(f"step {step}, loss {total / ((step - 1) % 200 + 1):.4f}, {time.time() - start:.0f} s", flush=True)
            total = 0.0
    average.copy_to(net.parameters())
    net.eval()


def trained_vae(images: torch.Tensor, kimg: float) -> AutoencoderKL:
    """A VAE of images, uint8 [N, C, H, W], with the scale that brings its latents to standard deviation 1."""
    net = vae(images.shape[-1], images.shape[1])

    def loss() -> torch.Tensor:
        x = images[torch.randint(len(images), [BATCH])].float() / 127.5 - 1
        latents = net.encode(x).latent_dist
        error = net.decode(latents.sample()).sample - x
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * latents.kl().mean() / x[0].numel()

    train(net, loss, kimg)
    mean, std = encoded(net, images[torch.randperm(len(images))[:1000]])
    net.register_to_config(scaling_factor=1 / (mean.var() + std.square().mean()).sqrt().item())
    return net


@torch.no_grad()
def encoded(net: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation) of the latents of images."""
    parts = [net.encode(part.float() / 127.5 - 1).latent_dist for part in images.split(500)]
    return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])


def read_vae(folder: Path, images: torch.Tensor, parser: argparse.ArgumentParser) -> AutoencoderKL:
    """The VAE in a folder, if it takes images of this shape."""
    name = AutoencoderKL.load_config(folder).get("_class_name")
    if name != "AutoencoderKL":
        parser.error(f"--vae={folder}: a {name}, not an AutoencoderKL; name another folder, or a new one to train one")
    net = AutoencoderKL.from_pretrained(folder)
    channels = images.shape[1]
    if net.config.in_channels != channels:
        parser.error(
            f"--vae={folder}: takes images of {net.config.in_channels} channels, and those of --data have {channels};"
            " name a new folder to train one on them"
        )
    return net


def check_width(images: torch.Tensor, reduction: int, parser: argparse.ArgumentParser) -> None:
    """Whether the networks can halve what they see. reduction: how many pixels wide a pixel of it is."""
    size = images.shape[-1]
    multiple = reduction * (2 if size < 16 * reduction else 4)
    if size % multiple:
        parser.error(
            f"--data: its images are {size} pixels wide, which is no multiple of {multiple}; use edm.dataset_tool"
            " --resolution"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="zip or folder of images")
    parser.add_argument("--architecture", choices=["unet", "dit"], default="unet", help="UNet2DModel or a DiT")
    parser.add_argument("--prediction", choices=SCHEDULERS, default="epsilon")
    parser.add_argument("--classes", action="store_true", help="learn the classes of the images; a DiT needs it")
    parser.add_argument("--vae", help="learn the latents of the VAE in this folder, which is trained if there is none")
    parser.add_argument("--vae-kimg", type=float, default=60, help="thousands of images to train the VAE on")
    parser.add_argument("--out", required=True, help="new folder for the teacher")
    parser.add_argument("--kimg", type=float, default=200, help="thousands of images to train on")
    parser.add_argument("--width", type=int, default=32, help="of the U-Net's first level; a DiT is four times as wide")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.architecture == "dit" and not arguments.classes:
        parser.error("--architecture=dit needs --classes")
    if Path(arguments.out).exists() and any(Path(arguments.out).iterdir()):
        parser.error(f"--out={arguments.out} exists already; remove it or choose another name")
    torch.manual_seed(arguments.seed)

    dataset = ImageFolderDataset(arguments.data, use_labels=arguments.classes)
    images = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(len(dataset))])  # uint8 [N, C, H, W]
    labels = torch.stack([torch.from_numpy(dataset.get_label(i)) for i in range(len(dataset))])  # one-hot
    shape = tuple(images.shape[1:])
    if not arguments.vae:
        check_width(images, 1, parser)
    else:
        folder = Path(arguments.vae)
        if not (folder / "config.json").exists():
            check_width(images, 2, parser)
            trained_vae(images, arguments.vae_kimg).save_pretrained(folder)
        decoder = read_vae(folder, images, parser)
        check_width(images, 2 ** (len(decoder.config.block_out_channels) - 1), parser)
        decoder.save_pretrained(Path(arguments.out, "vae"))
        mean, std = (decoder.config.scaling_factor * part for part in encoded(decoder, images))
        shape = tuple(mean.shape[1:])

    build = dit if arguments.architecture == "dit" else unet
    net = build(shape[-1], shape[0], dataset.label_dim, arguments.width)
    scheduler = SCHEDULERS[arguments.prediction]()

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(images), [BATCH])
        if arguments.vae:
            x = mean[chosen] + std[chosen] * torch.randn(BATCH, *shape)
        else:
            x = images[chosen].float() / 127.5 - 1
        x_t, t, target = noised(scheduler, arguments.prediction, x)
        classes = {"class_labels": labels[chosen].argmax(dim=1)} if dataset.label_dim else {}
        return (net(x_t, t, **classes).sample - target).square().mean()

    train(net, loss, arguments.kimg)
    net.save_pretrained(arguments.out)
    scheduler.save_pretrained(Path(arguments.out))


if __name__ == "__main__":
    main()
