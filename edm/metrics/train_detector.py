"""Trains a small classifier as the detector of a small data set: `python -m edm.metrics.train_detector --help`."""

import sys
import time
from pathlib import Path

import click

import dnnlib

PEAK_LR = 3e-3
WARM_UP = 0.2  # share of the steps
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 1  # pixels
TEST_BATCH = 500


@click.command(cls=dnnlib.LongCommand, context_settings={"show_default": True})
@click.option("--data", help="Labelled training images: folder or zip", type=str, required=True)
@click.option("--test", help="Labelled test images: folder or zip", type=str, required=True)
@click.option("--dest", help="Detector to write (.safetensors)", type=str, required=True)
@click.option("--epochs", help="Passes over the training images", type=dnnlib.WholeRange(min=1), default=10)
@click.option("--batch", help="Images per step", type=dnnlib.WholeRange(min=2), default=128)
@click.option("--width", help="Channels at full resolution", type=dnnlib.WholeRange(4, 4096), default=32)
@click.option("--seed", help="Of weights, order and augmentation", type=dnnlib.WholeRange(min=0), default=0)
@click.option("--device", help="cuda, mps or cpu; by default the first that is there", type=str)
def main(data: str, test: str, dest: str, epochs: int, batch: int, width: int, seed: int, device: str | None) -> None:
    """Trains a small classifier whose hidden layer gives the features for FID, IS, KID and precision/recall."""
    if not dest.endswith(".safetensors"):
        raise dnnlib.UserError(f"--dest={dest} must end in .safetensors")
    if not Path(dest).parent.is_dir() or Path(dest).is_dir():
        raise dnnlib.UserError(f"--dest={dest} is a folder, or there is no folder {Path(dest).parent}: make it first")
    from torch_utils import distributed

    place = distributed.init(device)
    train_detector(load_labelled(data), load_labelled(test, "--test"), dest, epochs, batch, width, seed, place)


def load_labelled(path: str, option: str = "--data"):
    """(uint8 images [N, C, H, W], int64 labels [N], number of classes) of a labelled data set."""
    import numpy as np
    import torch

    from training.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(path=path, use_labels=True, option=option)
    images, labels = zip(*(dataset[i] for i in range(len(dataset))))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels).argmax(1)), dataset.label_dim


def train_detector(train, test, dest: str, epochs: int, batch: int, width: int, seed: int, device) -> float:
    """Trains on `train`, writes `dest`, returns the share of `test` that is classified right.

    train, test: (uint8 images [N, C, H, W], int64 labels [N], number of classes).
    Errors: UserError when both don't fit together or there are fewer images than `batch`.
    """
    import torch
    from torch.nn import functional as F

    from torch_utils import misc

    from .detector import save_detector
    from .small_classifier import SmallClassifier

    images, labels, classes = train
    if test[0].shape[1:] != images.shape[1:] or test[2] > classes:
        raise dnnlib.UserError("--test must have the image size, channels and classes of --data")
    if len(images) < batch:
        raise dnnlib.UserError(f"--batch={batch} is more than the {len(images)} images of --data")
    torch.manual_seed(seed)
    init_kwargs = {
        "img_resolution": images.shape[2],
        "img_channels": images.shape[1],
        "num_classes": classes,
        "width": width,
    }
    net = SmallClassifier(**init_kwargs).to(device)
    misc.to_channels_last(net)
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * steps, pct_start=WARM_UP)
    start = time.time()
    for epoch in range(epochs):
        net.train()
        for index in torch.randperm(len(images))[: steps * batch].split(batch):
            _, logits = net(_augment(images[index]).to(device))
            loss = F.cross_entropy(logits, labels[index].to(device), label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        accuracy = measure_accuracy(net, test[0], test[1], device)
        took = dnnlib.format_time(time.time() - start)
        print(
            f"epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}  test accuracy {accuracy:.2%}  time {took}", flush=True
        )
    command = " ".join(["python -m edm.metrics.train_detector", *map(dnnlib.without_password, sys.argv[1:])])
    save_detector(net, dest, init_kwargs, test_accuracy=accuracy, epochs=epochs, command=command)
    return accuracy


def measure_accuracy(net, images, labels, device) -> float:
    """The share of images that `net`, in eval mode from here on, classifies right."""
    import torch

    net.eval()
    with torch.inference_mode():
        predicted = torch.cat([net(part.to(device))[1].argmax(1).cpu() for part in images.split(TEST_BATCH)])
    return (predicted == labels).float().mean().item()


def _augment(images):
    """Mirrors half of the images [N, C, H, W] and shifts all by up to MAX_SHIFT pixels, with an empty (0) border."""
    import torch
    from torch.nn import functional as F

    count, _, size, _ = images.shape
    images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)
    images = F.pad(images, [MAX_SHIFT] * 4)
    offsets = torch.randint(2 * MAX_SHIFT + 1, (2, count, 1)) + torch.arange(size)  # [2, N, size]
    rows, columns = offsets[0][:, :, None], offsets[1][:, None, :]
    return images[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
