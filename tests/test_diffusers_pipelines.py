"""Generators and teachers as pipelines of the diffusers library, which makes the same images of the same noise."""

import pytest
import torch
from click.testing import CliRunner
from tiny_diffusers import (
    DDPM,
    DIT,
    FLOW,
    LATENT,
    UNET,
    ZERO_SNR_V,
    denoiser,
    diffusers,
    less_contrast,
    of_latents,
    randomise,
    write,
)

from dnnlib import UserError
from edm import diffusers_pipelines, latents, zoo
from edm.diffusers_models import DiffusersDenoiser
from edm.sampler import generate_all
from edm.zoo.__main__ import main as zoo_command
from training.moments import Moments, attach

PIPELINES = {  # model and scheduler of the teacher
    "epsilon": ({}, DDPM),
    "v, zero terminal SNR": ({}, ZERO_SNR_V),
    "image, cosine": ({}, {**DDPM, "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"}),
    "sigmoid": ({}, {**DDPM, "beta_schedule": "sigmoid"}),
    "learned variance": ({"out_channels": 2}, {**DDPM, "variance_type": "learned_range"}),
    "classes": ({"num_class_embeds": 3}, DDPM),
    "flow": ({}, FLOW),
    "flow, classes": ({"num_class_embeds": 3}, FLOW),
}


def convert(net, folder):
    """The library's pipeline of a generator, by the command; and what the command prints."""
    zoo.save_network(net, folder / "net.safetensors", **net.metadata)
    command = ["convert", str(folder / "net.safetensors"), str(folder / "pipeline"), "--to=diffusers"]
    done = CliRunner().invoke(zoo_command, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, done.output


def test_a_generator_that_starts_from_the_moments_of_images_is_none(tmp_path):
    net = denoiser({}, DDPM)
    net.metadata = {"kind": "sid-generator", "init_sigma": 2.5}
    attach(net, Moments.of(torch.randn([4, 1, 8, 8])))
    zoo.save_network(net, tmp_path / "net.safetensors", **net.metadata)
    loaded = zoo.load_network(tmp_path / "net.safetensors")
    assert torch.equal(generate_all(loaded, range(2)), generate_all(net, range(2)))
    with pytest.raises(UserError, match=r"^--to=diffusers: .* --init-noise=white"):
        diffusers_pipelines.write(loaded, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_generator_is_a_pipeline_of_the_library(kind, tmp_path):
    """One step of the library's pipeline, with its defaults, makes our images from the same noise."""
    net = less_contrast(denoiser(*PIPELINES[kind]))
    net.metadata = {"kind": "sid-generator", "init_sigma": 2.5}
    pipeline, output = convert(net, tmp_path)
    assert "ConsistencyModelPipeline: pipeline(" in output
    classes = {"class_labels": [0, 2]} if net.label_dim else {}
    images = pipeline(2, generator=torch.Generator().manual_seed(0), output_type="pt", **classes).images
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = net(2.5 * z, torch.full([2, 1, 1, 1], 2.5), torch.eye(3)[[0, 2]] if net.label_dim else None)
    torch.testing.assert_close(images, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-5)
    assert images.std() > 0.01
    again = zoo.load_denoiser(tmp_path / "pipeline")
    if "flow" in kind:  # as a prediction of the noise
        assert again.metadata == {"kind": "sid-generator", "init_sigma": pytest.approx(2.5 / 3.5)}
    else:
        assert again.metadata == net.metadata
    torch.testing.assert_close(generate_all(again, range(4)), generate_all(net, range(4)), atol=1, rtol=0)


def test_a_pipeline_goes_to_the_hub(tmp_path):
    teacher = write(tmp_path / "teacher", denoiser())
    command = ["push", str(teacher), "someone/digits", "--to=diffusers", "--dry-run", str(tmp_path / "out")]
    result = CliRunner().invoke(zoo_command, command)
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert 'DiffusionPipeline.from_pretrained("someone/digits")' in card
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert zoo.network_hash(zoo.load_denoiser(tmp_path / "out")) == zoo.network_hash(zoo.load_denoiser(teacher))
    for path in (tmp_path / "out").rglob("*.*"):
        assert bytes(tmp_path.parent) not in path.read_bytes()


PIPELINES_OF_LATENTS = {
    "UNet2DModel, epsilon": ({**UNET, **LATENT}, DDPM, 2.5),
    "UNet2DModel, flow": ({**UNET, **LATENT}, FLOW, 2.5),
    "DiT, epsilon, learned variance": ({**DIT, "in_channels": 2, "out_channels": 4}, DDPM, 2.5),
    "DiT, epsilon, a low level": ({**DIT, **LATENT}, DDPM, 0.8),
    "DiT, v": ({**DIT, **LATENT}, ZERO_SNR_V, 2.5),
    "DiT, image": ({**DIT, **LATENT}, {**DDPM, "prediction_type": "sample"}, 2.5),
    "DiT, flow": ({**DIT, **LATENT}, FLOW, 2.5),
}


@pytest.mark.parametrize("kind", PIPELINES_OF_LATENTS)
def test_a_generator_of_latents_is_a_pipeline_of_the_library(kind, tmp_path):
    model, scheduler, level = PIPELINES_OF_LATENTS[kind]
    net = of_latents(tmp_path, model, scheduler, level)
    pipeline, output = convert(net, tmp_path)
    draws = torch.Generator().manual_seed(0)
    if net.label_dim:
        assert "DiTPipeline: pipeline(class_labels=[...], num_inference_steps=1, guidance_scale=1)" in output
        images = pipeline([0, 2], num_inference_steps=1, guidance_scale=1, generator=draws, output_type="np").images
    else:
        assert "LDMPipeline: pipeline(batch_size=..., num_inference_steps=1)" in output
        images = pipeline(2, num_inference_steps=1, generator=draws, output_type="np").images
    z = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = net(level * z, torch.full([2, 1, 1, 1], level), torch.eye(3)[[0, 2]] if net.label_dim else None)
    ours = latents.decoder_of(net).to_images(ours)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(images * 255, ours.float(), rtol=0, atol=1.01)
    assert images.std() > 0.01
    if net.label_dim:
        with pytest.raises(UserError, match="is for the library's own pipeline; load the snapshot"):
            zoo.load_denoiser(tmp_path / "pipeline")
    else:
        again = zoo.load_denoiser(tmp_path / "pipeline")
        torch.testing.assert_close(generate_all(again, range(4)), generate_all(net, range(4)), atol=1, rtol=0)


@pytest.mark.parametrize("model", [{**UNET, **LATENT}, {**DIT, **LATENT}])
def test_a_teacher_of_latents_is_a_pipeline_of_the_library(model, tmp_path):
    net = of_latents(tmp_path, model, DDPM)
    call = diffusers_pipelines.write(net, tmp_path / "pipeline")
    assert "num_inference_steps=..." in call
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"class_labels": [0, 2], "guidance_scale": 1} if net.label_dim else {"batch_size": 2}
    assert pipeline(**arguments, num_inference_steps=2, output_type="np").images.shape == (2, 16, 16, 1)
    again = zoo.load_denoiser(tmp_path / "pipeline")
    assert again.metadata["vae"]["scale"] == 0.7
    assert zoo.network_hash(again) == zoo.network_hash(net)


def test_a_teacher_is_a_pipeline_of_the_library(tmp_path):
    """It loads again as the same denoiser, and the library samples from it."""
    for name, (model, scheduler) in PIPELINES.items():
        net, folder = denoiser(model, scheduler), tmp_path / name
        net.metadata = {"kind": "teacher"}
        if name == "flow, classes":
            with pytest.raises(UserError, match="no pipeline of a flow with classes"):
                diffusers_pipelines.write(net, folder)
            continue
        diffusers_pipelines.write(net, folder)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
        again = zoo.load_denoiser(folder)
        x, sigma = torch.randn(2, 1, 8, 8), torch.full([2, 1, 1, 1], 0.7)
        condition = torch.eye(3)[:2] if net.label_dim else None
        torch.testing.assert_close(again(x, sigma, condition), net(x, sigma, condition), rtol=1e-5, atol=1e-5)


def test_what_the_library_can_not_run_is_not_written(tmp_path):
    from tiny import tiny_teacher

    centred, classes = denoiser({"center_input_sample": True}, FLOW), {"num_class_embeds": 3}
    learned = denoiser({"time_embedding_type": "learned", "num_train_timesteps": 1000})
    pixels = randomise(DiffusersDenoiser(model=DIT, scheduler=DDPM))
    for net, reason in (
        (tiny_teacher(), "EDMPrecond isn't"),
        (centred, "uses its input past the first layer"),
        (learned, "whole"),
        (pixels, "DiTPipeline, .*needs a VAE"),
        *refused_latents(tmp_path, classes),
    ):
        net.metadata = getattr(net, "metadata", {"init_sigma": 2.5})
        with pytest.raises(UserError, match=f"--to=diffusers: .*{reason}.*save it as .safetensors"):
            diffusers_pipelines.write(net, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def refused_latents(folder, classes):
    yield of_latents(folder / "classes", {**UNET, **LATENT, **classes}, DDPM, 2.5), "takes no classes"
    yield of_latents(folder / "shift", {**UNET, **LATENT}, DDPM, 2.5, shift_factor=0.1), "no shift"
    scales = {"latents_mean": [0.0, 0.0], "latents_std": [1.0, 2.0]}
    yield of_latents(folder / "scales", {**UNET, **LATENT}, DDPM, 2.5, **scales), "one scale"
    yield of_latents(folder / "flow", {**DIT, **LATENT}, FLOW), "scheduler of flows"
    yield of_latents(folder / "one", {**DIT, **LATENT}, DDPM, 1.0), "noise level 1"
