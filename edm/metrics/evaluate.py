"""One pass over images yields every metric asked for, each with a record of how it was made."""

import copy
import math
import os
import platform
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

import dnnlib
from torch_utils import distributed

from .data_reference import data_reference
from .detector import DEFAULT_DETECTOR, Detector, load_detector
from .frechet import frechet_distance
from .ground_colour import named, share_right
from .inception_score import SPLITS
from .kid import kernel_distance
from .measure import DEFAULT_BATCH, Measured, measure
from .precision_recall import NEIGHBOUR, precision_recall
from .reference import Reference, load_reference
from .sources import ImageSource, open_data
from .text_alignment import Alignment, TextImageEncoder, align, distinct

KINDS = ("fid", "is", "kid", "pr", "clip", "ground")
OF_PROMPTS = ("clip", "ground")  # kinds that compare images with their prompts, and take no detector
NAME_PATTERN = re.compile(
    rf"(?P<kind>{'|'.join(KINDS)})(?P<num>\d{{1,9}})(?:(?P<kilo>k)(?P<k>\d{{1,9}})?)?(?P<full>_full)?",
    re.ASCII,
)


@dataclass(frozen=True)
class Metric:
    """What a name like `fid50k_full` says: kind, number of images, and for precision/recall the neighbour k.

    full: for kid and pr, compare with all real images; without, with as many as are generated. FID compares with
    its reference either way.
    """

    name: str
    kind: str
    num: int
    k: int
    full: bool


def parse_metric(name: str) -> Metric:
    """The metric of a name: its kind; the number of images (`50k`, `1000`); for pr the neighbour; `_full`.

    Errors: UserError for any other name, and for a number of images too small for the metric.
    """
    match = NAME_PATTERN.fullmatch(name)
    if match is None or (match["k"] and match["kind"] != "pr"):
        raise dnnlib.UserError(
            f"--metrics={name} is unknown; use names like fid50k, is50k, kid50k_full, pr50k3_full, clip1k"
        )
    kind, k = match["kind"], int(match["k"] or NEIGHBOUR)
    num = int(match["num"]) * (1000 if match["kilo"] else 1)
    least = {"fid": 2, "is": SPLITS, "kid": 2, "pr": k + 1, "clip": 2, "ground": 1}[kind]
    if num < least or k < 1:
        raise dnnlib.UserError(f"--metrics={name}: {kind} needs at least {least} images")
    return Metric(name, kind, num, k, match["full"] is not None)


def fid_name(num: int) -> str:
    """`fid50k` for 50000, `fid1234` for 1234."""
    return f"fid{num // 1000}k" if num and num % 1000 == 0 else f"fid{num}"


class Evaluator:
    """Metrics of image sources, with the detector, the reference and the real images' features loaded once.

    metrics: names as `parse_metric` reads them.
    reference: for fid: a Reference, or its path, URL or name; without, that of `data`, kept in the cache folder.
    detector: a Detector, or its path, URL or name; by default the one that made the reference.
    encoder: for clip, which compares the images with their prompts; --clip in the command line.
    data: real images for kid and pr, and for fid without `reference`: the path of a folder, zip or `.npz` with arr_0;
        for kid and pr also an ImageSource.
    batch: images per process and step; the last digits of features depend on it, on nothing else.
    alignments: on process 0, what the largest clip metric measured, one per call.
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
    ):
        self.metrics = [parse_metric(name) for name in metrics]
        if not self.metrics:
            raise dnnlib.UserError("--metrics is empty; give names like fid50k,is50k")
        for metric in self.metrics:
            if metric.kind == "fid" and reference is None and isinstance(data, ImageSource | None):
                raise dnnlib.UserError(f"--metrics={metric.name} needs reference statistics: give --ref, or --data")
            if metric.kind in ("kid", "pr") and data is None:
                raise dnnlib.UserError(f"--metrics={metric.name} needs real images: give --data")
            if metric.kind == "clip" and encoder is None:
                raise dnnlib.UserError(
                    f"--metrics={metric.name} compares images with their prompts: run fid.py eval with --clip=MODEL, a"
                    " folder or a name on the Hugging Face Hub"
                )
        self._encoder, self._prompts, self._embedded_prompts = encoder, [], torch.zeros(0)
        self.alignments: list[Alignment] = []
        self._detector: Detector | None = None  # where only prompts are compared
        self.reference = reference if isinstance(reference, Reference | None) else load_reference(reference)
        if any(metric.kind not in OF_PROMPTS for metric in self.metrics):
            if isinstance(detector, Detector):
                self._detector = detector
                if self.reference is not None:
                    self.reference.check(detector)
            elif self.reference is not None:
                self._detector = self.reference.load_detector(device, detector)
            else:
                self._detector = load_detector(detector or DEFAULT_DETECTOR, device)
        self._batch, self._progress = batch, progress
        if self.reference is None and any(metric.kind == "fid" for metric in self.metrics):
            assert not isinstance(data, ImageSource | None)  # refused above
            self.reference = data_reference(data, self.detector, batch, progress)
        self._data = data if isinstance(data, ImageSource | None) else open_data(data)
        self._real: torch.Tensor | None = None  # features

    def only(self, *metrics: str) -> "Evaluator":
        """An evaluator of fewer metrics, with the same detector, reference and images."""
        found = copy.copy(self)
        found.metrics = [metric for metric in self.metrics if metric.name in metrics]
        return found

    @property
    def detector(self) -> Detector:
        """The detector of the metrics that take one."""
        assert self._detector is not None
        return self._detector

    def __call__(self, source: ImageSource) -> list[dict]:
        """A JSON-serialisable record for each metric, in order; every process must call it and gets them all."""
        if self.reference is not None and source.channels is not None and source.resolution is not None:
            self.reference.check_images(source.channels, source.resolution)
        of_kind = {kind: {m.num for m in self.metrics if m.kind == kind} for kind in KINDS}
        kept = max(of_kind["kid"] | of_kind["pr"], default=0)
        if kept and self._real is None:
            self._real = self._measure_real()
        embedded = max(of_kind["clip"], default=0)
        grounds = max(of_kind["ground"], default=0)
        texts, own = self._prompts_of(source, max(embedded, grounds)) if embedded or grounds else ([], [])
        asked = [texts[number] for number in own[:grounds]]
        named(asked)  # before the images are made
        prompts, numbers = distinct(texts) if embedded else ([], torch.zeros(0))
        measured = measure(
            source,
            self._detector,
            self._batch,
            statistics=of_kind["fid"],
            scores=of_kind["is"],
            features=kept,
            progress=self._progress,
            encoder=self._encoder,
            embeddings=embedded,
            grounds=grounds,
        )
        records = None
        with distributed.shared_errors():
            if distributed.rank() == 0:
                if embedded:
                    self.alignments.append(self._align(measured, prompts, numbers[own[:embedded]]))
                records = [
                    self._record(metric, self._finite(metric, measured, asked), source) for metric in self.metrics
                ]
        return distributed.from_process_0(records)

    def _measure_real(self) -> torch.Tensor:
        assert self._data is not None  # as the constructor made sure
        size, wanted = self._data.size, 0
        for metric in self.metrics:
            if metric.kind in ("kid", "pr"):
                if metric.full and size is None:
                    raise ValueError(
                        f"{metric.name} compares with all real images, but `data` doesn't tell their number"
                    )
                num = metric.num if size is None else size if metric.full else min(metric.num, size)
                if num < (2 if metric.kind == "kid" else metric.k + 1):
                    raise dnnlib.UserError(f"--metrics={metric.name} needs more than the {num} real images of --data")
                wanted = max(wanted, num)
        measured = measure(self._data, self.detector, self._batch, features=wanted, progress=self._progress)
        assert measured.features is not None
        return measured.features

    def _prompts_of(self, source: ImageSource, num: int) -> tuple[Sequence[str], list[int]]:
        """(all prompts of a source, which of them each of its first `num` images has)"""
        found = source.prompts(num)
        if found is None:
            raise dnnlib.UserError(
                "--metrics: clip and ground compare images with their prompts, and these images have none"
            )
        return found

    def _align(self, measured: Measured, prompts: list[str], numbers: torch.Tensor) -> Alignment:
        assert self._encoder is not None
        assert measured.embeddings is not None
        if prompts != self._prompts:
            self._prompts, self._embedded_prompts = prompts, self._encoder.embed_texts(prompts)
        embedded = self._embedded_prompts
        return align(measured.embeddings.to(embedded.device), embedded, prompts, numbers)

    def _finite(self, metric: Metric, measured: Measured, prompts: list[str]) -> dict[str, float]:
        values = self._values(metric, measured, prompts)
        if not all(map(math.isfinite, values.values())):
            raise dnnlib.UserError(f"--metrics={metric.name}: comes out as {values}; check --ref and --detector")
        return values

    def _values(self, metric: Metric, measured: Measured, prompts: list[str]) -> dict[str, float]:
        if metric.kind == "clip":
            return self.alignments[-1].first(metric.num).values()
        if metric.kind == "ground":
            assert measured.grounds is not None
            return {"ground": share_right(measured.grounds[: metric.num], prompts[: metric.num])}
        device = self.detector.device
        if metric.kind == "fid":
            assert self.reference is not None
            moments = measured.statistics[metric.num]
            if moments.n <= moments.feature_dim:
                warnings.warn(
                    f"{metric.name}: the covariance of {moments.n} images has a deficient rank in {moments.feature_dim}"
                    " features; the value is biased upwards, so compare it with values of as many images only",
                    stacklevel=3,
                )
            return {"fid": frechet_distance(moments.mu, moments.sigma, self.reference.mu, self.reference.sigma)}
        if metric.kind == "is":
            mean, std = measured.scores[metric.num].result()
            return {"is": mean, "is_std": std}
        assert self._real is not None
        assert measured.features is not None
        real = (self._real if metric.full else self._real[: metric.num]).to(device)
        generated = measured.features[: metric.num].to(device)
        if metric.kind == "kid":
            mean, std = kernel_distance(real, generated)
            return {"kid": mean, "kid_std": std}
        precision, recall = precision_recall(real, generated, metric.k)
        return {"precision": precision, "recall": recall}

    def _record(self, metric: Metric, values: dict[str, float], source: ImageSource) -> dict:
        record = {"metric": metric.name, "value": next(iter(values.values())), "values": values}
        record |= {"num_images": metric.num, **source.describe(metric.num)}
        if metric.kind == "fid":
            assert self.reference is not None
            made = self.reference.record
            record |= {"reference": self.reference.path.name, "reference_sha256": self.reference.sha256}
            record |= {"reference_images": made.get("num_images"), "reference_source": made.get("source")}
        if metric.kind in ("kid", "pr"):
            assert self._real is not None
            assert self._data is not None
            num_real = len(self._real) if metric.full else min(metric.num, len(self._real))
            record |= {"real_images": num_real, "real_source": self._data.describe(num_real).get("images")}
        if metric.kind == "clip":
            record["ranked_among"] = len(self._prompts)
        detector = self._encoder if metric.kind == "clip" else self._detector
        if metric.kind != "ground":
            assert detector is not None
            record |= {"detector": detector.name, "detector_sha256": detector.sha256}
        device = "cpu" if detector is None else detector.device.type
        versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
        return record | {"batch": self._batch, "device": device, "versions": versions}


def evaluate(source: ImageSource, metrics: Sequence[str] = ("fid50k",), **options) -> list[dict]:
    """One record per metric of the images of `source`; options as Evaluator takes them."""
    return Evaluator(metrics, **options)(source)
