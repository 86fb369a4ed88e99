"""Classes without images: no network learns them, and no one draws them."""

import json

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_config, tiny_teacher

from dnnlib import UserError
from edm import train, zoo
from edm.sampler import generate_images, sample
from sid.inputs import Inputs
from sid.prepare import prepare
from training.conditions import Classes, as_ranges, learnt_classes

CPU = torch.device("cpu")


def network(classes=None, label_dim=5):
    net = tiny_teacher(label_dim)
    net.metadata = {} if classes is None else {"classes": classes}
    return net


@pytest.mark.parametrize(
    ("classes", "text"),
    [([0], "0"), ([1, 2], "1-2"), ([0, 7], "0,7"), ([1, 2, 3, 7, 9, 10], "1-3,7,9-10"), (list(range(99)), "0-98")],
)
def test_text_of_classes(classes, text):
    assert as_ranges(classes) == text
    assert learnt_classes(network(text, 99)) == classes


@pytest.mark.parametrize("text", ["", "5", "0-5", "2,1", "1,1", "3-2", "-1", "1-", "x", " 1", 3, None, [1], "9" * 99])
def test_damaged_classes(tmp_path, text):
    net = network()
    zoo.save_network(net, tmp_path / "net.safetensors", classes=text)
    if text is None:
        assert learnt_classes(zoo.load_network(tmp_path / "net.safetensors")) is None
        return
    with pytest.raises(UserError, match="classes=") as error:
        zoo.load_network(tmp_path / "net.safetensors")
    assert str(tmp_path) in error.value.message


def test_all_classes_are_drawn_as_before():
    classes = Classes.of(network())
    torch.manual_seed(0)
    expected = torch.randint(5, [64])
    torch.manual_seed(0)
    drawn = classes.draw(64)
    assert torch.equal(drawn, torch.eye(5)[expected])


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ""])
def test_samples_are_of_learnt_classes(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    zoo.save_network(network(), path, classes="1-2,4")
    net, labels = zoo.load_network(path), []
    net.register_forward_pre_hook(lambda _module, args: labels.append(args[2]))
    sample(net, range(300), "one-step")
    counts = torch.cat(labels).sum(0).tolist()
    assert counts[0] == counts[3] == 0
    assert all(70 <= counts[i] <= 130 for i in (1, 2, 4))
    assert len(list(generate_images(net, [0], class_idx=2, steps=1))) == 1
    with pytest.raises(UserError, match="--class=3 had no images in training; choose one of 1-2,4"):
        list(generate_images(net, [0], class_idx=3, steps=1))


def test_a_distillation_draws_learnt_classes_and_passes_them_on(tmp_path):
    distillation = prepare(Inputs(network("0,3")), tiny_config(), CPU)
    assert set(distillation.draw_conditions(200).argmax(1).tolist()) == {0, 3}
    assert distillation.state.ema.metadata["classes"] == "0,3"
    assert "classes" not in prepare(Inputs(network()), tiny_config(), CPU).state.ema.metadata


@pytest.mark.parametrize(("classes", "expected"), [([1, 3, 1, 3], "1,3"), ([0, 1, 0, 1], None)])
def test_training_records_the_classes_that_have_images(tmp_path, classes, expected):
    from PIL import Image

    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.new("L", (4, 4), i).save(tmp_path / "in" / f"{i}.png")
    labels = [[f"{i}.png", label] for i, label in enumerate(classes)]
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"labels": labels}))
    options = "--cond=1 --cbase=4 --cres=1 --blocks=1 --attn=none --augment=0 --workers=0 --batch=4 --duration=0.000004"
    places = [f"--data={tmp_path / 'in'}", f"--outdir={tmp_path / 'run'}", "--nosubdir", "--device=cpu"]
    result = CliRunner().invoke(train.main, [*options.split(), *places])
    assert result.exit_code == 0, result.output
    (snapshot,) = (tmp_path / "run").glob("network-snapshot-*")
    assert zoo.load_network(snapshot).metadata.get("classes") == expected


@pytest.mark.parametrize(("size", "cres", "fitting"), [(30, "2,2,2", "28 or 32"), (9, "1,2", "8 or 10")])
def test_training_names_the_sizes_that_fit(tmp_path, size, cres, fitting):
    from PIL import Image

    Image.new("L", (size, size)).save(tmp_path / "0.png")
    result = CliRunner().invoke(train.main, [f"--data={tmp_path}", f"--outdir={tmp_path}", f"--cres={cres}", "-n"])
    assert result.exit_code == 2
    assert fitting in result.output
    assert result.output.count("\n") == 1
