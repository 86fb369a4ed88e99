"""Text encoders of text-to-image pipelines, and the conditions that they make of prompts.

The record of a pipeline's text encoders, metadata["text"], is plain values:

source         folder of the pipeline, or its name on the Hugging Face Hub
pipeline       its class in the diffusers library
sha256         of the encoders' and tokenizers' files (`fingerprint`)
zeros          for Stable Diffusion 3 without its third encoder: the width of the zeros in its place

The library's own pipeline encodes, without its image model. Prompts are encoded once, and kept in the cache folder.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import UserError, user_path
from dnnlib.download import cache_folder
from dnnlib.progress import ProgressBar
from torch_utils import distributed, persistence
from training.conditions import Prompts

from . import diffusers_folder, transformers_library
from .diffusers_folder import read_config
from .network_files import INDEX_FILE
from .text_families import BY_PIPELINE, ENCODERS, FAMILIES, TOKENIZERS, Family
from .transformers_library import Quiet

FILES = (".json", ".txt", ".model", ".safetensors")  # of a tokenizer or text encoder
MAX_WIDTH = 1 << 16  # of an encoder
FOLDER = "text"  # of a pipeline with the encoders, next to a network's file
EDGE_BYTES = 1 << 20  # of a file of weights that its fingerprint reads at either end
ENCODED_AT_ONCE = 32
MAX_PROMPTS, MAX_PROMPT_CHARACTERS, MAX_FILE_BYTES = 20_000_000, 10_000, 4 << 30


def record_of(path: Path) -> dict[str, Any]:
    """The record of the text encoders in a pipeline's folder. Errors: UserError when they aren't supported."""
    family, parts = supported_parts(path)
    record = {"source": str(path.resolve()), "pipeline": family.pipeline, "sha256": fingerprint(path, parts)}
    if not set(family.optional) <= set(parts):
        width = read_config(path / "transformer" / "config.json").get("joint_attention_dim", 4096)
        record = checked_record({**record, "zeros": width}, path)
    return record


def tokens_of(path: Path) -> int:
    """The number of tokens per prompt in a pipeline's conditions. Errors: UserError when its tokenizer doesn't say."""
    family, _ = supported_parts(path, with_weights=False)
    if not family.has_clip_tokens:
        return family.other_tokens
    tokenizer = path / "tokenizer" / "tokenizer_config.json"
    if not tokenizer.is_file():
        raise UserError(f"{path}: {INDEX_FILE} names a tokenizer, but there is no tokenizer/{tokenizer.name}")
    length = read_config(tokenizer).get("model_max_length")
    if type(length) is not int or not 0 < length < 10_000:
        raise UserError(f"{path / 'tokenizer'}: names no model_max_length, how many tokens a prompt has at most")
    return length + family.other_tokens


def supported_parts(path: Path, with_weights: bool = True) -> tuple[Family, list[str]]:
    """(family of a pipeline, its folders of tokenizers and text encoders). with_weights: whether they must be there.

    Errors: UserError when one isn't supported, or isn't there.
    """
    index = read_config(path / INDEX_FILE)
    pipeline = str(index.get("_class_name"))[:80]
    teacher = next((family.pipeline for family in FAMILIES if pipeline in family.generators), None)
    if teacher is not None:
        raise UserError(
            f"{path}: a {pipeline} is itself a generator of few steps, so its answers aren't the means of clean images,"
            f" as a teacher's are; distil a {teacher} instead"
        )
    if pipeline not in BY_PIPELINE:
        raise UserError(f"{path}: a {pipeline}; of text-to-image, {', '.join(BY_PIPELINE)} are supported")
    family = BY_PIPELINE[pipeline]
    without = family.optional and all(index.get(name) in (None, [None, None]) for name in family.optional)
    parts = []
    for name in family.folders:
        if without and name in family.optional:
            continue
        entry = index.get(name)
        library, found = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        known = TOKENIZERS if name.startswith("tokenizer") else ENCODERS
        if library != "transformers" or found not in known:
            raise UserError(f"{path}: its {name} is {str(found)[:80]!r}, none of {', '.join(known)}")
        if with_weights and not (path / name).is_dir():
            raise UserError(f"{path}: {INDEX_FILE} names a {name}, but there is no folder {name}/")
        if with_weights and name.startswith("text") and not any((path / name).glob("*.safetensors")):
            raise UserError(f"{path / name}: holds no .safetensors; save the pipeline again by save_pretrained")
        parts.append(name)
    return family, parts


def fingerprint(path: Path, parts: Sequence[str]) -> str:
    """A hash that changes with the text encoders. Small files are hashed whole, weights by their size and both ends."""
    digest = hashlib.sha256()
    for part in parts:
        for file in sorted((path / part).iterdir()):
            if not file.is_file() or file.suffix not in FILES:
                continue
            size = file.stat().st_size
            digest.update(f"{part}/{file.name} {size}".encode())
            with open(file, "rb") as opened:
                digest.update(opened.read(EDGE_BYTES))
                if size > EDGE_BYTES:
                    opened.seek(max(EDGE_BYTES, size - EDGE_BYTES))
                    digest.update(opened.read(EDGE_BYTES))
    return digest.hexdigest()


# --- prompts


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one per line, or of a .jsonl file, one JSON object with "prompt" or "text" per line.

    Empty lines are skipped. Errors: UserError naming --prompts when it holds none, or isn't such a file.
    """
    file, prompts = user_path(str(path)), []
    try:
        if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"--prompts={path}: is no file of prompts, one per line; name one")
        with open(file, encoding="utf-8-sig", newline=None) as lines:
            for number, line in enumerate(lines, 1):
                if not (line := line.strip()):
                    continue
                prompts.append(_prompt(line, number, path) if file.suffix in (".jsonl", ".ndjson") else line)
                if len(prompts[-1]) > MAX_PROMPT_CHARACTERS:
                    raise UserError(f"--prompts={path}: line {number} has {len(prompts[-1])} characters; shorten it")
                if len(prompts) > MAX_PROMPTS:
                    raise UserError(f"--prompts={path}: holds more than {MAX_PROMPTS} prompts; take a part of them")
    except UnicodeDecodeError:
        raise UserError(f"--prompts={path}: is no text in UTF-8; save it as such") from None
    except OSError as error:
        raise UserError(f"--prompts={path}: can't be read ({error.strerror})") from None
    if not prompts:
        raise UserError(f"--prompts={path}: holds no prompt; write one per line")
    return prompts


def _prompt(line: str, number: int, path: str | Path) -> str:
    try:
        value = json.loads(line)
        found = next(value[key] for key in ("prompt", "text", "caption") if isinstance(value.get(key), str))
    except (ValueError, AttributeError, StopIteration, RecursionError):
        raise UserError(f'--prompts={path}: line {number} is no JSON object with a "prompt"; write one') from None
    return re.sub(r"\s+", " ", found).strip()


def prompts_for(net: Any, texts: Sequence[str], device: torch.device | str = "cpu", in_order: bool = False) -> Prompts:
    """The conditions that a network's text encoders make of prompts, from the cache if they are there.

    in_order: as for `training.conditions.Prompts`. Every process must call it; one of them encodes.
    Errors: UserError when the encoders aren't available, or aren't the ones that the network was trained with.
    """
    if not getattr(net, "prompt_dim", 0):
        raise UserError("--prompts: this network makes no images of prompts; leave the option out")
    record = checked_record(net.metadata.get("text"), "the network")
    with distributed.shared_errors():
        if distributed.rank() == 0:
            path = _encoded(record, texts, net.prompt_dim, torch.device(device))
    path = distributed.from_process_0(str(path) if distributed.rank() == 0 else None)
    rows = np.lib.format.open_memmap(path, "r")  # the last row is the null condition
    return Prompts(rows, torch.from_numpy(rows[len(texts)].copy()), texts, in_order)


def _encoded(record: dict[str, Any], texts: Sequence[str], prompt_dim: int, device: torch.device) -> Path:
    """The file in the cache with the conditions of prompts and, last, the null condition, float32 [P + 1, prompt_dim].

    It is made if it isn't there.
    """
    key = hashlib.sha256(json.dumps([record["sha256"], record["pipeline"], list(texts)]).encode()).hexdigest()
    path = Path(cache_folder()) / "prompts" / f"{key}.npy"
    shape = (len(texts) + 1, prompt_dim)
    if path.is_file():
        try:
            if np.lib.format.open_memmap(path, "r").shape == shape:
                return path
        except (ValueError, OSError, EOFError):
            pass
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 4 * shape[0] * shape[1], shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"--prompts: {len(texts)} encoded prompts take {needed / 1e9:.3g} GB, but {path.parent} has"
            f" {free / 1e9:.3g} GB free; give fewer, or name another disk with DNNLIB_CACHE_DIR"
        )
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        rows = np.lib.format.open_memmap(part, "w+", np.float32, shape)
        done = 0
        for encoded in TextEncoder(record, device).encode(texts):
            if encoded.shape[1] != prompt_dim:
                raise UserError(
                    f"{record['source']}: its text encoders give {encoded.shape[1]} numbers per prompt, but the model"
                    f" takes {prompt_dim}; give the pipeline that it belongs to"
                )
            rows[done : done + len(encoded)] = encoded.numpy()
            done += len(encoded)
        if not all(np.isfinite(rows[start : start + 1024]).all() for start in range(0, len(rows), 1024)):
            raise UserError(f"{record['source']}: its text encoders make NaN or infinity of some prompts: damaged")
        rows.flush()
        del rows
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


class TextEncoder:
    """The tokenizers and text encoders of a pipeline.

    record: as the module describes it. Errors: UserError when they aren't available, or differ from the record.
    """

    def __init__(self, record: dict[str, Any], device: torch.device | str = "cpu"):
        path, self.device = folder_of(record), device
        self.family, parts = supported_parts(path)
        if self.family.pipeline != record["pipeline"] or fingerprint(path, parts) != record["sha256"]:
            raise UserError(
                f"{path}: its text encoders aren't those that the network was trained with; put the pipeline with those"
                f" as {FOLDER}/ next to the network's file"
            )
        diffusers = diffusers_folder.library()
        transformers = transformers_library.library()
        index = read_config(path / INDEX_FILE)
        try:
            with Quiet(diffusers, transformers):
                cls = getattr(diffusers, self.family.pipeline)
                components = {part: _component(index[part][1], path / part) for part in parts}
        except Exception as error:  # whatever the library raises on damaged files
            reason = persistence.one_line(error, 200)
            raise UserError(f"{path}: its text encoders can't be loaded: {reason}") from None
        overrides = {name: bool(index[name]) for name in self.family.indexed if name in index}
        self.settings = {**self.family.settings, **overrides}
        given = {**self.settings, **components, "scheduler": _scheduler(diffusers, self.family)}
        if "zeros" in record:
            given["transformer"] = _Width(record["zeros"])
        absent = [name for name in inspect.signature(cls).parameters if name not in given]
        self.pipeline = cls(**given, **dict.fromkeys(absent))
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Iterator[torch.Tensor]:
        """Yields the conditions of prompts in batches, float32 [n, prompt_dim] on the CPU, and last the null condition.

        Prints one line if some are longer than the encoders take.
        """
        tokenizer, most = self.family.limit(self.pipeline)
        transformers_library.warn_of_long(tokenizer, texts, most, "the text encoder")
        null = None
        libraries = diffusers_folder.library(), transformers_library.library()
        with ProgressBar(len(texts), desc="encoding prompts") as bar, Quiet(*libraries):
            for start in range(0, len(texts), ENCODED_AT_ONCE):
                part = list(texts[start : start + ENCODED_AT_ONCE])
                encoded, null = self.family.encode(self.pipeline, part, self.device)
                yield encoded
                bar.update(len(part))
            if null is None:
                null = self.family.null(self.pipeline, self.device)
        yield null[:1]


class _Width:
    """Stands in for Stable Diffusion 3's model, whose pipeline asks it for the width of the zeros in T5's place."""

    def __init__(self, width: int):
        self.config = types.SimpleNamespace(joint_attention_dim=width, sample_size=64, patch_size=2)


def _component(name: str, folder: Path) -> Any:
    """A tokenizer or text encoder."""
    return (transformers_library.tokenizer if name in TOKENIZERS else transformers_library.model)(name, folder)


def _scheduler(diffusers: Any, family: Family) -> Any:
    """Any scheduler that the pipeline accepts; encoding doesn't use it."""
    if family.is_flow:
        return diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def folder_of(record: dict[str, Any]) -> Path:
    """The folder of a record's pipeline, downloaded if need be. Errors: UserError when it isn't available."""
    source = str(record["source"])
    path = user_path(source)
    if (path / INDEX_FILE).is_file():
        return path
    if diffusers_folder.is_hub_name(source):
        folder = diffusers_folder.fetch(source)
        return folder if (folder / INDEX_FILE).is_file() else folder / FOLDER
    raise UserError(
        f"{source}: the pipeline whose text encoders the network was trained with isn't there; put it as {FOLDER}/ next"
        " to the network's file"
    )


def checked_record(record: Any, name: Any) -> dict[str, Any]:
    """`record`, checked to be one of text encoders. name: of its holder, for messages. Errors: UserError if not."""
    keys = ("source", "pipeline", "sha256")
    intact = type(record) is dict and all(type(record.get(key)) is str for key in keys)
    zeros = record.get("zeros", 1) if intact else None
    if type(zeros) is not int or not 0 < zeros <= MAX_WIDTH:
        raise UserError(f"{name}: what it says about its text encoders is damaged")
    if record["pipeline"] not in BY_PIPELINE:
        raise UserError(f"{name}: its prompts are those of a {record['pipeline'][:80]}, which isn't supported")
    return record


def found_nearby(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """A network's metadata, which name the text encoders next to its file instead, if there are any."""
    nearby = (path if path.is_dir() else path.parent) / FOLDER
    if "text" not in metadata or not (nearby / INDEX_FILE).is_file():
        return metadata
    return {**metadata, "text": {**checked_record(metadata["text"], path), "source": str(nearby.resolve())}}
