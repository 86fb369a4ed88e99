"""FID: the Fréchet distance of images' features from reference statistics."""

import warnings

from .frechet import frechet_distance
from .measure import FEATURES, Collection
from .metric import DETECTOR, REFERENCE, Metric, Tools
from .sources import ImageSource
from .statistics import FeatureStatistics


class FrechetMetric(Metric):
    """FID (`edm.metrics.frechet`), with a warning where there are too few images for the covariance."""

    kind, needs = "fid", (DETECTOR, REFERENCE)

    def collect(self, source: ImageSource, tools: Tools) -> Collection:
        assert tools.detector is not None
        return Collection(self.num, FEATURES, FeatureStatistics(tools.detector.feature_dim, tools.detector.device))

    def values(self, found: FeatureStatistics, tools: Tools) -> dict[str, float]:
        assert tools.reference is not None
        if found.n <= found.feature_dim:
            warnings.warn(
                f"{self.name}: the covariance of {found.n} images has a deficient rank in {found.feature_dim}"
                " features; the value is biased upwards, so compare it with values of as many images only",
                stacklevel=3,
            )
        return {"fid": frechet_distance(found.mu, found.sigma, tools.reference.mu, tools.reference.sigma)}
