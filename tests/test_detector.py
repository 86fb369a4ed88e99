"""Detectors: both kinds of file, what is refused, and the tool that trains one."""

import json
import runpy
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from dnnlib import UserError
from dnnlib.download import hash_file
from edm.metrics import frechet_distance, pretext, train_detector
from edm.metrics.detector import load_detector, save_detector
from edm.metrics.small_classifier import SmallClassifier

ARGUMENTS = {"img_resolution": 8, "img_channels": 1, "num_classes": 3, "width": 4}


THREES = torch.full([40], 3)


class LikeInception(torch.nn.Module):
    """Features: the mean of each channel; classes: softmax of the features, with and without a bias."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([3.0, 0.0, 0.0]))

    def forward(
        self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        features = images.float().mean((2, 3))
        if return_features:
            return features
        return torch.softmax(features if no_output_bias else features + self.bias, dim=1)


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    path = tmp_path_factory.mktemp("torchscript") / "toy.pt"
    torch.jit.script(LikeInception()).save(str(path))
    return path


@pytest.fixture
def safetensors(tmp_path):
    torch.manual_seed(0)
    net = SmallClassifier(**ARGUMENTS).eval()
    path = tmp_path / "small.safetensors"
    save_detector(net, path, ARGUMENTS, torch.float32, test_accuracy=0.5)
    return net, path


def images(count=5, channels=1, resolution=8):
    shape = (count, channels, resolution, resolution)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(torchscript):
    detector = load_detector(torchscript)
    assert (detector.name, detector.sha256, detector.feature_dim) == ("toy", hash_file(torchscript), 3)
    batch = images(channels=3)
    features, probabilities = detector.measure(batch, probabilities=True)
    assert torch.equal(features, batch.float().mean((2, 3)))
    assert torch.equal(probabilities, features.softmax(1))
    gray = images()
    assert torch.equal(detector.features(gray), gray.float().mean((2, 3)).repeat(1, 3))
    with pytest.raises(UserError, match="2"):
        detector.features(images(channels=2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_of_another_signature(tmp_path):
    path = tmp_path / "relu.pt"
    torch.jit.script(torch.nn.ReLU()).save(str(path))
    with pytest.raises(UserError, match="return_features=True"):
        load_detector(path).features(images())


class ToyBackbone(torch.nn.Module):
    """Stands in for a network of timm, which the tests don't need."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
        self.conv = torch.nn.Conv2d(3, 6, 14, stride=14)

    def forward(self, x):
        return self.conv(x).relu().flatten(2).mean(2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_example_of_the_manual(tmp_path, monkeypatch):
    manual = (Path(__file__).resolve().parents[1] / "docs" / "detectors.md").read_text(encoding="utf-8")
    script = tmp_path / "export.py"
    script.write_text(manual.split("```python\n")[1].split("```")[0], encoding="utf-8")
    torch.manual_seed(0)
    backbone = ToyBackbone()
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=lambda *_, **__: backbone))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="export")
    detector = load_detector("dinov2-vitl14.pt")
    batch = images(channels=3, resolution=16)
    mean, std = (torch.tensor(backbone.pretrained_cfg[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    resized = torch.nn.functional.interpolate(batch.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    torch.testing.assert_close(detector.features(batch), backbone((resized / 255 - mean) / std))
    single = torch.cat([detector.features(image[None]) for image in batch])
    torch.testing.assert_close(detector.features(batch), single)
    assert detector.feature_dim == 6
    with pytest.raises(UserError, match="no classes"):
        detector.probabilities(batch)


def test_small_classifier(safetensors):
    net, path = safetensors
    detector = load_detector(path)
    assert (detector.name, detector.sha256, detector.feature_dim) == ("small", hash_file(path), 128)
    assert detector.metadata == {"test_accuracy": 0.5}
    with torch.no_grad():
        features, logits = net(images())
    assert torch.equal(detector.features(images()), features)
    assert torch.equal(detector.probabilities(images()), logits.softmax(1))
    for wrong in (images(channels=3), images(resolution=16)):
        with pytest.raises(UserError, match="8x8"):
            detector.features(wrong)


def test_half_precision_file(safetensors, tmp_path):
    net, path = safetensors
    save_detector(net, tmp_path / "half.safetensors", ARGUMENTS, torch.float16)
    full, half = (load_detector(p).features(images()) for p in (path, tmp_path / "half.safetensors"))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=1e-2, atol=1e-2)


def test_color_detector_takes_gray_images(tmp_path):
    arguments = {**ARGUMENTS, "img_channels": 3}
    save_detector(SmallClassifier(**arguments), tmp_path / "color.safetensors", arguments)
    detector = load_detector(tmp_path / "color.safetensors")
    assert torch.equal(detector.features(images()), detector.features(images().repeat(1, 3, 1, 1)))


def test_refused_files(tmp_path):
    (tmp_path / "text.pt").write_text("not a network")
    (tmp_path / "text.safetensors").write_text("not a network")
    weights = {"w": torch.zeros(1)}
    save_file(weights, tmp_path / "headless.safetensors")
    save_file(
        weights, tmp_path / "foreign.safetensors", {"class_name": "os.system", "init_kwargs": '{"command": "id"}'}
    )
    header = {"class_name": "SmallClassifier", "init_kwargs": json.dumps(ARGUMENTS)}
    save_file(weights, tmp_path / "weights.safetensors", header)
    save_file(weights, tmp_path / "arguments.safetensors", {**header, "init_kwargs": '{"depth": 3}'})
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=path.name) as error:
            load_detector(path)
        assert "\n" not in error.value.message


def write_stripes(path, count, seed):
    """A zip of 8x8 images: class 0 has bright rows, class 1 bright columns."""
    rng = np.random.default_rng(seed)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            pixels = rng.integers(0, 100, (8, 8), dtype=np.uint8)
            pixels[(slice(None, None, 2),) if i % 2 == 0 else (slice(None), slice(None, None, 2))] += 150
            with archive.open(f"{i:04d}.png", "w") as file:
                Image.fromarray(pixels).save(file, "png")
            labels.append([f"{i:04d}.png", i % 2])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return str(path)


def test_training(tmp_path):
    data, test = write_stripes(tmp_path / "train.zip", 64, 0), write_stripes(tmp_path / "test.zip", 32, 1)
    dest = tmp_path / "detector.safetensors"
    options = [f"--data={data}", f"--test={test}", "--epochs=6", "--batch=16", "--width=4", "--device=cpu"]
    result = CliRunner().invoke(train_detector.main, [*options, f"--dest={dest}"])
    assert result.exit_code == 0, result.output
    detector = load_detector(dest)
    assert detector.metadata["test_accuracy"] == 1
    held_out, labels, _ = train_detector.load_labelled(test)
    assert torch.equal(detector.probabilities(held_out).argmax(1), labels)
    new = tmp_path / "new.safetensors"
    for wrong in (["--dest=x.pt"], [f"--dest={new}", "--batch=65"], [f"--dest={new}", "--test=none.zip"]):
        result = CliRunner().invoke(train_detector.main, [*options, *wrong])
        assert (result.exit_code, new.exists()) == (2, False)
        assert result.output.splitlines()[-1].startswith(f"Error: {wrong[-1]}")


def test_quarter_turns():
    """Each image is turned by its own number of quarter turns, counterclockwise as numpy turns arrays."""
    images = torch.arange(5 * 3 * 16, dtype=torch.uint8).reshape(5, 3, 4, 4)
    turns = torch.tensor([0, 3, 1, 2, 1])
    for made, image, turn in zip(pretext.turned(images, turns), images, turns.tolist()):
        np.testing.assert_array_equal(made, np.rot90(image, turn, (1, 2)))


def test_damages():
    """0 leaves an image as it is, 1 blurs it, 2 adds noise, 3 makes it of aligned parts of several images."""
    torch.manual_seed(0)
    values = torch.arange(100, 140, dtype=torch.uint8)
    flat = values[:, None, None, None].expand(-1, 3, 8, 8)  # image i is gray of value 100 + i
    edges = torch.where(torch.arange(8) < 4, 60, 200).to(torch.uint8).expand(40, 3, 8, 8)
    none, blurred, noisy, mixed = (torch.full([40], number) for number in range(4))
    assert torch.equal(pretext.damaged(edges, none), edges)
    assert torch.equal(pretext.damaged(flat, blurred), flat)
    soft = pretext.damaged(edges, blurred).float()
    assert soft.mean().item() == pytest.approx(130, abs=0.5)
    assert 60 < soft[0, 0, 4, 3] < 130 < soft[0, 0, 4, 4] < 200
    noise = (pretext.damaged(flat, noisy).float() - flat).std((1, 2, 3))
    assert noise.min() > 5
    assert noise.max() < 36
    assert noise.std() > 2  # another level for each image
    parts = pretext.damaged(flat, mixed)
    assert torch.equal(parts[:, :, ::2, ::2].sort(0).values, flat[:, :, ::2, ::2])  # nothing is lost or made up
    assert torch.equal(parts[:, :, ::2, ::2], parts[:, :, 1::2, 1::2])
    assert (parts.amax((1, 2, 3)) > parts.amin((1, 2, 3))).all()
    some = pretext.damaged(edges, torch.arange(40) % 4)
    assert torch.equal(some[::4], edges[::4])


def of_colour(colour, count, seed):
    """uint8 [count, 3, 8, 8]: noise around one colour."""
    noise = torch.randint(-20, 21, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    return (torch.tensor(colour)[:, None, None] + noise).to(torch.uint8)


def test_clusters_are_found():
    """Images around three colours lie around three centres: the colours."""
    colours = [(200, 60, 60), (60, 200, 60), (60, 60, 200)]
    images = torch.cat([of_colour(colour, 40, i) for i, colour in enumerate(colours)])
    centres = pretext.find_clusters(images, 3, seed=1)
    found = (centres.reshape(3, 3, 16) + 1) * 127.5  # colour by place
    order = found.mean(2).argmax(1)
    torch.testing.assert_close(found, torch.tensor(colours)[order][..., None].expand(3, 3, 16).float(), atol=6, rtol=0)
    assert sorted(order.tolist()) == [0, 1, 2]


def coloured_squares(count, seed):
    """uint8 [count, 3, 8, 8]: yellow or red squares, bright at the upper left, at random places on a dark ground."""
    draws = torch.Generator().manual_seed(seed)
    rows, columns, kinds = (torch.randint(n, [count], generator=draws).tolist() for n in (5, 5, 2))
    images = torch.full((count, 3, 8, 8), 20, dtype=torch.uint8)
    for image, row, column, kind in zip(images, rows, columns, kinds):
        colour = torch.tensor([(170, 140, 40), (160, 50, 30)][kind], dtype=torch.uint8)[:, None, None]
        image[:, row : row + 4, column : column + 4] = colour
        image[:, row : row + 2, column : column + 2] = colour + 80
    return images


def test_training_without_labels(tmp_path):
    """The detector beats chance on the tenth of the images that is held out, and its features are sensitive to a lot.

    Images of the same kind lie near in its features; with exchanged colours, blurred or noisy, or of one of both
    kinds, they lie far off.
    """
    (tmp_path / "images").mkdir()
    images = coloured_squares(400, seed=0)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"images/{i:03d}.png")
    dest = tmp_path / "detector.safetensors"
    options = [f"--data={tmp_path}/images", f"--dest={dest}", "--epochs=15", "--batch=32", "--width=8", "--device=cpu"]
    result = CliRunner().invoke(train_detector.main, options)
    assert result.exit_code == 0, result.output
    assert "No labels" in result.output
    detector = load_detector(dest)
    assert detector.metadata["test_accuracy"] > 0.4  # about 1/5 by chance

    def moments(images):
        features = detector.features(images).double()
        return features.mean(0).numpy(), torch.cov(features.T).numpy()

    reference, others = moments(images), coloured_squares(400, seed=1)
    near = frechet_distance(*moments(others), *reference)
    red = others[others[:, 1].amax((1, 2)) < 180]
    for number in (1, 2):
        assert frechet_distance(*moments(pretext.damaged(others, torch.full([400], number))), *reference) > 5 * near
    assert frechet_distance(*moments(others.roll(1, 1)), *reference) > 5 * near
    assert frechet_distance(*moments(red), *reference) > 5 * near


def gray_images(path, count, side=8, labels=None):
    """A folder of gray images of different brightness."""
    path.mkdir()
    for i in range(count):
        Image.fromarray(np.full((side, side), 8 * i, dtype=np.uint8)).save(path / f"{i:02d}.png")
    if labels is not None:
        pairs = [[f"{i:02d}.png", label] for i, label in enumerate(labels)]
        (path / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return path


def trained_on(data, *options):
    """What the tool prints after a training with few steps; it must succeed."""
    options = [f"--data={data}", f"--dest={data}.safetensors", "--width=4", "--device=cpu", *options]
    result = CliRunner().invoke(train_detector.main, options)
    assert result.exit_code == 0, result.output
    load_detector(f"{data}.safetensors")
    return result.output


def test_too_few_images(tmp_path):
    """They are refused in one line, before any clustering."""
    for count, batch, expected in ((2, [], "--data holds too few images"), (9, ["--batch=10"], "--batch=10 is more")):
        data = gray_images(tmp_path / f"{count}", count)
        result = CliRunner().invoke(train_detector.main, [f"--data={data}", f"--dest={data}.safetensors", *batch])
        assert result.exit_code == 2
        assert expected in result.output
    assert "accuracy" in trained_on(gray_images(tmp_path / "three", 3), "--epochs=1")  # by a smaller batch


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_training_on_tiny_images(tmp_path, side):
    """Parts of several images can't be more than the pixels of a side."""
    torch.manual_seed(side)
    mixed = pretext.damaged(torch.arange(40, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, side, side), THREES)
    assert sorted(mixed[:, 0, 0, 0].tolist()) == list(range(40))
    assert "accuracy" in trained_on(gray_images(tmp_path / "tiny", 6, side), "--epochs=3")


@pytest.mark.parametrize("epochs", [1, 2, 5, 9])
def test_a_few_steps(tmp_path, epochs):
    """The schedule of the rate divides by numbers that few steps make 0."""
    assert f"epoch {epochs}/{epochs}" in trained_on(gray_images(tmp_path / "few", 5), f"--epochs={epochs}", "--batch=4")


def test_equal_labels_are_none(tmp_path):
    """A classifier of one class would learn nothing, and be right about all images."""
    output = trained_on(gray_images(tmp_path / "same", 8, labels=[2] * 8), "--epochs=1")
    assert "All labels are equal: the detector learns to recognise 1 cluster of similar images" in output


def test_a_detector_that_learnt_nothing_is_told(tmp_path):
    data = gray_images(tmp_path / "random", 30, labels=[i * 7 % 3 for i in range(30)])  # no pattern
    assert "Warning: always giving the most frequent answer would be right for" in trained_on(data, "--epochs=1")
    known = torch.tensor([[0, 1], [0, 2], [1, 2]])
    assert train_detector.guessed_share(known, torch.tensor([[0, 2], [1, 0], [0, 2], [0, 1]])) == 5 / 8


def test_an_unwritable_place_is_found_before_the_training(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    data = gray_images(tmp_path / "data", 4)
    result = CliRunner().invoke(train_detector.main, [f"--data={data}", "--dest=new.safetensors"])
    assert result.exit_code == 2
    assert result.output == (
        "Error: --dest=new.safetensors can't be written (No space left on device); choose another folder\n"
    )


def test_errors_of_the_test_images_name_their_option(tmp_path):
    data, test = gray_images(tmp_path / "data", 4), gray_images(tmp_path / "test", 4)
    (test / "dataset.json").write_text("{")
    options = [f"--data={data}", f"--test={test}", f"--dest={tmp_path}/x.safetensors"]
    result = CliRunner().invoke(train_detector.main, options)
    assert f"--test={test}: dataset.json" in result.output
