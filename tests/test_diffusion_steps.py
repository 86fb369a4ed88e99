"""Generators of several steps of diffusions as pipelines of the diffusers library: equal images of equal noise."""

import pytest
import torch
from parity import assert_close
from tiny import CPU
from tiny_diffusers import DDPM, DIT, FLOW, LATENT, UNET, ZERO_SNR_V, denoiser, diffusers, less_contrast, of_latents

from dnnlib import UserError
from edm import diffusers_pipelines, latents, lora_files, zoo
from edm.one_step import set_times
from training.generator import Generator, spaced_levels
from training.steps import Steps

pytest.importorskip("transformers")
import tiny_pipelines

X0 = {**DDPM, "prediction_type": "sample"}
CLASSES = {"num_class_embeds": 3}


def as_generator(net, steps, noise="ddim", shift=1.0, init_sigma=2.5):
    made = Steps(spaced_levels(net, init_sigma, steps, shift), noise)
    net.metadata = {**getattr(net, "metadata", {}), **made.record(), "kind": "sid-generator"}
    return net


def our_images(net, condition=None, steps=None):
    """Two images in 0 ... 1, with the noise that the library draws from the same generator."""
    draws, channels = torch.Generator().manual_seed(3), net.img_channels
    z = torch.randn([2, channels, net.img_resolution, net.img_resolution], generator=draws)
    decoder = latents.decoder_by(net.metadata, net)
    with torch.no_grad():
        x = Generator(net, steps or Steps.of(net)).sample(z, condition, lambda z: torch.randn(z.shape, generator=draws))
        return (x if decoder is None else decoder.decode(x)).clamp(-1, 1) / 2 + 0.5


def library_images(folder, call, **arguments):
    """What a folder's pipeline makes when it is called by a printed line, with other prompts or classes."""
    return called(diffusers.DiffusionPipeline.from_pretrained(folder), call, **arguments)


def called(pipeline, call, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    arguments = {**eval("dict" + call.partition(": pipeline")[2]), **arguments}
    images = pipeline(**arguments, generator=torch.Generator().manual_seed(3), output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("scheduler", "steps", "noise", "shift"),
    [
        (DDPM, 2, "ddim", 1.0),
        (DDPM, 4, "ddim", 3.0),
        (X0, 3, "ddim", 1.0),
        (ZERO_SNR_V, 3, "ddim", 1.0),
        (ZERO_SNR_V, 2, "fresh", 1.0),
        (ZERO_SNR_V, 4, "fresh", 3.0),
    ],
)
def test_images(tmp_path, scheduler, steps, noise, shift):
    net = as_generator(less_contrast(denoiser(CLASSES, scheduler)), steps, noise, shift)
    call = diffusers_pipelines.write(net, tmp_path / "pipeline")
    assert call.startswith("ConsistencyModelPipeline: pipeline(class_labels=[...], batch_size=..., ")
    found = library_images(tmp_path / "pipeline", call, class_labels=[0, 2], batch_size=2)
    labels = torch.eye(3)[[0, 2]]
    expected = our_images(net, labels)
    assert_close(found, expected, 1e-4)
    assert (our_images(net, labels, Steps((2.5,))) - expected).abs().max() > 0.01  # of one step
    for load in (zoo.load_denoiser, zoo.load_shapes):
        with pytest.raises(UserError, match="is for the library's own pipeline; load the snapshot"):
            load(tmp_path / "pipeline")


def test_images_of_latents(tmp_path):
    net = as_generator(of_latents(tmp_path, {**UNET, **LATENT}, DDPM), 3)
    call = diffusers_pipelines.write(net, tmp_path / "pipeline")
    assert call == "LDMPipeline: pipeline(batch_size=..., num_inference_steps=3)"
    assert_close(library_images(tmp_path / "pipeline", call, batch_size=2), our_images(net), 1e-4)


# --- from prompts


@pytest.fixture(scope="module")
def teachers(text_pipelines, own_cache, tmp_path_factory):
    """{kind: the folder of a pipeline}, one of which predicts v"""
    folder = tmp_path_factory.mktemp("v") / "v"
    tiny_pipelines.stable_diffusion("v_prediction").save_pretrained(folder)
    return {**text_pipelines, "v": folder}


def teacher_of(folder):
    net = tiny_pipelines.teacher_of(folder)
    return net, {"prompt": tiny_pipelines.TEXTS[:2], "width": 2 * net.img_resolution, "height": 2 * net.img_resolution}


@pytest.mark.parametrize(
    ("kind", "steps", "noise"),
    [
        ("stable_diffusion", 2, "ddim"),
        ("stable_diffusion_xl", 4, "ddim"),
        ("v", 3, "ddim"),
        ("v", 4, "fresh"),
    ],
)
def test_images_from_prompts(teachers, tmp_path, kind, steps, noise):
    net, arguments = teacher_of(teachers[kind])
    as_generator(net, steps, noise)
    call = diffusers_pipelines.write(net, tmp_path / "pipeline")
    found = library_images(tmp_path / "pipeline", call, **arguments)
    condition = net.prompts.of_seeds([0, 1], CPU, None)
    expected = our_images(net, condition)
    assert_close(found, expected, 1e-4)
    assert (our_images(net, condition, Steps((2.5,))) - expected).abs().max() > 0.01
    if steps == 2:  # 50 steps, of which two change the images
        default = library_images(tmp_path / "pipeline", ": pipeline()", **arguments)
        assert_close(default, expected, 5e-3)


def test_a_lora_file(teachers, tmp_path):
    """The teacher's own pipeline with the file makes the images of a generator of several steps."""
    teacher, arguments = teacher_of(teachers["stable_diffusion"])
    start = teacher.times.sigma(torch.tensor([625.0], dtype=torch.float64)).item()
    net = as_generator(tiny_pipelines.updated(teacher_of(teachers["stable_diffusion"])[0], 2), 3, init_sigma=start)
    call = lora_files.write(net, teacher, tmp_path / "lora")
    assert call.endswith('pipeline(prompt="...", timesteps=[625, 416, 208], guidance_scale=1)')
    pipeline = diffusers.DiffusionPipeline.from_pretrained(teachers["stable_diffusion"])
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "lora/scheduler")
    found = called(pipeline, "Pipeline: pipeline" + call.rpartition("pipeline")[2], **arguments)
    assert_close(found, our_images(net, net.prompts.of_seeds([0, 1], CPU, None)), 1e-4)
    as_generator(net, 3, "fresh")
    with pytest.raises(UserError, match=r"--to=lora: .* 3 steps with --steps-noise=fresh"):
        lora_files.write(net, teacher, tmp_path / "other")
    as_generator(net, 3, init_sigma=2.505)
    with pytest.raises(UserError, match=f"--to=lora: .* distil with --init_sigma={start:.8g}"):
        lora_files.write(net, teacher, tmp_path / "other")


# --- what can't be exact is refused


REFUSED = {
    "fresh, epsilon": (UNET, DDPM, "fresh", "with --steps-noise=fresh for a network that doesn't predict v"),
    "fixed": (UNET, ZERO_SNR_V, "fixed", "with --steps-noise=fixed; distil with --steps-noise=ddim"),
    "flow": (UNET, FLOW, "ddim", "no pipeline for 2 steps of a flow without prompts"),
    "latents, fresh": ({**UNET, **LATENT}, ZERO_SNR_V, "fresh", "LDMPipeline takes no list of times"),
    "DiT": ({**DIT, **LATENT}, DDPM, "ddim", "no pipeline for 2 steps of a DiT"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_library_cannot_make(tmp_path, kind):
    model, scheduler, noise, words = REFUSED[kind]
    net = of_latents(tmp_path, model, scheduler) if model["in_channels"] == 2 else denoiser(model, scheduler)
    with pytest.raises(UserError, match=f"--to=diffusers: .*{words}.*save it as .safetensors"):
        diffusers_pipelines.write(as_generator(net, 2, noise), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(("changes", "level"), [({}, 800.0), ({}, 15e3), ({"num_train_timesteps": 4000}, 5e8)])
def test_a_start_that_float32_cannot_hold_is_refused(tmp_path, changes, level):
    scheduler = {**ZERO_SNR_V, "rescale_betas_zero_snr": not changes, **changes}
    net = as_generator(denoiser({}, scheduler), 2, shift=0.01, init_sigma=level)
    with pytest.raises(
        UserError, match=r"^--to=diffusers: .* can't start at noise level .*; distil from a lower --init"
    ):
        diffusers_pipelines.write(net, tmp_path / "folder")


# --- the times


def test_some_times_stand_for_others():
    model = denoiser().net
    layer, features = model.time_embedding.linear_1, model.time_proj
    wanted, called = [700.3, 2.5, 90.0], [999.0, 500.0, 0.0]
    expected, before = layer(features(torch.tensor(wanted))), layer.weight.clone()
    set_times(model, wanted, called)
    assert_close(layer(features(torch.tensor(called))), expected)
    assert not torch.equal(layer.weight, before)


def test_one_time_needs_a_bias_only():
    model = denoiser().net
    layer, features = model.time_embedding.linear_1, model.time_proj
    expected, before = layer(features(torch.tensor([700.3]))), layer.weight.clone()
    set_times(model, [700.3], [999.0])
    assert_close(layer(features(torch.tensor([999.0]))), expected)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("width", [4, 8])  # with 8, the times differ by no more than rounding
def test_a_small_embedding_cannot_tell_many_times_apart(tmp_path, width):
    net = as_generator(denoiser({"block_out_channels": [width, width]}), 8)
    with pytest.raises(UserError, match="its embedding of time is too small for 8 steps"):
        diffusers_pipelines.write(net, tmp_path / "folder")
