"""Metrics against parity numbers, closed forms and brute force; one process against two and four."""

import json
import multiprocessing
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from tiny import on_two_processes

from dnnlib import UserError
from edm.images import to_pil
from edm.metrics import data_reference, frechet_distance
from edm.metrics.detector import load_detector, save_detector
from edm.metrics.evaluate import KINDS, Evaluator, evaluate, parse_metric
from edm.metrics.inception_score import inception_score
from edm.metrics.kid import kernel_distance
from edm.metrics.measure import FEATURES, IMAGES, Collection, Rows, measure
from edm.metrics.metric import Metric
from edm.metrics.precision_recall import precision_recall
from edm.metrics.records import describe, summarise
from edm.metrics.reference import load_reference, save_reference
from edm.metrics.small_classifier import SmallClassifier
from edm.metrics.sources import NetworkSource, TensorSource, array_source
from edm.metrics.statistics import FeatureStatistics
from torch_utils import distributed

PARITY = np.load(Path(__file__).parent / "data" / "metrics.npz")
DETECTOR_ARGUMENTS = {"img_resolution": 8, "img_channels": 1, "num_classes": 3, "width": 4}


def moments(features):
    return features.mean(0), np.cov(features, rowvar=False)


def test_frechet_parity():
    a, b = moments(PARITY["features_a"]), moments(PARITY["features_b"])
    assert frechet_distance(*a, *b) == pytest.approx(PARITY["fid"], rel=1e-10)
    assert frechet_distance(*b, *a) == pytest.approx(PARITY["fid"], rel=1e-10)


def test_frechet_of_deficient_rank():
    low, b = moments(PARITY["features_low"]), moments(PARITY["features_b"])
    for value in (frechet_distance(*low, *b), frechet_distance(*b, *low)):
        assert value == pytest.approx(PARITY["fid_low_vs_b"], rel=1e-6)
    point = np.zeros_like(low[1])  # all images equal
    expected = np.square(low[0] - b[0]).sum() + np.trace(b[1])
    assert frechet_distance(low[0], point, *b) == pytest.approx(expected)
    assert frechet_distance(*b, low[0], point) == pytest.approx(expected)


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    p, q = rng.uniform(0.1, 3, (2, 20))
    rotation = scipy.linalg.qr(rng.normal(size=(20, 20)))[0]
    shift = rng.normal(size=20)
    commuting = rotation @ np.diag(p) @ rotation.T, rotation @ np.diag(q) @ rotation.T
    expected = shift @ shift + np.square(np.sqrt(p) - np.sqrt(q)).sum()
    assert frechet_distance(shift, commuting[0], 0 * shift, commuting[1]) == pytest.approx(expected, rel=1e-12)
    x, y = (np.cov(rng.normal(size=(60, 20)) @ rng.normal(size=(20, 20)), rowvar=False) for _ in range(2))
    root = scipy.linalg.sqrtm(x @ y).real
    assert frechet_distance(shift, x, shift, y) == pytest.approx(np.trace(x + y - 2 * root), rel=1e-9)
    assert frechet_distance(shift, x, shift, x) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="agree"):
        frechet_distance(shift, x, shift[:3], x[:3, :3])


def test_inception_score():
    mean, std = inception_score(torch.from_numpy(PARITY["probs"]))
    assert mean == pytest.approx(PARITY["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(PARITY["inception_score_std"], rel=1e-10)
    assert inception_score(torch.full((50, 4), 0.25)) == pytest.approx((1, 0))
    assert inception_score(torch.eye(5).repeat(20, 1)) == pytest.approx((5, 0))  # sure and diverse; zeros are allowed


def test_kid():
    a, b = torch.from_numpy(PARITY["features_a"]), torch.from_numpy(PARITY["features_b"])
    assert kernel_distance(a, b, max_subset_size=200)[0] == pytest.approx(PARITY["kid"], rel=1e-10)
    x, y = a[:6, :3], b[:6, :3]  # the subset is the whole set: a double sum over distinct pairs

    def kernel(u, v):
        return (float(u @ v) / 3 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j) / 30
    across = sum(kernel(u, v) for u in x for v in y) / 36
    assert kernel_distance(x, y, subsets=2) == pytest.approx((within - 2 * across, 0), abs=1e-12)


def test_precision_recall(monkeypatch):
    a, b = torch.from_numpy(PARITY["features_a"][:300, :8]), torch.from_numpy(PARITY["features_b"][:300, :8])
    expected = (float(PARITY["precision_k3"]), float(PARITY["recall_k3"]))
    assert precision_recall(a, b) == pytest.approx(expected)
    monkeypatch.setattr("edm.metrics.precision_recall.MAX_CHUNK_ELEMENTS", 7 * 300)
    assert precision_recall(a, b) == pytest.approx(expected)


def test_precision_recall_of_repeated_points():
    collapsed = (torch.randn(1, 16, generator=torch.Generator().manual_seed(0)) + 100).repeat(6, 1)
    assert precision_recall(collapsed, collapsed[:5]) == (1, 1)  # radius 0 covers an equal point
    assert precision_recall(collapsed, collapsed + 1e-3) == (0, 0)


def test_statistics_do_not_depend_on_the_batches():
    features = np.random.default_rng(0).normal(size=(101, 7)) + 1e6  # squares of these would lose eight digits
    whole, left, right = (FeatureStatistics(7) for _ in range(3))
    whole.append(features)
    for rows in np.split(features, [1, 1, 30, 64]):
        (left if len(rows) > 10 else right).append(rows)
    left.merge(right)
    left.merge(FeatureStatistics(7))
    assert left.n == whole.n == 101
    for statistics in (whole, left):
        np.testing.assert_allclose(statistics.mu, features.mean(0), rtol=1e-14)
        np.testing.assert_allclose(statistics.sigma, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(left.sigma, whole.sigma, rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="two images"):
        _ = FeatureStatistics(7).sigma


def test_metric_names():
    assert [parse_metric("fid50k_full").num, parse_metric("fid5k").num, parse_metric("fid1000").num] == [
        50000,
        5000,
        1000,
    ]
    pr, kid = parse_metric("pr50k3_full"), parse_metric("kid50k")
    assert (pr.kind, pr.num, pr.k, pr.full, kid.full) == ("pr", 50000, 3, True, False)
    for name in ("fid", "fid50k3", "fid1", "is9", "pr3", "fid50K", "lpips5k", "pr50k3_half"):
        with pytest.raises(UserError, match=f"--metrics={name}"):
            parse_metric(name)


@pytest.fixture
def detector(tmp_path):
    torch.manual_seed(0)
    save_detector(SmallClassifier(**DETECTOR_ARGUMENTS), tmp_path / "detector.safetensors", DETECTOR_ARGUMENTS)
    return load_detector(tmp_path / "detector.safetensors")


def make_images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


def measure_moments(source, num, detector, batch=64):
    statistics = FeatureStatistics(detector.feature_dim)
    measure(source, [Collection(num, FEATURES, statistics)], detector, batch)
    return statistics


def make_reference(path, detector, images):
    statistics = measure_moments(TensorSource([images]), len(images), detector)
    save_reference(path, statistics, detector, "noise", 1, 8)
    return path


METRICS = ["fid200", "fid150", "is200", "kid100_full", "pr150"]


def test_one_pass_gives_every_metric(tmp_path, detector):
    real, fake = make_images(180, 1), make_images(230, 2) // 2
    reference = make_reference(tmp_path / "reference.npz", detector, real)
    source = TensorSource(fake.split([3, 100, 0, 127]), name="noise")
    records = evaluate(source, METRICS, reference=reference, data=TensorSource([real]), batch=32)
    x, y = detector.features(real), detector.features(fake)
    by_name = {record["metric"]: record for record in records}
    assert list(by_name) == METRICS
    for name, num in (("fid200", 200), ("fid150", 150)):
        expected = frechet_distance(*moments(y[:num].double().numpy()), *moments(x.double().numpy()))
        assert by_name[name]["value"] == pytest.approx(expected, rel=1e-5)
        assert by_name[name]["reference_images"] == 180
    assert by_name["is200"]["values"]["is"] == pytest.approx(
        inception_score(detector.probabilities(fake[:200]))[0], 1e-6
    )
    assert by_name["kid100_full"]["value"] == pytest.approx(kernel_distance(x, y[:100])[0], rel=1e-3)
    precision, recall = precision_recall(x[:150], y[:150])
    assert by_name["pr150"]["values"] == {"precision": precision, "recall": recall}
    assert json.loads(json.dumps(records)) == records
    assert all(record["detector_sha256"] == detector.sha256 for record in records)


def test_fewer_metrics_with_the_same_tools(tmp_path, detector):
    """An evaluator of fewer real images leaves the other one those that it needs."""
    real, source = TensorSource([make_images(180, 1)]), TensorSource([make_images(200, 2) // 2])
    evaluator = Evaluator(["pr150", "kid60", "is60"], detector=detector, data=real)
    few = evaluator.only("kid60")(source)
    records = evaluator(source)
    assert few == [records[1]]
    assert records == Evaluator(["pr150", "kid60", "is60"], detector=detector, data=real)(source)


def test_a_new_kind_of_metric_is_a_class(monkeypatch):
    """The share of bright pixels, which needs nothing but the images."""

    class Bright(Metric):
        kind, needs, shares = "bright", (), "bright"

        def collect(self, source, tools):
            return Collection(
                self.num, IMAGES, Rows(self.num, 1, lambda x: (x > 127).float().flatten(1).mean(1)[:, None])
            )

        def values(self, found, tools):
            return {"bright": found.values[: self.num].mean().item()}

    with pytest.raises(UserError, match=r"^--metrics=bright100 is unknown"):
        parse_metric("bright100")
    monkeypatch.setitem(KINDS, Bright.kind, Bright)
    images = make_images(100, 0)
    records = Evaluator(["bright100", "bright60"], batch=32)(TensorSource([images]))
    for record, num in zip(records, (100, 60)):
        assert record["value"] == pytest.approx((images[:num] > 127).double().mean().item(), rel=1e-6)
        assert record["num_images"] == num
    with pytest.raises(UserError, match="bright needs at least 2 images"):
        parse_metric("bright1")


def test_where_processes_sum(monkeypatch):
    assert distributed.communication_device() == torch.device("cpu")
    for name, value in {"is_initialized": True, "get_backend": "gloo"}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert distributed.communication_device() == torch.device("cpu")
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert distributed.communication_device() == torch.device("cuda", 3)


def test_too_few_images_for_the_covariance(tmp_path, detector):
    reference = make_reference(tmp_path / "reference.npz", detector, make_images(180, 1))
    with pytest.warns(UserWarning, match=r"100 images .* 128 features"):
        (record,) = evaluate(TensorSource([make_images(100, 3)]), ["fid100"], reference=reference)
    assert np.isfinite(record["value"])
    with pytest.raises(UserError, match="101 images"):
        evaluate(TensorSource([make_images(100, 3)]), ["fid101"], reference=reference)


def test_references(tmp_path, detector):
    path = make_reference(tmp_path / "reference.npz", detector, make_images(40, 1))
    reference = load_reference(path)
    assert reference.record["num_images"] == 40
    assert reference.load_detector().sha256 == detector.sha256  # found beside the reference
    with pytest.raises(UserError, match="8x8"):
        reference.check_images(1, 16)
    torch.manual_seed(1)
    save_detector(SmallClassifier(**DETECTOR_ARGUMENTS), tmp_path / "other.safetensors", DETECTOR_ARGUMENTS)
    with pytest.raises(UserError, match="was made with the detector detector"):
        reference.load_detector(override=tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="was made with the detector detector"):
        Evaluator(["fid100"], reference=path, detector=load_detector(tmp_path / "other.safetensors"))
    detector.path.unlink()
    with pytest.raises(UserError, match="give it by --detector"):
        reference.load_detector()


def test_references_of_data_are_measured_once(tmp_path, detector, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    images, folder = make_images(20, 1), tmp_path / "real"
    (folder / "00000").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
        for i, image in enumerate(images):
            name = f"00000/img{i:08d}.png"
            to_pil(image).save(folder / name)
            archive.write(folder / name, name)
    options = {"metrics": ["fid20"], "detector": detector}
    made = Evaluator(data=folder, **options).reference
    np.testing.assert_allclose(made.sigma, np.cov(detector.features(images).double().numpy().T), atol=1e-6)
    assert made.record["num_images"] == 20
    made.path.write_bytes(made.path.read_bytes()[:-100])
    assert np.array_equal(Evaluator(data=folder, **options).reference.mu, made.mu)
    measured = []
    monkeypatch.setattr(data_reference, "make_reference", lambda _source, file, *_: measured.append(file))
    for same in (folder, tmp_path / "real.zip"):  # by content: a zip of the same images is the same data set
        assert np.array_equal(Evaluator(data=same, **options).reference.mu, made.mu)
    assert not measured
    to_pil(255 - images[0]).save(folder / "00000/img00000000.png")
    with pytest.raises(UserError):  # another content, and nothing was made
        Evaluator(data=folder, **options)
    assert len(measured) == 1
    assert made.path.parent == measured[0].parent == tmp_path / "cache" / "references"


def test_references_of_edm(tmp_path, detector):
    features = detector.features(make_images(200, 1)).double().numpy()
    np.savez(tmp_path / "edm.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    options = {"reference": tmp_path / "edm.npz", "detector": detector}
    (record,) = evaluate(TensorSource([make_images(200, 1)]), ["fid200"], **options)
    assert record["value"] == pytest.approx(0, abs=1e-6)
    np.savez(tmp_path / "small.npz", mu=features.mean(0)[:5], sigma=np.eye(5))
    with pytest.raises(UserError, match="holds 5 features"):
        Evaluator(["fid200"], reference=tmp_path / "small.npz", detector=detector)
    np.savez(tmp_path / "empty.npz", mu=features.mean(0))
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    for name in ("empty.npz", "broken.npz"):
        with pytest.raises(UserError, match=name):
            load_reference(tmp_path / name)


def test_missing_inputs(detector):
    for metric, option in (("fid100", "--ref"), ("kid100", "--data"), ("pr100", "--data")):
        with pytest.raises(UserError, match=option):
            Evaluator([metric], detector=detector)


def test_array_source(tmp_path):
    images = make_images(10, 0)
    np.savez(tmp_path / "batch.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    source = array_source(tmp_path / "batch.npz")
    assert (source.size, source.channels, source.resolution) == (10, 1, 8)
    assert torch.equal(torch.cat([part for _, part in source.batches(10, 4)]), images)


class Pattern(torch.nn.Module):
    """A one-step generator whose image is a function of its latents."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 8, 1, 0, 0.0, float("inf")

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.2))
        self.metadata = {"kind": "sid-generator", "init_sigma": 2.5}

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return torch.tanh(self.gain * x.float())


def test_a_live_network(tmp_path, detector):
    path = make_reference(tmp_path / "reference.npz", detector, make_images(180, 1))
    evaluator = Evaluator(["fid150"], reference=path, batch=64)
    net = Pattern().eval()
    before = torch.random.get_rng_state()
    trials = [evaluator(NetworkSource(net, seed=seed)) for seed in (0, 0, 150)]
    assert torch.equal(before, torch.random.get_rng_state())  # a metric doesn't change the training around it
    assert trials[0] == trials[1] != trials[2]
    assert trials[2][0]["seeds"] == [150, 299]
    (joint,) = summarise(trials[1:])
    values = [trial[0]["value"] for trial in trials[1:]]
    assert joint["value"] == pytest.approx(np.mean(values))
    assert joint["trials"]["std"]["fid"] == pytest.approx(np.std(values, ddof=1))
    assert joint["trials"]["min"]["fid"] == min(values)
    assert joint["seeds"] == [0, 299]
    assert "2 x 150 images, seeds 0-299" in describe(joint)
    assert describe(*summarise(trials[:1])) == describe(*trials[0])


def evaluate_in_group(rank, folder, world):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/group-{world}", rank=rank, world_size=world)
    result = [evaluate_noise(folder), measure_pattern(folder)]
    torch.save(result, Path(folder, f"result-{world}-{rank}.pt"))
    torch.distributed.destroy_process_group()


def evaluate_noise(folder):
    real, fake = make_images(180, 1), make_images(200, 2) // 2
    options = {"reference": f"{folder}/reference.npz", "batch": 32}
    many = evaluate(TensorSource([fake]), METRICS, data=TensorSource([real]), **options)
    few = evaluate(TensorSource([fake]), ["is60", "fid60"], **options)  # two batches: more processes have none
    return many + few


def measure_pattern(folder):
    """This process's images, and the statistics of the images of all processes."""
    source, detector = NetworkSource(Pattern().eval(), seed=5), load_detector(f"{folder}/detector.safetensors")
    place = {"rank": distributed.rank(), "processes": distributed.world_size()}
    images = dict(source.batches(150, 16, **place))
    statistics = measure_moments(source, 150, detector, 16)
    return images, torch.from_numpy(statistics.mu), torch.from_numpy(statistics.sigma)


@pytest.mark.filterwarnings("ignore:.*deficient rank")
def test_two_and_four_processes_equal_one(tmp_path, detector):
    make_reference(tmp_path / "reference.npz", detector, make_images(180, 1))
    context = multiprocessing.get_context("forkserver")
    ranks = [(rank, world) for world in (2, 4) for rank in range(world)]
    group = [context.Process(target=evaluate_in_group, args=(rank, str(tmp_path), world)) for rank, world in ranks]
    for process in group:
        process.start()
    for process in group:
        process.join()
        assert process.exitcode == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the groups: float32 features round by the number of threads
    expected, (images, *statistics) = evaluate_noise(tmp_path), measure_pattern(tmp_path)
    torch.set_num_threads(threads)
    made = {2: {}, 4: {}}
    for rank, world in ranks:
        records, (own_images, *own_statistics) = torch.load(tmp_path / f"result-{world}-{rank}.pt")
        for record, reference in zip(records, expected):
            assert record["values"] == pytest.approx(reference["values"], rel=1e-9, abs=1e-12)
            assert {**record, "value": 0, "values": 0} == {**reference, "value": 0, "values": 0}
        for own, whole in zip(own_statistics, statistics):
            assert (own - whole).abs().max() <= 1e-12 * whole.abs().max()
        made[world] |= own_images
    for of_world in made.values():
        assert of_world.keys() == images.keys()
        assert all(torch.equal(of_world[start], images[start]) for start in images)


class FailsOnProcess1(Pattern):
    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return super().forward(x, sigma) / (1 - distributed.rank())


def refusal(folder):
    """The error that this process gets, and proof that the group works afterwards."""
    with pytest.raises(UserError) as error:
        evaluate(NetworkSource(FailsOnProcess1()), ["is60"], detector=f"{folder}/detector.safetensors", batch=16)
    return error.value.message, distributed.from_every_process(distributed.rank())


def test_an_error_of_one_process_is_raised_by_all(tmp_path, detector):
    first, second = on_two_processes(refusal, tmp_path, str(tmp_path))
    assert first == second
    assert "image of seed 16 holds NaN" in first[0]
    assert first[1] == [0, 1]
