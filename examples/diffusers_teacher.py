"""Trains a small teacher by the diffusers library's own classes, as its tutorial does, to be distilled afterwards.

    pip install '.[diffusers]' scikit-learn
    python -m edm.small_teachers --only=digits --outdir=small --kimg=1    # small/digits/data.zip
    python examples/diffusers_teacher.py --data=small/digits/data.zip --classes --prediction=flow --out=TEACHER
    python sid_train.py --recipe=auto --edm_model=TEACHER --outdir=RUN --nosubdir

TEACHER is a folder of the library: a model with its scheduler's configuration. Nothing here but the reading of images
comes from this project.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

from training.dataset import ImageFolderDataset

BATCH, WARMUP, LEARNING_RATE = 64, 100, 1e-3
SCHEDULERS = {
    "epsilon": lambda: DDPMScheduler(),
    "v_prediction": lambda: DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
}


def build(size: int, channels: int, classes: int, width: int) -> UNet2DModel:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="zip or folder of images")
    parser.add_argument("--prediction", choices=SCHEDULERS, default="epsilon")
    parser.add_argument("--classes", action="store_true", help="learn the classes of the images")
    parser.add_argument("--out", required=True, help="new folder for the teacher")
    parser.add_argument("--kimg", type=float, default=200, help="thousands of images to train on")
    parser.add_argument("--width", type=int, default=32, help="channels of the first level")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    dataset = ImageFolderDataset(arguments.data, use_labels=arguments.classes)
    images = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(len(dataset))])  # uint8 [N, C, H, W]
    labels = torch.stack([torch.from_numpy(dataset.get_label(i)) for i in range(len(dataset))])  # one-hot
    net = build(dataset.resolution, dataset.num_channels, dataset.label_dim, arguments.width)
    scheduler = SCHEDULERS[arguments.prediction]()
    steps = max(1, round(arguments.kimg * 1000 / BATCH))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    rates = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    average = EMAModel(net.parameters(), decay=0.999, use_ema_warmup=True, power=3 / 4)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} million parameters, {steps} steps of {BATCH}")

    start, total = time.time(), 0.0
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), [BATCH])
        x = images[chosen].float() / 127.5 - 1
        x_t, t, target = noised(scheduler, arguments.prediction, x)
        classes = {"class_labels": labels[chosen].argmax(dim=1)} if dataset.label_dim else {}
        loss = (net(x_t, t, **classes).sample - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(net.parameters())
        total += loss.item()
        if step % 200 == 0 or step == steps:
            print(f"step {step}, loss {total / ((step - 1) % 200 + 1):.4f}, {time.time() - start:.0f} s", flush=True)
            total = 0.0
    average.copy_to(net.parameters())
    net.save_pretrained(arguments.out)
    scheduler.save_pretrained(Path(arguments.out))


if __name__ == "__main__":
    main()
