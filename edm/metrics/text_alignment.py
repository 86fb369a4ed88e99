"""How well images match their prompts, by a model such as CLIP that embeds images and texts in one space.

CLIP score: 100 · max(cosine, 0) of an image and its prompt (arXiv:2104.08718 without its factor of 2.5), averaged over
the images. The rank of an image's prompt is its place among all different prompts of the file, by the same cosine.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, check_new_file

from .measure import IMAGES, Collection, Rows
from .metric import ENCODER, Metric, TextImageEncoder, Tools
from .sources import ImageSource

MAX_PROMPTS = 100_000  # different ones, among which an image's own is ranked
COMPARED_AT_ONCE = 256  # images
TOP = (1, 5)
SHOWN = 5  # prompts at either end of the table
TABLE_SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Alignment:
    """How well N images match their prompts.

    prompts: the P different prompts that were compared. numbers: each image's own one, int64 [N].
    scores: CLIP scores, float64 [N]. ranks: of the own prompts, from 1, float64 [N]; equal ones share the mean rank.
    matches: which prompt is the most similar, int64 [N].
    """

    prompts: Sequence[str]
    numbers: torch.Tensor
    scores: torch.Tensor
    ranks: torch.Tensor
    matches: torch.Tensor

    def first(self, n: int) -> "Alignment":
        """The alignment of the first n images."""
        return Alignment(self.prompts, self.numbers[:n], self.scores[:n], self.ranks[:n], self.matches[:n])

    def values(self) -> dict[str, float]:
        """The mean CLIP score and its standard error; with several prompts, what the ranks say."""
        found = {"clip": self.scores.mean().item(), "clip_se": self._standard_error()}
        if len(self.prompts) > 1:
            found |= {f"top{k}": (self.ranks <= k).double().mean().item() for k in TOP if k < len(self.prompts)}
            found["mean_rank"] = self.ranks.mean().item()
        return found

    def _standard_error(self) -> float:
        """The standard error of the mean score over the prompts, since images of one prompt resemble each other.

        With a single prompt it is the error over the images, and 0 for a single image.
        """
        groups = self.numbers.unique(return_inverse=True)[1]
        groups = groups if groups.max() > 0 else torch.arange(len(groups))
        count = int(groups.max()) + 1
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, self.scores - self.scores.mean())
        return (sums.square().sum() * count / max(count - 1, 1)).sqrt().item() / len(self.scores)


def align(images: torch.Tensor, texts: torch.Tensor, prompts: Sequence[str], numbers: torch.Tensor) -> Alignment:
    """Compares embedded images [N, D] with embedded prompts [P, D]. numbers: of each image's own prompt, int64 [N].

    Errors: UserError when an embedding isn't finite or has no direction.
    """
    images, texts = _directions(images), _directions(texts)
    scores, ranks, matches = [], [], []
    for part, own in zip(images.split(COMPARED_AT_ONCE), numbers.split(COMPARED_AT_ONCE)):
        cosines = part @ texts.T
        right = cosines.gather(1, own[:, None].to(cosines.device))
        scores.append(100 * right[:, 0].double().clamp(min=0).cpu())
        ties = (cosines == right).sum(1) - 1
        ranks.append(1 + (cosines > right).sum(1).cpu() + ties.cpu().double() / 2)
        matches.append(cosines.argmax(1).cpu())
    return Alignment(prompts, numbers, torch.cat(scores), torch.cat(ranks), torch.cat(matches))


def _directions(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings [N, D] with length 1. Errors: UserError as for `align`."""
    norms = embeddings.norm(dim=1, keepdim=True)
    if not (norms.isfinite() & (norms > 0)).all():
        raise UserError("--clip: some images or prompts are embedded as zeros, NaN or infinity; use another model")
    return embeddings / norms


def distinct(prompts: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """(the different prompts in their order, which of them each prompt is, int64).

    Errors: UserError when there are more than MAX_PROMPTS.
    """
    found = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    if len(found) > MAX_PROMPTS:
        raise UserError(
            f"--prompts: has {len(found)} different prompts, and an image's own is ranked among all of them; give a"
            f" file with at most {MAX_PROMPTS}, those of the images to measure"
        )
    return list(found), torch.tensor([found[prompt] for prompt in prompts])


class PromptedImages(Rows):
    """The embeddings of images, and how well they match their prompts.

    numbers: of each image's own prompt, int64 [N]. embed_texts: gives the embeddings of the prompts, float32 [P, D].
    """

    def __init__(
        self,
        encoder: TextImageEncoder,
        prompts: Sequence[str],
        numbers: torch.Tensor,
        embed_texts: Callable[[], torch.Tensor],
    ):
        super().__init__(len(numbers), encoder.embedding_dim, encoder.embed_images)
        self.prompts, self._numbers, self._embed_texts = prompts, numbers, embed_texts

    @cached_property
    def alignment(self) -> Alignment:
        """Of all images, once all processes are merged."""
        texts = self._embed_texts()
        return align(self.values.to(texts.device), texts, self.prompts, self._numbers)


class ClipMetric(Metric):
    """The CLIP score of images and their prompts, and the ranks of these.

    alignments: what was measured, on process 0, one per call of the evaluator.
    """

    kind, needs = "clip", (ENCODER,)

    def __init__(self, name: str, num: int, k: int = 0, full: bool = False):
        super().__init__(name, num, k, full)
        self.alignments: list[Alignment] = []
        self._prompts, self._embedded = [], torch.zeros(0)

    @property
    def shares(self) -> str:
        return self.kind

    def collect(self, source: ImageSource, tools: Tools) -> Collection:
        encoder = tools.encoder
        assert encoder is not None
        texts, own = self.prompts_of(source)
        prompts, numbers = distinct(texts)
        images = PromptedImages(encoder, prompts, numbers[own], lambda: self._embed_texts(encoder, prompts))
        return Collection(self.num, IMAGES, images)

    def values(self, found: PromptedImages, tools: Tools) -> dict[str, float]:
        self.alignments.append(found.alignment.first(self.num))
        return self.alignments[-1].values()

    def details(self, found: PromptedImages) -> dict[str, Any]:
        return {"ranked_among": len(found.prompts)}

    def _embed_texts(self, encoder: TextImageEncoder, prompts: list[str]) -> torch.Tensor:
        """The embeddings of prompts, kept for the next call of the evaluator."""
        if prompts != self._prompts:
            self._prompts, self._embedded = prompts, encoder.embed_texts(prompts)
        return self._embedded


def alignments_of(metrics: Iterable[Metric]) -> list[Alignment]:
    """What the CLIP score of the most images has measured, one per call of the evaluator; none without a CLIP score."""
    found = [metric for metric in metrics if isinstance(metric, ClipMetric)]
    return max(found, key=lambda metric: metric.num).alignments if found else []


# --- by prompt


def table(alignments: Sequence[Alignment]) -> list[dict[str, Any]]:
    """One row per prompt that has images, those first that the images match least.

    Several alignments of the same prompts count as one. The columns are the prompt, the number of its images, the means
    of their CLIP scores and ranks, the share with rank 1, and the prompt that most of them match best.
    """
    prompts = alignments[0].prompts
    joined = {
        name: torch.cat([getattr(found, name) for found in alignments])
        for name in ("numbers", "scores", "ranks", "matches")
    }
    order = joined["numbers"].argsort(stable=True)
    counts = joined["numbers"].bincount(minlength=len(prompts)).tolist()
    scores, ranks, matches = (joined[name][order].split(counts) for name in ("scores", "ranks", "matches"))
    rows = [
        {
            "prompt": prompts[number],
            "images": count,
            "clip": scores[number].mean().item(),
            "rank": ranks[number].mean().item(),
            "top1": (ranks[number] <= 1).double().mean().item(),
            "best_match": prompts[Counter(matches[number].tolist()).most_common(1)[0][0]],
        }
        for number, count in enumerate(counts)
        if count
    ]
    return sorted(rows, key=lambda row: (-row["rank"], row["clip"]))


def describe_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of the prompts that images match least and best, as text."""
    shown = [*rows] if len(rows) <= 2 * SHOWN else [*rows[:SHOWN], None, *rows[-SHOWN:]]
    width = max(len(_short(row["prompt"])) for row in shown if row)
    lines = [
        f"The prompts that their images match least{', and best' if None in shown else ''}, of {len(rows)}:",
        f"  images    clip    rank  {'prompt':{width}}  best match",
    ]
    for row in shown:
        if row is None:
            lines.append("     ...")
            continue
        match = "the same" if row["best_match"] == row["prompt"] else _short(row["best_match"])
        prompt = _short(row["prompt"])
        lines.append(f"{row['images']:8d}{row['clip']:8.2f}{row['rank']:8.1f}  {prompt:{width}}  {match}")
    return "\n".join(lines)


def _short(text: str, length: int = 48) -> str:
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def check_table(path: str | None) -> None:
    """Errors: UserError naming --table when `write_table` couldn't write there, or a file would be replaced."""
    if path is None:
        return
    if Path(path).suffix not in TABLE_SUFFIXES:
        raise UserError(f"--table={path} must end in {' or '.join(TABLE_SUFFIXES)}")
    check_new_file(path, "--table")


def write_table(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Writes all rows as CSV or as JSON lines, by the file's suffix. Errors: UserError when it can't be written."""
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            if path.endswith(".csv"):
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"--table={path} can't be written: {error.strerror}; give another file") from None
