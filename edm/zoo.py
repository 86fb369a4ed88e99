"""Networks and other files by name, path or URL: loading, saving, cloning, converting.

python -m edm.zoo list
python -m edm.zoo fetch edm-cifar10-32x32-uncond-vp
python -m edm.zoo convert edm-cifar10-32x32-uncond-vp teacher.safetensors
"""

import copy
import difflib
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib import UserError, write_atomically
from dnnlib.download import cache_path, is_url, local_path
from edm.published import FILES, NETWORK_KINDS, Published
from torch_utils import edm_pickle, persistence
from training import networks

MAX_HEADER_BYTES = 16 << 20
SUFFIXES = (".pkl", ".safetensors")
NETWORK_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(networks.EDMPrecond, networks.VPPrecond, networks.VEPrecond, networks.iDDPMPrecond),
        *(networks.SongUNet, networks.DhariwalUNet),
    )
}


def resolve(source: str | os.PathLike, kind: str = "network") -> Path:
    """The local file behind a published file's short name, a path or a URL; downloaded if need be.

    kind: 'network' (any teacher or generator), 'reference', 'images' or 'detector'.
    Errors: UserError when there is no such file or it can't be fetched.
    """
    kinds = NETWORK_KINDS if kind == "network" else (kind,)
    entry = FILES.get(str(source))
    if entry is not None:
        if entry.kind not in kinds:
            raise UserError(f"{source} is a published {entry.kind}, but a {kind} is needed here")
        return local_path(entry.url, entry.sha256)
    if is_url(source) or Path(source).expanduser().is_file():
        return local_path(source, _sha256_of(str(source)))
    names = [name for name, file in FILES.items() if file.kind in kinds]
    near = difflib.get_close_matches(str(source), names, n=3) or names
    raise UserError(f"{source}: no such file, and no published {kind} has that name; published: {', '.join(near)}")


def load_network(source: str | os.PathLike, classes: Mapping[str, type] | None = None) -> torch.nn.Module:
    """A denoiser in eval mode, without gradients, float32, on the CPU. Runs nothing that the file contains.

    source:   short name, path or URL of a .pkl (EDM's format) or .safetensors file (`save_network`).
    classes:  further classes that the file may name, {name: class}; for one whose constructor arguments the file
              doesn't record (`save_network`), a function of no arguments that builds the network.
    returns:  the network; its `metadata` dict holds what the file or the list of published files says about it, for
              instance {'kind': 'sid-generator', 'init_sigma': 2.5}.
    Errors:   UserError when it can't be had, is damaged, or names an unknown class.
    """
    path = resolve(source)
    read = {".pkl": _read_pickle, ".safetensors": _read_safetensors}.get(path.suffix)
    if read is None:
        raise UserError(f"{path}: a network is a {' or '.join(SUFFIXES)} file")
    net, metadata = read(path, {**NETWORK_CLASSES, **(classes or {})})
    net = net.float().eval().requires_grad_(False)
    net.metadata = {**_published_metadata(str(source)), **metadata}
    return net


def load_item(source: str | os.PathLike, name: str, classes: Mapping[str, type] | None = None) -> Any:
    """Another item of an EDM pickle: 'loss_fn', 'augment_pipe' or 'dataset_kwargs'; None if it isn't there.

    classes: those that the item may name, {name: class}. Errors: UserError as `load_network`.
    """
    path = resolve(source)
    item = edm_pickle.read(path).get(name)
    return edm_pickle.build(item, classes or {}, path) if type(item) is edm_pickle.Record else item


def save_network(net: torch.nn.Module, path: str | os.PathLike, **metadata: Any) -> None:
    """Saves a network, float32 and in eval mode; the file appears whole or not at all.

    path:      by suffix, .safetensors (weights; class, constructor arguments and metadata in the header) or .pkl
               (opens in EDM's and SiD's own tools; persistent classes only). Of a class that isn't persistent the
               constructor arguments aren't known: `load_network` then needs a `classes` entry that takes none.
    metadata:  plain values that travel with the weights, for instance kind='sid-generator', init_sigma=2.5.
    Errors:    UserError when the suffix is another, the format can't hold the class or the path can't be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a network is saved as {' or '.join(SUFFIXES)}")
    if path.suffix == ".pkl" and not persistence.is_persistent(net):
        name = type(net).__name__
        raise UserError(f"{path}: {name} isn't a persistent_class, which EDM pickles ask for: save as .safetensors")
    net = edm_pickle.frozen_copy(net).float()
    vars(net).pop("metadata", None)
    metadata = json.loads(json.dumps(metadata))  # the same plain values in either format
    try:
        with write_atomically(path) as file:
            if path.suffix == ".pkl":
                edm_pickle.write(file, ema=net, **({"metadata": metadata} if metadata else {}))
            else:
                file.write(_safetensors_bytes(net, metadata))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: choose another place") from None


def clone_network(net: torch.nn.Module, **overrides: Any) -> torch.nn.Module:
    """An independent network with equal weights, on the same device, in the same mode.

    overrides: constructor arguments to replace, for instance dropout=0.13, use_fp16=True.
    Errors: UserError when the constructor doesn't take an override, the weights no longer fit, or the class doesn't
    record its constructor's arguments.
    """
    if not overrides:
        return copy.deepcopy(net)
    name = type(net).__name__
    if not persistence.is_persistent(net):
        raise UserError(f"{name} can't be built anew with {', '.join(overrides)}: decorate it with persistent_class")
    kwargs = {**_named_arguments(net), **overrides}
    clone = persistence.construct(type(net), (), kwargs, net.state_dict(), f"{name} with {_text(overrides)}")
    reference = next(iter(net.state_dict().values()), torch.empty(0))
    clone = clone.to(reference.device).train(net.training)
    for copied, original in zip(clone.parameters(), net.parameters()):
        copied.requires_grad_(original.requires_grad)
    if hasattr(net, "metadata"):
        clone.metadata = copy.deepcopy(net.metadata)
    return clone


def network_hash(net: torch.nn.Module) -> str:
    """sha256, in hex, of the names, types, shapes and bytes of a network's state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- the two formats


def _read_pickle(path: Path, classes: Mapping[str, type]) -> tuple[torch.nn.Module, dict[str, Any]]:
    contents = edm_pickle.read(path)
    if "ema" not in contents:
        raise UserError(f"{path}: not a network snapshot: it has no 'ema'")
    metadata = contents.get("metadata")
    return edm_pickle.build(contents["ema"], classes, path), _checked_metadata(metadata or {}, path)


def _safetensors_bytes(net: torch.nn.Module, metadata: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    header = {"class_name": type(net).__name__, "metadata": metadata}
    if persistence.is_persistent(net):
        header |= {"init_args": net.init_args, "init_kwargs": net.init_kwargs}
    tensors = {name: tensor.contiguous().clone() for name, tensor in net.state_dict().items()}
    return save(tensors, {"network": json.dumps(header)})  # in one entry: the order of several would be random


def _read_safetensors(path: Path, classes: Mapping[str, type]) -> tuple[torch.nn.Module, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
            raise UserError(
                f"{path}: its header claims more than {MAX_HEADER_BYTES >> 20} MB: damaged, or not a network"
            )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get("network", "")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, MemoryError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file: {persistence.one_line(error)}") from None
    try:
        header = json.loads(text)
        name, args, kwargs = str(header["class_name"]), header.get("init_args", []), header.get("init_kwargs", {})
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: its header doesn't say how to build the network: save it by save_network") from None
    if name not in classes:
        raise UserError(f"{path}: holds a {name[:80]!r}, which is none of: {', '.join(classes)}")
    if type(args) is not list or type(kwargs) is not dict or not edm_pickle.is_plain([args, kwargs]):
        raise UserError(f"{path}: the constructor arguments of {name} are not plain values")
    net = persistence.construct(classes[name], tuple(args), kwargs, state, path)
    return net, _checked_metadata(header.get("metadata"), path)


def _checked_metadata(metadata: Any, path: Path) -> dict[str, Any]:
    if type(metadata) is not dict or not edm_pickle.is_plain(metadata):
        raise UserError(f"{path}: its metadata are not a dict of plain values")
    return metadata


# --- published files


def _published(source: str) -> Published | None:
    """The entry of a short name, of its URL, or of a file that has its name in the cache or elsewhere."""
    if source in FILES:
        return FILES[source]
    file_name = Path(source).name
    return next((file for file in FILES.values() if source == file.url or file_name == Path(file.url).name), None)


def _published_metadata(source: str) -> dict[str, Any]:
    entry = _published(source)
    if entry is None or entry.kind not in NETWORK_KINDS:
        return {}
    values = {"name": entry.name, "kind": entry.kind, "licence": entry.licence, "init_sigma": entry.init_sigma}
    return {key: value for key, value in values.items() if value is not None}


def _sha256_of(url: str) -> str | None:
    return next((file.sha256 for file in FILES.values() if file.url == url), None)


# --- constructor arguments


def _named_arguments(net: torch.nn.Module) -> dict[str, Any]:
    """All arguments that the network was built with, by name."""
    names = [
        name
        for name, parameter in inspect.signature(type(net)).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return {**dict(zip(names, net.init_args)), **net.init_kwargs}


def _text(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


# --- command line


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Published networks, reference statistics and detectors; conversion between file formats."""


@main.command("list")
def list_command() -> None:
    """List the published files by short name."""
    for file in FILES.values():
        result = f", FID {file.fid} (NFE {file.nfe})" if file.fid is not None else ""
        here = "*" if cache_path(file.url).is_file() else " "
        click.echo(f"{here} {file.name:28} {file.description}{result}; {file.licence}")
    click.echo("* already downloaded")


@main.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Download the published file NAME and print its path."""
    entry = FILES.get(name)
    click.echo(resolve(name, entry.kind if entry is not None and entry.kind not in NETWORK_KINDS else "network"))


@main.command()
@click.argument("source")
@click.argument("destination")
def convert(source: str, destination: str) -> None:
    """Load the network SOURCE (name, path or URL) and save it as DESTINATION (.safetensors or .pkl)."""
    net = load_network(source)
    save_network(net, destination, **net.metadata)
    click.echo(f"{destination}: {type(net).__name__}, sha256 of the weights {network_hash(net)}")


if __name__ == "__main__":
    main()
