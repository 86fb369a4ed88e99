"""Clusters of a teacher's samples: how they are found, and when a generator has lost one of them."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
import sklearn.cluster
import torch
from tiny import tiny_teacher

from edm.metrics.clusters import k_means
from sid.config import DistillationConfig
from sid.monitor.clusters import CHANCE, chance_of_fewer, judge_clusters, lost_share, shares
from sid.monitor.diagnosis import diagnose
from sid.teacher_clusters import SampleClusters, points_of, squares, without_own
from sid.teacher_distance import SHOWN_CLUSTERS, SHOWN_IMAGES, TeacherDistance
from sid.teacher_samples import NUM_IMAGES


def mixture(number, seed, modes=10, size=16, apart=3.0):
    """Points of equally frequent Gaussian modes, the same ones for every seed; one mode is a plain Gaussian."""
    centres = apart * np.random.default_rng(99).standard_normal((modes, size))
    rng = np.random.default_rng(seed)
    points = (centres[rng.integers(modes, size=number)] if modes > 1 else 0) + rng.standard_normal((number, size))
    return torch.from_numpy(points)


def counts_of(teacher, generator):
    return {"teacher": list(teacher), "generator": list(generator)}


def lost(counts):
    return {share.cluster for share in shares(counts) if share.is_lost}


def test_clusters_are_as_tight_as_another_librarys():
    points = mixture(200, 0, modes=5, apart=1.0)
    own = squares(points, SampleClusters(points).centres).amin(1).sum().item()
    other = sklearn.cluster.KMeans(10, n_init=4, random_state=0).fit(points.numpy()).inertia_
    assert own < 1.05 * other


def test_the_chance_is_fishers():
    for made, known in [(0, 9), (3, 14), (20, 10), (256, 128), (0, 0), (200, 0)]:
        expected = scipy.stats.hypergeom.cdf(made, 256 + 128, made + known, 256)
        assert chance_of_fewer(made, 256, known, 128) == pytest.approx(expected, rel=1e-9)


def test_what_a_sample_adds_to_its_own_centre_does_not_count():
    points = torch.cat([mixture(30, 0, modes=3, size=2, apart=20.0), torch.full([1, 2], 500.0)])
    centres = k_means(points, 4)
    distances = squares(points, centres)
    expected, own = distances.clone(), distances.argmin(1)
    assert (own == own[30]).sum() == 1  # the last one is alone
    for i, cluster in enumerate(own):
        others = (own == cluster) & (torch.arange(31) != i)
        expected[i, cluster] = (points[i] - points[others].mean(0)).square().sum() if others.any() else torch.inf
    torch.testing.assert_close(without_own(distances), expected)


@pytest.mark.parametrize(("modes", "size"), [(1, 2), (1, 64), (10, 16)])
def test_other_samples_of_the_teacher_lose_nothing(modes, size):
    """And how surely they seem to is no more than chance allows, whatever the clusters."""
    surest = []
    for seed in range(60):
        clusters = SampleClusters(mixture(256, 2 * seed, modes, size))
        counts = dataclasses.asdict(clusters(mixture(256, 2 * seed + 1, modes, size)))
        assert lost_share(counts) == 0.0
        chances = [chance_of_fewer(g, 256, t, 256) for t, g in zip(counts["teacher"], counts["generator"])]
        surest.append(len(chances) * min(chances))
    for level in (0.05, 0.2):
        assert np.mean(np.array(surest) < level) <= level + 2 * np.sqrt(level / len(surest))
    assert min(surest) > CHANCE


def test_a_lost_mode_is_named_and_how_often_it_occurs():
    clusters = SampleClusters(mixture(256, 0))
    largest = int(np.argmax(clusters(mixture(256, 1)).generator))
    points = mixture(3000, 5)
    others = points[(points - clusters.centres[largest]).square().sum(1) > 60][:256]
    counts = dataclasses.asdict(clusters(others))
    assert lost(counts) == {largest}
    assert lost_share(counts) == counts["teacher"][largest] / 256 > 0.05


def test_thumbnails_keep_the_means_of_their_parts():
    images = torch.randint(0, 256, (70, 3, 64, 64), dtype=torch.uint8)
    points = points_of(images)
    assert points.shape == (70, 3 * 16 * 16)
    assert points[69, -1].item() == pytest.approx(images[69, 2, -4:, -4:].double().mean().item() / 127.5 - 1, rel=1e-4)
    assert points_of(images[:, :1, :8, :8]).shape == (70, 64)


def test_a_share_is_lost_only_if_little_of_it_is_left():
    assert lost(counts_of([40, 88], [0, 256])) == {0}
    assert lost(counts_of([40, 88], [20, 236])) == {0}  # a quarter of its share
    assert lost(counts_of([40, 88], [32, 224])) == set()  # 0.4, although no accident
    assert lost(counts_of([2, 126], [0, 256])) == set()  # too few to tell
    assert [share.cluster for share in shares(counts_of([10, 50, 68], [100, 0, 156]))] == [1, 2, 0]


WRONG = [None, {}, 3, [1], counts_of([1], [2, 3]), counts_of([0], [0]), counts_of([1.5], [2]), counts_of([-1], [2])]
WRONG += [counts_of([True], [2]), counts_of(["<"], [2]), counts_of([10**9], [2]), counts_of([1] * 500, [1] * 500)]


@pytest.mark.parametrize("counts", WRONG)
def test_damaged_counts_say_nothing(counts):
    assert shares(counts) == []
    assert judge_clusters([{"kimg": 0.0}, {"kimg": 1.0, "clusters": counts}]) is None


def record(kimg, generator, value=0.01):
    return {"kimg": kimg, "value": value, "clusters": counts_of([30, 40, 58], generator)}


START = record(0.0, [0, 0, 256], 0.4)


def test_the_doctor_names_what_is_lost_and_which_snapshot_had_it():
    good, bad = record(4.0, [60, 80, 116]), record(8.0, [1, 100, 155])
    ticks = [{"Progress/kimg": float(k), "Health/divergence": 0.1} for k in range(1, 9)]
    options = DistillationConfig().options()
    assert [f.name for f in diagnose(ticks, options, [START, good])] == ["healthy"]
    (found,) = diagnose(ticks, options, [START, good, bad])
    assert (found.name, found.certain) == ("lost-cluster", True)
    assert found.text.startswith("cluster 0 of the teacher's samples is lost: 0.4% of the generator's images are")
    assert "23.4% of the teacher's" in found.text
    assert "the snapshot at 4 kimg had it: take that one" in found.text
    assert diagnose(ticks[:3], options, [START, good, bad])[0].name == "lost-cluster"
    never = judge_clusters([START, record(4.0, [0, 0, 256])])
    assert never is not None
    assert never.text.startswith("clusters 0, 1 are lost")
    assert "lower --glr" in never.text
    assert "kimg" not in never.text
    assert judge_clusters([START]) is None  # nobody expects the start to be good


def test_images_far_from_the_teacher_are_called_that_alone():
    ticks = [{"Progress/kimg": float(k), "Health/divergence": 0.1} for k in range(1, 9)]
    found = diagnose(ticks, DistillationConfig().options(), [START, record(8.0, [0, 0, 256], 0.3)])
    assert [finding.name for finding in found] == ["far-from-teacher"]


def test_a_teachers_own_samples_and_a_single_image_instead():
    teacher = tiny_teacher()
    distance = TeacherDistance(teacher)
    own = distance(teacher, sampler="heun", num_steps=10)
    counts = dataclasses.asdict(own.clusters)
    assert sum(counts["teacher"]) == sum(counts["generator"]) == NUM_IMAGES
    assert lost_share(json.loads(json.dumps(counts))) == 0.0
    assert len(own.examples) == SHOWN_CLUSTERS
    assert {tuple(e.shape[:2]) for e in own.examples.values()} == {(2, SHOWN_IMAGES)}
    distance._images = lambda net: distance.samples[:1].repeat(NUM_IMAGES, 1, 1, 1)
    collapsed = distance(None)
    assert lost_share(dataclasses.asdict(collapsed.clusters)) > 0.5
    assert all((known != made).any() for known, made in collapsed.examples.values())
