"""The teacher's own samples, which stand in for the data that a distillation doesn't have."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dnnlib import UserError
from dnnlib.download import cache_folder
from dnnlib.files import write_atomically
from dnnlib.progress import ProgressBar
from edm.latents import decoder_of, image_shape
from edm.sampler import check_finite, sample
from torch_utils import distributed
from training.denoiser import DenoiserModule

NUM_IMAGES = 256
STEPS = 10  # of Heun's sampler
BATCH = 64
KEPT_BYTES = 1 << 28  # larger ones aren't kept in the cache folder
CHECKED, MAX_CHANGE = 2, 0.05  # samples made again before kept ones are used; their difference, in standard deviations
FILES_VERSION = 1  # to be raised when the same teacher's samples change

Samples = tuple[torch.Tensor, torch.Tensor]


def teacher_samples(teacher: DenoiserModule, identity: list[Any] | None = None) -> Samples:
    """NUM_IMAGES samples of a teacher: float32 [N, C, H, W] as it makes them and uint8 images, on the CPU.

    Every process must call it; each makes a share, and all get the same samples. They take long, so those of a known
    `identity` (what the samples depend on, `Inputs.identity`) are kept in the cache folder. They come from there if the
    teacher makes the first of them again.
    Errors: NonFiniteImagesError, on all processes.
    """
    file = None if identity is None else _file(identity)
    with distributed.shared_errors():
        kept = _read(file, teacher) if file is not None and distributed.rank() == 0 else None
    found = distributed.from_process_0(kept)
    if found is not None:
        return found
    samples = _make(teacher)
    if file is not None and distributed.rank() == 0 and sum(part.nbytes for part in samples) <= KEPT_BYTES:
        _write(file, samples)
    return samples


def _make(teacher: DenoiserModule) -> Samples:
    made, decoder = {}, decoder_of(teacher)
    parts = [range(NUM_IMAGES)[start : start + BATCH] for start in range(0, NUM_IMAGES, BATCH)]
    share = parts[distributed.rank() :: distributed.world_size()]
    bar = ProgressBar(sum(map(len, share)), desc="samples of the teacher", hidden=distributed.rank() != 0)
    with distributed.shared_errors(), torch.no_grad(), bar:
        for seeds in share:
            part = sample(teacher, seeds, sampler="heun", num_steps=STEPS)
            check_finite(part, seeds)
            made[seeds.start] = part.to("cpu", torch.float32), decoder.to_images(part).cpu()
            bar.update(len(part))
    every = {start: both for found in distributed.from_every_process(made) for start, both in found.items()}
    latents, images = zip(*(every[part.start] for part in parts))
    return torch.cat(latents), torch.cat(images)


def _file(identity: list[Any]) -> Path:
    key = hashlib.sha256(json.dumps([FILES_VERSION, STEPS, BATCH, identity]).encode()).hexdigest()
    return cache_folder() / "teacher-samples" / f"{key[:32]}.safetensors"


def _read(file: Path, teacher: DenoiserModule) -> Samples | None:
    """The samples in a file; None if there are none, or others than the teacher makes."""
    try:
        parts = safetensors.torch.load(file.read_bytes())
        made, images = parts["made"], parts["images"]
    except (OSError, ValueError, KeyError, safetensors.SafetensorError):
        return None  # not made yet, or damaged
    channels, resolution = image_shape(teacher)
    expected = (
        (torch.float32, (NUM_IMAGES, teacher.img_channels, teacher.img_resolution, teacher.img_resolution)),
        (torch.uint8, (NUM_IMAGES, channels, resolution, resolution)),
    )
    fits = tuple((part.dtype, tuple(part.shape)) for part in (made, images)) == expected
    return (made, images) if fits and bool(made.isfinite().all()) and _makes(teacher, made[:CHECKED]) else None


def _makes(teacher: DenoiserModule, expected: torch.Tensor) -> bool:
    """Whether these are the teacher's first samples: code that isn't part of its identity may have changed.

    expected: [N, C, H, W]. Roundoff differs between devices, so that they needn't be equal.
    """
    with torch.no_grad():
        again = sample(teacher, range(len(expected)), sampler="heun", num_steps=STEPS).to("cpu", torch.float32)
    return bool((again - expected).square().mean() <= MAX_CHANGE**2 * expected.var())


def _write(file: Path, samples: Samples) -> None:
    with contextlib.suppress(OSError, UserError):  # they are made again, then
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(file) as stream:
            stream.write(safetensors.torch.save(dict(zip(("made", "images"), (part.contiguous() for part in samples)))))
