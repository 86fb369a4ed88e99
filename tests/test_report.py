"""Metrics in training: each snapshot is measured once, and the best one is remembered."""

import json
import math
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_distillation, tiny_teacher

from edm import zoo
from edm.integrity import examine
from edm.published import FILES
from edm.sampler import generate_all
from edm.snapshot_metrics import read_metrics
from edm.training_report import TeacherReport
from edm.zoo import network_hash
from sid.config import DistillationConfig
from sid.inputs import published_reference
from sid.report import __main__ as report
from sid.report import pictures
from sid.report.progress import Report
from sid.report.summary import summarise
from sid.teacher_distance import Distance
from sid.training_loop import publish


class Evaluator:
    """Gives prepared values in turn and counts its calls."""

    metrics = (SimpleNamespace(name="fid2", kind="fid"), SimpleNamespace(name="is10", kind="is"))

    def __init__(self, *values):
        self.values, self.calls = list(values), 0

    def __call__(self, source):
        self.calls += 1
        value, described = self.values.pop(0), source.describe(2)
        return [{"metric": m.name, "value": value, "values": {m.kind: value}, **described} for m in self.metrics]


class Net(torch.nn.Module):
    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 8, 1, 0, 0.0, float("inf")

    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(float(gain)))
        self.metadata = {"init_sigma": 2.5}

    def forward(self, x, sigma, class_labels=None):
        return self.gain * x


def distilled(folder, teacher, gain, sha256="a", **steps):
    """A run folder with a generator that multiplies its teacher's images."""
    folder.mkdir()
    options = {**DistillationConfig().options(), "edm_model": str(teacher), "transfer": None}
    (folder / "training_options.json").write_text(json.dumps(options))
    net = zoo.load_denoiser(teacher)
    for parameter in net.parameters():
        parameter.data *= gain
    zoo.save_network(
        net, folder / "network-snapshot-000001.safetensors", init_sigma=2.5, teacher_sha256=sha256, **steps
    )
    return folder


def test_two_generators_of_a_teacher_are_compared(tmp_path, monkeypatch):
    """The picture has the teacher at 35 evaluations and at as many as the first generator, and both generators."""
    zoo.save_network(tiny_teacher(), teacher := tmp_path / "teacher.safetensors")
    one = distilled(tmp_path / "one", teacher, 0.9)
    four = distilled(tmp_path / "four", teacher, 0.8, step_levels=[2.5, 1.5, 0.7, 0.3], steps_noise="ddim")
    drawn = {}
    monkeypatch.setattr(pictures, "save_titled_grids", lambda bands, path, *_: drawn.update(bands))
    result = CliRunner().invoke(report.main, [str(one), f"--beside={four}"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "teacher at 35 evaluations, at 1, generator at 1, another at 4)" in result.output.replace("\n", " ")
    assert list(drawn) == [
        "Teacher, 35 evaluations per image",
        "Teacher, 1 evaluation per image",
        "Generator distilled from it, 1 evaluation per image",
        "Another generator, 4 evaluations per image",
    ]
    images = list(drawn.values())
    net = zoo.load_denoiser(four / "network-snapshot-000001.safetensors")
    assert torch.equal(images[3], generate_all(net, range(len(images[3]))))
    assert not any(torch.equal(images[3], other) for other in images[:3])


def test_a_generator_of_another_teacher_is_not_compared(tmp_path):
    zoo.save_network(tiny_teacher(), teacher := tmp_path / "teacher.safetensors")
    one, other = distilled(tmp_path / "one", teacher, 0.9), distilled(tmp_path / "other", teacher, 0.9, "b")
    result = CliRunner().invoke(report.main, [str(one), f"--beside={other}"])
    assert result.exit_code == 2
    assert result.output == f"Error: --beside={other}: its generator has another teacher; name a run of the same one\n"


def snapshots(folder, evaluator, gains, kind=Report):
    """As a training does it: first the file, then the report."""
    for i, gain in gains:
        (folder / f"network-snapshot-{i:06d}.safetensors").write_text(f"weights {i}")
        kind(folder, evaluator).snapshot(Net(gain), 1000 * i)


def best(folder):
    return json.loads((folder / "best.json").read_text()), (folder / "best.safetensors").read_text()


def found_in(path):
    return " ".join(str(finding) for finding in examine(path))


def refuse(*args):
    raise NotImplementedError("no links here")


@pytest.mark.parametrize("links", [True, False])
def test_the_best_snapshot_is_linked(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    evaluator = Evaluator(9.0, 4.0, 2.0, 3.0)
    Report(tmp_path, evaluator).start(Net(0.1))
    assert not (tmp_path / "best.json").exists()  # nothing is trained yet
    for i, number in ((1, 1), (2, 2), (3, 2)):
        snapshots(tmp_path, evaluator, [(i, i)])
        record, content = best(tmp_path)
        assert content == f"weights {number}"
        assert record["snapshot"] == f"network-snapshot-{number:06d}.safetensors"
    expected = {"snapshot": "network-snapshot-000002.safetensors", "kimg": 2, "metric": "fid2", "value": 2.0}
    assert record == {**expected, "records": "metric-fid2.jsonl"}
    assert "no checksum" in found_in(tmp_path / "best.json")
    assert (tmp_path / "best.safetensors").is_symlink() == links
    assert not list(tmp_path.glob(".*"))
    assert [record["kimg"] for record in read_metrics(tmp_path, "is10")] == [0, 1, 2, 3]


def test_without_fid_the_best_snapshot_is_the_one_closest_in_features(tmp_path):
    class Distances:
        samples = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
        features: typing.ClassVar = iter([9.0, 3.0, 2.0, math.nan, 2.5])

        def __call__(self, net):
            return Distance(0.001, 0.001, next(self.features))

    def report(i):
        (tmp_path / f"network-snapshot-{i:06d}.safetensors").write_text(f"weights {i}")
        Report(tmp_path, distance=Distances()).snapshot(Net(i), 1000 * i)

    Report(tmp_path, distance=Distances()).start(Net(0.5))
    assert not (tmp_path / "best.json").exists()
    for i in range(1, 5):
        report(i)
    record, content = best(tmp_path)
    assert content == "weights 2"
    assert (record["metric"], record["value"], record["kimg"]) == ("features", 2.0, 2.0)
    assert "no checksum" in found_in(tmp_path / "best.json")
    (tmp_path / "best.json").write_text(json.dumps({**record, "value": 1.5}))
    assert "teacher-distance.jsonl has no record" in found_in(tmp_path / "best.json")


def test_the_best_snapshot_has_the_name_that_it_was_saved_by(tmp_path):
    """The name depends on the batch, and a resumed run may have another one."""
    record = {"kimg": 1.024, "value": 5.0, "network_sha256": "x"}
    for batch, name in ((1, "000001"), (256, "000001.024")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metric-fid2.jsonl").write_text(json.dumps(record) + "\n")
        (folder / f"network-snapshot-{name}.safetensors").write_text("weights 1")
        Report(folder, Evaluator(9.0), batch=batch).snapshot(Net(0.1), 2048)
        assert best(folder)[0]["snapshot"] == f"network-snapshot-{name}.safetensors"


@pytest.mark.parametrize("kind", [Report, TeacherReport])
def test_equal_weights_are_not_measured_again(tmp_path, kind):
    snapshots(tmp_path, Evaluator(4.0, 2.0), [(1, 1), (2, 2)], kind)
    resumed = Evaluator(1.0, 3.0)
    snapshots(tmp_path, resumed, [(2, 2), (3, 3)], kind)
    assert resumed.calls == 1
    assert [record["value"] for record in read_metrics(tmp_path, "fid2")] == [4.0, 2.0, 1.0]
    (tmp_path / "metric-is10.jsonl").unlink()  # as if killed between the two metrics
    snapshots(tmp_path, resumed, [(3, 3)], kind)
    assert len(read_metrics(tmp_path, "fid2")) == 3
    assert len(read_metrics(tmp_path, "is10")) == 1


def test_a_snapshot_records_its_fid(tmp_path):
    """Again when a resumed run comes past it and measures nothing."""
    distillation = tiny_distillation()
    state, config = distillation.state, distillation.config
    state.nimg = 40
    for value in (9.0, 8.0):
        publish(state, config, tmp_path, Report(tmp_path, Evaluator(value), batch=config.batch))
        net = zoo.load_network(tmp_path / "network-snapshot-000000.040.safetensors")
        assert net.metadata["fid"] == {"metric": "fid2", "evaluations_1": 9.0, "seeds": [0, 1]}
        assert network_hash(net) == network_hash(state.ema)


@pytest.mark.parametrize("kind", [Report, TeacherReport])
def test_other_weights_are_measured_even_after_as_many_images(tmp_path, kind):
    snapshots(tmp_path, Evaluator(4.0, 2.0), [(1, 1), (1, 2)], kind)
    assert [record["value"] for record in read_metrics(tmp_path, "fid2")] == [4.0, 2.0]


OWN_FID = {"metric": "fid5k", "detector_sha256": "d", "evaluations_35": 15.2, "evaluations_1": 452.3}
LINE = {"kimg": 9.0, "value": 15.2, "steps": 18, "detector_sha256": "d"}  # of the run that trained the teacher


@pytest.mark.parametrize(
    ("recorded", "line", "row"),
    [
        (OWN_FID, None, [("teacher", 35, 15.2)]),
        (OWN_FID | {"detector_sha256": "another"}, None, []),
        (OWN_FID | {"metric": "fid50k"}, None, []),
        (OWN_FID | {"evaluations_35": "15.2"}, None, []),
        (None, None, []),
        (None, LINE, [("teacher", 35, 15.2)]),
        (None, LINE | {"detector_sha256": "another"}, []),
        (None, LINE | {"reference_sha256": "another"}, []),
        (OWN_FID | {"reference_sha256": "another"}, None, []),
        (None, LINE | {"network_sha256": "another"}, []),
        (None, LINE | {"steps": None}, []),
    ],
)
def test_the_summary_takes_the_teachers_fid_from_its_file_or_training(tmp_path, recorded, line, row):
    records = [{"kimg": kimg, "value": value, "detector_sha256": "d"} for kimg, value in ((0, 300.0), (5, 30.0))]
    records[0]["reference_sha256"] = "r"
    (tmp_path / "metric-fid5k.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    training = tmp_path / "teacher"
    training.mkdir()
    (training / "network.safetensors").touch()
    teacher = Net(0.1)
    teacher.metadata = {"fid": recorded}
    if line is not None:
        line = {"network_sha256": network_hash(teacher), **line}
        (training / "metric-fid5k.jsonl").write_text(json.dumps(line) + "\n")
    source = str(training / "network.safetensors")
    rows = summarise(tmp_path, teacher, {"edm_model": source})
    assert rows == [*row, ("teacher = generator before", 1, 300.0), ("generator after 5 kimg", 1, 30.0)]
    of_another = summarise(tmp_path, teacher, {"edm_model": source, "transfer": "another"})
    assert of_another[-2] == ("generator before (--transfer)", 1, 300.0)
    known = {"edm_model": source, "teacher_fid": {"value": 6.0, "evaluations": 70}}
    assert summarise(tmp_path, teacher, known, True)[0] == ("guided teacher", 70, 6.0)
    damaged = known | {"teacher_fid": {"value": "6", "evaluations": 70}}
    assert summarise(tmp_path, teacher, damaged) == rows
    assert summarise(tmp_path, teacher, damaged, True) == rows[-2:]  # what a file records is without guidance


def test_the_reference_of_a_published_teacher(tmp_path):
    name = "edm-cifar10-32x32-uncond-vp"
    for teacher in (name, FILES[name].url, f"{tmp_path}/{name}.pkl"):
        assert published_reference(teacher) == "cifar10-32x32"
    for own in ("runs/00000-cifar10-32x32-ddpmpp/network-snapshot-000100.safetensors", "my-ffhq-64x64-gray.pkl"):
        assert published_reference(own) is None
