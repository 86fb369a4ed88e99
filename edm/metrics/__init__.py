"""Metrics of generated images: pure functions of detector features."""
