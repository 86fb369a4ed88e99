"""Loads, saves and clones networks; finds them and other files by name, path or URL."""

import copy
import difflib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from dnnlib import UserError, user_path
from dnnlib.download import cache_path, is_url, local_path
from edm import (
    diffusers_folder,
    diffusers_models,
    diffusers_reader,
    latents,
    network_files,
    text_encoders,
    text_models,
    transformer_files,
)
from edm.published import FILES, NETWORK_KINDS, Published, find, names_of_kinds
from torch_utils import checkpoint, distributed, persistence
from torch_utils.untrusted import edm_pickle
from training import dit, moments, networks, networks_edm2
from training.conditions import learnt_classes
from training.denoiser import DenoiserModule, check_denoiser

Network = TypeVar("Network", bound=torch.nn.Module)

ATTACHED = ("metadata", "prompts")  # attributes that whoever loads a network sets, and that its file doesn't hold
NETWORK_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(networks.EDMPrecond, networks.VPPrecond, networks.VEPrecond, networks.iDDPMPrecond),
        *(networks.SongUNet, networks.DhariwalUNet, networks_edm2.Precond),
        *(diffusers_models.DiffusersDenoiser, text_models.TextDenoiser, dit.DiTDenoiser),
    )
}


def resolve(source: str | os.PathLike, kind: str = "network") -> Path:
    """The local file behind a published file's short name, a path or a URL; downloaded if need be.

    A run folder stands for its best snapshot, or for its newest one if nothing was measured.

    kind: 'network' (any teacher or generator), 'reference', 'images' or 'detector'.
    Errors: UserError when the file doesn't exist or can't be downloaded, or a local network has the short name, too.
    """
    kinds = NETWORK_KINDS if kind == "network" else (kind,)
    entry = find(str(source))
    if entry is not None:
        if entry.kind not in kinds:
            raise UserError(f"{source} is a published {entry.kind}, but a {kind} is needed here")
        _refuse_ambiguous(str(source), kind)
        return local_path(entry.url, entry.sha256)
    if is_url(source):
        return local_path(source, _sha256_of(str(source)))
    path = user_path(source)
    if kind == "network" and path.is_dir():
        return path if network_files.is_folder(path) else _snapshot(path)
    if path.is_file():
        return path
    known = names_of_kinds(kinds)
    near = difflib.get_close_matches(str(source), known, n=3) or known
    if kind == "network" and diffusers_folder.is_hub_name(source):
        return diffusers_folder.fetch(str(source))
    raise UserError(f"{source}: no such file, and no published {kind} has that name; published: {', '.join(near)}")


def _refuse_ambiguous(name: str, kind: str) -> None:
    """Errors: UserError when a local file or folder with networks has the short name of a published file."""
    path = user_path(name)
    folder = kind == "network" and (network_files.is_folder(path) or any(path.glob("network-snapshot-*")))
    if folder or path.is_file():
        raise UserError(f"{name} is a published {kind}, and also a file or folder here: for that write ./{name}")


def network_file(source: str) -> str:
    """`source`, or its best or newest snapshot if it is a run folder. Errors: UserError as `resolve`."""
    is_path = find(source) is None and not is_url(source) and user_path(source).is_dir()
    return str(_snapshot(user_path(source))) if is_path and not network_files.is_folder(source) else source


def _snapshot(folder: Path) -> Path:
    """The best or otherwise the newest snapshot in a run folder; prints which. Errors: UserError when it has none."""
    best, snapshots = folder / checkpoint.BEST_LINK, checkpoint.snapshots(folder)
    if best.is_file():
        chosen, which = folder / os.readlink(best) if best.is_symlink() else best, "best"
    elif snapshots:
        chosen, which = snapshots[0], "newest"
    else:
        raise UserError(f"{folder}: a folder with no network-snapshot-* in it; name a network's file or a run folder")
    if distributed.rank() == 0:
        print(f"{folder}: takes its {which} snapshot, {chosen.name}", file=sys.stderr, flush=True)
    return chosen


def is_here(source: str | os.PathLike) -> bool:
    """Whether loading a network downloads nothing, because its file is on this machine already."""
    entry = find(str(source))
    address = entry.url if entry is not None else str(source)
    return cache_path(address).is_file() if is_url(address) else user_path(source).exists()


def load_network(source: str | os.PathLike, classes: Mapping[str, Callable[..., Any]] | None = None) -> DenoiserModule:
    """A denoiser in eval mode, without gradients, float32, on the CPU. Runs nothing that the file contains.

    source:   short name, path or URL of a .pkl (EDM's format) or .safetensors file, of a DiT's or SiT's .pt file
              (`edm.transformer_files`), or a folder, from `save_network`
              or of the diffusers library; either may also be named as on the Hugging Face Hub, owner/name.
    classes:  further classes that the file may name, {name: class}; for one whose constructor arguments the file
              doesn't record (`save_network`), a function of no arguments that builds the network.
    returns:  the network; its `metadata` dict holds what the file or the list of published files says about it, for
              instance {'kind': 'sid-generator', 'init_sigma': 2.5}.
    Errors:   UserError when it isn't available, is damaged, or names an unknown class.
    """
    path = resolve(source)
    transformer = transformer_files.weights_of(path) if path.suffix in network_files.FOREIGN_SUFFIXES else None
    if transformer is not None:
        loaded, metadata = transformer_files.read(path, transformer)
    elif diffusers_reader.is_folder(path):
        loaded, metadata = diffusers_reader.read(path)
    else:
        loaded, metadata = network_files.read(path, {**NETWORK_CLASSES, **(classes or {})})
    net = cast(DenoiserModule, loaded.float().eval().requires_grad_(False))
    metadata = text_encoders.found_nearby(latents.found_nearby(metadata, path), path)
    if diffusers_folder.is_hub_name(source) and not user_path(source).exists():
        metadata = _with_parts_named(metadata, path, str(source))
    net.metadata = {**_published_metadata(str(source)), **metadata}
    try:
        learnt_classes(net)
    except UserError as error:
        raise UserError(f"{source}: {error.message}: damaged, or not a network") from None
    return net


def _with_parts_named(metadata: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """A network's metadata, in which the VAE and text encoders in a repository's folder get the repository's name, by
    which other machines find them, too.
    """
    checks = {"vae": latents.checked_record, "text": text_encoders.checked_record}
    records = {part: check(metadata[part], folder) for part, check in checks.items() if part in metadata}
    for record in records.values():
        if user_path(record["source"]).resolve().is_relative_to(folder.resolve()):
            record["source"] = name
    return metadata


def load_shapes(source: str | os.PathLike) -> DenoiserModule | None:
    """The network of a folder of the diffusers library without its weights, on the device meta; None for others.

    Errors: UserError as `load_network`.
    """
    path = user_path(source)
    if not path.is_dir() or not diffusers_reader.is_folder(path):
        return None
    return cast(DenoiserModule, diffusers_reader.shapes(path))


def load_denoiser(source: str | os.PathLike, classes: Mapping[str, Callable[..., Any]] | None = None) -> DenoiserModule:
    """As `load_network`; a network of one of `classes`, or of the diffusers library, is also called once, to see that
    it is a denoiser.

    Errors: UserError as `load_network` and `training.denoiser.check_denoiser`.
    """
    net = load_network(source, classes)
    of_library = isinstance(net, diffusers_models.LibraryDenoiser)
    if of_library or type(net).__name__ in (classes or {}):
        check_denoiser(net, source)
    return net


def save_network(net: torch.nn.Module, path: str | os.PathLike, /, **metadata: Any) -> None:
    """Saves a network, float32 and in eval mode; the file appears whole or not at all.

    path:      by suffix, .safetensors (weights; class, constructor arguments and metadata in the header) or .pkl
               (opens in EDM's and SiD's own tools; persistent classes only); without a suffix, a new folder with
               config.json; .onnx for other programs (`edm.onnx_file`), which `load_network` doesn't
               read. Of a class that isn't persistent the constructor arguments aren't known: `load_network` then
               needs a `classes` entry that takes none.
    metadata:  plain values that travel with the weights, for instance kind='sid-generator', init_sigma=2.5.
    Errors:    UserError when the suffix is another, the format can't hold the class or the path can't be written.
    """
    net = edm_pickle.frozen_copy(net).float()
    for name in ATTACHED:
        vars(net).pop(name, None)
    metadata = json.loads(json.dumps(metadata))  # the same plain values in either format
    decoder = latents.decoder_by(metadata, net) if Path(path).suffix == ".onnx" else None
    try:
        network_files.write(net, Path(path), metadata, decoder)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: choose another place") from None


def clone_network(net: Network, **overrides: Any) -> Network:
    """An independent network with equal weights, on the same device, in the same mode.

    overrides: constructor arguments to replace, for instance dropout=0.13, use_fp16=True.
    Errors: UserError when the constructor doesn't take an override, the weights no longer fit, or the class doesn't
    record its constructor's arguments.
    """
    if not overrides:
        return copy.deepcopy(net)
    name = type(net).__name__
    if not persistence.is_persistent(net):
        raise UserError(f"{name} can't be rebuilt with {', '.join(overrides)}: decorate it with persistent_class")
    kwargs = {**_named_arguments(net), **overrides}
    weights, _ = moments.split_off(net.state_dict())
    clone = persistence.construct(type(net), (), kwargs, weights, f"{name} with {_text(overrides)}")
    reference = next(iter(net.state_dict().values()), torch.empty(0))
    clone = clone.to(reference.device).train(net.training)
    for copied, original in zip(clone.parameters(), net.parameters()):
        copied.requires_grad_(original.requires_grad)
    for name in (*ATTACHED, moments.ATTRIBUTE):
        if hasattr(net, name):
            setattr(clone, name, copy.deepcopy(getattr(net, name)))
    return clone


def network_hash(net: torch.nn.Module) -> str:
    """sha256, in hex, of the names, types, shapes and bytes of a network's state dict."""
    return network_files.weights_hash(net)


# --- published files


def published(source: str) -> Published | None:
    """The entry for a short name, a URL, or a file of that name in the cache or elsewhere; otherwise None."""
    entry = find(source)
    if entry is not None:
        return entry
    file_name = Path(source).name
    return next((file for file in FILES.values() if source == file.url or file_name == Path(file.url).name), None)


def _published_metadata(source: str) -> dict[str, Any]:
    entry = published(source)
    if entry is None or entry.kind not in NETWORK_KINDS:
        return {}
    values = {"name": entry.name, "kind": entry.kind, "licence": entry.licence, "init_sigma": entry.init_sigma}
    return {key: value for key, value in values.items() if value is not None}


def _sha256_of(url: str) -> str | None:
    return next((file.sha256 for file in FILES.values() if file.url == url), None)


# --- constructor arguments


def _named_arguments(net: Any) -> dict[str, Any]:
    """All arguments that the network was built with, by name."""
    names = [
        name
        for name, parameter in inspect.signature(type(net)).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return {**dict(zip(names, net.init_args)), **net.init_kwargs}


def _text(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
