"""SANA as a teacher: the library's own pipeline and scheduler, Gemma's prompts with their mask, AutoencoderDC."""

import json
import math
import shutil

import pytest
import torch
from parity import assert_close
from tiny import CPU, tiny_config

from dnnlib import UserError
from edm import diffusers_folder, latents, text_encoders, zoo
from edm.inspection import facts
from edm.latent_inspection import latents_misfit
from edm.text_models import TextDenoiser
from sid import memory
from sid.config import resolve
from sid.inputs import Inputs
from sid.prepare import prepare
from torch_utils import precision
from training.guidance import class_guided

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import tiny_pipelines  # noqa: E402
from tiny_pipelines import SIZE, teacher_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = ["a red apple", "Dogs"]
SIZES = {"width": 32, "height": 32, "use_resolution_binning": False}  # of images, which its pipeline checks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "sana"
    tiny_pipelines.sana(timestep_scale=0.5).save_pretrained(path)
    return path


@pytest.fixture
def teacher(folder):
    return teacher_of(folder, TEXTS)


def pipeline_of(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(n=2):
    return torch.randn([n, 4, SIZE, SIZE], generator=torch.Generator().manual_seed(2))


# --- the library's pipeline


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_one_step_of_the_library_from_any_noise_level(folder, teacher, guidance):
    """Its encoding of prompts with the instruction, its times and its guidance included."""
    pipeline, z = pipeline_of(folder), noise()
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    how = {"guidance_scale": guidance, "output_type": "latent", **SIZES}
    condition = teacher.prompts.of_seeds([0, 1], CPU, None)
    for t in (0.02, 0.3, 0.75, 0.98):
        expected = pipeline(TEXTS, latents=z, sigmas=[t], **how).images
        sigma = torch.full([2, 1, 1, 1], t / (1 - t))
        with torch.no_grad():
            found = class_guided(teacher, guidance, teacher.prompts)(z / (1 - t), sigma, condition)
        assert_close(found, expected, 1e-5)


def test_one_step_of_its_own_scheduler(folder, teacher):
    """Up to the time, of which that scheduler leaves out the fraction."""
    how = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "latent", **SIZES}
    expected = pipeline_of(folder)(TEXTS, latents=noise(), **how).images
    t = 3 * 0.999 / (1 + 2 * 0.999)  # shifted by 3
    condition = teacher.prompts.of_seeds([0, 1], CPU, None)
    with torch.no_grad():
        exactly = noise() - t * teacher.answer(noise(), torch.full([2], float(int(1000 * t))), condition)
        found = teacher.scaled(noise(), torch.full([2, 1, 1, 1], t / (1 - t)), condition)
    assert_close(exactly, expected)
    assert_close(found, expected, 5e-3)


def test_what_follows_a_prompt_is_masked(teacher):
    condition, z = teacher.prompts.of_seeds([0, 1], CPU, None), noise()
    mask = teacher.split(condition)["mask"]
    lengths = mask.sum(dim=1).int().tolist()
    assert mask.shape == (2, 300)
    assert lengths == [2 + len(text) for text in TEXTS]  # the first token, and the last of the instruction
    null = teacher.split(teacher.prompts.null(1))["mask"]
    assert null.sum() == 1  # the first token alone
    sigma = torch.full([2, 1, 1, 1], 2.5)

    def asked(change):
        given = condition.clone()
        change(teacher.split(given))
        with torch.no_grad():
            return teacher(z, sigma, given)

    same, beyond, unmasked = (
        asked(change)
        for change in (
            lambda parts: None,
            lambda parts: parts["tokens"][:, max(lengths) :].add_(1),
            lambda parts: parts["mask"].fill_(1),
        )
    )
    assert torch.equal(same, beyond)
    assert not torch.allclose(same, unmasked)


def test_its_vae(folder, teacher):
    decoder, record = latents.decoder_of(teacher), teacher.metadata["vae"]
    assert (record["scale"], record["shift"], record["channels"]) == (tiny_pipelines.DC_VAE["scaling_factor"], 0, 4)
    assert latents.image_shape(teacher) == (3, 2 * SIZE)
    vae = diffusers.AutoencoderDC.from_pretrained(folder / "vae")
    images = torch.randint(256, [2, 3, 16, 16], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        expected = vae.encode(images / 127.5 - 1).latent * record["scale"]
    mean, std = decoder.encode(images).unbind(dim=1)
    assert_close(mean, expected, 1e-6)
    assert not std.any()
    pipeline = pipeline_of(folder)
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    how = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "pt", **SIZES}
    expected = pipeline(TEXTS, latents=noise(), **how).images
    with torch.no_grad():
        level, condition = torch.full([2, 1, 1, 1], math.inf), teacher.prompts.of_seeds([0, 1], CPU, None)
        found = decoder.decode(teacher.scaled(noise(), level, condition))
    assert_close(found.clamp(-1, 1) / 2 + 0.5, expected, 1e-4)
    assert "latents" in str(latents_misfit(teacher))  # random weights don't give images back


def test_a_long_prompt_is_named(teacher, capsys):
    letters = "abcdefghij" * 40
    text_encoders.prompts_for(teacher, ["dogs", letters[:298]])
    assert "longer" not in capsys.readouterr().err
    text_encoders.prompts_for(teacher, ["dogs", letters[:299]])
    assert "1 of 2 prompts are longer than the 299 tokens" in capsys.readouterr().err


# --- distillation


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_distilling(teacher, name):
    """Both losses with the recipe's guidance and steps, recomputed activations included; the estimate needs no net."""
    steps = {"steps": 4, "init_sigma": 999, "guidance": "long-short=4.5", "weighting": "time", "augment": 0}
    config = tiny_config(precision=name, checkpoint=True, **steps)
    made = prepare(Inputs(teacher), config, CPU)
    before = [parameter.clone() for parameter in made.state.generator.parameters()]
    made.iteration()
    made.iteration()
    after = list(made.state.generator.parameters())
    changed = [not torch.equal(*pair) for pair in zip(before, after)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(parameter.isfinite().all() for parameter in after)


def test_half_precision_is_near(teacher):
    condition, sigma = teacher.prompts.of_seeds([0, 1], CPU, None), torch.full([2, 1, 1, 1], 2.5)
    with torch.no_grad():
        expected = teacher(noise(), sigma, condition)
        with precision.autocast(CPU, torch.bfloat16):
            found = teacher(noise(), sigma, condition)
    assert_close(found.float(), expected, 0.03)
    assert not torch.equal(found.float(), expected)


def test_an_estimate_needs_no_weights(folder, teacher, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors", "text_encoder*"))
    config = resolve(tiny_config(precision="bf16", augment=0), teacher, CPU)
    assert memory.estimate(zoo.load_shapes(bare), config, 4, device=CPU) == memory.estimate(teacher, config, 4)


def test_a_network_file(teacher, tmp_path):
    zoo.save_network(teacher, tmp_path / "net.safetensors", **teacher.metadata)
    again = zoo.load_network(tmp_path / "net.safetensors")
    assert (type(again), again.metadata) == (TextDenoiser, teacher.metadata)
    assert zoo.network_hash(again) == zoo.network_hash(teacher)
    assert any("SanaTransformer2DModel" in text for text in facts(again).values())


# --- bad input


def test_sprint_is_refused_by_name(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "SanaSprintPipeline"}))
    with pytest.raises(UserError, match=r"a SanaSprintPipeline is itself a generator.*distil a SanaPipeline instead"):
        zoo.load_network(copy)


def test_an_embedded_guidance_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "transformer/config.json").read_text())
    (copy / "transformer/config.json").write_text(json.dumps({**config, "guidance_embeds": True}))
    with pytest.raises(UserError, match="its guidance_embeds is 'True', which isn't supported"):
        zoo.load_network(copy)


def test_the_weights_in_several_files_come_before_a_variant(folder, tmp_path):
    """As the published pipelines have them: float32 in several files, next to one of bf16."""
    part, model = tmp_path / "transformer", diffusers.SanaTransformer2DModel.from_pretrained(folder / "transformer")
    model.save_pretrained(part, max_shard_size="5KB")
    assert len(list(part.glob("*-of-*.safetensors"))) > 1
    model.to(torch.bfloat16).save_pretrained(part, variant="bf16")
    whole = diffusers_folder.weights(folder / "transformer")
    found = diffusers_folder.weights(part)
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    for file in part.glob("*model-*"):
        file.unlink()
    (part / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert {weight.dtype for weight in diffusers_folder.weights(part).values()} == {torch.bfloat16}
