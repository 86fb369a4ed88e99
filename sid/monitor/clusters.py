"""Judges which kinds of the teacher's images a generator has lost, by clusters of the teacher's samples."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from .rules import Finding

CHANCE = 1e-5  # of a generator as good as the teacher to seem to have lost any of the clusters
LACKING = 1 / 3  # of the teacher's share: a cluster of which more is left isn't lost, however sure the loss is
MAX_IMAGES, MAX_CLUSTERS = 100_000, 64  # of a record; more are damage, and would take long


class Share(NamedTuple):
    """How much of all images one cluster has. cluster: its number. is_lost: whether the generator lacks it."""

    cluster: int
    teacher: float
    generator: float
    is_lost: bool


def shares(counts: Any) -> list[Share]:
    """The clusters' shares, what the generator lacks most surely first; empty if the record is damaged.

    counts: images per cluster, {"teacher": [K], "generator": [K]} (`sid.teacher_clusters`).
    """
    if not is_sound(counts):
        return []
    teacher, generator, found = counts["teacher"], counts["generator"], []
    for cluster, (known, made) in enumerate(zip(teacher, generator)):
        of_all = known / sum(teacher), made / sum(generator)
        chance = chance_of_fewer(made, sum(generator), known, sum(teacher))
        is_lost = chance < CHANCE / len(teacher) and of_all[1] < LACKING * of_all[0]
        found.append((chance, Share(cluster, *of_all, is_lost)))
    return [share for _, share in sorted(found)]


def chance_of_fewer(made: int, of_made: int, known: int, of_known: int) -> float:
    """How likely a generator as good as the teacher has so few images in a cluster, or fewer.

    Given how many of all images are in the cluster, which of them are the generator's is then chance, so their number
    has the hypergeometric distribution (Fisher's exact test, one-sided). The clusters may come from neither.

    made, known: images in the cluster, of the generator and of the teacher; of_made, of_known: in all clusters.
    """
    both, total = made + known, of_made + of_known

    def log_choices(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    fewer = range(max(both - of_known, 0), made + 1)
    logs = (log_choices(of_made, n) + log_choices(of_known, both - n) - log_choices(total, both) for n in fewer)
    return min(math.fsum(map(math.exp, logs)), 1.0)


def lost_share(counts: Any) -> float:
    """The share of the teacher's images that are in clusters which the generator has lost."""
    return math.fsum(share.teacher for share in shares(counts) if share.is_lost)


def judge_clusters(records: Sequence[dict[str, Any]]) -> Finding | None:
    """A finding when the last snapshot has lost clusters.

    records: of teacher-distance.jsonl, with kimg, the first of the start. Some may have no counts.
    """
    if len(records) < 2:
        return None
    lost = [share for share in shares(records[-1].get("clusters")) if share.is_lost]
    if not lost:
        return None
    names = ", ".join(f"{share.cluster}" for share in sorted(lost))
    made, known = sum(share.generator for share in lost), sum(share.teacher for share in lost)
    which = f"cluster {names} of the teacher's samples is" if len(lost) == 1 else f"clusters {names} are"
    text = f"{which} lost: {made:.1%} of the generator's images are of this kind, and {known:.1%} of the teacher's"
    return Finding("lost-cluster", f"{text}; clusters.png shows some; {_remedy(records, lost)}")


def _remedy(records: Sequence[dict[str, Any]], lost: Sequence[Share]) -> str:
    """The last snapshot that still had the lost clusters, if there is one."""
    numbers = {share.cluster for share in lost}
    for record in reversed(records[:-1]):
        found = shares(record.get("clusters"))
        if record["kimg"] > 0 and found and not numbers & {share.cluster for share in found if share.is_lost}:
            had = f"the snapshot at {record['kimg']:g} kimg had them" if len(lost) > 1 else ""
            had = had or f"the snapshot at {record['kimg']:g} kimg had it"
            return f"{had}: take that one, or resume from an earlier state with lower --glr and --lr"
    return "lower --glr and --lr"


def is_sound(counts: Any) -> bool:
    """Whether a record holds such counts as `shares` takes."""
    if not isinstance(counts, dict):
        return False
    teacher, generator = counts.get("teacher"), counts.get("generator")
    return _are_counts(teacher) and _are_counts(generator) and len(teacher) == len(generator)


def _are_counts(values: Any) -> TypeGuard[Sequence[int]]:
    if not isinstance(values, list | tuple) or len(values) > MAX_CLUSTERS:
        return False
    return all(type(value) is int and value >= 0 for value in values) and 0 < sum(values) <= MAX_IMAGES
