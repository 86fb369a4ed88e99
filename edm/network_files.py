"""The formats of a network's file: EDM pickle, safetensors, and a folder with config.json.

Each holds the weights, the class by name, its constructor arguments, and metadata: plain values. Nothing that a file
contains is executed. ONNX is written only.
"""

import contextlib
import hashlib
import inspect
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dnnlib import UserError, open_plain, write_atomically
from torch_utils import checkpoint, finiteness, persistence
from torch_utils.untrusted import edm_pickle
from torch_utils.untrusted.bounds import parse_json, read_json
from training import moments
from training.decoder import LatentDecoder
from training.steps import Steps

from . import onnx_file

M = TypeVar("M", bound=torch.nn.Module)

MAX_HEADER_BYTES = 16 << 20
MAX_HEADER_VALUES = 100_000
MAX_SIGMA = 1e6
LIMITS = {  # of the attributes that a file sets; the resolution needs a limit because the weights don't depend on it
    "img_resolution": (1, 8192),
    "img_channels": (1, 1024),
    "label_dim": (0, 1 << 20),
    "sigma_min": (0.0, MAX_SIGMA),
    "sigma_max": (0.0, float("inf")),
    "sigma_data": (0.0, MAX_SIGMA),
}
VAE_ENCODER = "StabilityVAEEncoder"  # EDM2's class around a VAE
SUFFIXES = (".pkl", ".safetensors")
WRITTEN = (*SUFFIXES, ".onnx")
FOREIGN_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")  # of what torch.save writes, mostly weights alone
CONFIG_FILE, WEIGHTS_FILE = "config.json", "network.safetensors"  # of a folder
FORMER_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # in older folders
INDEX_FILE = "model_index.json"  # of a folder that the diffusers library wrote (`edm.diffusers_reader`)
OWN_KEYS = {"class_name": "_class_name", "init_args": "_init_args", "metadata": "_metadata"}  # in CONFIG_FILE
OWN_KEYS[checkpoint.CHECKSUM] = "_sha256"


def is_folder(path: str | os.PathLike) -> bool:
    """Whether `path` is a network's folder, written here or by the diffusers library."""
    return any((Path(path) / name).is_file() for name in (CONFIG_FILE, INDEX_FILE))


def read(path: Path, classes: Mapping[str, Callable[..., Any]]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(network, metadata) of a file or folder. Errors: UserError when it is damaged or names another class."""
    if path.suffix == ".pkl" and not is_folder(path):
        return _read_pickle(path, classes)
    header, state, source = contents(path)
    return build(header, state, classes, source)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], Path]:
    """(header, tensors, the file that the header comes from) of a .safetensors file or a folder.

    Errors: UserError when it is damaged or neither.
    """
    if is_folder(path):
        return _folder_contents(path)
    if path.suffix == ".safetensors":
        header, state = read_tensors(path)
        return _parse(header.get("network", ""), state, path), state, path
    advice = ""
    if path.suffix in FOREIGN_SUFFIXES:
        advice = "; load the weights of this one into a network in PyTorch and save that by edm.zoo.save_network"
    raise UserError(f"{path}: a network is a {' or '.join(SUFFIXES)} file or a folder with {CONFIG_FILE}{advice}")


def write(net: torch.nn.Module, path: Path, metadata: dict[str, Any], decoder: LatentDecoder | None = None) -> None:
    """Writes a network in eval mode on the CPU, by the suffix of `path`; without a suffix, a new folder.

    decoder: of the network's latents, which becomes part of an .onnx file.
    The file or folder appears whole or not at all. Errors: OSError; UserError as `edm.zoo.save_network`.
    """
    if path.suffix not in ("", *WRITTEN):
        raise UserError(f"{path}: a network is saved as {' or '.join(WRITTEN)}, or without a suffix as a folder")
    if path.suffix == ".pkl" and not persistence.is_persistent(net):
        name = type(net).__name__
        raise UserError(f"{path}: {name} isn't a persistent_class, which EDM pickles ask for: save as .safetensors")
    if path.suffix == ".pkl":
        moments.refuse(net, f"{path}", "EDM's and SiD's own tools, which these files are for, know")
    if path.suffix == "":
        _write_folder(net, path, metadata)
        return
    if path.suffix == ".onnx":
        path.parent.stat()  # fails now if the folder is missing: tracing takes a minute
        contents = onnx_file.model_bytes(net, _header(net, metadata), decoder)
    elif path.suffix == ".safetensors":  # one entry, because the order of several would be random
        header = json.loads(json.dumps(_header(net, metadata)))
        header[checkpoint.CHECKSUM] = checksum(header, net.state_dict())
        contents = _tensors_bytes(net, {"network": json.dumps(header)})
    with write_atomically(path) as file:
        if path.suffix == ".pkl":
            edm_pickle.write(file, ema=net, **({"metadata": metadata} if metadata else {}))
        else:
            file.write(contents)


# --- EDM's pickle


def _read_pickle(path: Path, classes: Mapping[str, Callable[..., Any]]) -> tuple[torch.nn.Module, dict[str, Any]]:
    contents = edm_pickle.read(path)
    if "ema" not in contents:
        names = ", ".join(repr(str(name)[:40]) for name in itertools.islice(contents, 5)) or "nothing"
        raise UserError(
            f"{path}: not a network snapshot: it has no 'ema' but {names}; load the weights into a network in PyTorch"
            " and save that by edm.zoo.save_network"
        )
    net = edm_pickle.build(contents["ema"], classes, path)
    vae = _vae_record(contents.get("encoder"), path)
    metadata = checked_metadata(contents.get("metadata") or {}, path)
    return checked(net, path), metadata if vae is None else {"vae": vae, **metadata}


def _vae_record(encoder: Any, path: Path) -> dict[str, Any] | None:
    """What EDM2's snapshots say about the VAE of their latents, raw scale + bias; None for networks of images.

    source: the VAE's name on the Hugging Face Hub. sha256: empty, since the files don't tell the VAE's weights.
    channels, scale, shift: the network's latents are (raw - shift) scale, with a number for each channel.
    """
    if type(encoder) is not edm_pickle.Record or encoder.class_name != VAE_ENCODER:
        return None
    try:
        source, parts = encoder.state["vae_name"], [encoder.state[name].numpy() for name in ("scale", "bias")]
        scale, bias = (part.astype(float).reshape(len(parts[0])) for part in parts)
    except (AttributeError, LookupError, TypeError, ValueError):
        source, scale, bias = None, np.zeros(1), np.zeros(1)
    if type(source) is not str or not np.isfinite([scale, bias]).all() or not scale.all():
        raise UserError(f"{path}: what it says about its VAE is damaged: fetch it again")
    values = {"scale": scale.tolist(), "shift": (-bias / scale).tolist()}
    return {"source": source, "sha256": "", "channels": len(scale), **values}


# --- safetensors


def _header(net: torch.nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    header = {"class_name": type(net).__name__, "metadata": metadata}
    if persistence.is_persistent(net):
        header |= {"init_args": net.init_args, "init_kwargs": net.init_kwargs}
    return header


def _tensors_bytes(net: torch.nn.Module, header: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous().clone() for name, tensor in net.state_dict().items()}, header)


def checksum(header: dict[str, Any], state: dict[str, torch.Tensor]) -> str:
    """sha256, in hex, of the tensors and of a header as read back from JSON, without the checksum itself."""
    header = {name: value for name, value in header.items() if name != checkpoint.CHECKSUM}
    return checkpoint.checksum([json.dumps(header, sort_keys=True), dict(sorted(state.items()))])


@contextlib.contextmanager
def verified(header: dict[str, Any], state: dict[str, torch.Tensor], source: Any) -> Iterator[None]:
    """Raises UserError if the checksum in the header is wrong: at the end, or in place of an error raised inside.

    Files from other programs, and older ones, have no checksum.
    """
    damage = None
    if checkpoint.CHECKSUM in header:
        try:
            sound = header[checkpoint.CHECKSUM] == checksum(header, state)
        except (RecursionError, RuntimeError, TypeError, ValueError):  # for contents that no file of this project has
            sound = False
        damage = None if sound else f"{source}: damaged, its contents don't have their checksum"
    try:
        yield
    except UserError as error:
        if damage:
            raise UserError(f"{damage} ({error.message.removeprefix(f'{source}: ')}): fetch it again") from None
        raise
    if damage:
        raise UserError(f"{damage}: fetch it again, or take another snapshot")


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(metadata, tensors on the CPU) of a safetensors file. Errors: UserError when it is damaged or none."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_plain(path) as file:
            length = int.from_bytes(file.read(8), "little")
            tensors = file.read(min(length, MAX_HEADER_BYTES)).count(b'"data_offsets"')
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: check the file name") from None
    if length > MAX_HEADER_BYTES or tensors > edm_pickle.MAX_PARTS:
        raise UserError(
            f"{path}: its header claims more than {MAX_HEADER_BYTES >> 20} MB or {edm_pickle.MAX_PARTS} tensors:"
            " damaged, or not a network"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, LookupError, AttributeError, MemoryError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file: {persistence.one_line(error)}") from None


def _parse(text: str, names: Collection[str], path: Path) -> dict[str, Any]:
    """The header that describes the tensors of these names."""
    try:
        header = parse_json(text, MAX_HEADER_VALUES)
        return {**header, "class_name": str(header["class_name"])}
    except (LookupError, TypeError, ValueError, RecursionError):
        hint = persistence.wrapper_hint(names)
        raise UserError(
            f"{path}: its header doesn't say how to build the network: save it by save_network"
            + (f"; of its tensors, {hint}" if hint else "")
        ) from None


def build(
    header: dict[str, Any], state: dict[str, torch.Tensor], classes: Mapping[str, Callable[..., Any]], path: Path
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(network, metadata) of what `contents` gives. Errors: UserError when it is damaged or names another class."""
    name, args, kwargs = header["class_name"], header.get("init_args", []), header.get("init_kwargs", {})
    with verified(header, state, path):
        if name not in classes:
            raise UserError(
                f"{path}: holds a {name[:80]!r}, which is none of: {', '.join(classes)}; for a class of your own give"
                " --classes=module:Class, or classes= from Python"
            )
        if type(args) is not list or type(kwargs) is not dict or not edm_pickle.is_plain([args, kwargs]):
            raise UserError(f"{path}: the constructor arguments of {name} are not plain values")
        weights, tensors = moments.split_off(state)
        net = persistence.construct(classes[name], tuple(args), kwargs, weights, path)
        _attach_start(net, tensors, path)
        return checked(net, path), checked_metadata(header.get("metadata"), path)


def _attach_start(net: Any, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Attaches the moments of the noise that a generator starts from, if its file holds some."""
    if not tensors:
        return
    try:
        moments.attach(net, moments.loaded(tensors, net))
    except (AttributeError, ValueError):
        raise UserError(f"{path}: the moments of the noise that its generator starts from are damaged") from None


def checked(net: M, path: Path) -> M:
    """The network in float32. Checks that its weights are finite, and its sizes and noise levels plausible."""
    for part in net.modules():
        if persistence.is_persistent(part) and type(part).__module__.startswith("training."):
            _check_numbers(part, path)
    weight = finiteness.first_non_finite(net.float())
    if weight is not None:
        raise UserError(
            f"{path}: its {weight} holds NaN or infinity: the training that made it has diverged, or the file is"
            " damaged; take an earlier snapshot, or fetch it again"
        )
    for name, (low, high) in LIMITS.items():
        try:
            value = getattr(net, name, low)
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            number = math.nan
        if not low <= number <= high or (type(low) is int and not number.is_integer()):
            raise UserError(f"{path}: its {name} is not a number from {low} to {high}: damaged, or not a network")
    return net


def _check_numbers(part: Any, path: Path) -> None:
    """Errors: UserError for constructor arguments of our own classes that aren't numbers where their defaults are.

    Many are used only when the network is called, and by then no message could name the file.
    """
    signature = inspect.signature(type(part).__init__)
    given = signature.bind_partial(part, *part.init_args, **part.init_kwargs).arguments
    for name, parameter in signature.parameters.items():
        value, default = given.get(name, parameter.default), parameter.default
        if type(default) is float:
            sound = type(value) in (int, float) and (math.isfinite(value) or value == default)
        elif type(default) is int:
            sound = type(value) in (int, bool) or (type(value) is float and math.isfinite(value))
        else:
            continue
        if not sound or ("dropout" in name and not 0 <= value <= 1):
            kind = "probability" if "dropout" in name else "number"
            raise UserError(f"{path}: its {name}={str(value)[:40]} is not a {kind}: damaged, or not a network")


def weights_hash(net: torch.nn.Module) -> str:
    """sha256, in hex, of the names, types, shapes and bytes of a network's state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def checked_metadata(metadata: Any, path: Path) -> dict[str, Any]:
    if type(metadata) is not dict or not edm_pickle.is_plain(metadata) or not all(type(k) is str for k in metadata):
        raise UserError(f"{path}: its metadata are not a dict of plain values")
    try:
        steps = Steps.recorded(metadata)
    except (ArithmeticError, TypeError, ValueError):
        raise UserError(f"{path}: the init_sigma or steps in its metadata are not noise levels") from None
    if steps is not None and steps.levels[0] >= MAX_SIGMA:
        raise UserError(f"{path}: the init_sigma in its metadata is not a noise level")
    return metadata


# --- a folder: CONFIG_FILE holds the constructor arguments by name, `_class_name`, and further entries of this project


def check_new_folder(path: Path) -> None:
    """Errors: UserError when there is something at `path` that isn't an empty folder."""
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; remove it or choose another name")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end and is removed after an error.

    Errors: UserError when there is something at `path`; OSError.
    """
    check_new_folder(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()  # TemporaryDirectory's own is private
        yield new
        os.replace(new, path)


def _write_folder(net: torch.nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    header = _header(net, metadata)
    config = {key: header[name] for name, key in OWN_KEYS.items() if header.get(name)} | header.get("init_kwargs", {})
    config[OWN_KEYS[checkpoint.CHECKSUM]] = checksum(_folder_header(json.loads(json.dumps(config))), net.state_dict())
    with new_folder(path) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with write_atomically(folder / WEIGHTS_FILE) as file:
            file.write(_tensors_bytes(net, {"format": "pt"}))


def _folder_contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], Path]:
    config = path / CONFIG_FILE
    try:
        header = _folder_header(read_json(config, MAX_HEADER_BYTES, MAX_HEADER_VALUES))
    except (OSError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
        raise UserError(f"{config}: doesn't say how to build the network: write it by edm.zoo convert") from None
    former = path / FORMER_WEIGHTS_FILE
    return header, read_tensors(former if former.is_file() else path / WEIGHTS_FILE)[1], config


def _folder_header(values: dict[str, Any]) -> dict[str, Any]:
    """The values in CONFIG_FILE under the names that a file's header has; removes the entries of this project."""
    header = {"metadata": {}} | {name: values.pop(key) for name, key in OWN_KEYS.items() if key in values}
    values.pop("_diffusers_version", None)
    return {**header, "class_name": str(header["class_name"]), "init_kwargs": values}
