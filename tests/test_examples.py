"""The examples run, at tiny length, and the toy one learns."""

import json
import sys
from pathlib import Path

import forked
import PIL.Image
import pytest
import torch
from tiny import TINY_VAE, tiny_teacher

from edm import latents, zoo

ROOT = Path(__file__).resolve().parents[1]


def run(folder, name, *arguments):
    return forked.run([str(ROOT / "examples" / name), *arguments], folder)


def test_one_step(tmp_path):
    zoo.save_network(tiny_teacher(), tmp_path / "generator.safetensors", kind="sid-generator", init_sigma=2.5)
    run(tmp_path, "one_step.py", "generator.safetensors", "grid.png")
    assert PIL.Image.open(tmp_path / "grid.png").size == (512, 512)  # 8 x 8 images of 8 x 8 pixels, enlarged


def test_own_denoiser(tmp_path):
    run(tmp_path, "own_denoiser.py", "--out=RUN", "--teacher-steps=2", "--kimg=0.128")
    assert list((tmp_path / "RUN").glob("network-snapshot-*.safetensors"))
    assert PIL.Image.open(tmp_path / "RUN" / "generated.png").size == (512, 512)


def diffusers_teacher(folder, monkeypatch, *options):
    """Runs the example on four gray images, 8x8, of two classes, in this process, where the library is loaded once."""
    pytest.importorskip("diffusers")
    (folder / "images").mkdir()
    for i in range(4):
        PIL.Image.new("L", (8, 8), 60 * i).save(folder / "images" / f"{i}.png")
    labels = [[f"{i}.png", i % 2] for i in range(4)]
    (folder / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))
    monkeypatch.chdir(folder)
    always = ["--data=images", "--kimg=0.128", "--width=8", "--out=TEACHER"]
    monkeypatch.setattr("sys.argv", ["diffusers_teacher.py", *always, *options])
    load("diffusers_teacher").main()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_a_teacher_of_the_diffusers_library(prediction, tmp_path, monkeypatch, capsys):
    classes = ["--classes"] if prediction == "flow" else []
    diffusers_teacher(tmp_path, monkeypatch, *classes, f"--prediction={prediction}")
    assert "2 steps of 64" in capsys.readouterr().out
    net = zoo.load_denoiser(tmp_path / "TEACHER")
    assert net.prediction == prediction.removesuffix("_prediction")
    assert (net.img_resolution, net.img_channels, net.label_dim) == (8, 1, 2 if classes else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vae=COLOUR"], "--vae=COLOUR: takes images of 3 channels, and those of --data have 1"),
        (["--vae=DEEP"], "--data: its images are 8 pixels wide, which is no multiple of 16"),
        (["--vae=OTHER"], "--vae=OTHER: a UNet2DModel, not an AutoencoderKL"),
        (["--out=COLOUR"], "--out=COLOUR exists already"),
    ],
)
def test_a_vae_that_does_not_fit_the_images(options, message, tmp_path, monkeypatch, capsys):
    library = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    for name, changes in {
        "COLOUR": {"in_channels": 3, "out_channels": 3},
        "DEEP": {"block_out_channels": [4] * 4, **blocks},
    }.items():
        library.AutoencoderKL.from_config({**TINY_VAE, **changes}).save_pretrained(tmp_path / name)
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(SystemExit, match="2"):
        diffusers_teacher(tmp_path, monkeypatch, *options)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "TEACHER").exists()


def test_a_transformer_of_latents_of_the_diffusers_library(tmp_path, monkeypatch, capsys):
    options = ["--architecture=dit", "--classes", "--prediction=flow", "--vae=VAE", "--vae-kimg=0.128"]
    diffusers_teacher(tmp_path, monkeypatch, *options)
    said = capsys.readouterr().out
    assert "AutoencoderKL" in said
    assert "DiTTransformer2DModel" in said
    net = zoo.load_denoiser(tmp_path / "TEACHER")
    assert (type(net.net).__name__, net.prediction, net.null_class) == ("DiTTransformer2DModel", "flow", 2)
    assert (net.img_channels, net.img_resolution) == (4, 4)
    assert latents.image_shape(net) == (1, 8)

    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "VAE")
    pictures = torch.stack([torch.full([1, 8, 8], 60 * i / 127.5 - 1) for i in range(4)])
    with torch.no_grad():
        scaled = vae.encode(pictures).latent_dist
        scaled = vae.config.scaling_factor * (scaled.mean + scaled.std * torch.randn(1000, 4, 4, 4, 4))
    assert abs(scaled.std().item() - 1) < 0.02


def load(name):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


def test_own_denoiser_is_right_for_an_exact_network():
    """For data N(0, 1/4) the best noise predictor is linear, and the denoiser must be x / (1 + 4 sigma^2)."""
    example = load("own_denoiser")

    class Exact(example.NoiseNet):
        def forward(self, x, t):
            a = self.a[t].reshape(-1, 1, 1, 1)
            return x * (1 - a).sqrt() / (a / 4 + 1 - a)

    denoiser = example.NoiseNetDenoiser(Exact())
    sigma = denoiser.round_sigma(torch.tensor([0.02, 0.5, 2.5, 80.0])).reshape(-1, 1, 1, 1)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(denoiser(x, sigma), x / (1 + 4 * sigma**2), rtol=1e-3, atol=1e-5)


def test_toy_teacher_is_the_conditional_mean():
    """By importance sampling: the mean of clean points, weighted by the likelihood of the noisy one."""
    toy = load("toy_2d")
    torch.manual_seed(0)
    clean, x = toy.data(200_000), torch.tensor([0.3, -0.2]).reshape(1, 2, 1, 1)
    for sigma in (0.2, 1.0):
        weights = (-(clean - x).square().sum(dim=[1, 2, 3]) / (2 * sigma**2)).softmax(dim=0)
        mean = (weights[:, None, None, None] * clean).sum(dim=0)
        answer = toy.teacher(x, torch.full([1, 1, 1, 1], sigma))[0]
        torch.testing.assert_close(answer, mean, rtol=0, atol=0.01)


def test_toy_learns(capsys):
    """0.2 % of the points lie on a mode before, and about half of them after so few iterations."""
    near, rarest = load("toy_2d").main(steps=300, batch=128, out=None)
    assert near > 0.3
    assert rarest > 0.1
    assert capsys.readouterr().out.startswith("before: 0.")


def test_toy_saves_its_picture(tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path, "toy_2d.py", "--steps=2", "--out=toy.png")
    assert PIL.Image.open(tmp_path / "toy.png").width > 500
