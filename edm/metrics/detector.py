"""Detectors: what turns images into features and class probabilities.

Two kinds of file hold one: a TorchScript file called as NVIDIA's Inception is, and a `.safetensors` of one of the
classes in DETECTOR_CLASSES (class and constructor arguments in its header; nothing in the file is executed). A
TorchScript file is a program, so only the published one and those that the user names are run.
"""

import json
import os
import sys
import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import torch

import dnnlib
from dnnlib.download import hash_file
from dnnlib.errors import printable
from torch_utils import distributed, persistence
from torch_utils.checkpoint import CHECKSUM
from torch_utils.untrusted import edm_pickle
from torch_utils.untrusted.bounds import parse_json

from .small_classifier import SmallClassifier

DEFAULT_DETECTOR = "inception-2015-12-05"
DETECTOR_CLASSES = {"SmallClassifier": SmallClassifier}
PROBE_RESOLUTION = 32  # of the image with which a TorchScript file is called once, to learn how many features it gives


class Detector(ABC):
    """Features and class probabilities of images; results are float32 on `device`.

    name: the file's name without its suffix.
    path: the file it came from; sha256: that file's hash.
    feature_dim: number of features.
    """

    def __init__(self, path: Path, device: torch.device):
        self.path, self.name, self.device = path, path.stem, device
        self.sha256 = hash_file(path)

    feature_dim: int

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, feature_dim] of uint8 images [N, C, H, W]. Errors: UserError when images don't fit the detector."""
        hidden, _ = self.measure(images)
        assert hidden is not None
        return hidden

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """[N, K] softmax of uint8 images [N, C, H, W]. Errors: UserError, also when the detector has no classes."""
        _, probabilities = self.measure(images, features=False, probabilities=True)
        assert probabilities is not None
        return probabilities

    @abstractmethod
    def check(self, channels: int, resolution: int) -> None:
        """Raises UserError if images of this shape don't fit the detector."""

    @abstractmethod
    def measure(
        self, images: torch.Tensor, features: bool = True, probabilities: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(features, probabilities) of uint8 images [N, C, H, W], in one pass where possible; None if not asked."""


class TorchScriptDetector(Detector):
    """A TorchScript file called `(images, return_features=True)` and `(images, no_output_bias=True)`."""

    def __init__(self, path: Path, device: torch.device):
        super().__init__(path, device)
        self._module = _load_torchscript(path, device)

    @cached_property
    def feature_dim(self) -> int:
        probe = torch.zeros(1, 3, PROBE_RESOLUTION, PROBE_RESOLUTION, dtype=torch.uint8)
        return self.features(probe).shape[1]

    def check(self, channels: int, resolution: int) -> None:
        if channels not in (1, 3):
            raise dnnlib.UserError(f"--detector={self.path} wants images of 1 or 3 channels, these have {channels}")

    @torch.inference_mode()
    def measure(self, images, features=True, probabilities=False):
        self.check(*images.shape[1:3])
        images = images.to(self.device)
        images = images.expand(-1, 3, -1, -1).contiguous() if images.shape[1] == 1 else images
        return (
            self._call(images, return_features=True) if features else None,
            self._call(images, no_output_bias=True) if probabilities else None,
        )

    def _call(self, images: torch.Tensor, **option: bool) -> torch.Tensor:
        try:
            return self._module(images, **option).to(torch.float32)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:  # the latter for what the file itself raises
            raise dnnlib.UserError(
                f"--detector={self.path} can't be called with {next(iter(option))}=True as NVIDIA's Inception is: "
                + str(error).strip().splitlines()[-1]
            ) from error


class ModuleDetector(Detector):
    """A network that lives here, called `(uint8 images) -> (features, logits)`; weights from a `.safetensors`.

    metadata: further entries of the header: how the detector was made, its accuracy.
    """

    def __init__(self, path: Path, device: torch.device):
        super().__init__(path, device)
        self._module, self.metadata = _load_module(path)
        self._module.to(device)
        self.feature_dim = self._module.feature_dim

    def check(self, channels: int, resolution: int) -> None:
        net = self._module
        fits = channels == net.img_channels or (channels, net.img_channels) == (1, 3)
        if not fits or resolution != net.img_resolution:
            raise dnnlib.UserError(
                f"--detector={self.path} measures {net.img_resolution}x{net.img_resolution} images of"
                f" {net.img_channels} channel(s), these are {resolution}x{resolution} with {channels};"
                " use the detector made for them"
            )

    @torch.inference_mode()
    def measure(self, images, features=True, probabilities=False):
        self.check(*images.shape[1:3])
        images = images.to(self.device).expand(-1, self._module.img_channels, -1, -1)
        hidden, logits = self._module(images)
        return hidden if features else None, logits.softmax(1) if probabilities else None


def load_detector(
    source: str | os.PathLike = DEFAULT_DETECTOR, device: torch.device | str = "cpu", chosen_by_user: bool = True
) -> Detector:
    """The detector in a file, behind a URL, or known to `edm.zoo` by name.

    A TorchScript file is a program. One that the user didn't choose is run only if it is a published one.
    Errors: UserError when it can't be found or isn't a detector, or is such a program.
    """
    from edm import zoo

    path = zoo.resolve(source, kind="detector")
    if path.suffix == ".safetensors":
        return ModuleDetector(path, torch.device(device))
    known = {file.sha256 for file in zoo.FILES.values() if file.kind == "detector"}
    if hash_file(path) not in known:
        if not chosen_by_user:
            raise dnnlib.UserError(f"{path} is a program (TorchScript): if you trust it, give it by --detector")
        warning = f"Warning: --detector={path} is a program (TorchScript) and runs as you: use only what you trust"
        if distributed.rank() == 0:
            print(printable(warning), file=sys.stderr, flush=True)
    return TorchScriptDetector(path, torch.device(device))


def save_detector(
    module: torch.nn.Module, path: str | os.PathLike, init_kwargs: dict, dtype: torch.dtype = torch.float16, **metadata
) -> None:
    """Writes a module of one of DETECTOR_CLASSES as `.safetensors`.

    init_kwargs: the arguments its constructor got; metadata: plain values recorded with them.
    Errors: UserError when a weight isn't finite in `dtype`.
    """
    from safetensors.torch import save

    from edm.network_files import checksum

    class_name = type(module).__name__
    assert class_name in DETECTOR_CLASSES
    weights = {
        k: v.detach().cpu().to(dtype if v.is_floating_point() else v.dtype).contiguous()
        for k, v in module.state_dict().items()
    }
    wrong = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if wrong is not None:
        raise dnnlib.UserError(f"{path}: {wrong} holds NaN or infinity as {dtype}: its training has diverged")
    header = {"class_name": class_name, "init_kwargs": json.dumps(init_kwargs), "metadata": json.dumps(metadata)}
    header[CHECKSUM] = checksum(header, weights)
    with dnnlib.write_atomically(path) as file:
        file.write(save(weights, metadata=header))


def _load_module(path: Path) -> tuple[SmallClassifier, dict]:
    from edm.network_files import checked, read_tensors, verified

    try:
        header, weights = read_tensors(path)
        with verified(header, weights, path):
            kwargs, metadata = _arguments(header, path)
            cls = DETECTOR_CLASSES[header["class_name"]]
            module = checked(persistence.construct(cls, (), kwargs, weights, path), path)
    except dnnlib.UserError as error:
        raise dnnlib.UserError(f"--detector={path} is not a detector of this project: {error.message}") from None
    return module.eval().requires_grad_(False), metadata


def _arguments(header: dict[str, str], path: Path) -> tuple[dict, dict]:
    """(constructor arguments, metadata) in the header of a detector's file. Errors: UserError."""
    from edm.network_files import MAX_HEADER_VALUES

    class_name = header.get("class_name")
    if class_name not in DETECTOR_CLASSES:
        raise dnnlib.UserError(f"{path}: its header names the class {class_name}; known: {', '.join(DETECTOR_CLASSES)}")
    try:
        kwargs, metadata = (
            parse_json(header.get(name, "{}"), MAX_HEADER_VALUES) for name in ("init_kwargs", "metadata")
        )
    except (ValueError, RecursionError) as error:
        raise dnnlib.UserError(f"{path}: its header is damaged: {persistence.one_line(error)}") from None
    if type(kwargs) is not dict or type(metadata) is not dict or not edm_pickle.is_plain([kwargs, metadata]):
        raise dnnlib.UserError(f"{path}: its constructor arguments and metadata are not plain values")
    return kwargs, metadata


def _load_torchscript(path: Path, device: torch.device) -> torch.nn.Module:
    """The one place that depends on TorchScript, which PyTorch has deprecated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise dnnlib.UserError(f"--detector={path} is not a TorchScript file; give one, or a .safetensors") from error
