"""Trains a small classifier as the detector of a small data set: `python -m edm.metrics.train_detector --help`."""

import math
import sys
import time
from typing import TYPE_CHECKING

import click

import dnnlib
from dnnlib.progress import ProgressBar

if TYPE_CHECKING:
    import torch

    from .pretext import Pretext

PEAK_LR = 3e-3
WARM_UP = 0.2  # share of the steps
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 1  # pixels
TEST_BATCH = 500
EPOCHS, LEAST_STEPS = 10, 500
BATCH, LEAST_BATCH = 128, 2  # one image alone can't be normalised


@click.command(cls=dnnlib.LongCommand, context_settings={"show_default": True})
@click.option("--data", help="Training images, labelled or not: folder or zip", type=str, required=True)
@click.option(
    "--test",
    type=str,
    show_default=False,
    help="Test images: folder or zip  [default: a tenth of --data, drawn by --seed]",
)
@click.option("--dest", help="Detector to write: new .safetensors", type=str, required=True)
@click.option(
    "--epochs",
    type=dnnlib.WholeRange(min=1),
    show_default=False,
    help=f"Passes over the training images  [default: {EPOCHS}, more if they make fewer than {LEAST_STEPS} steps]",
)
@click.option(
    "--batch",
    help=f"Images per step  [default: {BATCH}, or all if there are fewer]",
    type=dnnlib.WholeRange(min=LEAST_BATCH),
    show_default=False,
)
@click.option("--width", help="Channels at full resolution", type=dnnlib.WholeRange(4, 4096), default=32)
@click.option("--seed", help="Of weights, order and augmentation", type=dnnlib.WholeRange(min=0), default=0)
@click.option("--device", help="cuda, mps or cpu  [default: the first available]", type=str)
def main(
    data: str,
    test: str | None,
    dest: str,
    epochs: int | None,
    batch: int | None,
    width: int,
    seed: int,
    device: str | None,
) -> None:
    """Trains a small classifier whose hidden layer gives the features for FID, IS, KID and precision/recall.

    If --data has labels of several classes, the classifier learns to predict them. Otherwise it learns to tell which of
    a few clusters of similar images an image belongs to, how the image was rotated, and whether it was blurred, made
    noisy or assembled from parts of several images. Such features rank networks by FID and KID, which is what it takes
    to follow a training; the inception score then says nothing about classes.
    """
    if not dest.endswith(".safetensors"):
        raise dnnlib.UserError(f"--dest={dest} must end in .safetensors")
    dnnlib.check_new_file(dest, "--dest")
    from torch_utils import distributed

    from .pretext import Pretext

    place = distributed.init(device)
    images, labels, classes = load_images(data)
    if test is None:
        held_out = split_by_seed(len(images), seed)
        tested = (images[held_out], None if labels is None else labels[held_out], classes)
        images, labels = images[~held_out], None if labels is None else labels[~held_out]
    else:
        tested = load_images(test, "--test")
    test_images, test_labels, test_classes = tested
    batch = min(BATCH, max(LEAST_BATCH, len(images))) if batch is None else batch
    check_fit((images, labels if test_labels is not None else None, classes), tested, batch)
    pretext, one_class = None, labels is not None and len(labels.unique()) == 1
    if labels is None or test_labels is None or one_class:
        pretext = Pretext(images, seed)
        clusters, turns, damages = pretext.sizes
        print(
            f"{'All labels are equal' if one_class else 'No labels'}: the detector learns to recognise {clusters}"
            f" {'cluster' if clusters == 1 else 'clusters'} of similar images, {turns} rotations and {damages} kinds of"
            " damage",
            flush=True,
        )
        labels, test_labels, test_classes = pretext.clusters(images), pretext.clusters(test_images), clusters
    if epochs is None:
        epochs = max(EPOCHS, math.ceil(LEAST_STEPS / max(1, len(images) // batch)))
    test_set = (test_images, test_labels, test_classes)
    train_detector((images, labels, classes), test_set, dest, epochs, batch, width, seed, place, pretext)


def load_images(path: str, option: str = "--data") -> "tuple[torch.Tensor, torch.Tensor | None, int]":
    """(uint8 images [N, C, H, W], int64 labels [N] or None, number of classes) of a data set, labelled or not."""
    import numpy as np
    import torch

    from training.dataset import FileTree, ImageFolderDataset, image_names, read_labels

    dataset = ImageFolderDataset(path=path, option=option)  # refuses a data set without images
    tree = FileTree(path, option)
    if read_labels(tree, image_names(tree)) is not None:
        return load_labelled(path, option)
    return torch.from_numpy(np.stack([dataset[i][0] for i in range(len(dataset))])), None, 0


def load_labelled(path: str, option: str = "--data") -> "tuple[torch.Tensor, torch.Tensor, int]":
    """(uint8 images [N, C, H, W], int64 labels [N], number of classes) of a labelled data set."""
    import numpy as np
    import torch

    from training.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(path=path, use_labels=True, option=option)
    images, labels = zip(*(dataset[i] for i in range(len(dataset))))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels).argmax(1)), dataset.label_dim


def split_by_seed(count: int, seed: int) -> "torch.Tensor":
    """bool [count], true for the images held out for testing: a tenth of them, but at least one."""
    import torch

    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[order[: max(1, count // 10)]] = True
    return held_out


def check_fit(train: tuple, test: tuple, batch: int) -> None:
    """Errors: UserError when the test images don't fit the training images, or fewer than `batch` of the latter exist.

    train, test: (uint8 images [N, C, H, W], int64 labels [N] or None, number of classes).
    """
    images, labels, classes = train
    if test[0].shape[1:] != images.shape[1:] or (labels is not None and test[2] > classes):
        raise dnnlib.UserError("--test must have the image size, channels and classes of --data")
    if len(images) < LEAST_BATCH:
        raise dnnlib.UserError("--data holds too few images: a detector needs 3, of which one is held out for testing")
    if len(images) < batch:
        raise dnnlib.UserError(f"--batch={batch} is more than the {len(images)} images of --data; give at most those")


def train_detector(
    train: "tuple[torch.Tensor, torch.Tensor, int]",
    test: "tuple[torch.Tensor, torch.Tensor, int]",
    dest: str,
    epochs: int,
    batch: int,
    width: int,
    seed: int,
    device: "torch.device",
    pretext: "Pretext | None" = None,
) -> float:
    """Trains on `train`, writes `dest` and returns the share of correct answers about `test`.

    train, test: (uint8 images [N, C, H, W], int64 labels [N], number of classes).
    pretext: the questions about images without labels, whose clusters then stand in for labels. Without it the only
        question is the class, and half of the images are mirrored.
    """
    import torch
    from torch.nn import functional as F

    from torch_utils import devices

    from .detector import save_detector
    from .small_classifier import SmallClassifier

    images, labels, classes = train
    torch.manual_seed(seed)

    def ask(images, labels):  # pictures, and the answers [N, questions]
        return (_augment(images), labels[:, None]) if pretext is None else pretext.ask(_shift(images), labels)

    sizes = [classes] if pretext is None else pretext.sizes
    asked = (test[0], test[1][:, None]) if pretext is None else pretext.ask(*test[:2])
    init_kwargs = {
        "img_resolution": images.shape[2],
        "img_channels": images.shape[1],
        "num_classes": sum(sizes),
        "width": width,
    }
    net = SmallClassifier(**init_kwargs).to(device)
    devices.to_channels_last(net)
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    total = max(3, epochs * steps)  # the schedule divides by the length of its two parts
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=total, pct_start=max(WARM_UP, 2 / total)
    )
    start = time.time()
    with ProgressBar(epochs * steps, unit="batch", among_lines=True) as bar:
        for epoch in range(epochs):
            net.train()
            for index in torch.randperm(len(images))[: steps * batch].split(batch):
                pictures, answers = ask(images[index], labels[index])
                logits = net(pictures.to(device))[1].split(sizes, 1)
                losses = [
                    F.cross_entropy(own, answer, label_smoothing=LABEL_SMOOTHING)
                    for own, answer in zip(logits, answers.to(device).unbind(1))
                ]
                loss = torch.stack(losses).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            accuracy = measure_accuracy(net, *asked, sizes, device)
            took = dnnlib.format_time(time.time() - start)
            print(
                f"epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}  test accuracy {accuracy:.2%}  time {took}",
                flush=True,
            )
    command = " ".join(["python -m edm.metrics.train_detector", *map(dnnlib.without_password, sys.argv[1:])])
    save_detector(net, dest, init_kwargs, test_accuracy=accuracy, epochs=epochs, command=command)
    guess = guessed_share(ask(images, labels)[1], asked[1])
    if accuracy <= guess:
        print(
            f"Warning: always giving the most frequent answer would be right for {guess:.2%}: on the test images, the"
            " detector is no better, so its FIDs mean little; train for more --epochs, or on more images",
            flush=True,
        )
    return accuracy


def guessed_share(known: "torch.Tensor", answers: "torch.Tensor") -> float:
    """The share of `answers` that are right if each question gets the answer that is most frequent in `known`.

    Both are int64 [N, questions].
    """
    return (answers == known.mode(dim=0).values).float().mean().item()


def measure_accuracy(
    net: "torch.nn.Module", images: "torch.Tensor", answers: "torch.Tensor", sizes: list[int], device: "torch.device"
) -> float:
    """The share of `answers`, int64 [N, questions], that the network gets right; leaves it in eval mode.

    sizes: the number of logits that belong to each question.
    """
    import torch

    net.eval()
    with torch.inference_mode():
        logits = torch.cat([net(part.to(device))[1].cpu() for part in images.split(TEST_BATCH)])
    predicted = torch.stack([own.argmax(1) for own in logits.split(sizes, 1)], dim=1)
    return (predicted == answers).float().mean().item()


def _augment(images):
    """Mirrors half of the images [N, C, H, W] and shifts all of them as `_shift` does."""
    import torch

    return _shift(torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images))


def _shift(images):
    """Shifts images [N, C, H, W] by up to MAX_SHIFT pixels and fills the border with 0."""
    import torch
    from torch.nn import functional as F

    count, _, size, _ = images.shape
    images = F.pad(images, [MAX_SHIFT] * 4)
    offsets = torch.randint(2 * MAX_SHIFT + 1, (2, count, 1)) + torch.arange(size)  # [2, N, size]
    rows, columns = offsets[0][:, :, None], offsets[1][:, None, :]
    return images[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
