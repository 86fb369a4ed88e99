"""Latents of a VAE: encoding, decoding, and data sets of them."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from parity import DATA
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_config
from tiny_latents import toy_vae

from dnnlib import UserError
from edm import dataset_tool, latents, zoo
from sid.inputs import load_dataset
from training.decoder import LatentDecoder, PixelDecoder, clean_samples
from training.latent_dataset import LatentDataset

diffusers = pytest.importorskip("diffusers")


def pixels(folder):
    return torch.stack([torch.from_numpy(np.array(Image.open(path)))[None] for path in sorted(folder.glob("*.png"))])


def test_decoding_and_encoding_are_the_librarys(vae):
    net = diffusers.AutoencoderKL.from_pretrained(vae)
    z, x = torch.randn(10, 2, 8, 8), torch.randint(256, [10, 1, 16, 16], dtype=torch.uint8)
    decoder = LatentDecoder(toy_vae(), 0.7, 0.1)
    with torch.no_grad():
        expected = PixelDecoder.to_images(net.decode(z / 0.7 + 0.1).sample)
        distribution = net.encode(PixelDecoder.from_images(x)).latent_dist
    assert (decoder.to_images(z).int() - expected.int()).abs().max() <= 1
    found = decoder.encode(x)
    torch.testing.assert_close(found[:, 0], (distribution.mean - 0.1) * 0.7)
    torch.testing.assert_close(found[:, 1], distribution.std * 0.7)
    assert torch.equal(decoder.from_images(x), found[:, 0])
    per_channel = LatentDecoder(toy_vae(), [0.7, -2.0], [0.1, 0.3])
    torch.testing.assert_close(per_channel.encode(x)[:, 0, 1], (distribution.mean[:, 1] - 0.3) * -2)
    assert (per_channel.encode(x)[:, 1] > 0).all()


def test_decoding_is_in_float32_and_refuses_what_overflows():
    decoder = LatentDecoder(toy_vae(), 0.7)
    z = torch.randn(2, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder.to_images(z), LatentDecoder(toy_vae(), 0.7).to_images(z))
    with pytest.raises(UserError, match="NaN or infinity"):
        LatentDecoder(toy_vae(), 1e-38).to_images(z)


def test_a_latent_is_drawn_with_its_mean_and_deviation():
    items = torch.stack([torch.full([2, 50, 50], 3.0), torch.full([2, 50, 50], 0.5)])[None]
    torch.manual_seed(0)
    drawn = clean_samples(items)
    torch.manual_seed(0)
    assert torch.equal(drawn, 3 + 0.5 * torch.randn(1, 2, 50, 50))


def test_a_data_set_of_latents(encoded_images, latent_images, vae):
    """Means and deviations are the VAE's; over the data, each channel has mean 0 and standard deviation 0.5."""
    dataset = LatentDataset(encoded_images, use_labels=True)
    assert (len(dataset), dataset.num_channels, dataset.resolution, dataset.label_dim) == (12, 2, 8, 3)
    assert (dataset.classes, dataset.get_label(4).tolist()) == ([0, 1, 2], [0, 1, 0])
    items = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(12)])
    assert items.mean(dim=(0, 3, 4))[0].tolist() == pytest.approx([0, 0], abs=1e-5)
    variance = items[:, 0].square().mean(dim=(0, 2, 3)) + items[:, 1].square().mean(dim=(0, 2, 3))
    assert variance.tolist() == pytest.approx([0.25, 0.25], rel=1e-4)
    record = dataset.metadata["vae"]
    expected = LatentDecoder(toy_vae(), record["scale"], record["shift"]).encode(pixels(latent_images))
    torch.testing.assert_close(items, expected)
    assert set(load_file(encoded_images)) == {"latents", "labels"}  # other programs can read it


def test_a_data_set_with_the_vaes_own_scale(latent_images, vae, tmp_path):
    command = ["--source", latent_images, "--dest", tmp_path / "x.safetensors", "--vae", vae, "--vae-scale"]
    result = CliRunner().invoke(dataset_tool.main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert "12 images, 16x16, gray, 3 classes, as latents of 2 x 8 x 8 (scale 0.7)" in result.output
    record = LatentDataset(tmp_path / "x.safetensors").metadata["vae"]
    assert (record["scale"], record["shift"], record["channels"]) == (0.7, 0.1, 2)


def test_a_data_set_with_the_scale_of_edm2(latent_images, tmp_path):
    """It is what a published snapshot expects, so EDM2's teachers can go on with real images (SiDA)."""
    toy_vae(in_channels=3, out_channels=3, latent_channels=4).save_pretrained(tmp_path / "vae")
    path = tmp_path / "x.safetensors"
    command = [f"--source={latent_images}", f"--dest={path}", f"--vae={tmp_path / 'vae'}", "--vae-scale=edm2"]
    result = CliRunner().invoke(dataset_tool.main, command)
    assert result.exit_code == 0, result.output
    dataset = LatentDataset(path)
    teacher = zoo.load_network(DATA / "edm2-format-latent.pkl")
    latents.check_same_vae(teacher, dataset.metadata["vae"], str(path))
    raw = torch.as_tensor(load_file(path)["latents"])
    mean, std = (torch.tensor(v).reshape(4, 1, 1) for v in ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)))
    torch.testing.assert_close(torch.from_numpy(dataset[3][0][0]), (raw[3, 0] - mean) / std / 2)
    assert len(load_dataset(str(path), teacher, tiny_config(gan=True, augment=0), cache=False)) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vae-scale=edm2"], "is for the 4 channels of"),
        (["--dest=x.zip"], "ends in .safetensors"),
        (["--resolution=15x15"], "2 pixels each, but the images are 15 wide"),
        (["--vae=nothing"], "nothing"),
    ],
)
def test_what_the_tool_refuses(latent_images, vae, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    command = [f"--source={latent_images}", "--dest=x.safetensors", f"--vae={vae}", *options]
    result = CliRunner().invoke(dataset_tool.main, command)
    assert result.exit_code != 0
    assert words in str(result.exception) + result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "text", "header", "labels"])
def test_damaged_files_of_latents(encoded_images, tmp_path, damage):
    path = tmp_path / "x.safetensors"
    data = encoded_images.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "text":
        path.write_text("nothing")
    elif damage == "header":
        path.write_bytes(data.replace(b'"F32"', b'"I32"'))
    else:
        path.write_bytes(data[:-8] + b"\xff" * 8)
    with pytest.raises(UserError, match="--data="):
        LatentDataset(path, use_labels=True)
