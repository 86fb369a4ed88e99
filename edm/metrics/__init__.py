"""Metrics of generated images: pure functions of detector features, and what gathers the features."""

from .frechet import frechet_distance

__all__ = ["frechet_distance"]
