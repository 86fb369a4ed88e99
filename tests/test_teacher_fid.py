"""The teacher's FID beside the generator's: recorded, kept by an earlier run, or measured at the start of a run."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import fid
import sid_train
from dnnlib import UserError
from dnnlib.download import cache_folder
from edm.metrics.data_reference import make_reference
from edm.metrics.detector import load_detector, save_detector
from edm.metrics.evaluate import Evaluator
from edm.metrics.small_classifier import SmallClassifier
from edm.metrics.sources import NetworkSource, TensorSource
from edm.published import FILES
from edm.snapshot_metrics import MultiStepFid, read_metrics
from edm.zoo import load_denoiser, save_network
from sid import distil
from sid import teacher_fid as room
from sid.inputs import Inputs
from sid.teacher_fid import teacher_fid
from tests.tiny import CPU, tiny_config, tiny_teacher
from training.guidance import GuidedDenoiser

NUM = 24


@pytest.fixture
def detector(tmp_path):
    torch.manual_seed(0)
    arguments = {"img_resolution": 8, "img_channels": 1, "num_classes": 3, "width": 4}
    save_detector(SmallClassifier(**arguments).eval(), tmp_path / "detector.safetensors", arguments)
    return load_detector(tmp_path / "detector.safetensors")


@pytest.fixture
def reference(tmp_path, detector):
    images = torch.randint(0, 256, [40, 1, 8, 8], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    make_reference(TensorSource([images]), tmp_path / "reference.npz", detector)
    return tmp_path / "reference.npz"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def inputs(reference):
    return Inputs(tiny_teacher().eval(), evaluator=Evaluator([f"is{NUM}", f"fid{NUM}"], reference))


def find(inputs, wanted=None, source="teacher.safetensors", **changes):
    return teacher_fid(inputs, tiny_config(**changes), source, wanted, CPU)


def no_more(monkeypatch):
    monkeypatch.setattr(room, "NetworkSource", None)  # whoever measures now fails


def test_it_is_that_of_35_evaluations_and_kept(inputs, monkeypatch):
    record = inputs.evaluator.only(f"fid{NUM}")(NetworkSource(inputs.teacher, steps=18))[0]
    assert find(inputs, True) == MultiStepFid(record["value"], 35)
    assert [metric.name for metric in inputs.evaluator.metrics] == [f"is{NUM}", f"fid{NUM}"]
    no_more(monkeypatch)
    assert find(inputs, True) == find(inputs, False) == MultiStepFid(record["value"], 35)
    other = dataclasses.replace(inputs, teacher=tiny_teacher(label_dim=0).eval())
    assert find(other, False) is None
    inputs.teacher.metadata = {"classes": "1"}  # the same weights make other images
    assert find(inputs, False) is None


def test_damage_in_the_cache_is_measured_again(inputs, monkeypatch):
    value = find(inputs, True)
    (file,) = (cache_folder() / "teacher-fid").iterdir()
    records = [{"value": 1}, {"value": "1", "evaluations": 35}, {"value": float("nan"), "evaluations": 35}]
    for text in ["", "[]", "{", *map(json.dumps, records)]:
        file.write_text(text)
        assert find(inputs, True) == value
    assert json.loads(file.read_text()) == {"value": value.value, "evaluations": 35}


def test_without_being_asked_only_where_a_run_hardly_notices(inputs, monkeypatch):
    evaluations = NUM * 35
    assert find(inputs, total_kimg=2 * evaluations / 1000 - 0.001) is None
    no_more(monkeypatch)
    assert find(inputs, False, total_kimg=1e6) is None
    with pytest.raises(TypeError):
        find(inputs, total_kimg=2 * evaluations / 1000)


def test_a_guided_teacher_has_another(inputs, tmp_path):
    plain = find(inputs, True)
    guided = find(inputs, True, guidance="long=3")
    record = inputs.evaluator.only(f"fid{NUM}")(NetworkSource(GuidedDenoiser(inputs.teacher, None, 3.0), steps=18))[0]
    assert guided == MultiStepFid(record["value"], 70) != plain
    assert find(inputs, False, guidance="long=4") is None
    with_guide = dataclasses.replace(inputs, guide=tiny_teacher().eval(), hashes=None)
    assert find(with_guide, True, guidance="1.5").evaluations == 70
    # What a file records is of the teacher alone.
    detector = inputs.evaluator.detector.sha256
    inputs.teacher.metadata = {"fid": {"metric": f"fid{NUM}", "detector_sha256": detector, "evaluations_79": 7.0}}
    assert find(inputs, True) == MultiStepFid(7.0, 79)
    assert find(inputs, True, guidance="long=3") == guided
    # Nor is it known against other statistics.
    recorded = inputs.teacher.metadata["fid"]
    for sha256, expected in ((inputs.evaluator.reference.sha256, MultiStepFid(7.0, 79)), ("0" * 64, plain)):
        recorded["reference_sha256"] = sha256
        assert find(inputs, True) == expected


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, MultiStepFid(1.97, 35)),
        ({"name": "teacher.safetensors"}, None),
        ({"num": 5000}, None),
        ({"detector": "another"}, None),
        ({"reference": "own.npz"}, None),
    ],
)
def test_a_published_teachers_owners_figure_counts_for_what_they_measured(change, known):
    values = {"name": "edm-cifar10-32x32-uncond-vp", "num": 50_000, "reference": "cache/cifar10-32x32.npz", **change}
    detector = change.get("detector", FILES["inception-2015-12-05"].sha256)
    evaluator = SimpleNamespace(
        metrics=[SimpleNamespace(num=values["num"])],
        detector=SimpleNamespace(sha256=detector),
        reference=SimpleNamespace(path=values["reference"]),
    )
    assert room._published_fid(values["name"], evaluator) == known


def test_nothing_to_measure(inputs):
    without = dataclasses.replace(inputs, evaluator=inputs.evaluator.only(f"is{NUM}"))
    assert find(without) is find(dataclasses.replace(inputs, evaluator=None)) is None
    with pytest.raises(UserError, match=r"^--measure-teacher: the run measures no FID; give --metrics=fid50k"):
        find(without, True)
    inputs.teacher.metadata = {"sigma": 0.37}  # a teacher of one noise level can't be sampled
    assert find(inputs) is find(inputs, False, guidance="long=3") is None
    with pytest.raises(UserError, match=r"^--measure-teacher: the teacher knows one noise level only, .*-teacher=0$"):
        find(inputs, True, guidance="long=3")


def test_a_run_says_and_records_it(reference, tmp_path, capsys):
    teacher, out = tmp_path / "teacher.safetensors", tmp_path / "run"
    save_network(tiny_teacher(), teacher)
    options = [f"--edm_model={teacher}", f"--data_stat={reference}", f"--metrics=fid{NUM}"]
    short = ["--nosubdir", "--batch=8", "--duration=1.6e-5", "--tick=0.008", "--device=cpu"]
    sid_train.main([*options, f"--outdir={tmp_path / 'plain'}", *short], standalone_mode=False)
    assert "the teacher's isn't known (--measure-teacher=1)" in " ".join(capsys.readouterr().out.split())
    sid_train.main([*options, f"--outdir={out}", *short, "--measure-teacher=1"], standalone_mode=False)
    output = " ".join(capsys.readouterr().out.split())
    recorded = json.loads((out / "training_options.json").read_text())["teacher_fid"]
    assert recorded["evaluations"] == 35
    assert f"the teacher: {recorded['value']:.4g} with 35 evaluations" in output
    sid_train.main([*options, f"--outdir={tmp_path / 'other'}", *short, "--seed=3"], standalone_mode=False)
    assert json.loads((tmp_path / "other" / "training_options.json").read_text())["teacher_fid"] == recorded


@pytest.mark.parametrize(
    ("options", "is_kept"),
    [
        (["--steps=18"], True),
        (["--steps=17"], False),
        (["--steps=18", "--seeds=1"], False),
        (["--steps=18", "--trials=2"], False),
        (["--steps=18", "--rho=5"], False),
        (["--steps=18", "--class=1"], False),
        (["--steps=18", "--guidance=2"], False),
    ],
)
def test_what_fid_py_measured_of_a_teacher_counts(reference, tmp_path, options, is_kept):
    teacher = tmp_path / "teacher.safetensors"
    save_network(tiny_teacher(), teacher)
    command = [f"--network={teacher}", f"--ref={reference}", f"--metrics=fid{NUM},is{NUM}", "--device=cpu"]
    result = CliRunner().invoke(fid.main, ["eval", *command, *options])
    assert result.exit_code == 0, result.output
    value = json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))["value"]
    net = load_denoiser(teacher)
    inputs = Inputs(net, evaluator=Evaluator([f"fid{NUM}"], reference))
    assert find(inputs, False) == (MultiStepFid(value, 35) if is_kept else None)
    assert find(inputs, False, guidance="long=3") is None


def test_the_start_is_measured_once_with_trials_too(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sid.teacher_samples.NUM_IMAGES", 16)
    monkeypatch.setattr("sid.teacher_samples.STEPS", 2)
    lengths = {"augment": 0, "lr": 1e-5, "glr": 1e-5, "total_kimg": 0.08, "kimg_per_tick": 0.016}
    measured = {"metrics": f"fid{NUM}", "data_stat": str(reference), "device": "cpu"}
    for trials in (0.0, 0.5):
        distil(tiny_teacher(), tiny_config(**lengths), tmp_path / str(trials), trials=trials, **measured)
    without, with_trials = (read_metrics(tmp_path / str(trials), f"fid{NUM}") for trials in (0.0, 0.5))
    assert [record["kimg"] for record in with_trials].count(0) == 1
    assert (with_trials[0]["kimg"], with_trials[0]["value"]) == (0, without[0]["value"])
    assert with_trials[-1]["kimg"] > 0
    assert f"The start: FID {with_trials[0]['value']:.4g}" in capsys.readouterr().out
