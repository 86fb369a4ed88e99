"""What every kind of metric has in common: its name, what it needs, and what it collects of the images."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

import dnnlib

from .caption_template import CaptionTemplate
from .detector import Detector
from .measure import Collection
from .reference import Reference
from .sources import ImageSource

# Of `Tools`.
DETECTOR, REFERENCE, REAL, ENCODER, CAPTIONS = "detector", "reference", "real", "encoder", "captions"


class TextImageEncoder(Protocol):
    """Embeds images and texts in one space, in which a larger cosine means a better match.

    name, sha256: of its files, for the records. device: where it is. embedding_dim: D.
    """

    name: str
    sha256: str
    device: torch.device
    embedding_dim: int

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [N, D] of uint8 images [N, C, H, W] with 1 or 3 channels."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [N, D] of N texts, however many."""
        ...


@dataclass
class Tools:
    """What metrics measure with, each loaded once; None where none of an evaluator's metrics needs it.

    detector:  gives images features and class probabilities
    reference: statistics of real images' features
    real:      the features of real images, float32 [N, D] on the CPU
    encoder:   embeds images and prompts in one space
    captions:  how the prompts are built
    """

    detector: Detector | None = None
    reference: Reference | None = None
    real: torch.Tensor | None = None
    encoder: TextImageEncoder | None = None
    captions: CaptionTemplate | None = None


class Metric(ABC):
    """A metric, such as `fid50k_full`. A subclass is a kind of metric; `edm.metrics.evaluate.KINDS` lists them.

    kind:      what its names begin with
    needs:     names of the `Tools` that it uses
    default_k: of kinds whose names may give a number after that of the images, such as the neighbour in `pr50k3`
    num, k:    these numbers
    full:      for kinds with real images: compare with all of them; otherwise, with as many as are generated
    """

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    default_k: ClassVar[int | None] = None

    def __init__(self, name: str, num: int, k: int = 0, full: bool = False):
        self.name, self.num, self.k, self.full = name, num, k, full

    @property
    def least(self) -> int:
        """The smallest number of images, generated and real, that it is defined for."""
        return 2

    @property
    def shares(self) -> Hashable:
        """Metrics for which this is equal share what is collected for the one of them with the most images."""
        return self.kind, self.num

    @abstractmethod
    def collect(self, source: ImageSource, tools: Tools) -> Collection:
        """What to collect of the images of a source. Errors: UserError when the source doesn't fit the metric."""

    @abstractmethod
    def values(self, found: Any, tools: Tools) -> dict[str, float]:
        """{name: value}, the main one first; called on process 0. found: the accumulator of the collection."""

    def details(self, found: Any) -> dict[str, Any]:
        """Further entries of the record, as plain values."""
        return {}

    def prompts_of(self, source: ImageSource) -> tuple[Sequence[str], list[int]]:
        """(all prompts of a source, which of them each of its first `num` images has).

        Errors: UserError when its images have none.
        """
        found = source.prompts(self.num)
        if found is None:
            raise dnnlib.UserError(
                f"--metrics={self.name} compares images with their prompts, and these images have none"
            )
        return found
