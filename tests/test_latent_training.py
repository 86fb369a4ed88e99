"""Teachers and generators of latents, and their pictures."""

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny import CPU, tiny_config
from tiny_latents import toy_vae

from dnnlib import UserError
from edm import generate, latents, zoo
from edm import train as edm_train
from edm.onnx_file import can_trace
from edm.sampler import generate_all, sample
from sid.generator import OneStepGenerator
from sid.inputs import Inputs, load_dataset
from sid.prepare import prepare
from sid.run import distil
from sid.teacher_distance import TeacherDistance
from training.decoder import LatentDecoder
from training.latent_dataset import LatentDataset


def test_a_pipeline_of_latents_is_a_teacher(latent_pipeline):
    net = zoo.load_denoiser(latent_pipeline)
    assert (net.img_channels, net.img_resolution, net.label_dim, net.sigma_data) == (2, 8, 3, 1.0)
    record = net.metadata["vae"]
    assert (record["scale"], record["shift"]) == (0.7, 0.1)
    assert latents.image_shape(net) == (1, 16)
    found = generate_all(net, range(3), steps=2)
    assert found.shape == (3, 1, 16, 16)
    z = sample(net, range(3), "heun", num_steps=2).float()
    assert torch.equal(found, LatentDecoder(toy_vae(), 0.7, 0.1).to_images(z))


def test_distilling_a_pipeline_of_latents(latent_pipeline, latent_images, tmp_path, monkeypatch):
    """Training never decodes; snapshots make pictures by themselves, and also where the VAE lies next to them."""
    teacher = zoo.load_denoiser(latent_pipeline)
    calls = []
    decode = LatentDecoder.to_images
    monkeypatch.setattr(LatentDecoder, "to_images", lambda self, x: calls.append(len(x)) or decode(self, x))
    distillation = prepare(Inputs(teacher), tiny_config(augment=0), CPU)
    distillation.iteration()
    assert not calls
    out = tmp_path / "run"
    generator = distil(teacher, tiny_config(total_kimg=0.008, augment=0), out, device="cpu", data=str(latent_images))
    assert generator(2).shape == (2, 1, 16, 16)
    assert calls
    (snapshot,) = out.glob("network-snapshot-*.safetensors")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(snapshot, moved)
    toy_vae().save_pretrained(moved / "vae")
    copied = OneStepGenerator.from_pretrained(moved / snapshot.name)
    assert copied.net.metadata["vae"]["source"] == str(moved / "vae")
    assert torch.equal(copied(2), generator(2))
    result = CliRunner().invoke(generate.main, [f"--network={snapshot}", f"--outdir={tmp_path}/made", "--seeds=0,1"])
    assert result.exit_code == 0, result.output
    assert Image.open(next((tmp_path / "made").rglob("*.png"))).size == (16, 16)


@pytest.mark.slow
@pytest.mark.skipif(not can_trace(), reason="a PyTorch that can't write ONNX")
def test_an_onnx_file_decodes(latent_pipeline, tmp_path):
    """It runs from noise to the images that OneStepGenerator makes of it, for any number of them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    net = zoo.load_denoiser(latent_pipeline)
    net.metadata |= {"kind": "sid-generator", "init_sigma": 2.5}
    zoo.save_network(net, tmp_path / "net.onnx", **net.metadata)
    model = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 70):
        z = torch.stack([torch.randn([2, 8, 8], generator=torch.Generator().manual_seed(i)) for i in range(n)])
        labels = np.eye(3, dtype=np.float32)[[1] * n]
        (images,) = model.run(["images"], {"z": z.numpy(), "class_labels": labels})
        expected = OneStepGenerator(net)(n, class_idx=1).numpy()
        assert (images.dtype, images.shape) == (np.uint8, (n, 1, 16, 16))
        assert np.abs(images.astype(int) - expected).max() <= 1
        assert images.std() > 5


def test_the_distance_from_the_teacher_is_of_images(latent_pipeline, monkeypatch):
    monkeypatch.setattr("sid.teacher_samples.NUM_IMAGES", 4)
    teacher = zoo.load_denoiser(latent_pipeline)
    distance = TeacherDistance(teacher)
    assert distance.samples.shape == (4, 1, 16, 16)
    assert distance(teacher, sampler="one-step", init_sigma=2.5).value >= -1


def test_training_on_latents(encoded_images, tmp_path):
    """edm.train: pictures are decoded, snapshots name the VAE, a run on other latents isn't resumed."""
    options = ["--arch=ddpmpp", "--cbase=8", "--cres=1", "--blocks=1", "--attn=none", "--dropout=0", "--workers=0"]
    options += [
        "--batch=4",
        "--duration=0.000016",
        "--cond=1",
        f"--outdir={tmp_path}/run",
        "--nosubdir",
        "--device=cpu",
    ]
    run = ["--augment=0", f"--data={encoded_images}", *options]
    result = CliRunner().invoke(edm_train.main, run)
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    net = zoo.load_network(tmp_path / "run")
    assert net.metadata["vae"] == LatentDataset(encoded_images).metadata["vae"]
    assert Image.open(next((tmp_path / "run").glob("fakes*.png"))).size[0] % 16 == 0
    shown = np.asarray(Image.open(tmp_path / "run" / "reals.png"))  # the 12 images of the data set, enlarged
    zoom = shown.shape[1] // (8 * 16)
    latent = torch.as_tensor(LatentDataset(encoded_images)[9][0][:1])
    assert np.array_equal(shown[::zoom, ::zoom][16:32, 16:32], latents.decoder_of(net).to_images(latent)[0, 0].numpy())
    assert generate_all(net, [0], steps=2).shape == (1, 1, 16, 16)
    result = CliRunner().invoke(edm_train.main, [f"--data={encoded_images}", *options])
    assert "latents can't be augmented; use --augment=0" in result.output
    teacher = zoo.load_network(tmp_path / "run")
    config = tiny_config(gan=True, augment=0)
    assert len(load_dataset(str(encoded_images), teacher, config, cache=False)) == 12


def test_sida_learns_from_latents_of_the_teachers_vae(encoded_images, latent_images, latent_pipeline, tmp_path):
    teacher = zoo.load_denoiser(latent_pipeline)
    for path, gan, words in (
        (
            latent_images,
            True,
            "the teacher makes latents, but these are images; encode them by edm.dataset_tool --vae",
        ),
        (encoded_images, True, "another VAE, scale or shift"),
        (encoded_images, False, "only --gan learns from latents"),
    ):
        with pytest.raises(UserError, match=words):
            load_dataset(str(path), teacher, tiny_config(gan=gan, augment=0), cache=False)
