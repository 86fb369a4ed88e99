"""Text-to-image pipelines of the diffusers library as teachers, and generators as its pipelines."""

import importlib
import json
import math
import shutil

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, slow_ones
from parity import assert_close
from tiny import CPU, tiny_config

from dnnlib import UserError
from edm import diffusers_pipelines, latents, onnx_file, text_encoders, transformers_library, zoo
from edm.sampler import draw_starts, generate_images
from edm.zoo.__main__ import main as zoo_command
from sid import memory
from sid.config import resolve
from training.generator import Generator
from training.steps import Steps

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import tiny_pipelines  # noqa: E402
from tiny_pipelines import TEXTS, teacher_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")
ONNX_KINDS = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_a_pipeline_as_a_teacher(text_pipelines, kind):
    """One step of the library's own pipeline from pure noise, its encoding of prompts included, is our denoiser."""
    net = teacher_of(text_pipelines[kind])
    if kind == "flux":  # whose configuration doesn't name the size
        assert net.img_resolution == 128
        net.img_resolution = tiny_pipelines.SIZE
    torch.manual_seed(2)
    z, width = torch.randn(2, 4, tiny_pipelines.SIZE, tiny_pipelines.SIZE), 2 * tiny_pipelines.SIZE
    pipeline = diffusers.DiffusionPipeline.from_pretrained(text_pipelines[kind])
    pipeline.set_progress_bar_config(disable=True)
    level, start = torch.full([2, 1, 1, 1], math.inf), z
    if kind.startswith("stable_diffusion") and kind != "stable_diffusion_3":
        options = {"timestep_spacing": "trailing", "clip_sample": False}
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **options)
        level = torch.full([2, 1, 1, 1], net.sigma_max)
    if kind == "flux":
        start = pipeline._pack_latents(z, 2, 4, tiny_pipelines.SIZE, tiny_pipelines.SIZE)
    how = {"num_inference_steps": 1, "guidance_scale": 3.5 if kind == "flux" else 1.0, "output_type": "latent"}
    expected = pipeline(TEXTS[:2], latents=start, width=width, height=width, **how).images
    if kind == "flux":
        expected = pipeline._unpack_latents(expected, width, width, 2)
    with torch.no_grad():
        found = net.scaled(z, level, net.prompts.of_seeds([0, 1], CPU, None))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.equal(*net.prompts.of_seeds([0, 1], CPU, None))


def test_the_null_condition_is_the_librarys(text_pipelines):
    """The empty prompt for Stable Diffusion; zeros for XL, as its configuration says."""
    plain, large = (teacher_of(text_pipelines[kind]) for kind in ("stable_diffusion", "stable_diffusion_xl"))
    assert not large.prompts.null(1).any()
    for net in (plain, large):  # without prompts it is the same
        (null,) = text_encoders.TextEncoder(net.metadata["text"]).encode([])
        assert torch.equal(null, net.prompts.null(1))
    empty = text_encoders.prompts_for(plain, [""])
    assert torch.equal(plain.prompts.null(1), empty.draw(1, randint=lambda high: torch.zeros(1, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [
        ("stable_diffusion", "epsilon"),
        ("stable_diffusion", "v_prediction"),
        ("stable_diffusion_xl", "epsilon"),
    ],
)
def test_a_generator_as_a_pipeline(text_pipelines, tmp_path, kind, prediction):
    """The library's pipeline makes our images of the same noise: in one step, and by its own default arguments."""
    folder = text_pipelines[kind]
    if prediction == "v_prediction":
        folder = tmp_path / "v"
        tiny_pipelines.stable_diffusion(prediction).save_pretrained(folder)
    net = teacher_of(folder)
    net.metadata |= Steps((2.2,)).record() | {"kind": "sid-generator"}
    call = diffusers_pipelines.write(net, tmp_path / "out")
    assert call.endswith('pipeline(prompt="...", num_inference_steps=1)')
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    z, width = torch.randn(2, 4, tiny_pipelines.SIZE, tiny_pipelines.SIZE), 2 * tiny_pipelines.SIZE
    with torch.no_grad():
        x = Generator(net, Steps((2.2,))).sample(z, net.prompts.of_seeds([0, 1], CPU, None))
        expected = latents.decoder_of(net).decode(x).clamp(-1, 1)
    for options, tolerance in (({"num_inference_steps": 1}, 2e-5), ({}, 5e-3)):
        images = pipeline(TEXTS[:2], latents=z, width=width, height=width, output_type="pt", **options).images
        assert (images * 2 - 1 - expected).abs().max() < tolerance
    with pytest.raises(UserError, match="for the library's own pipeline"):
        zoo.load_network(tmp_path / "out")


def test_what_cannot_become_a_pipeline(text_pipelines, tmp_path):
    net = teacher_of(text_pipelines["stable_diffusion_3"])
    with pytest.raises(UserError, match="a teacher from prompts is a pipeline already"):
        diffusers_pipelines.write(net, tmp_path / "out")


@pytest.mark.skipif(not onnx_file.can_trace(), reason="a PyTorch that can't write ONNX")
@pytest.mark.parametrize("kind", slow_ones(ONNX_KINDS, *ONNX_KINDS[1:]))
def test_onnx(text_pipelines, tmp_path, kind):
    """onnxruntime makes the images of PyTorch, from noise and encoded prompts, the VAE included."""
    onnxruntime = pytest.importorskip("onnxruntime")
    net = teacher_of(text_pipelines[kind])
    net.img_resolution = tiny_pipelines.SIZE  # which flux's configuration doesn't name
    net.metadata |= Steps((2.2,)).record()
    zoo.save_network(net, tmp_path / "net.onnx", **net.metadata)
    model = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    z = draw_starts(net, range(5))[1]
    inputs = {"z": z.numpy(), "prompts": net.prompts.of_seeds(range(5), CPU, None).numpy()}
    (images,) = model.run(["images"], inputs)
    (expected,) = generate_images(net, range(5))
    assert abs(images.astype(int) - expected.numpy()).max() <= 1
    assert (images == expected.numpy()).mean() > 0.95
    assert len(expected.unique()) > 20
    (others,) = model.run(["images"], {**inputs, "prompts": inputs["prompts"][::-1].copy()})
    assert (others != images).any()


def test_an_estimate_needs_no_weights(text_pipelines, tmp_path):
    """The memory estimate of a pipeline's configurations alone is that of the pipeline."""
    bare, absent = tmp_path / "bare", shutil.ignore_patterns("*.safetensors", "text_encoder*")
    shutil.copytree(text_pipelines["stable_diffusion"], bare, ignore=absent)
    net = zoo.load_denoiser(text_pipelines["stable_diffusion"])
    config = resolve(tiny_config(precision="bf16", augment=0), net, CPU)
    shapes = zoo.load_shapes(bare)
    assert next(shapes.parameters()).is_meta
    assert memory.estimate(shapes, config, 4, device=CPU) == memory.estimate(net, config, 4)
    with pytest.raises(UserError, match="has no diffusion_pytorch_model"):
        zoo.load_network(bare)


def test_a_network_goes_to_the_hub_with_its_text_encoders(text_pipelines, tmp_path, monkeypatch):
    import huggingface_hub

    shutil.copytree(text_pipelines["stable_diffusion"], tmp_path / "pipeline")
    config = tmp_path / "pipeline" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "/home/jane/clip"}))
    net = teacher_of(tmp_path / "pipeline")
    zoo.save_network(net, tmp_path / "net.safetensors", **net.metadata)
    command = ["push", str(tmp_path / "net.safetensors"), "someone/net", "--dry-run", str(tmp_path / "out")]
    result = CliRunner().invoke(zoo_command, command)
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "out").rglob("*.*"):
        assert b"/home/jane" not in path.read_bytes()
        assert bytes(tmp_path) not in path.read_bytes()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "out"))
    again = zoo.load_network("someone/net")
    assert again.metadata["text"]["source"] == "someone/net"
    found = list(text_encoders.TextEncoder(again.metadata["text"]).encode(TEXTS))
    expected = list(text_encoders.TextEncoder(net.metadata["text"]).encode(TEXTS))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("has_bars", [True, False])
def test_the_libraries_speak_again_afterwards(has_bars):
    """Their progress bars and levels of messages are the user's own choice."""
    log = transformers.utils.logging
    (log.enable_progress_bar if has_bars else log.disable_progress_bar)()
    level = log.get_verbosity()
    with transformers_library.Quiet(transformers):
        assert not log.is_progress_bar_enabled()
    assert (log.is_progress_bar_enabled(), log.get_verbosity()) == (has_bars, level)
    log.enable_progress_bar()


# --- what isn't supported, or damaged


def test_other_text_encoders_are_refused(text_pipelines, tmp_path):
    """A generator isn't asked by the words of another encoder."""
    net, other = zoo.load_denoiser(text_pipelines["stable_diffusion"]), tmp_path / "other"
    tiny_pipelines.stable_diffusion(encoder_scale=2.0).save_pretrained(other)
    net.metadata["text"]["source"] = str(other)
    with pytest.raises(UserError, match="aren't those that the network was trained with"):
        text_encoders.prompts_for(net, ["something new"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"text_encoder": ["transformers", "LlamaModel"]}, "its text_encoder is 'LlamaModel'"),
        ({"text_encoder": ["own_module", "CLIPTextModel"]}, "its text_encoder is"),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "a StableDiffusionUpscalePipeline"),
    ],
)
def test_pipelines_that_are_not_supported(text_pipelines, tmp_path, damage, words):
    folder = shutil.copytree(text_pipelines["stable_diffusion"], tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **damage}))
    with pytest.raises(UserError, match=words):
        zoo.load_network(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "there is no folder text_encoder/"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "there is no tokenizer/tokenizer_config.json"),
        (lambda folder: shutil.rmtree(folder / "unet"), "names a unet, but there is no unet/config.json"),
        (lambda folder: shutil.rmtree(folder / "vae"), "names a VAE, but there is no vae/config.json"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "has no scheduler_config.json"),
        (lambda folder: (folder / "text_encoder/model.safetensors").rename(folder / "model.bin"), "no .safetensors"),
        (lambda folder: (folder / "text_encoder/model.safetensors").write_bytes(b"junk"), "can't be loaded"),
        (lambda folder: (folder / "tokenizer/tokenizer.json").write_bytes(b"{"), "can't be loaded"),
    ],
)
def test_damaged_pipelines(text_pipelines, tmp_path, change, words):
    folder = shutil.copytree(text_pipelines["stable_diffusion"], tmp_path / "copy")
    change(folder)
    with pytest.raises(UserError, match=words):
        teacher_of(folder, ["something else"])


def without(folder, copy, *parts):
    """A copy of a pipeline's folder without some of its parts, as the library saves one."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*parts))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, **{part: [None, None] for part in parts}}))
    return copy


def test_stable_diffusion_3_without_t5(text_pipelines, tmp_path, capsys):
    """The library has zeros in the place of its states. So has a snapshot, which doesn't lie next to the model."""
    folder = without(text_pipelines["stable_diffusion_3"], tmp_path / "copy", "tokenizer_3", "text_encoder_3")
    net = teacher_of(folder)
    assert net.metadata["text"]["zeros"] == 32
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, tokenizer_3=None, text_encoder_3=None)
    pipeline.set_progress_bar_config(disable=True)
    z = torch.randn([2, 4, tiny_pipelines.SIZE, tiny_pipelines.SIZE], generator=torch.Generator().manual_seed(2))
    how = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "width": 16, "height": 16}
    expected = pipeline(TEXTS[:2], latents=z, **how).images
    condition = net.prompts.of_seeds([0, 1], CPU, None)
    with torch.no_grad():
        found = net.scaled(z, torch.full([2, 1, 1, 1], math.inf), condition)
    assert_close(found, expected)
    tokens = net.split(condition)["tokens"]
    assert tokens[:, : tiny_pipelines.LENGTH].any()
    assert not tokens[:, tiny_pipelines.LENGTH :].any()

    zoo.save_network(net, tmp_path / "net.safetensors", **net.metadata)
    without(folder, tmp_path / "text", "transformer", "vae")
    again = zoo.load_network(tmp_path / "net.safetensors")
    assert again.metadata["text"]["source"] == str(tmp_path / "text")
    again.prompts = text_encoders.prompts_for(again, ["dogs too"])
    text_encoders.prompts_for(again, ["a prompt of many letters, which are its tokens here"])
    assert "longer than the 16 tokens" in capsys.readouterr().err


def test_stable_diffusion_3_with_half_of_t5(text_pipelines, tmp_path):
    folder = without(text_pipelines["stable_diffusion_3"], tmp_path / "copy", "tokenizer_3")
    with pytest.raises(UserError, match="its tokenizer_3 is 'None'"):
        zoo.load_network(folder)


def test_a_model_without_its_pipeline(text_pipelines):
    with pytest.raises(UserError, match="name the folder of the whole pipeline"):
        zoo.load_network(text_pipelines["stable_diffusion"] / "unet")


@pytest.mark.parametrize(
    ("name", "millions", "size"),  # as published, SD3.5's without its table of positions
    [
        ("sd15", 860, 512),
        ("sdxl", 2567, 1024),
        ("sd35-medium", 2243, 1024),
        ("sana-600m", 592, 512),
        ("flux-dev", 11901, 1024),
    ],
)
def test_published_sizes(tmp_path, monkeypatch, name, millions, size):
    """examples/text_sizes.py writes enough for an estimate."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    importlib.import_module("text_sizes").write(name, tmp_path)
    net = zoo.load_shapes(tmp_path)
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6) == millions
    assert net.image_size == size
