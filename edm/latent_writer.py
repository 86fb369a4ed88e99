"""Writes a data set of latents, `training.latent_dataset`: what a VAE makes of images."""

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dnnlib import UserError, write_atomically
from dnnlib.progress import ProgressBar
from training.decoder import DECODED_AT_ONCE, LatentDecoder
from training.latent_dataset import RECORD, SUFFIX

from .latents import load_vae, recorded, reduction

STD = 0.5  # of standardised latents: EDM's sigma_data
SCALES = ("data", "vae", "edm2")
# Of ImageNet's latents by stabilityai/sd-vae-ft-mse, over which EDM2 standardises (arXiv:2312.02696).
EDM2_MEAN, EDM2_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
HEADER_BYTES = 1 << 16  # reserved at the beginning of the file, since the scale is only known at its end


def write_latents(
    images: Iterator[Image.Image],
    count: int,
    labels: Sequence[int] | None,
    vae_source: str,
    dest: Path,
    scaled_by: str = "data",
    device: torch.device | str = "cpu",
) -> tuple[int, int, float]:
    """Encodes images, all square and of one size, and gives (channels, resolution, scale of the first channel).

    scaled_by: one of SCALES: how networks are to see the latents. "data" brings each channel to mean 0 and standard
    deviation STD, as `edm.train` expects its data; "vae" is the scale of the VAE's configuration; "edm2" that of EDM2's
    published networks.
    Errors: UserError when the VAE doesn't fit the images, or the file can't be written.
    """
    vae, sha256, folder = load_vae(vae_source)
    record = recorded(vae, sha256, folder)
    if scaled_by == "edm2":
        if vae.config.latent_channels != len(EDM2_MEAN):
            raise UserError(
                f"--vae-scale=edm2: is for the {len(EDM2_MEAN)} channels of stabilityai/sd-vae-ft-mse, and"
                f" {vae_source} makes {vae.config.latent_channels}; leave it out"
            )
        record |= _standardised(EDM2_MEAN, EDM2_STD)
    decoder = LatentDecoder(vae.to(device), 1.0)
    mode = "L" if vae.config.in_channels == 1 else "RGB"
    channels = vae.config.latent_channels
    total, squares, shape = torch.zeros(channels).double(), torch.zeros(channels).double(), None
    try:
        with write_atomically(dest) as file:
            file.seek(HEADER_BYTES)
            for batch in _batches(images, count):
                latents = decoder.encode(_pixels(batch, mode, reduction(vae)).to(device)).cpu()
                if not latents.isfinite().all():
                    raise UserError(f"--vae={vae_source}: its latents of some images are NaN or infinite")
                mean, std = latents.double().unbind(dim=1)
                total += mean.sum(dim=[0, 2, 3])
                squares += (mean**2 + std**2).sum(dim=[0, 2, 3])
                shape = list(latents.shape[1:])  # [2, C, h, h]
                file.write(np.ascontiguousarray(latents.numpy(), "<f4").tobytes())
            assert shape is not None
            pixels = count * shape[2] * shape[3]
            mean, std = total / pixels, (squares / pixels - (total / pixels) ** 2).sqrt()
            if scaled_by == "data":
                record |= _standardised(mean.tolist(), std.tolist())
            if labels is not None:
                file.write(np.asarray(labels, "<i8").tobytes())
            file.seek(0)
            file.write(_header([count, *shape], labels is not None, record))
    except OSError as error:
        raise UserError(f"--dest={dest} can't be written: {error.strerror or error}") from None
    scale = record["scale"]
    return shape[1], shape[2], scale[0] if isinstance(scale, list) else scale


def _standardised(mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """The entries of a VAE's record that bring channels of these means and deviations to mean 0 and deviation STD."""
    return {"shift": list(mean), "scale": [STD / max(value, 1e-6) for value in std]}


def check_dest(dest: Path) -> None:
    """Errors: UserError unless `dest` may become a data set of latents."""
    if dest.suffix != SUFFIX:
        raise UserError(f"--dest={dest}: latents are one file; give it a name that ends in {SUFFIX}")


def _batches(images: Iterator[Image.Image], count: int) -> Iterator[list[Image.Image]]:
    batch = []
    with ProgressBar(count) as bar:
        for image in images:
            batch.append(image)
            if len(batch) == DECODED_AT_ONCE:
                yield batch
                bar.update(len(batch))
                batch = []
    if batch:
        yield batch


def _pixels(images: list[Image.Image], mode: str, factor: int) -> torch.Tensor:
    """uint8 [N, C, H, W]. Errors: UserError when the VAE can't take the size."""
    width = images[0].width
    if width % factor:
        raise UserError(f"--vae: makes latents of {factor} pixels each, but the images are {width} wide; --resolution")
    pixels = np.stack([np.asarray(image.convert(mode)) for image in images])
    return torch.from_numpy(pixels[:, None] if mode == "L" else pixels.transpose(0, 3, 1, 2).copy())


def _header(shape: list[int], with_labels: bool, record: dict[str, Any]) -> bytes:
    """The beginning of a .safetensors file, HEADER_BYTES long."""
    end = 4 * int(np.prod(shape, dtype=np.int64))
    header: dict[str, Any] = {"__metadata__": {RECORD: json.dumps(record)}}
    header["latents"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    if with_labels:
        header["labels"] = {"dtype": "I64", "shape": shape[:1], "data_offsets": [end, end + 8 * shape[0]]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", HEADER_BYTES - 8) + text.ljust(HEADER_BYTES - 8)
