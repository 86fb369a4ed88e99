"""Downloads into a cache folder: streamed, checked, and present whole or not at all."""

from pathlib import Path


def open_url(*a, **k):  # replaced below by the full version
    raise NotImplementedError
