"""The small teachers: their pictures, and the command that makes them, step by step."""

import json
import os
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dnnlib import UserError
from edm import train, train_options, zoo
from edm.metrics.detector import save_detector
from edm.metrics.reference import load_reference
from edm.metrics.small_classifier import SmallClassifier
from edm.small_teachers import __main__ as command
from edm.small_teachers import pictures, presets
from edm.snapshot_metrics import MultiStepFid, recorded_fid
from training.dataset import ImageFolderDataset


def gradients(resolution):
    """40 gray images in two classes: brighter to the right, or downwards."""
    ramp = np.tile(np.arange(resolution, dtype=np.uint8) * 16, (resolution, 1))
    for i in range(40):
        yield Image.fromarray((ramp if i % 2 else ramp.T) + np.uint8(i)), i % 2


@pytest.fixture
def gradient_teacher(monkeypatch):
    monkeypatch.setitem(presets.TEACHERS, "gradients", presets.SmallTeacher(gradients, 8, True, 0.128))


@pytest.mark.parametrize(
    ("resolution", "multipliers", "attention"),
    [
        (4, [1], []),
        (8, [1, 2], [4]),
        (12, [1, 2], [6]),
        (15, [1], []),  # can't be halved
        (16, [1, 2, 2], [8]),
        (20, [1, 2, 2], [5]),
        (24, [1, 2, 2], [6]),
        (32, [1, 2, 2, 2], [8]),
    ],
)
def test_the_small_preset_fits_every_size(resolution, multipliers, attention):
    options = train.main.make_context("edm.train", ["--preset=small", "--outdir=runs", "--data=images"]).params
    dataset = types.SimpleNamespace(resolution=resolution, num_channels=3, label_dim=0)
    arguments = train_options.network_arguments(options, dataset, augment_dim=0)
    assert (arguments["channel_mult"], arguments["attn_resolutions"]) == (multipliers, attention)
    net = train.build_network("EDMPrecond", arguments, None)
    assert net(torch.zeros(1, 3, resolution, resolution), torch.ones(1)).shape == (1, 3, resolution, resolution)


@pytest.mark.parametrize(
    ("options", "attention"),
    [(["--attn=none"], []), (["--attn=16,4"], [16, 4]), (["--cres=1,2"], [8]), (["--cres=1"], [])],
)
def test_attention_is_where_the_network_has_layers(options, attention):
    arguments = ["--preset=small", "--outdir=runs", "--data=images", *options]
    options = train.main.make_context("edm.train", arguments).params
    dataset = types.SimpleNamespace(resolution=16, num_channels=3, label_dim=0)
    assert train_options.network_arguments(options, dataset, augment_dim=0)["attn_resolutions"] == attention


def make(folder, *options):
    fixed = [f"--outdir={folder}", "--only=gradients", "--num=20", "--device=cpu"]
    return CliRunner().invoke(command.main, [*fixed, *options])


def test_it_makes_a_teacher_and_continues(gradient_teacher, tmp_path):
    folder = tmp_path / "gradients"
    folder.mkdir()
    arguments = {"img_resolution": 8, "img_channels": 1, "num_classes": 2, "width": 4}
    torch.manual_seed(0)
    save_detector(SmallClassifier(**arguments).eval(), folder / "detector.safetensors", arguments)  # is skipped
    result = make(tmp_path)
    assert result.exit_code == 0, result.output
    dataset = ImageFolderDataset(folder / "data.zip", use_labels=True)
    for i, (image, label) in enumerate(gradients(8)):
        np.testing.assert_array_equal(dataset[i][0][0], np.asarray(image))
        assert dataset[i][1].argmax() == label
    assert load_reference(folder / "reference.npz").record["num_images"] == 40
    net = zoo.load_network(folder / "teacher.safetensors")
    assert (net.label_dim, net.metadata["kimg"]) == (2, 0.128)
    made = json.loads((folder / "teacher.json").read_text())
    assert made["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert (made["images"], made["kimg"], made["fid"]["num_images"], made["fid"]["steps"]) == (40, 0.128, 20, 18)
    reference = load_reference(folder / "reference.npz")
    files = (reference.record["detector_sha256"], reference.sha256)
    known = recorded_fid(net, folder / "teacher.safetensors", "fid20", *files)
    assert known == MultiStepFid(made["fid"]["value"], 35)
    row = f"| gradients | 40 | 1x8x8 | 2 | {made['parameters']} | 0 |"
    assert row in result.output
    assert f"{made['fid']['value']:.2f} |" in result.output.splitlines()[-1]

    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    os.remove(folder / "reference.npz")
    assert make(tmp_path).exit_code == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"reference.npz"}


def test_equal_pictures_give_equal_bytes(tmp_path):
    for name in ("a.zip", "b.zip"):
        pictures.write_data(gradients(8), tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_missing_packages_are_named_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "EMOJI_FONT", tmp_path / "none.ttf")
    monkeypatch.setattr(pictures, "ICONS", tmp_path / "none")
    result = CliRunner().invoke(command.main, [f"--outdir={tmp_path}/new", "--only=emoji,icons"])
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert "emoji: its pictures aren't on this machine: apt install fonts-noto-color-emoji" in line
    assert "icons: its pictures aren't on this machine: apt install oxygen-icon-theme" in line
    assert not (tmp_path / "new").exists()
    result = CliRunner().invoke(command.main, [f"--outdir={tmp_path}/new", "--only=emoji,cats"])
    assert result.exit_code == 2
    assert "no teacher 'cats'" in result.output


def test_digits():
    """All 1797, with scikit-learn's labels, in the full range of gray."""
    datasets = pytest.importorskip("sklearn.datasets")
    made = list(pictures.digits(8))
    assert [label for _, label in made] == datasets.load_digits().target.tolist()
    values = np.stack([np.asarray(image) for image, _ in made])
    assert (values.shape, values.dtype, values.min(), values.max()) == ((1797, 8, 8), np.uint8, 0, 255)


@pytest.mark.parametrize("name", sorted(presets.TEACHERS))
def test_pictures_of_installed_packages(name, monkeypatch):
    """Of the right size, each in its mode, and the same every time."""
    teacher, few_fonts = presets.TEACHERS[name], pictures.FONTS / "truetype" / "dejavu"
    if few_fonts.is_dir():  # all that a machine has take seconds to read
        monkeypatch.setattr(pictures, "FONTS", few_fonts)
    try:
        first, again = (next(teacher.source(teacher.resolution)) for _ in range(2))
    except UserError as error:
        pytest.skip(error.message)
    assert first[0].size == (teacher.resolution, teacher.resolution)
    assert first[0].mode == ("RGB" if name in ("emoji", "icons", "crops") else "L")
    assert first[0].tobytes() == again[0].tobytes()
    assert (first[1] is None) == (name in ("emoji", "icons", "crops"))
