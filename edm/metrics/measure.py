"""One pass over images, on all processes: statistics, inception scores and features."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

import dnnlib
from dnnlib.progress import ProgressBar
from torch_utils import distributed

from .detector import Detector
from .ground_colour import colours
from .inception_score import InceptionScore
from .sources import ImageSource
from .statistics import FeatureStatistics
from .text_alignment import TextImageEncoder

DEFAULT_BATCH = 64
GATHERED_ROWS = 4096  # rows of features in one message


@dataclass
class Measured:
    """The results of a pass over images; the keys say how many images, from the first one, an entry covers."""

    statistics: dict[int, FeatureStatistics]
    scores: dict[int, InceptionScore]
    features: torch.Tensor | None  # float32 [N, D] on the CPU
    embeddings: torch.Tensor | None = None  # by a TextImageEncoder, float32 [N, D] on the CPU
    grounds: torch.Tensor | None = None  # their colours, float32 [N, 3] on the CPU

    def is_finite(self) -> bool:
        """Whether all features and probabilities were finite."""
        scores = all(score.is_finite() for score in self.scores.values())
        features = self.features is None or bool(self.features.isfinite().all())
        return scores and features and all(moments.is_finite() for moments in self.statistics.values())


def measure(
    source: ImageSource,
    detector: Detector | None,
    batch: int = DEFAULT_BATCH,
    statistics: Iterable[int] = (),
    scores: Iterable[int] = (),
    features: int = 0,
    progress: bool = False,
    encoder: TextImageEncoder | None = None,
    embeddings: int = 0,
    grounds: int = 0,
) -> Measured:
    """Passes once over the images of all processes; every process must call it and gets the same result.

    statistics, scores: for each number n, feature statistics or inception scores are taken of the first n images.
    features: how many images' features to keep. embeddings, grounds: of how many to keep the
    encoder's embeddings, and the colours of their grounds. detector: may be None where nothing else is taken.
    Errors: UserError when the source has too few images, they don't fit the detector, or its features aren't finite.
    """
    feature_dim, device = (detector.feature_dim, detector.device) if detector is not None else (0, torch.device("cpu"))
    moments = {num: FeatureStatistics(feature_dim, device) for num in statistics}
    scored = {num: InceptionScore(num) for num in scores}
    num_images = max([*moments, *scored, features, embeddings, grounds])
    if source.size is not None and source.size < num_images:
        raise dnnlib.UserError(
            f"{num_images} images are asked for but there are only {source.size}; ask for at most that many by --num"
            " or in the name of the metric"
        )
    if detector is not None and source.channels is not None and source.resolution is not None:
        detector.check(source.channels, source.resolution)
    kept = torch.zeros(features, feature_dim) if features else None
    embedded = torch.zeros(embeddings, encoder.embedding_dim) if encoder is not None and embeddings else None
    ground = torch.zeros(grounds, 3) if grounds else None
    rank, processes = distributed.rank(), distributed.world_size()
    bar = ProgressBar(num_images, hidden=not progress or rank > 0, desc="measuring")
    with distributed.shared_errors(), bar:
        for start, images in source.batches(num_images, batch, rank, processes):
            distributed.alive()
            hidden, probabilities = None, None
            if detector is not None:
                hidden, probabilities = detector.measure(images, bool(moments) or features > 0, bool(scored))
            if hidden is not None:
                for num, moment in moments.items():
                    moment.append(hidden[: max(num - start, 0)])
            if probabilities is not None:
                for num, score in scored.items():
                    score.append(probabilities[: max(num - start, 0)], start)
            if kept is not None and hidden is not None and start < features:
                kept[start : start + len(images)] = hidden[: features - start].cpu()
            if encoder is not None and embedded is not None and start < embeddings:
                rows = embedded[start : start + len(images)]
                rows.copy_(encoder.embed_images(images[: len(rows)]))
            if ground is not None and start < grounds:
                ground[start : start + len(images)] = colours(images[: grounds - start]).cpu()
            bar.update(min(len(images) * processes, num_images - bar.n))
    for moment in moments.values():
        moment.merge_processes()
    communication = device if device.type == "cuda" else "cpu"
    for score in scored.values():
        score.merge_processes(communication)
    for all_rows in (kept, embedded, ground):
        if all_rows is not None and processes > 1:
            for rows in all_rows.split(GATHERED_ROWS):  # each row is zero on all processes but one
                rows.copy_(distributed.all_reduce_sum(rows.to(communication, copy=True)))
    measured = Measured(moments, scored, kept, embedded, ground)
    if detector is not None and not measured.is_finite():
        raise dnnlib.UserError(
            f"--detector={detector.path}: its features or probabilities of some images are NaN or infinite: it is"
            " damaged, or overflows on them; use another detector"
        )
    return measured
