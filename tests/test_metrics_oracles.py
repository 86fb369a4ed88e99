"""Metrics against independent implementations on the same features: torch-fidelity, SciPy, scikit-learn."""

import json

import fidelity
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from edm.metrics import frechet_distance
from edm.metrics.inception_score import inception_score
from edm.metrics.kid import kernel_distance
from edm.metrics.precision_recall import precision_recall

CLOSE = {"rel": 1e-6}


def moments(features):
    return features.mean(0), np.cov(features, rowvar=False)


def our_numbers():
    """As `fidelity.numbers`."""
    data = np.load(fidelity.DATA / "metrics.npz")
    a, b, low = (data[f"features_{name}"].astype(np.float64) for name in ("a", "b", "low"))
    score = inception_score(torch.from_numpy(data["probs"]))
    distance = kernel_distance(a, b, max_subset_size=200)
    precision, recall = precision_recall(a[:280, :8], b[:300, :8])
    return {
        "fid.frechet_inception_distance": frechet_distance(*moments(a), *moments(b)),
        "fid_low.frechet_inception_distance": frechet_distance(*moments(low), *moments(b)),
        "is.inception_score_mean": score[0],
        "is.inception_score_std": score[1],
        "kid.kernel_inception_distance_mean": distance[0],
        "kid.kernel_inception_distance_std": distance[1],
        "pr.precision": precision,
        "pr.recall": recall,
        "pr.f_score": 2 * precision * recall / (precision + recall),
    }


def test_torch_fidelity():
    recorded = json.loads(fidelity.RECORDED.read_text())
    assert our_numbers() == pytest.approx(recorded, **CLOSE)
    if fidelity.installed():  # another version of it may be here than the one that was recorded
        assert fidelity.numbers() == pytest.approx(recorded, **CLOSE)


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(24, 24))
    return rng.normal(size=(400, 24)) @ mixing, rng.normal(0.2, 1.1, size=(350, 24)) @ mixing  # real, generated


def test_frechet_by_scipy(features):
    (mu, sigma), (mu_ref, sigma_ref) = (moments(x) for x in features)
    root = scipy.linalg.sqrtm(sigma @ sigma_ref)
    expected = np.square(mu - mu_ref).sum() + np.trace(sigma + sigma_ref) - 2 * np.trace(root).real
    assert frechet_distance(mu, sigma, mu_ref, sigma_ref) == pytest.approx(expected, **CLOSE)


def test_inception_score_by_scipy():
    probabilities = np.random.default_rng(1).dirichlet(np.full(7, 0.3), size=103)  # splits of unequal length
    parts = [probabilities[i * 103 // 10 : (i + 1) * 103 // 10] for i in range(10)]
    scores = [np.exp(scipy.stats.entropy(part, part.mean(0, keepdims=True), axis=1).mean()) for part in parts]
    assert inception_score(probabilities) == pytest.approx((np.mean(scores), np.std(scores)), **CLOSE)


def test_kernel_distance_by_scikit_learn(features):
    real, generated = (x[:300] for x in features)
    rr, gg, rg = (
        polynomial_kernel(x, y, degree=3, coef0=1) for x, y in ((real, real), (generated, generated), (real, generated))
    )
    within = sum((kernel.sum() - np.trace(kernel)) / (300 * 299) for kernel in (rr, gg))
    expected = within - 2 * rg.mean()
    assert kernel_distance(real, generated, subsets=1)[0] == pytest.approx(expected, **CLOSE)  # the subset is all


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_by_scikit_learn(features, k):
    def covered(queries, points):
        radii = NearestNeighbors(n_neighbors=k).fit(points).kneighbors()[0][:, -1]  # no point is its own neighbour
        return (pairwise_distances(queries, points) <= radii).any(1).mean()

    real, generated = (x[:, :6] for x in features)
    expected = covered(generated, real), covered(real, generated)
    assert all(0.1 < value < 0.99 for value in expected)
    assert precision_recall(real, generated, k) == pytest.approx(expected, **CLOSE)
