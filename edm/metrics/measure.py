"""One pass over images, on all processes: statistics, inception scores and features."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

import dnnlib
from dnnlib.progress import ProgressBar
from torch_utils import distributed

from .detector import Detector
from .inception_score import InceptionScore
from .sources import ImageSource
from .statistics import FeatureStatistics

DEFAULT_BATCH = 64
GATHERED_ROWS = 4096  # rows of features in one message


@dataclass
class Measured:
    """The results of a pass over images; the keys say how many images, from the first one, an entry covers."""

    statistics: dict[int, FeatureStatistics]
    scores: dict[int, InceptionScore]
    features: torch.Tensor | None  # float32 [N, D] on the CPU

    def is_finite(self) -> bool:
        """Whether all features and probabilities were finite."""
        scores = all(score.is_finite() for score in self.scores.values())
        features = self.features is None or bool(self.features.isfinite().all())
        return scores and features and all(moments.is_finite() for moments in self.statistics.values())


def measure(
    source: ImageSource,
    detector: Detector,
    batch: int = DEFAULT_BATCH,
    statistics: Iterable[int] = (),
    scores: Iterable[int] = (),
    features: int = 0,
    progress: bool = False,
) -> Measured:
    """Passes once over the images of all processes; every process must call it and gets the same result.

    statistics, scores: for each number n, feature statistics or inception scores are taken of the first n images.
    features: how many images' features to keep.
    Errors: UserError when the source has too few images, they don't fit the detector, or its features aren't finite.
    """
    moments = {num: FeatureStatistics(detector.feature_dim, detector.device) for num in statistics}
    scored = {num: InceptionScore(num) for num in scores}
    num_images = max([*moments, *scored, features])
    if source.size is not None and source.size < num_images:
        raise dnnlib.UserError(
            f"{num_images} images are asked for but there are only {source.size}; ask for at most so many by --num"
            " or in the name of the metric"
        )
    if source.channels is not None and source.resolution is not None:
        detector.check(source.channels, source.resolution)
    kept = torch.zeros(features, detector.feature_dim) if features else None
    rank, processes = distributed.rank(), distributed.world_size()
    bar = ProgressBar(num_images, hidden=not progress or rank > 0, desc="measuring")
    with distributed.shared_errors(), bar:
        for start, images in source.batches(num_images, batch, rank, processes):
            distributed.alive()
            hidden, probabilities = detector.measure(images, bool(moments) or features > 0, bool(scored))
            if hidden is not None:
                for num, moment in moments.items():
                    moment.append(hidden[: max(num - start, 0)])
            if probabilities is not None:
                for num, score in scored.items():
                    score.append(probabilities[: max(num - start, 0)], start)
            if kept is not None and hidden is not None and start < features:
                kept[start : start + len(images)] = hidden[: features - start].cpu()
            bar.update(min(len(images) * processes, num_images - bar.n))
    for moment in moments.values():
        moment.merge_processes()
    communication = detector.device if detector.device.type == "cuda" else "cpu"
    for score in scored.values():
        score.merge_processes(communication)
    if kept is not None and processes > 1:
        for rows in kept.split(GATHERED_ROWS):  # each row is zero on all processes but one
            rows.copy_(distributed.all_reduce_sum(rows.to(communication, copy=True)))
    measured = Measured(moments, scored, kept)
    if not measured.is_finite():
        raise dnnlib.UserError(
            f"--detector={detector.path}: its features or probabilities of some images are NaN or infinite: it is"
            " damaged, or overflows on them; use another detector"
        )
    return measured
