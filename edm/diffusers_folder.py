"""Folders in the layout of the diffusers library: configurations, weights, names on the Hugging Face Hub.

Weights are read from safetensors only, and no code that a folder may hold is run.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.errors import printable
from torch_utils import distributed
from torch_utils.untrusted.bounds import read_json

from . import hub, network_files
from .network_files import read_tensors

WEIGHTS_NAME = "diffusion_pytorch_model"
SCHEDULER_FILE = "scheduler_config.json"
MAX_CONFIG_BYTES, MAX_CONFIG_VALUES = 16 << 20, 100_000
INSTALL = "pip install diffusers"
_WITHOUT_WEIGHTS: list[bool] = []  # holds something inside `shapes_only`
# Folders of a pipeline with weights that are used here, and names of their variants.
PARTS = ("unet", "transformer", "vae", "vqvae", "movq", "text_encoder", "text_encoder_2", "text_encoder_3")
READ_VARIANTS = ("bf16", "fp16", "non_ema")
VARIANTS = [f"*.{name}{end}*" for name in (*READ_VARIANTS, "int4") for end in (".", "-")]
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention layers


class _Library:
    """The diffusers library, whose classes load when they are asked for."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._module, name)
        except RuntimeError as error:  # what the library makes of an ImportError
            raise _broken(error) from error


def library() -> Any:
    """The diffusers library. Errors: UserError when it isn't installed, or doesn't work with what is."""
    try:
        import diffusers  # pyright: ignore[reportMissingImports]  an optional package
    except ModuleNotFoundError:
        raise UserError(f"a network of the diffusers library needs that library: {INSTALL}") from None
    except (ImportError, RuntimeError) as error:
        raise _broken(error) from error
    return _Library(diffusers)


def _broken(error: Exception) -> UserError:
    cause = printable(str(error).strip().splitlines()[-1][:200])
    return UserError(f"the diffusers library can't be loaded ({cause}): pip install -U diffusers transformers")


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within it, `build` makes models without weights, on the device meta."""
    _WITHOUT_WEIGHTS.append(True)
    try:
        yield
    finally:
        _WITHOUT_WEIGHTS.pop()


def build(name: str, config: dict[str, Any]) -> Any:
    """A model of the library by its class and configuration."""
    with torch.device("meta") if _WITHOUT_WEIGHTS else contextlib.nullcontext():
        return getattr(library(), name).from_config(config)


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether `source` could be the name of a repository on the Hub, owner/name."""
    return hub.NAME.fullmatch(str(source)) is not None and Path(source).suffix not in network_files.WRITTEN


def fetch(name: str) -> Path:
    """The local folder of a model on the Hub, downloaded unless the library's cache holds it.

    Only configurations, vocabularies, safetensors and the model card are downloaded: no pickles, no code. For a
    pipeline, only the weights in PARTS are downloaded, and a variant such as fp16 only if there are no others.
    Errors: UserError when it can't be downloaded.
    """
    small = ["*.json", "*.txt", "*.model", "README.md"]  # in a pattern, "*" stands for slashes, too
    folder = hub.download(name, small)
    if not (folder / network_files.INDEX_FILE).is_file():
        return hub.download(name, [*small, "*.safetensors"])
    weights = [f"{part}/*.safetensors" for part in PARTS]
    folder = hub.download(name, weights, ignore_patterns=VARIANTS)
    absent = [part for part in PARTS if (folder / part).is_dir() and not any((folder / part).glob("*.safetensors"))]
    return hub.download(name, [f"{part}/*.safetensors" for part in absent]) if absent else folder


def fetch_part(name: str, part: str, classes: Sequence[str], why: str) -> Path:
    """The local folder of one model on the Hub: of a repository's folder `part`, or of a repository that is the model.

    Its configuration is downloaded first, and its safetensors only if that is of one of `classes`: no other part of a
    pipeline, no pickles, no code. What the library's cache holds isn't downloaded.
    why: what it is and why it is wanted, for the line that says what is downloaded.
    Errors: UserError when it can't be downloaded, or is a model of another class.
    """
    configs = [network_files.CONFIG_FILE, f"{part}/{network_files.CONFIG_FILE}"]
    weights = [f"{WEIGHTS_NAME}*.safetensors", f"{WEIGHTS_NAME}*.json"]
    patterns = [*configs, *weights, *(f"{part}/{file}" for file in weights)]
    try:
        folder = hub.download(name, patterns, local_files_only=True)
        found = next(folder / file for file in reversed(configs) if (folder / file).is_file()).parent
        if any(found.glob(weights[0])):
            return found
    except (UserError, StopIteration):  # not in the cache, or not whole
        pass
    if distributed.rank() == 0:
        print(
            f"{name}: {why}, is downloaded from the Hugging Face Hub (its configuration and safetensors alone)",
            file=sys.stderr,
            flush=True,
        )
    folder = hub.download(name, configs)
    found = next((folder / file for file in reversed(configs) if (folder / file).is_file()), None)
    if found is None:
        wanted = " or ".join(classes)
        raise UserError(f"{name}: has neither {configs[0]} nor {configs[1]}: name the repository of an {wanted}")
    check_class(found, classes)
    inside = "" if found.parent == folder else f"{part}/"
    hub.download(name, [inside + file for file in weights])
    return found.parent


def check_class(config: Path, classes: Sequence[str]) -> dict[str, Any]:
    """A model's configuration. Errors: UserError when it can't be read or is one of another class."""
    values = read_config(config)
    if values.get("_class_name") not in classes:
        found = str(values.get("_class_name"))[:80]
        raise UserError(f"{config.parent}: a {found}, not an {' or '.join(classes)}; name one")
    return values


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path, MAX_CONFIG_BYTES, MAX_CONFIG_VALUES)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{path}: can't be read as a configuration of the diffusers library") from None
    if type(config) is not dict:
        raise UserError(f"{path}: is not a configuration of the diffusers library")
    return config


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder, in one file or several, under the names that the library gives them today."""
    whole = folder / f"{WEIGHTS_NAME}.safetensors"
    if whole.is_file():
        return _renamed(read_tensors(whole)[1])
    index = folder / f"{WEIGHTS_NAME}.safetensors.index.json"
    if index.is_file():
        names = read_config(index).get("weight_map")
        files = set(names.values()) if isinstance(names, dict) else set()
        if not files or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(file)) for file in files):
            raise UserError(f"{index}: names no .safetensors files")
        parts = [read_tensors(folder / file)[1] for file in sorted(files)]
        return _renamed({name: tensor for part in parts for name, tensor in part.items()})
    for variant in (f"{WEIGHTS_NAME}.{name}.safetensors" for name in READ_VARIANTS):
        if (folder / variant).is_file():
            return _renamed(read_tensors(folder / variant)[1])
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder}: its weights are pickled ({pickled[0]}), and opening that could run code: save the model again"
            " with save_pretrained(folder, safe_serialization=True)"
        )
    raise UserError(f"{folder}: has no {WEIGHTS_NAME}.safetensors")


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {_current_name(name): tensor for name, tensor in state.items()}


def _current_name(name: str) -> str:
    """The name that the library gives a weight today; attention layers had others before."""
    *parents, layer, kind = ["", "", *name.split(".")]
    return name if layer not in FORMER_NAMES else ".".join([*filter(None, parents), FORMER_NAMES[layer], kind])


def licence(path: Path) -> dict[str, str]:
    """{'licence': name} from the top of a model card, README.md; empty if it names none."""
    for place in (path, path.resolve().parent):
        try:
            with open(place / "README.md", encoding="utf-8", errors="replace") as file:
                head = re.match(r"---\n(.*?)\n---", file.read(100_000), re.DOTALL)
        except OSError:
            continue
        found = re.search(r"^license: *([\w.-]{1,80}) *$", head[1], re.MULTILINE) if head else None
        if found:
            return {"licence": found[1]}
    return {}
