"""One pass over images yields every metric asked for, each with a record of how it was made."""

import copy
import math
import os
import platform
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import dnnlib
from torch_utils import distributed

from .caption_template import CaptionTemplate, template_beside
from .data_reference import data_reference
from .detector import DEFAULT_DETECTOR, Detector, load_detector
from .fid import FrechetMetric
from .ground_colour import GroundMetric
from .inception_score import InceptionMetric
from .kid import KernelMetric
from .measure import DEFAULT_BATCH, FEATURES, Collection, Rows, measure
from .metric import CAPTIONS, DETECTOR, ENCODER, REAL, REFERENCE, Metric, TextImageEncoder, Tools
from .picture_name import NameMetric
from .precision_recall import PrecisionRecallMetric
from .reference import Reference, load_reference
from .sources import ImageSource, open_data
from .text_alignment import ClipMetric

KINDS: dict[str, type[Metric]] = {
    kind.kind: kind
    for kind in (
        *(FrechetMetric, InceptionMetric, KernelMetric, PrecisionRecallMetric, ClipMetric, GroundMetric, NameMetric),
    )
}
NAME_PATTERN = re.compile(
    r"(?P<kind>[a-z]+)(?P<num>\d{1,9})(?:(?P<kilo>k)(?P<k>\d{1,9})?)?(?P<full>_full)?",
    re.ASCII,
)
LACKING = {  # what to say where an evaluator isn't given what a metric needs
    REFERENCE: "needs reference statistics: give --ref, or --data",
    REAL: "needs real images: give --data",
    ENCODER: (
        "compares images with their prompts: run fid.py eval with --clip=MODEL, a folder or a name on the Hugging Face"
        " Hub"
    ),
    CAPTIONS: "looks for a part of the prompts in the images: give --prompts=FILE, with captions.json next to it",
}


def parse_metric(name: str) -> Metric:
    """The metric of a name: its kind; the number of images (`50k`, `1000`); for pr the neighbour; `_full`.

    Errors: UserError for any other name, and for a number of images too small for the metric.
    """
    match = NAME_PATTERN.fullmatch(name)
    kind = None if match is None else KINDS.get(match["kind"])
    if match is None or kind is None or (match["k"] and kind.default_k is None):
        raise dnnlib.UserError(
            f"--metrics={name} is unknown; use names like fid50k, is50k, kid50k_full, pr50k3_full, clip1k"
        )
    num, k = int(match["num"]) * (1000 if match["kilo"] else 1), int(match["k"] or kind.default_k or 0)
    metric = kind(name, num, k, match["full"] is not None)
    if num < metric.least or (kind.default_k is not None and k < 1):
        raise dnnlib.UserError(f"--metrics={name}: {kind.kind} needs at least {metric.least} images")
    return metric


def captions_for(metrics: Sequence[str], prompts: str | None) -> CaptionTemplate | None:
    """How the prompts of a file are built, if one of the metrics needs that and there are prompts.

    Errors: UserError when captions.json next to the file doesn't say it.
    """
    needed = any(CAPTIONS in parse_metric(name).needs for name in metrics)
    return template_beside(prompts) if needed and prompts else None


def fid_name(num: int) -> str:
    """`fid50k` for 50000, `fid1234` for 1234."""
    return f"fid{num // 1000}k" if num and num % 1000 == 0 else f"fid{num}"


class Evaluator:
    """Metrics of image sources, with the detector, the reference and the real images' features loaded once.

    metrics: names as `parse_metric` reads them.
    reference: for fid: a Reference, or its path, URL or name; without, that of `data`, kept in the cache folder.
    detector: a Detector, or its path, URL or name; by default the one that made the reference.
    encoder: for clip and name, which compare the images with their prompts; --clip in the command line.
    captions: for ground and name: how the prompts are built.
    data: real images for kid and pr, and for fid without `reference`: the path of a folder, zip or `.npz` with arr_0;
        for kid and pr also an ImageSource.
    batch: images per process and step; the last digits of features depend on it, on nothing else.
    Errors: UserError, here and in the call, naming the option and the remedy.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("fid50k",),
        reference: Reference | str | os.PathLike | None = None,
        detector: Detector | str | os.PathLike | None = None,
        data: ImageSource | str | os.PathLike | None = None,
        batch: int = DEFAULT_BATCH,
        device: torch.device | str = "cpu",
        progress: bool = False,
        encoder: TextImageEncoder | None = None,
        captions: CaptionTemplate | None = None,
    ):
        self.metrics = [parse_metric(name) for name in metrics]
        if not self.metrics:
            raise dnnlib.UserError("--metrics is empty; give names like fid50k,is50k")
        data_path = None if isinstance(data, ImageSource) else data
        given = {DETECTOR: True, REFERENCE: reference is not None or data_path is not None}
        given |= {REAL: data is not None, ENCODER: encoder is not None, CAPTIONS: captions is not None}
        for metric in self.metrics:
            for need in metric.needs:
                if not given[need]:
                    raise dnnlib.UserError(f"--metrics={metric.name} {LACKING[need]}")
        needed = {need for metric in self.metrics for need in metric.needs}
        self._batch, self._progress = batch, progress
        loaded = reference if isinstance(reference, Reference | None) else load_reference(reference)
        self._tools = Tools(reference=loaded, encoder=encoder, captions=captions)
        if DETECTOR in needed:
            self._tools.detector = find_detector(detector, loaded, device)
        if REFERENCE in needed and loaded is None:
            assert data_path is not None  # refused above
            self._tools.reference = data_reference(data_path, self.detector, batch, progress)
        self._data = data if isinstance(data, ImageSource | None) else open_data(data)

    def only(self, *metrics: str) -> "Evaluator":
        """An evaluator of fewer metrics, with the same detector, reference and images."""
        found = copy.copy(self)
        found.metrics = [metric for metric in self.metrics if metric.name in metrics]
        return found

    @property
    def detector(self) -> Detector:
        """The detector of the metrics that take one."""
        assert self._tools.detector is not None
        return self._tools.detector

    @property
    def reference(self) -> Reference | None:
        """The reference statistics, if any metric takes some."""
        return self._tools.reference

    def check_images(self, channels: int, resolution: int) -> None:
        """Errors: UserError when images of this shape are not what the reference and the detector were made for."""
        if self._tools.reference is not None:
            self._tools.reference.check_images(channels, resolution)
        if self._tools.detector is not None:
            self._tools.detector.check(channels, resolution)

    def __call__(self, source: ImageSource) -> list[dict]:
        """A JSON-serialisable record for each metric, in order; every process must call it and gets them all."""
        tools = self._tools
        if source.channels is not None and source.resolution is not None:
            self.check_images(source.channels, source.resolution)
        largest = {metric.shares: metric for metric in sorted(self.metrics, key=lambda metric: metric.num)}
        # Each may refuse the source, and then no images are made.
        collections = {shares: metric.collect(source, tools) for shares, metric in largest.items()}
        if any(REAL in metric.needs for metric in self.metrics):
            self._measure_real()
        measure(source, collections.values(), tools.detector, self._batch, self._progress)
        records = None
        with distributed.shared_errors():
            if distributed.rank() == 0:
                records = [self._record(metric, collections[metric.shares].into, source) for metric in self.metrics]
        return distributed.from_process_0(records)

    def _measure_real(self) -> None:
        """Measures as many real images as the metrics compare with, unless so many are measured already."""
        assert self._data is not None  # as the constructor made sure
        size, wanted, known = self._data.size, 0, self._tools.real
        for metric in self.metrics:
            if REAL in metric.needs:
                if metric.full and size is None:
                    raise ValueError(
                        f"{metric.name} compares with all real images, but `data` doesn't tell their number"
                    )
                num = metric.num if size is None else size if metric.full else min(metric.num, size)
                if num < metric.least:
                    raise dnnlib.UserError(f"--metrics={metric.name} needs more than the {num} real images of --data")
                wanted = max(wanted, num)
        if known is None or len(known) < wanted:
            rows = Rows(wanted, self.detector.feature_dim)
            measure(self._data, [Collection(wanted, FEATURES, rows)], self.detector, self._batch, self._progress)
            self._tools.real = rows.values

    def _record(self, metric: Metric, found: Any, source: ImageSource) -> dict:
        """The record of a metric. found: the accumulator of what it collects.

        Errors: UserError when a value isn't finite.
        """
        tools, values = self._tools, metric.values(found, self._tools)
        if not all(map(math.isfinite, values.values())):
            raise dnnlib.UserError(f"--metrics={metric.name}: comes out as {values}; check --ref and --detector")
        record = {"metric": metric.name, "value": next(iter(values.values())), "values": values}
        record |= {"num_images": metric.num, **source.describe(metric.num)}
        if REFERENCE in metric.needs:
            assert tools.reference is not None
            made = tools.reference.record
            record |= {"reference": tools.reference.path.name, "reference_sha256": tools.reference.sha256}
            record |= {"reference_images": made.get("num_images"), "reference_source": made.get("source")}
        if REAL in metric.needs:
            assert tools.real is not None
            assert self._data is not None
            num_real = len(tools.real) if metric.full else min(metric.num, len(tools.real))
            record |= {"real_images": num_real, "real_source": self._data.describe(num_real).get("images")}
        record |= metric.details(found)
        network = tools.encoder if ENCODER in metric.needs else tools.detector if DETECTOR in metric.needs else None
        if network is not None:
            record |= {"detector": network.name, "detector_sha256": network.sha256}
        device = "cpu" if network is None else network.device.type
        versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
        return record | {"batch": self._batch, "device": device, "versions": versions}


def find_detector(
    detector: Detector | str | os.PathLike | None, reference: Reference | None, device: torch.device | str
) -> Detector:
    """The detector that a user asks for, by default that of the reference, or the published one.

    Errors: UserError when it isn't the one that made the reference.
    """
    if isinstance(detector, Detector):
        if reference is not None:
            reference.check(detector)
        return detector
    if reference is not None:
        return reference.load_detector(device, detector)
    return load_detector(detector or DEFAULT_DETECTOR, device)


def evaluate(source: ImageSource, metrics: Sequence[str] = ("fid50k",), **options) -> list[dict]:
    """One record per metric of the images of `source`; options as Evaluator takes them."""
    return Evaluator(metrics, **options)(source)
