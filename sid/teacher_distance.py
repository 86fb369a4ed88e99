"""How far a generator's images are from its teacher's own samples; needs neither data nor a detector."""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from edm.latents import decoder_of
from edm.metrics.energy import energy_distance, energy_distance_of_vectors
from edm.sampler import generate_all
from training.conditions import conditions_of
from training.denoiser import DenoiserModule, known_sigma, noise_range, sigma_data
from training.moments import Moments
from training.steps import INIT_SIGMA

from .calibration import calibrate
from .monitor.clusters import shares
from .teacher_clusters import ClusterCounts, SampleClusters, points_of
from .teacher_features import BlockFeatures, FeatureDistance
from .teacher_samples import BATCH, Samples, teacher_samples

FIRST_SEED = 1 << 20  # of one-step images: other noise than the teacher's samples have
DETAIL_LEVEL = 0.1  # noise level of the corrections, in units of the data's standard deviation
FEATURE_LEVEL = 0.2  # of the features, likewise
LEAST_VISIBLE = 2 / 255  # corrections of less than an 8-bit step per pixel are rounding
SHOWN_CLUSTERS, SHOWN_IMAGES = 3, 16  # examples of what the images lack most, and as many of the teacher's


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far images are from the teacher's samples.

    pixels: energy distance of the images. detail: that of the teacher's corrections. Each near 0 for its samples.
    features: Fréchet distance in the teacher's own features, near 1 for its samples; None if its blocks can't be read
    or answer the same to all of them.
    clusters: images in each cluster of the teacher's samples.
    examples: {cluster: uint8 [2, N, C, H, W]} for those that the images lack most surely: the teacher's samples and the
    images that are nearest to its centre.
    """

    pixels: float
    detail: float
    features: float | None = None
    clusters: ClusterCounts | None = None
    examples: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def value(self) -> float:
        return self.pixels + self.detail


class TeacherDistance:
    """Measures networks against samples of the teacher.

    The distance is the sum of two energy distances. That of pixels at three scales sees brightness, colours and layout.
    That of the teacher's corrections D(x + sigma n; sigma) - x, at a low sigma, sees fine detail: it is what told the
    better of two settings apart on letters, where pixels chose the worse one (docs/ablations.md).
    Both are blind to the last steps towards the teacher, where the Fréchet distance in the teacher's own features
    still follows FID (`sid.teacher_features`). What kinds of images are missing is counted in clusters of the samples
    (`sid.teacher_clusters`).

    teacher: a denoiser, on its device and in eval mode; it isn't changed. It stays in use here.
    samples: what `teacher_samples` made; None calls it, as a group of several processes can't.
    keep: whether to keep a copy, on the CPU, of a teacher whose weights change later.
    calibrates: whether to measure up to which noise level to train; `calibration` is None otherwise.
    finds_moments: whether to find those of the samples, with all directions; `moments` is None otherwise.
    """

    def __init__(
        self,
        teacher: DenoiserModule,
        samples: Samples | None = None,
        keep: bool = False,
        calibrates: bool = False,
        finds_moments: bool = False,
    ):
        made, self.samples = samples or teacher_samples(teacher)
        self._device = next(teacher.parameters()).device
        self._moves = keep and self._device.type != "cpu"
        self._teacher = copy.deepcopy(teacher) if keep else teacher
        with self._teacher_at_hand():
            self.moments = Moments.of(made) if finds_moments else None
            self.calibration = calibrate(self._teacher, made, range(len(made))) if calibrates else None
            clean = decoder_of(self._teacher).from_images(self.samples)
            self._corrections = self._correct(clean)
            self._blocks = self._find_blocks(clean[:2])
            self._feature_distance = self._find_feature_distance(clean)
        self._clusters = SampleClusters(points_of(self.samples))

    def __call__(self, net: Any, **options: Any) -> Distance:
        """The distance of the images that a network makes with `options`, those of `generate_all`."""
        images = self._images(net, **options)
        with self._teacher_at_hand():
            clean = decoder_of(self._teacher).from_images(images)
            corrections = self._correct(clean)
            features = self._feature_distance and self._feature_distance(self._features(clean))
        visible = LEAST_VISIBLE * math.sqrt(corrections[0].numel())
        detail = energy_distance_of_vectors(corrections, self._corrections, floor=visible)
        found = Distance(energy_distance(images, self.samples), detail, features)
        return self._sorted_into_clusters(found, images)

    def of_pixels(self, net: Any, **options: Any) -> float:
        """The first part of the distance alone."""
        return energy_distance(self._images(net, **options), self.samples)

    @functools.cached_property
    def features_white(self) -> float | None:
        """`features` of the teacher's own images of one evaluation, of plain noise of the usual level: a yardstick that
        no generator's start changes. None if its blocks can't be read.
        """
        if self._feature_distance is None:
            return None
        low, high = noise_range(self._teacher)
        with self._teacher_at_hand():
            images = self._images(self._teacher, sampler="one-step", init_sigma=min(max(INIT_SIGMA, low), high))
            return self._feature_distance(self._features(decoder_of(self._teacher).from_images(images)))

    def _sorted_into_clusters(self, distance: Distance, images: torch.Tensor) -> Distance:
        clusters, points = self._clusters, points_of(images)
        counts, examples = clusters(points), {}
        for cluster in [share.cluster for share in shares(dataclasses.asdict(counts))[:SHOWN_CLUSTERS]]:
            known, made = (clusters.nearest(x, cluster, SHOWN_IMAGES) for x in (clusters.samples, points))
            examples[cluster] = torch.stack([self.samples[known], images[made]])
        return dataclasses.replace(distance, clusters=counts, examples=examples)

    def _images(self, net: Any, **options: Any) -> torch.Tensor:
        return generate_all(net, range(FIRST_SEED, FIRST_SEED + len(self.samples)), **{"batch": BATCH, **options})

    @contextlib.contextmanager
    def _teacher_at_hand(self) -> Iterator[None]:
        """Meanwhile the teacher is on its device, and nothing records gradients."""
        self._teacher.to(self._device)
        try:
            with torch.no_grad():
                yield
        finally:
            if self._moves:
                self._teacher.to("cpu")

    def _correct(self, clean: torch.Tensor) -> torch.Tensor:
        """What the teacher changes in noisy images, float32 [N, C * H * W] on the CPU. clean: [N, C, H, W]."""
        denoised = [denoise().to("cpu", torch.float32) for denoise in self._noisy(clean, DETAIL_LEVEL)]
        return (torch.cat(denoised) - clean).flatten(1)

    def _find_blocks(self, clean: torch.Tensor) -> BlockFeatures | None:
        try:
            return BlockFeatures(self._teacher, next(self._noisy(clean, FEATURE_LEVEL)))
        except LookupError:
            return None

    def _find_feature_distance(self, clean: torch.Tensor) -> FeatureDistance | None:
        if self._blocks is None:
            return None
        try:
            return FeatureDistance(self._features(clean))
        except LookupError:
            return None

    def _features(self, clean: torch.Tensor) -> torch.Tensor:
        """The teacher's features of noisy images, float32 [N, D] on the CPU. clean: [N, C, H, W]."""
        assert self._blocks is not None
        parts = self._noisy(clean, FEATURE_LEVEL)
        return torch.cat([self._blocks.read(self._teacher, denoise) for denoise in parts])

    def _noisy(self, clean: torch.Tensor, level: float) -> Iterator[Callable[[], torch.Tensor]]:
        """A call for each batch that denoises it at `level`, in units of the data's standard deviation.

        The noise is the same at every call.
        """
        generator = torch.Generator().manual_seed(FIRST_SEED)
        sigma = known_sigma(self._teacher, torch.tensor(level * sigma_data(self._teacher))).item()
        for part in clean.split(BATCH):
            noisy = (part + sigma * torch.randn(part.shape, generator=generator)).to(self._device)
            condition = conditions_of(self._teacher).null(len(part), self._device)
            levels = torch.full([len(part), 1, 1, 1], sigma, device=self._device)
            yield functools.partial(self._teacher, noisy, levels, condition)
