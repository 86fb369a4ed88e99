"""Trains a small classifier as the detector of a small data set: `python -m edm.metrics.train_detector --help`."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

import dnnlib

if TYPE_CHECKING:
    import torch

PEAK_LR = 3e-3
WARM_UP = 0.2  # share of the steps
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 1  # pixels
TEST_BATCH = 500
TURNS = 4  # quarter turns


@click.command(cls=dnnlib.LongCommand, context_settings={"show_default": True})
@click.option("--data", help="Training images, labelled or not: folder or zip", type=str, required=True)
@click.option(
    "--test",
    type=str,
    show_default=False,
    help="Test images: folder or zip  [default: a tenth of --data, drawn by --seed]",
)
@click.option("--dest", help="Detector to write (.safetensors)", type=str, required=True)
@click.option("--epochs", help="Passes over the training images", type=dnnlib.WholeRange(min=1), default=10)
@click.option("--batch", help="Images per step", type=dnnlib.WholeRange(min=2), default=128)
@click.option("--width", help="Channels at full resolution", type=dnnlib.WholeRange(4, 4096), default=32)
@click.option("--seed", help="Of weights, order and augmentation", type=dnnlib.WholeRange(min=0), default=0)
@click.option("--device", help="cuda, mps or cpu; by default the first that is there", type=str)
def main(
    data: str, test: str | None, dest: str, epochs: int, batch: int, width: int, seed: int, device: str | None
) -> None:
    """Trains a small classifier whose hidden layer gives the features for FID, IS, KID and precision/recall.

    Where --data has labels it learns those. Where it has none it learns to recognise how an image was transformed:
    turned by a multiple of 90 degrees, inverted, its colour channels exchanged. Such features rank networks by FID and
    KID, which is what following a training needs; the inception score then says nothing about classes.
    """
    if not dest.endswith(".safetensors"):
        raise dnnlib.UserError(f"--dest={dest} must end in .safetensors")
    if not Path(dest).parent.is_dir() or Path(dest).is_dir():
        raise dnnlib.UserError(f"--dest={dest} is a folder, or there is no folder {Path(dest).parent}: make it first")
    from torch_utils import distributed

    place = distributed.init(device)
    images, labels, classes = load_images(data)
    if test is None:
        held_out = split_by_seed(len(images), seed)
        tested = (images[held_out], None if labels is None else labels[held_out], classes)
        images, labels = images[~held_out], None if labels is None else labels[~held_out]
    else:
        tested = load_images(test, "--test")
    if labels is None or tested[1] is None:
        print(f"No labels: the detector learns to recognise {transformations(images)} transformations", flush=True)
        tested = transformed_evenly(tested[0])
        labels, classes = None, transformations(images)
    train_detector((images, labels, classes), tested, dest, epochs, batch, width, seed, place)


def load_images(path: str, option: str = "--data") -> "tuple[torch.Tensor, torch.Tensor | None, int]":
    """(uint8 images [N, C, H, W], int64 labels [N] or None, number of classes) of a data set, labelled or not."""
    import numpy as np
    import torch

    from training.dataset import FileTree, ImageFolderDataset, image_names, read_labels

    dataset = ImageFolderDataset(path=path, option=option)  # says so if there are no images
    tree = FileTree(path)
    if read_labels(tree, image_names(tree)) is not None:
        return load_labelled(path, option)
    return torch.from_numpy(np.stack([dataset[i][0] for i in range(len(dataset))])), None, 0


def load_labelled(path: str, option: str = "--data"):
    """(uint8 images [N, C, H, W], int64 labels [N], number of classes) of a labelled data set."""
    import numpy as np
    import torch

    from training.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(path=path, use_labels=True, option=option)
    images, labels = zip(*(dataset[i] for i in range(len(dataset))))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels).argmax(1)), dataset.label_dim


def split_by_seed(count: int, seed: int) -> "torch.Tensor":
    """bool [count]: which images are held out for testing, a tenth of them, at least one."""
    import torch

    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[order[: max(1, count // 10)]] = True
    return held_out


def transformations(images: "torch.Tensor") -> int:
    """How many transformations `transformed` knows for images [N, C, H, W]: 8, and 24 if they have 3 channels."""
    return TURNS * 2 * images.shape[1]


def transformed(images: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """Image i of uint8 [N, C, H, W], with H = W, transformed as labels[i], int64 [N] below `transformations`, says.

    A label is turns + 4 (inverted + 2 rolled): quarter turns, whether the values are inverted, and by how many places
    the colour channels are rolled.
    """
    result = images.clone()
    for label in labels.unique().tolist():
        turns, inverted, rolled = label % TURNS, label // TURNS % 2, label // (2 * TURNS)
        chosen = images[labels == label].rot90(turns, (2, 3)).roll(rolled, 1)
        result[labels == label] = 255 - chosen if inverted else chosen
    return result


def transformed_evenly(images: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor, int]":
    """(transformed images, their labels, number of classes): the transformations take turns."""
    import torch

    classes = transformations(images)
    labels = torch.arange(len(images)) % classes
    return transformed(images, labels), labels, classes


def train_detector(train, test, dest: str, epochs: int, batch: int, width: int, seed: int, device) -> float:
    """Trains on `train`, writes `dest`, returns the share of `test` that is classified right.

    train, test: (uint8 images [N, C, H, W], int64 labels [N], number of classes). If the labels of `train` are None, a
    label below the number of classes is drawn for each image and each epoch, and the image is `transformed` by it.
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
            if labels is None:
                wanted = torch.randint(classes, [batch])
                pictures = _shift(transformed(images[index], wanted))  # a mirror image may be another one turned
            else:
                wanted, pictures = labels[index], _augment(images[index])
            _, logits = net(pictures.to(device))
            loss = F.cross_entropy(logits, wanted.to(device), label_smoothing=LABEL_SMOOTHING)
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

    return _shift(torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images))


def _shift(images):
    """Shifts images [N, C, H, W] by up to MAX_SHIFT pixels, with an empty (0) border."""
    import torch
    from torch.nn import functional as F

    count, _, size, _ = images.shape
    images = F.pad(images, [MAX_SHIFT] * 4)
    offsets = torch.randint(2 * MAX_SHIFT + 1, (2, count, 1)) + torch.arange(size)  # [2, N, size]
    rows, columns = offsets[0][:, :, None], offsets[1][:, None, :]
    return images[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
