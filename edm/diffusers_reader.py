"""Reads folders in the layout of the diffusers library as denoisers: a pipeline, or a model with its scheduler.

A folder holds either a pipeline (model_index.json, the model in unet/ or transformer/, scheduler/) or a model alone
(config.json) with scheduler_config.json, scheduler/ or ../scheduler/. Weights are read from safetensors only, and
no code that a folder may hold is run.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib import UserError
from torch_utils import persistence
from torch_utils.untrusted import edm_pickle
from training.parameterisations import WrappedDenoiser

from . import latents, network_files, text_encoders
from .diffusers_folder import SCHEDULER_FILE, check_class, licence, read_config, shapes_only, weights
from .diffusers_models import LATENT_SIGMA_DATA, MODELS, DiffusersDenoiser
from .network_files import CONFIG_FILE, INDEX_FILE
from .text_families import MODEL_FOLDERS, family_of_model
from .text_models import TextDenoiser

VAES = (latents.FOLDER, "vqvae", "movq")  # what pipelines call the folder of a VAE
PIPELINE_ONLY = "pipeline_only"  # in the metadata of a model that only its pipeline calls rightly


def is_folder(path: str | Path) -> bool:
    """Whether a folder is in the library's layout, and not one that this project wrote for itself."""
    if (Path(path) / INDEX_FILE).is_file():
        return True
    try:
        config = read_config(Path(path) / CONFIG_FILE)
    except UserError:
        return False
    is_model = config.get("_class_name") in {**MODELS, **MODEL_FOLDERS}
    return "_sha256" not in config and ("_diffusers_version" in config or is_model)


def read(path: Path) -> tuple[WrappedDenoiser, dict[str, Any]]:
    """(denoiser, metadata) of a folder. Errors: UserError when it is damaged or not supported."""
    with _named(path):
        folder, scheduler, vae_folder = _parts(path)
        model, metadata = _model(folder, path)
        is_text = _is_text(model)
        settings = _settings(path, model, scheduler, vae_folder)
        state = {f"net.{name}": tensor for name, tensor in weights(folder).items()}
        if is_text:
            metadata["text"] = text_encoders.record_of(path)
        if vae_folder is not None:
            metadata["vae"] = latents.record_of(vae_folder)
        net = persistence.construct(TextDenoiser if is_text else DiffusersDenoiser, (), settings, state, path)
        _check_vae(net, vae_folder)
        latents.check_channels(net, metadata)
        return network_files.checked(net, path), metadata


def shapes(path: Path) -> WrappedDenoiser:
    """The denoiser of a folder without its weights, which needn't be there: on the device meta, for estimates.

    Errors: UserError as `read`.
    """
    with _named(path):
        folder, scheduler, vae_folder = _parts(path)
        model, _ = _model(folder, path)
        cls = TextDenoiser if _is_text(model) else DiffusersDenoiser
        settings = _settings(path, model, scheduler, vae_folder)
        with shapes_only():
            try:
                net = cls(**settings).eval()
            except UserError:
                raise
            except Exception as error:  # whatever the library raises on a configuration
                raise UserError(f"can't be built by its configuration: {persistence.one_line(error)}") from None
        _check_vae(net, vae_folder)
        if vae_folder is not None:
            config = check_class(vae_folder / CONFIG_FILE, tuple(latents.VAES))
            record = {"source": str(vae_folder), "channels": config.get("latent_channels", net.img_channels)}
            latents.check_channels(net, {"vae": record})
        return net


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the folder's name before a UserError raised while open, unless it begins with a place in the folder."""
    try:
        yield
    except UserError as error:
        if error.message.startswith((f"{path}: ", f"{path}{os.sep}")):
            raise
        raise UserError(f"{path}: {error.message}") from None


def _model(folder: Path, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the configuration of a model, its metadata) in its own folder. path: of the pipeline, if it is in one.

    Errors: UserError when they are damaged, or the model is called rightly by its pipeline alone.
    """
    config = read_config(folder / CONFIG_FILE)
    recorded = config.pop("_metadata", {}) or {"kind": "teacher", **licence(path)}
    metadata = network_files.checked_metadata(recorded, path)
    if metadata.get(PIPELINE_ONLY):
        raise UserError("is for the library's own pipeline; load the snapshot that it was made of")
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}, metadata


def _check_vae(net: WrappedDenoiser, vae_folder: Path | None) -> None:
    """Errors: UserError when a network makes latents and has no VAE."""
    if vae_folder is None and net.img_channels not in (1, 3):
        raise UserError(
            f"its {net.img_channels} channels are latents, but there is no VAE: put the folder of the one that it was"
            f" trained with as {latents.FOLDER}/ next to its own"
        )


def _makes_images(folder: Path, vae: Path) -> bool:
    """Whether a model makes images by itself, and a VAE's folder that lies near its own is another model's."""
    channels = read_config(folder / CONFIG_FILE).get("in_channels")
    return channels in (1, 3) and channels != read_config(vae / CONFIG_FILE).get("latent_channels")


def _is_text(model: dict[str, Any]) -> bool:
    """Whether a model is text-to-image, by its configuration. Errors: UserError when it isn't a supported one."""
    is_text = model.get("_class_name") in MODEL_FOLDERS
    if not is_text and model.get("_class_name") not in MODELS:
        DiffusersDenoiser(model, {})
    return is_text


def _settings(path: Path, model: dict[str, Any], scheduler: Path, vae_folder: Path | None) -> dict[str, Any]:
    """The arguments of a folder's denoiser. Errors: UserError when they hold more than plain values."""
    settings: dict[str, Any] = {"model": model, "scheduler": read_config(scheduler)}
    if not edm_pickle.is_plain(settings):
        raise UserError("its configuration holds more than plain values")
    if _is_text(model):
        if not (path / INDEX_FILE).is_file():
            raise UserError("its model takes text: name the folder of the whole pipeline, with text_encoder/")
        settings |= {"length": text_encoders.tokens_of(path), **_sizes(model, path)}
    if vae_folder is not None:
        settings["sigma_data"] = LATENT_SIGMA_DATA
    return settings


def _sizes(model: dict[str, Any], path: Path) -> dict[str, int]:
    """Sizes that a text-to-image model's own configuration doesn't give: of its latents and of its images."""
    vae = read_config(path / latents.FOLDER / CONFIG_FILE)
    blocks = latents.widths_of(vae)
    reduction = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and len(blocks) < 10 else 8
    family = family_of_model(model)
    if family is not None and family.sample_size is not None:
        return {"sample_size": family.sample_size, "image_size": family.sample_size * reduction}
    size = model.get("sample_size")
    return {"image_size": size * reduction} if type(size) is int else {}


def _parts(path: Path) -> tuple[Path, Path, Path | None]:
    """(folder of the model, file of its scheduler's configuration, folder of its VAE if it has one)."""
    folder, named, vaes = path, [], [path / latents.FOLDER, path.resolve().parent / latents.FOLDER]
    if (path / INDEX_FILE).is_file():
        index = read_config(path / INDEX_FILE)
        parts = {name for name, value in index.items() if isinstance(value, list) and all(value)}
        if "text_encoder" in parts:
            text_encoders.supported_parts(path, with_weights=False)
        named = [path / name for name in VAES if name in parts]
        vaes = named
        found = [name for name in ("unet", "transformer") if name in parts]
        if len(found) != 1:
            raise UserError(f"{INDEX_FILE} names neither a unet nor a transformer, or names both")
        folder = path / found[0] if (path / found[0] / CONFIG_FILE).is_file() else path
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"{INDEX_FILE} names a {found[0]}, but there is no {found[0]}/{CONFIG_FILE}")
    vae = next((vae for vae in vaes if (vae / CONFIG_FILE).is_file()), None)
    if vae is not None and vae not in named and vae.parent != path and _makes_images(folder, vae):
        vae = None
    if named and vae is None:
        raise UserError(f"{INDEX_FILE} names a VAE, but there is no {named[0].name}/{CONFIG_FILE}")
    places = [folder, folder / "scheduler", path / "scheduler", folder.resolve().parent / "scheduler"]
    for place in places:
        if (place / SCHEDULER_FILE).is_file():
            return folder, place / SCHEDULER_FILE, vae
    raise UserError(
        f"has no {SCHEDULER_FILE}, which says how noise was added in training: put the file of the scheduler"
        " that the model was trained with next to config.json"
    )
