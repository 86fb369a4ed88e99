"""Networks of latents: the VAE that a network's metadata name, and the images that it makes of latents.

The record of a VAE, metadata["vae"], is plain values:

source         its folder, or its name on the Hugging Face Hub
sha256         of its weights (`edm.network_files.weights_hash`); empty where it isn't known, as in EDM2's snapshots
channels       of a latent
scale, shift   latents of the network are (raw - shift) scale; one number, or one for each channel
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, user_path
from torch_utils import persistence
from training.decoder import LatentDecoder, PixelDecoder

from . import diffusers_folder, network_files

FOLDER = "vae"  # of a VAE, in a pipeline, and next to a network's file
MAX_CHANNELS = 1024


def decoder_of(net: Any) -> PixelDecoder | LatentDecoder:
    """What turns a network's samples into images. Errors: UserError when its VAE isn't available, or isn't its own."""
    return decoder_by(getattr(net, "metadata", {}), net) or PixelDecoder()


def decoder_by(metadata: dict[str, Any], net: Any) -> LatentDecoder | None:
    """The decoder of a network's latents by its metadata; None if it makes images. Errors: as `decoder_of`."""
    record = metadata.get("vae")
    if record is None:
        return None
    checked_record(record, "the network")
    check_channels(net, metadata)
    return _decoder(json.dumps(record, sort_keys=True))


def image_shape(net: Any) -> tuple[int, int]:
    """(channels, resolution) of a network's images, decoded if it makes latents."""
    decoder = decoder_of(net)
    if isinstance(decoder, PixelDecoder):
        return net.img_channels, net.img_resolution
    return images_of(decoder.vae), net.img_resolution * reduction(decoder.vae)


def reduction(vae: Any) -> int:
    """How many pixels wide a pixel of a latent is."""
    return 2 ** (len(widths_of(vae.config)) - 1)


def widths_of(config: Any) -> Any:
    """How many channels each resolution of a VAE has, by its configuration; None if that doesn't say."""
    return config.get("block_out_channels") or config.get("encoder_block_out_channels")


def images_of(vae: Any) -> int:
    """The channels of the images that a VAE makes."""
    return vae.config.get("out_channels", vae.config.in_channels)


def checked_record(record: Any, name: Any) -> dict[str, Any]:
    """`record`, if it is one of a VAE. name: of what holds it, in messages. Errors: UserError when it isn't."""
    sound = type(record) is dict and all(type(record.get(key)) is str for key in ("source", "sha256"))
    channels = record.get("channels") if sound else 0
    sound = sound and type(channels) is int and 0 < channels <= MAX_CHANNELS
    for key in ("scale", "shift"):
        values = record.get(key) if sound else None
        values = values if type(values) is list else [values]
        sound = sound and len(values) in (1, channels)
        sound = sound and all(isinstance(v, int | float) and math.isfinite(v) and (v or key == "shift") for v in values)
    if not sound:
        raise UserError(f"{name}: what it says about its VAE is damaged")
    return record


def record_of(source: str | Path) -> dict[str, Any]:
    """The record of a VAE, with the scale and shift that its own configuration gives. Errors: as `load_vae`."""
    return recorded(*load_vae(source))


def recorded(vae: Any, sha256: str, folder: Path) -> dict[str, Any]:
    """The record of a VAE that `load_vae` gave. Errors: UserError when its configuration has no sound scale."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    factor = vae.config.get("scaling_factor", 1.0)
    try:
        scale = [factor / value for value in std] if std else factor
        shift = list(mean) if mean else vae.config.get("shift_factor") or 0.0
    except (TypeError, ArithmeticError):
        scale = shift = None
    record = {"source": str(folder), "sha256": sha256, "scale": scale, "shift": shift}
    return checked_record({**record, "channels": vae.config.latent_channels}, folder)


def check_channels(net: Any, metadata: dict[str, Any]) -> None:
    """Errors: UserError when the VAE in the metadata makes latents of other channels than the network."""
    record = metadata.get("vae")
    if record is not None and record["channels"] != net.img_channels:
        raise UserError(
            f"its VAE, {record['source']}, makes latents of {record['channels']} channels, but the network has"
            f" {net.img_channels}; give the VAE that it was trained with"
        )


def load_vae(source: str | Path, why: str = "the VAE") -> tuple[Any, str, Path]:
    """(VAE, hash of its weights, folder) of a folder of the diffusers library or a name on the Hub.

    source: the VAE's own folder, or that of a pipeline with one. why: as `diffusers_folder.fetch_part`.
    Errors: UserError when it isn't available, or isn't of one of `VAES`.
    """
    path = user_path(str(source))
    if not path.exists() and diffusers_folder.is_hub_name(source):
        path = diffusers_folder.fetch_part(str(source), FOLDER, tuple(VAES), why)
    path = vae_folder(path)
    config = diffusers_folder.check_class(path / network_files.CONFIG_FILE, tuple(VAES))
    state = diffusers_folder.weights(path)
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    vae = persistence.construct(VAES[config["_class_name"]], (), arguments, state, path)
    network_files.checked(vae, path)
    if vae.config.in_channels not in (1, 3) or images_of(vae) != vae.config.in_channels:
        raise UserError(f"{path}: a VAE of {vae.config.in_channels} channels, not of gray or colour images")
    return vae.eval().requires_grad_(False), network_files.weights_hash(vae), path.resolve()


def vae_folder(path: Path) -> Path:
    """The folder of the VAE in a pipeline's folder, or `path`, if that is a VAE's own."""
    return path / FOLDER if (path / FOLDER / network_files.CONFIG_FILE).is_file() else path


class AutoencoderKL:
    """The library's class of this name, as `persistence.construct` calls one."""

    @classmethod
    def import_library(cls) -> None:
        getattr(diffusers_folder.library(), cls.__name__)

    def __new__(cls, **config: Any) -> Any:
        return getattr(diffusers_folder.library(), cls.__name__).from_config(config)


class AutoencoderDC(AutoencoderKL):
    """Likewise. Its latents have no variance."""


VAES = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderDC)}


@functools.lru_cache(maxsize=2)
def _decoder(text: str) -> LatentDecoder:
    """The decoder of a record as JSON."""
    record = json.loads(text)
    advice = f"put the folder of that VAE as {FOLDER}/ next to the network's file"
    try:
        vae, sha256, _ = load_vae(record["source"], "the VAE that the network's file names")
    except UserError as error:
        raise UserError(f"the VAE of these latents isn't available ({error.message}); {advice}") from None
    if record["sha256"] not in ("", sha256):
        raise UserError(f"{record['source']}: isn't the VAE that the network was trained with; {advice}")
    return LatentDecoder(vae, record["scale"], record["shift"])


def found_nearby(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """A network's metadata in which the VAE is the one next to its file, where there is one."""
    nearby = (path if path.is_dir() else path.parent) / FOLDER
    if "vae" not in metadata or not (nearby / network_files.CONFIG_FILE).is_file():
        return metadata
    return {**metadata, "vae": {**checked_record(metadata["vae"], path), "source": str(nearby.resolve())}}


def check_same_vae(net: Any, record: dict[str, Any] | None, data: str) -> None:
    """Errors: UserError naming --data when its latents aren't those that the network makes."""
    own = getattr(net, "metadata", {}).get("vae")
    if (own is None) != (record is None):
        kinds = ("images", "latents") if own is None else ("latents", "images")
        advice = "give images" if own is None else "encode them by edm.dataset_tool --vae"
        raise UserError(f"--data={data}: the teacher makes {kinds[0]}, but these are {kinds[1]}; {advice}")
    if own is None or record is None:
        return
    for key in ("sha256", "scale", "shift"):
        ours, theirs = (torch.tensor(r[key]) if key != "sha256" else r[key] for r in (own, record))
        if key == "sha256":
            same = ours == theirs or "" in (ours, theirs)
        else:
            same = ours.shape == theirs.shape and torch.allclose(ours, theirs)
        if not same:
            raise UserError(f"--data={data}: its latents have another VAE, scale or shift than the teacher's")
