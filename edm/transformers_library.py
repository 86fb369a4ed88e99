"""The transformers library: tokenizers and models from folders, without running code that a folder may hold."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError

from .diffusers_folder import read_config

INSTALL = "pip install diffusers transformers"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
MAX_LAYERS = 1000
ATTENTION = ("attn_implementation", "_attn_implementation")  # name code that the library would download and run


def library(why: str = "encoding prompts") -> Any:
    """The library. Errors: UserError, beginning with `why`, when it isn't installed."""
    try:
        return importlib.import_module("transformers")  # a statement would have pyright read all of it
    except ImportError:
        raise UserError(f"{why} needs the transformers library: {INSTALL}") from None


def tokenizer(name: str, folder: Path) -> Any:
    """The tokenizer of a folder, by its class, with or without "Fast".

    Errors: UserError when it has no vocabulary, for which the library would make up an empty one.
    """
    transformers = library()
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise UserError(f"its tokenizer has no vocabulary: none of {', '.join(VOCABULARIES)} is there")
    cls = getattr(transformers, name, None) or getattr(transformers, name.removesuffix("Fast"))
    return cls.from_pretrained(folder, local_files_only=True)


def model(name: str, folder: Path) -> Any:
    """The model of a folder, by its class, in float32.

    Errors: UserError when weights are missing or its configuration asks for too much, and what the library raises.
    """
    cls = getattr(library(), name)
    config = cls.config_class.from_dict(_checked(read_config(folder / "config.json"), folder))
    loaded, report = cls.from_pretrained(
        folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"its weights lack {len(missing)} tensors, such as {missing[0][:80]}: they aren't a {name}'s")
    return loaded.to(torch.float32).eval()


def _checked(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration without choices of attention's code. Errors: UserError when it names too many layers."""
    kept = {name: value for name, value in config.items() if name not in ATTENTION}
    for name, value in kept.items():
        if isinstance(value, dict):
            kept[name] = _checked(value, folder)
        elif name.endswith("layers") and type(value) is int and not 0 < value <= MAX_LAYERS:
            raise UserError(f"its config.json says {name}={str(value)[:80]}, not 1 to {MAX_LAYERS}")
    return kept


def warn_of_long(tokenizer: Any, texts: Sequence[str], most: int, what: str) -> None:
    """Prints one line if some prompts have more than `most` tokens. what: that takes no more."""
    with Quiet(library()):
        long = [i for i, text in enumerate(texts) if len(tokenizer(text, truncation=False).input_ids) > most]
    if long:
        print(
            f"{len(long)} of {len(texts)} prompts are longer than the {most} tokens that {what} takes and are cut off,"
            f" such as number {long[0] + 1}: {texts[long[0]][:60]!r}…",
            file=sys.stderr,
            flush=True,
        )


class Quiet:
    """Keeps the libraries from writing about parts that aren't loaded and prompts that are cut off."""

    def __init__(self, *libraries: Any):
        self._logs = [each.utils.logging for each in libraries]

    def __enter__(self) -> None:
        self._before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in self._logs]
        for log in self._logs:
            log.disable_progress_bar()
            log.set_verbosity_error()

    def __exit__(self, *_: Any) -> None:
        for log, (level, has_bars) in zip(self._logs, self._before):
            log.set_verbosity(level)
            if has_bars:
                log.enable_progress_bar()
