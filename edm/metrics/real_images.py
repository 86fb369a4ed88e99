"""Metrics that compare the features of generated images with those of real ones, image by image."""

from abc import abstractmethod

import torch

from .measure import FEATURES, Collection, Rows
from .metric import DETECTOR, REAL, Metric, Tools
from .sources import ImageSource


class RealImagesMetric(Metric):
    """A metric of two sets of features; a subclass names it and compares them."""

    needs = (DETECTOR, REAL)

    @property
    def shares(self) -> str:
        return FEATURES

    def collect(self, source: ImageSource, tools: Tools) -> Collection:
        assert tools.detector is not None
        return Collection(self.num, FEATURES, Rows(self.num, tools.detector.feature_dim))

    def values(self, found: Rows, tools: Tools) -> dict[str, float]:
        assert tools.detector is not None
        assert tools.real is not None
        real = tools.real if self.full else tools.real[: self.num]
        return self.compare(real.to(tools.detector.device), found.values[: self.num].to(tools.detector.device))

    @abstractmethod
    def compare(self, real: torch.Tensor, generated: torch.Tensor) -> dict[str, float]:
        """{name: value} of features [N, D] and [M, D] on the detector's device."""
