"""CLIP models in the layout of the transformers library, from a folder or the Hugging Face Hub.

A folder holds config.json, safetensors, a tokenizer and the settings of the image processor. No code that it may hold
is run.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, user_path
from dnnlib.progress import ProgressBar
from edm import hub, transformers_library
from edm.diffusers_folder import read_config
from edm.network_files import CONFIG_FILE
from edm.text_encoders import fingerprint
from torch_utils import persistence

MODEL_TYPE, MODEL = "clip", "CLIPModel"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the library writes one or the other
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
MAX_IMAGE_SIZE = 4096
IMAGES_AT_ONCE, TEXTS_AT_ONCE = 16, 64


class ClipEncoder:
    """Embeds images and texts by a CLIPModel, in float32; a `metric.TextImageEncoder`.

    source: a folder or the name of a repository on the Hub.
    Errors: UserError when it isn't available, or isn't such a model.
    """

    def __init__(self, source: str | os.PathLike, device: torch.device | str = "cpu"):
        self._library = transformers_library.library("--clip")
        path = _folder(str(source))
        self.name, self.device = user_path(source).resolve().name, torch.device(device)
        try:
            with transformers_library.Quiet(self._library):
                self._model = transformers_library.model(MODEL, path).to(self.device)
                self._tokenizer = transformers_library.tokenizer("CLIPTokenizerFast", path)
                # Torchvision's kernels would resize a little differently, and needn't be installed.
                processor = getattr(self._library, "CLIPImageProcessorPil", self._library.CLIPImageProcessor)
                self._processor = processor.from_pretrained(path, local_files_only=True)
            most = self._model.config.text_config.max_position_embeddings
            self._max_tokens = min(most, self._tokenizer.model_max_length)
            _check_size(self._processor)
            probe = torch.cat([self.embed_images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), self._embed(["a"])])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the library raises on damaged files
            raise UserError(f"--clip={source}: can't be loaded: {persistence.one_line(error, 200)}") from None
        if not probe.isfinite().all():
            raise UserError(f"--clip={source}: gives NaN or infinity: damaged")
        self.embedding_dim = probe.shape[1]
        self.sha256 = fingerprint(path, ["."])

    @torch.inference_mode()
    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        images, found = images.expand(-1, 3, -1, -1).cpu(), []
        for part in images.split(IMAGES_AT_ONCE):
            pixels = self._processor(list(part.numpy()), return_tensors="pt", input_data_format="channels_first")
            found.append(self._model.get_image_features(pixel_values=pixels.pixel_values.to(self.device)))
        return torch.cat([getattr(each, "pooler_output", each) for each in found])

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [N, D] of N texts. Prints one line if the model takes only the beginning of some."""
        transformers_library.warn_of_long(self._tokenizer, texts, self._max_tokens, "--clip")
        found = []
        with ProgressBar(len(texts), desc="embedding prompts") as bar:
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                found.append(self._embed(texts[start : start + TEXTS_AT_ONCE]))
                bar.update(len(found[-1]))
        return torch.cat(found)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        found = self._model.get_text_features(**tokens.to(self.device))
        return getattr(found, "pooler_output", found)  # where the library returns all outputs


def _folder(source: str) -> Path:
    """The local folder of a model. Errors: UserError when there is none, or it holds something else."""
    path = user_path(source)
    if not path.is_dir():
        if not hub.is_name(source):
            raise UserError(f"--clip={source}: is no folder; name one, or a CLIP on the Hugging Face Hub, owner/name")
        path = hub.download(source, [CONFIG_FILE, *PROCESSOR_FILES, *WEIGHTS, *TOKENIZER_FILES])
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"--clip={source}: holds no {CONFIG_FILE}; give a CLIPModel as save_pretrained writes it")
    kind = str(read_config(path / CONFIG_FILE).get("model_type"))[:80]
    if kind != MODEL_TYPE:
        raise UserError(f"--clip={source}: is a model of type {kind}, not {MODEL_TYPE}; give a CLIPModel")
    for what, files in (("weights in safetensors", WEIGHTS), ("settings of an image processor", PROCESSOR_FILES)):
        if not any(found for file in files for found in path.glob(file)):
            raise UserError(
                f"--clip={source}: holds no {what} ({files[0]}); save the model, its tokenizer and its image processor"
                " by save_pretrained"
            )
    return path


def _check_size(processor: Any) -> None:
    """Errors: UserError when an image processor makes images of an unheard-of size."""
    sizes = [dict(size) for size in (processor.size, processor.crop_size) if size]
    if any(not 0 < length <= MAX_IMAGE_SIZE for size in sizes for length in size.values() if length is not None):
        raise UserError(f"its image processor makes images of {sizes}, not of 1 to {MAX_IMAGE_SIZE} pixels")
