"""Inception score (arXiv:1606.03498, section 4): exp of the mean KL(p(y|x) ‖ p(y)), over splits of the images."""

import torch

from torch_utils import distributed

from .measure import PROBABILITIES, Collection
from .metric import DETECTOR, Metric, Tools
from .sources import ImageSource

SPLITS = 10


class InceptionScore:
    """Sums class probabilities as they come, so memory doesn't grow with the images; merges over processes.

    num_images: of all processes together. Split i holds images i·n//splits to (i+1)·n//splits, in their order.
    """

    def __init__(self, num_images: int, splits: int = SPLITS):
        self._bounds = torch.tensor([i * num_images // splits for i in range(1, splits)])
        self._splits = splits
        self._sums: torch.Tensor | None = None  # per split: sum of p [K], sum of p·ln p, number of images; float64

    def append(self, probabilities: torch.Tensor, start: int) -> None:
        """Adds [N, K] probabilities of the images `start`, `start + 1`, …"""
        p = probabilities.detach().cpu().to(torch.float64)
        parts = torch.cat([p, torch.special.entr(p).sum(1, keepdim=True).neg(), torch.ones(len(p), 1)], dim=1)
        split = torch.bucketize(torch.arange(start, start + len(p)), self._bounds, right=True)
        if self._sums is None:
            self._sums = torch.zeros(self._splits, parts.shape[1], dtype=torch.float64)
        self._sums.index_add_(0, split, parts)

    def is_finite(self) -> bool:
        """Whether all probabilities were finite."""
        return self._sums is None or bool(self._sums.isfinite().all())

    def merge_processes(self) -> None:
        """Gives every process what all have seen; every process must call it."""
        if distributed.world_size() == 1:
            return
        device = distributed.communication_device()
        width = 0 if self._sums is None else self._sums.shape[1]
        widths = torch.tensor([width, width > 0], dtype=torch.int64, device=device)
        total, seen = distributed.all_reduce_sum(widths).tolist()  # a process without images doesn't know the classes
        sums = torch.zeros(self._splits, total // seen, dtype=torch.float64) if self._sums is None else self._sums
        self._sums = distributed.all_reduce_sum(sums.to(device)).cpu()

    def result(self) -> tuple[float, float]:
        """(mean, population standard deviation) over the splits."""
        assert self._sums is not None  # there were images
        sums, p_ln_p, counts = self._sums[:, :-2], self._sums[:, -2], self._sums[:, -1]
        marginal_entropy = torch.special.entr(sums / counts[:, None]).sum(1)
        scores = (p_ln_p / counts + marginal_entropy).exp()
        return scores.mean().item(), scores.std(correction=0).item() if len(scores) > 1 else 0.0


def inception_score(probabilities: torch.Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """(mean, standard deviation) over `splits` of the score of class probabilities [N, K] with N ≥ splits."""
    probabilities = torch.as_tensor(probabilities)
    score = InceptionScore(len(probabilities), splits)
    score.append(probabilities, 0)
    return score.result()


class InceptionMetric(Metric):
    """The inception score of the detector's class probabilities, and its standard deviation over the splits."""

    kind, needs = "is", (DETECTOR,)

    @property
    def least(self) -> int:
        return SPLITS

    def collect(self, source: ImageSource, tools: Tools) -> Collection:
        return Collection(self.num, PROBABILITIES, InceptionScore(self.num))

    def values(self, found: InceptionScore, tools: Tools) -> dict[str, float]:
        mean, std = found.result()
        return {"is": mean, "is_std": std}
