"""Generators of flows from prompts as pipelines of the diffusers library, of one step and of several."""

import pytest
import torch
from parity import assert_close
from tiny import CPU

from dnnlib import UserError
from edm import diffusers_pipelines, latents, lora_files, zoo
from training.generator import Generator, spaced_levels
from training.steps import Steps

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import tiny_pipelines  # noqa: E402
from tiny_pipelines import SIZE, TEXTS, teacher_of, updated  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")
KINDS = ("sana", "stable_diffusion_3", "flux")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: the folder of a pipeline}, of which the VAEs of two have a shift"""
    root = tmp_path_factory.mktemp("pipelines")
    for kind in KINDS:
        pipeline = getattr(tiny_pipelines, kind)(**({"timestep_scale": 0.5} if kind == "sana" else {}))
        if kind != "sana":
            pipeline.vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
        pipeline.save_pretrained(root / kind)
    return {path.name: path for path in root.iterdir()}


def generator_of(folder, init_sigma, steps=1, **options):
    net = teacher_of(folder)
    net.img_resolution = SIZE  # which FLUX.1's configuration doesn't name
    net.image_size = 2 * SIZE
    made = Steps(spaced_levels(net, init_sigma, steps), **options)
    net.metadata |= made.record() | {"kind": "sid-generator"}
    return net, made


def images_of(pipeline, kind, z, noises, monkeypatch):
    """What the library makes of noise in as many steps. noises: those of further steps."""
    steps, width = 1 + len(noises), 2 * SIZE
    pipeline.set_progress_bar_config(disable=True)
    how = {"sana": {"use_resolution_binning": False, "guidance_scale": 1}, "flux": {}}.get(kind, {"guidance_scale": 1})
    if kind == "sana":
        width = 32  # its pipeline takes multiples of this, and the latents' own size all the same
    if kind == "flux":
        z, *noises = (pipeline._pack_latents(n, len(n), 4, SIZE, SIZE) for n in (z, *noises))
    left = list(noises)
    scheduling = "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor"
    monkeypatch.setattr(scheduling, lambda shape, **_: left.pop(0) if left else torch.zeros(shape))
    call = {"latents": z, "width": width, "height": width, "num_inference_steps": steps, "output_type": "pt"}
    images = pipeline(TEXTS[:2], **call, **how).images
    assert not left
    return images


def compared(folders, tmp_path, kind, init_sigma, steps, monkeypatch):
    """(the library's images, ours) of the same noise."""
    net, made = generator_of(folders[kind], init_sigma, steps)
    call = diffusers_pipelines.write(net, tmp_path / "out")
    assert f"num_inference_steps={steps}" in call
    z, *noises = torch.randn([steps, 2, 4, SIZE, SIZE], generator=torch.Generator().manual_seed(3))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    return images_of(pipeline, kind, z, noises, monkeypatch), our_images(net, made, z, noises)


def our_images(net, steps, z, noises):
    left = list(noises)
    with torch.no_grad():
        x = Generator(net, steps).sample(z, net.prompts.of_seeds([0, 1], CPU, None), lambda _: left.pop(0))
        return latents.decoder_of(net).decode(x).clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_one_step(folders, tmp_path, kind, monkeypatch):
    """From the middle of the times, at one that isn't whole; the first layer, the time and the VAE's scale matter."""
    found, expected = compared(folders, tmp_path, kind, 2.5, 1, monkeypatch)
    assert_close(found, expected, 1e-4)
    with pytest.raises(UserError, match="for the library's own pipeline"):
        zoo.load_network(tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_several_steps(folders, tmp_path, kind, monkeypatch):
    """From almost infinite noise, where the scheduler's weights are the generator's."""
    found, expected = compared(folders, tmp_path, kind, 1e6, 4, monkeypatch)
    assert_close(found, expected, 1e-4)


def test_several_steps_from_the_usual_start(folders, tmp_path, monkeypatch):
    """As the recipes have it, the images are slightly others."""
    found, expected = compared(folders, tmp_path, "sana", 999, 4, monkeypatch)
    assert_close(found, expected, 0.005)
    (tmp_path / "single").mkdir()
    single = compared(folders, tmp_path / "single", "sana", 999, 1, monkeypatch)[0]
    assert (single - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("start", "options", "words"),
    [
        (999, {"noise": "fixed"}, "of 2 steps with --steps-noise=fixed"),
        (2.5, {}, "of 2 steps that starts at noise level 2.5; distil with --init_sigma=999"),
    ],
)
def test_steps_that_the_library_cannot_make(folders, tmp_path, start, options, words):
    net, _ = generator_of(folders["sana"], start, 2, **options)
    with pytest.raises(UserError, match=f"--to=diffusers: the library has no scheduler for a generator {words}"):
        diffusers_pipelines.write(net, tmp_path / "out")


def test_shifted_steps_cannot_be_made(folders, tmp_path):
    net, _ = generator_of(folders["sana"], 999)
    net.metadata |= Steps(spaced_levels(net, 999, 2, shift=3.0)).record()
    with pytest.raises(UserError, match="whose times aren't evenly spaced"):
        diffusers_pipelines.write(net, tmp_path / "out")


# --- LoRA files


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_file_of_several_steps(folders, tmp_path, kind, monkeypatch):
    """The teacher's pipeline with the file makes our images."""
    teacher, _ = generator_of(folders[kind], 1e6, 4)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    net, steps = generator_of(folders[kind], 1e6, 4)
    net = updated(net, 2)
    changed = [name for name, weight in net.state_dict().items() if not torch.equal(weight, before[name])]
    assert len(changed) > 10
    call = lora_files.write(net, teacher, tmp_path / "lora")
    assert "FlowMatchEulerDiscreteScheduler.from_pretrained" in call
    assert "num_inference_steps=4" in call

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[kind])
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "lora/scheduler")
    z, *noises = torch.randn([4, 2, 4, SIZE, SIZE], generator=torch.Generator().manual_seed(3))
    found, expected = images_of(pipeline, kind, z, noises, monkeypatch), our_images(net, steps, z, noises)
    assert_close(found, expected, 1e-4)
    assert (our_images(teacher, steps, z, noises) - expected).abs().max() > 1e-2


def test_a_lora_file_cannot_hold_another_start(folders, tmp_path):
    teacher, _ = generator_of(folders["sana"], 2.5)
    net = updated(generator_of(folders["sana"], 2.5)[0], 2)
    with pytest.raises(UserError, match=r"starts at noise level 2\.5, and flows in the library at pure noise"):
        lora_files.write(net, teacher, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
