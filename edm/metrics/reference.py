"""Reference statistics: `.npz` files with `mu` and `sigma`, and here also with a record of how they were made.

EDM2's are pickles, {metric: {mu, sigma}}, which are read without running anything in them.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dnnlib
from dnnlib.download import hash_file
from torch_utils import persistence
from torch_utils.checkpoint import CHECKSUM, checksum
from torch_utils.untrusted import edm_pickle
from torch_utils.untrusted.bounds import parse_json
from torch_utils.untrusted.inert_pickle import Array

from .detector import DEFAULT_DETECTOR, Detector, load_detector
from .npz import read_arrays
from .statistics import FeatureStatistics

MAX_REFERENCE_BYTES = 1 << 28  # of sigma: some 5 800 features; checking it takes twice as much again
MAX_RECORD_VALUES = 1000
PICKLED_METRIC = "fid"  # in EDM2's files
ROUNDING = 1e-4  # of the largest variance: how far a covariance may be from symmetric; files may be in float32
RECORD_TYPES = {"detector": str, "detector_sha256": str, "detector_file": str, "source": str}
RECORD_TYPES |= {"num_images": int, "channels": int, "resolution": int}
OPTION = "--ref"  # of fid.py; sid_train.py and edm.train have EDM's name, --data_stat


@dataclass
class Reference:
    """Mean [D] and covariance [D, D] of the features of real images.

    path, sha256: the file they came from. record: how they were made; empty for EDM's own files. Its keys:
    detector, detector_sha256, detector_file (in the reference's folder), num_images, source, channels, resolution.
    has_checksum: whether the file has one, which was verified. option: of the command line, that names the file.
    """

    mu: np.ndarray
    sigma: np.ndarray
    path: Path
    sha256: str
    record: dict = field(default_factory=dict)
    has_checksum: bool = False
    option: str = OPTION

    def check(self, detector: Detector) -> None:
        """Raises UserError if these statistics aren't of this detector's features."""
        recorded = self.record.get("detector_sha256", detector.sha256)
        if recorded != detector.sha256:
            raise dnnlib.UserError(
                f"{self.option}={self.path} was made with the detector {self.record.get('detector')} (sha256"
                f" {recorded[:12]}…), not with {detector.path} ({detector.sha256[:12]}…); give that one by --detector"
                f" or make a new {self.option}"
            )
        if len(self.mu) != detector.feature_dim:
            raise dnnlib.UserError(
                f"{self.option}={self.path} holds {len(self.mu)} features, --detector={detector.path} gives"
                f" {detector.feature_dim}; give the detector that made the reference"
            )

    def check_images(self, channels: int, resolution: int) -> None:
        """Raises UserError if images of this shape are not of the size that these statistics record."""
        own = [self.record.get("channels", channels), self.record.get("resolution", resolution)]
        if own != [channels, resolution]:
            raise dnnlib.UserError(
                f"{self.option}={self.path} is of {own[1]}x{own[1]} images with {own[0]} channel(s), these are"
                f" {resolution}x{resolution} with {channels}; bring them to one size with edm.dataset_tool"
            )

    def load_detector(self, device: torch.device | str = "cpu", override: str | os.PathLike | None = None) -> Detector:
        """The detector that made these statistics: `override`, else the file recorded, else the name recorded.

        Errors: UserError when it isn't there, or is a different one.
        """
        # Names only: a reference from elsewhere must not choose a URL or a path on this machine.
        name = Path(self.record.get("detector", DEFAULT_DETECTOR)).name
        beside = self.path.parent / Path(self.record.get("detector_file", name)).name
        source = override or (beside if beside.is_file() else name)
        try:
            detector = load_detector(source, device, chosen_by_user=override is not None)
        except dnnlib.UserError as error:
            if override or not self.record:
                raise
            raise dnnlib.UserError(
                f"{self.option}={self.path} was made with the detector {name}, which can't be taken from {beside};"
                f" give it by --detector ({error.message})"
            ) from error
        self.check(detector)
        return detector


def load_reference(source: str | os.PathLike, option: str = OPTION) -> Reference:
    """Reads reference statistics from a file, a URL, or a name known to `edm.zoo`.

    option: of the command line, that names them.

    Errors: UserError when they can't be found or read.
    """
    from edm import zoo

    path = zoo.resolve(source, kind="reference")
    try:
        content = _read(path)
        has_checksum = CHECKSUM in content
        if has_checksum and str(content.pop(CHECKSUM)) != _checksum(content):
            raise ValueError("it is damaged: its contents don't have their checksum")
        mu, sigma = content["mu"].astype(np.float64, copy=False), content["sigma"].astype(np.float64, copy=False)
        record = _checked_record(parse_json(str(content["record"]), MAX_RECORD_VALUES)) if "record" in content else {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise dnnlib.UserError(
            f"{option}={source} is not an .npz with mu and sigma, nor EDM2's .pkl ({persistence.one_line(error)}); make"
            " one by `fid.py ref`"
        ) from None
    if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not np.isfinite(mu).all() or not _is_covariance(sigma):
        raise dnnlib.UserError(
            f"{option}={source}: mu {mu.shape} and sigma {sigma.shape} are not a mean and a covariance of finite"
            " numbers; fetch the file again, or make one by `fid.py ref`"
        )
    return Reference(mu, sigma, path, hash_file(path), record, has_checksum, option)


def _read(path: Path) -> dict[str, np.ndarray]:
    """mu and sigma, and in files from here their record and checksum. Errors: UserError, ValueError and KeyError."""
    if path.suffix != ".pkl":
        return read_arrays(path, {"mu": "f", "sigma": "f", "record": "U", CHECKSUM: "U"}, MAX_REFERENCE_BYTES)
    contents = edm_pickle.read(path)
    values = contents.get(PICKLED_METRIC)
    arrays = {name: values.get(name) for name in ("mu", "sigma")} if type(values) is dict else {}
    found = {name: array.numpy() for name, array in arrays.items() if isinstance(array, Array)}
    if len(found) < 2:
        raise ValueError(f"it has no statistics for {PICKLED_METRIC!r}")
    if any(array.dtype.kind != "f" for array in found.values()):
        raise ValueError("its statistics are no floating-point numbers")
    return found


def _checksum(content: dict[str, np.ndarray]) -> str:
    """sha256, in hex, of arrays by name: type, shape and values."""
    values = {
        name: array.tolist() if array.dtype.kind == "U" else torch.as_tensor(array)
        for name, array in sorted(content.items())
    }
    return checksum(values)


def _is_covariance(sigma: np.ndarray) -> bool:
    """Whether a square matrix is finite, symmetric up to rounding, and has no negative variance."""
    if not np.isfinite(sigma).all():
        return False
    variances = sigma.diagonal()
    rounding = ROUNDING * variances.max(initial=0)
    return bool((variances >= 0).all() and (np.abs(sigma - sigma.T) <= rounding).all())


def _checked_record(record: Any) -> dict:
    """The record, if the entries that are read have the types that `save_reference` writes."""
    if type(record) is not dict:
        raise ValueError("its record is not a dict")
    for name, kind in RECORD_TYPES.items():
        if name in record and type(record[name]) is not kind:
            raise ValueError(f"{name} in its record is not {kind.__name__}")
    return record


def save_reference(
    path: str | os.PathLike,
    statistics: FeatureStatistics,
    detector: Detector,
    source: str,
    channels: int,
    resolution: int,
) -> None:
    """Writes reference statistics that `load_reference` and EDM's tools read.

    source: words that say which images they are of. The detector is recorded by name and hash, and by its file
    name if it lies in the same folder, so that both can move together.
    """
    record = {
        "detector": detector.name,
        "detector_sha256": detector.sha256,
        "num_images": statistics.n,
        "source": source,
        "channels": channels,
        "resolution": resolution,
    }
    if detector.path.resolve().parent == Path(path).resolve().parent:
        record["detector_file"] = detector.path.name
    content: dict[str, Any] = {"mu": statistics.mu, "sigma": statistics.sigma, "record": np.array(json.dumps(record))}
    content[CHECKSUM] = np.array(_checksum(content))
    with dnnlib.write_atomically(path) as file:
        np.savez(file, **content)
