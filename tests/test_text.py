"""Text-to-image teachers: the library's own pipelines, the published losses with guidance, prompts to images."""

import importlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from parity import DATA
from test_steps import fill
from tiny import CPU, tiny_config, tiny_teacher

import fid
from dnnlib import UserError
from edm import diffusers_pipelines, generate, latents, lora_files, text_encoders, transformers_library, zoo
from edm.metrics.clip import ClipEncoder
from edm.sampler import generate_all
from edm.small_teachers import captions, pictures
from edm.text_models import TextDenoiser
from edm.zoo.__main__ import main as zoo_command
from sid import lora, memory
from sid.config import resolve
from sid.guidance import Guidance, parse_guidance
from sid.loss import SiDLoss
from sid.prepare import prepare
from sid.run import distil
from training.conditions import Classes, Prompts, conditions_of
from training.generator import Generator
from training.guidance import class_guided
from training.steps import Steps

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import tiny_pipelines  # noqa: E402

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
TEXTS = ["a red apple", "dogs", "a cat in a hat"]
KAPPAS = [(1, 1, 1, 1.0), (1, 1, 3.0, 1.0), (0.5, 1, 1, 1.0), (1.5, 1.5, 1.5, 1.0), (4.5, 4.5, 4.5, 1.2)]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNNLIB_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: the folder of a pipeline}"""
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"):
        getattr(tiny_pipelines, name)().save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def teacher_of(folder, texts=TEXTS):
    net = zoo.load_denoiser(folder)
    net.prompts = text_encoders.prompts_for(net, texts, in_order=True)
    return net


# --- the published losses


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_published_losses_with_guidance(kind):
    """Guided answers, both losses and theta's gradient of SiD-LSG's code on a tiny UNet, 1e-4 of the largest value."""
    arrays = np.load(DATA / "lsg-losses.npz")
    model = {**json.loads((DATA / "lsg-unet.json").read_text()), "_class_name": "UNet2DConditionModel"}
    scheduler = {**tiny_pipelines.BETAS, "_class_name": "DDPMScheduler", "prediction_type": kind}
    psi, phi = (TextDenoiser(model, scheduler, length=5).eval() for _ in range(2))
    fill(psi.net, seed=701)
    fill(phi.net, seed=702)
    embeddings, noise, t = (torch.tensor(arrays[name]) for name in ("embeddings", "noise", "timesteps"))
    condition = embeddings[:-1].flatten(1)
    prompts = Prompts(condition.numpy(), embeddings[-1].flatten(), TEXTS)
    sigma = phi.times.sigma(t.double()).float().reshape(-1, 1, 1, 1)
    x_g = torch.tensor(arrays[f"{kind}/generated_steps1"])

    def check(found, name):
        expected = torch.tensor(arrays[f"{kind}/kappa{k1}_{k2}_{k4}_alpha{alpha}/{name}"])
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), (k1, k2, k4, name)

    for k1, k2, k4, alpha in KAPPAS:
        options = {"guidance": Guidance(k1, k2, k4), "conditions": prompts}
        loss, x = SiDLoss(alpha, **options, fake_score_weight=lambda s: s**-2), x_g.clone().requires_grad_()
        _, f_phi, f_psi = loss.denoised(phi, psi, x, sigma, noise, condition)
        check(f_phi.detach(), "f_phi")
        check(f_psi.detach(), "f_psi")
        value = loss.generator_loss(phi, psi, x, condition, (sigma, noise))
        check(value.detach(), "generator_loss")
        check(torch.autograd.grad(value.sum(), x)[0], "generator_grad_images")
        answer = class_guided(psi, k1, prompts)(x_g + sigma * noise, sigma, condition)
        check(loss.denoising.weighted(psi, (answer - x_g) ** 2, sigma).detach(), "fake_score_loss")


def test_a_class_is_a_prompt():
    """Classes given as the encodings of prompts: the same losses bit for bit, dropped conditions included."""
    net, (x, labels) = tiny_teacher().eval(), (torch.randn(4, 1, 8, 8), torch.eye(3)[[0, 2, 1, 0]])
    found = []
    for conditions in (Classes(3), Prompts(torch.eye(3).numpy(), torch.zeros(3), TEXTS)):
        torch.manual_seed(7)
        loss = SiDLoss(guidance=Guidance(2.0, 1.5, 3.0), conditions=conditions)
        drawn = conditions.drop(conditions.draw(4), 0.5)
        found.append([drawn, loss.generator_loss(net, net, x, labels), loss.fake_score_loss(net, x, labels)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found))


# --- the library's pipelines


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_a_pipeline_as_a_teacher(folders, kind):
    """One step of the library's own pipeline from pure noise, its encoding of prompts included, is our denoiser."""
    net = teacher_of(folders[kind])
    if kind == "flux":  # whose configuration doesn't name the size
        assert net.img_resolution == 128
        net.img_resolution = tiny_pipelines.SIZE
    torch.manual_seed(2)
    z, width = torch.randn(2, 4, tiny_pipelines.SIZE, tiny_pipelines.SIZE), 2 * tiny_pipelines.SIZE
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[kind])
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


def test_the_null_condition_is_the_librarys(folders):
    """The empty prompt for Stable Diffusion; zeros for XL, as its configuration says."""
    plain, large = (teacher_of(folders[kind]) for kind in ("stable_diffusion", "stable_diffusion_xl"))
    assert not large.prompts.null(1).any()
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
def test_a_generator_as_a_pipeline(folders, tmp_path, kind, prediction):
    """The library's pipeline makes our images of the same noise: in one step, and by its own default arguments."""
    folder = folders[kind]
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


def test_what_cannot_become_a_pipeline_or_onnx(folders, tmp_path):
    net = teacher_of(folders["stable_diffusion_3"])
    net.metadata |= Steps((2.2,)).record()
    with pytest.raises(UserError, match="text-to-image networks aren't exported"):
        zoo.save_network(net, tmp_path / "net.onnx", **net.metadata)
    with pytest.raises(UserError, match="only generators distilled from Stable Diffusion 1, 2 and XL"):
        diffusers_pipelines.write(net, tmp_path / "out")


# --- distillation


def test_clip_scores(folders, tmp_path):
    """By fid.py eval, with a table of all prompts."""
    clip, prompts = tiny_pipelines.save_clip(tmp_path / "clip"), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS), encoding="utf-8")
    options = ["eval", f"--network={folders['stable_diffusion']}", f"--prompts={prompts}", "--steps=1", "--device=cpu"]
    options += [f"--clip={clip}", "--metrics=clip6", "--seeds=5", "--trials=2", f"--table={tmp_path}/table.jsonl"]
    result = CliRunner().invoke(fid.main, options)
    assert result.exit_code == 0, result.output
    line, *_, last = result.stdout.splitlines()
    record = json.loads(last)
    assert line.startswith(f"clip6: clip {record['value']:.6g} (sd")
    assert line.endswith("2 x 6 images, seeds 5-16, ranked among 3 prompts, detector clip")
    rows = [json.loads(row) for row in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row["images"] for row in rows} == dict.fromkeys(TEXTS, 4)
    assert sum(row["images"] * row["clip"] for row in rows) / 12 == pytest.approx(record["value"])
    assert (record["prompts"], len(record["detector_sha256"])) == ("prompts.txt", 64)

    encoder = ClipEncoder(clip)
    images = generate_all(teacher_of(folders["stable_diffusion"]), range(5, 11), steps=1)
    pairs = zip(encoder.embed_images(images), encoder.embed_texts([TEXTS[i % 3] for i in range(5, 11)]))
    scores = [100 * max(torch.cosine_similarity(*pair, dim=0).item(), 0) for pair in pairs]
    assert np.mean(scores) == pytest.approx(record["trials"]["values"]["clip"][0], rel=1e-4)


def test_distilling_a_pipeline(folders, tmp_path, monkeypatch):
    """With long-short guidance from prompts to a snapshot, again from a state, and images of it by the command line."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS), encoding="utf-8")
    teacher = zoo.load_denoiser(folders["stable_diffusion"])
    names = {"fake_sigma_schedule": "times=20,980", "sigma_schedule": "times=20,980", "augment": 0}
    config = tiny_config(guidance="long-short=1.5", fake_score_weighting="noise", total_kimg=0.024, **names)
    distil(teacher, config, tmp_path / "whole", prompts=str(prompts))

    half = tmp_path / "half"
    shorter = tiny_config(guidance="long-short=1.5", fake_score_weighting="noise", total_kimg=0.008, **names)
    distil(teacher, shorter, half, prompts=str(prompts))
    prompts.write_text("\n".join(reversed(TEXTS)), encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts \(contents\)"):
        distil(teacher, config, half, prompts=str(prompts))
    prompts.write_text("\n\n".join(TEXTS), encoding="utf-8")
    generator = distil(teacher, config, half, prompts=str(prompts), override=True)
    snapshots = [next((tmp_path / name).glob("network-snapshot-000000.024*")) for name in ("whole", "half")]
    first, second = (zoo.load_denoiser(path) for path in snapshots)
    assert zoo.network_hash(first) == zoo.network_hash(second) == zoo.network_hash(generator.net)
    assert zoo.network_hash(first) != zoo.network_hash(teacher)

    assert first.metadata["text"] == teacher.metadata["text"]
    assert first.metadata["vae"] == teacher.metadata["vae"]
    with pytest.raises(UserError, match="give some with --prompts"):
        generate_all(first, [0])
    for option in ("--prompt=dogs", f"--prompts={prompts}"):
        out = tmp_path / f"out{len(option)}"
        result = CliRunner().invoke(
            generate.main, [f"--network={snapshots[0]}", f"--outdir={out}", "--seeds=0-3", option]
        )
        assert result.exit_code == 0, result.output
        assert len(list(out.rglob("*.png"))) == 4
    first.prompts = text_encoders.prompts_for(first, ["dogs"])
    shutil.move(folders["stable_diffusion"], tmp_path / "elsewhere")
    try:
        with pytest.raises(UserError, match=r"put it as text/ next to the network's file"):
            text_encoders.prompts_for(first, ["frogs"])
        shutil.copytree(tmp_path / "elsewhere", snapshots[0].parent / "text")
        shutil.copytree(tmp_path / "elsewhere/vae", snapshots[0].parent / "vae")
        moved = zoo.load_denoiser(snapshots[0])
        moved.prompts = text_encoders.prompts_for(moved, ["dogs"])
        monkeypatch.setattr(text_encoders, "TextEncoder", None)  # the cache has them
        assert text_encoders.prompts_for(moved, ["dogs"]).texts == ["dogs"]
        assert torch.equal(moved.prompts.draw(2), first.prompts.draw(2))
        assert generate_all(moved, [0]).shape == (1, 3, 16, 16)
    finally:
        shutil.move(tmp_path / "elsewhere", folders["stable_diffusion"])


def test_low_rank_updates_as_a_lora_file(folders, tmp_path):
    """The library's pipeline with the file makes our images; the generator's vectors stay the teacher's."""
    teacher = teacher_of(folders["stable_diffusion"])
    level = teacher.times.sigma(torch.tensor([625.0], dtype=torch.float64)).item()
    options = {"lora_rank": 3, "augment": 0, "init_sigma": level, "lr": 0.01, "glr": 0.01, "ema_halflife_kimg": 0}
    made = prepare(teacher, tiny_config(**options, lora_vectors=False), CPU)
    made.iteration()
    made.iteration()
    net = lora.merge(made.state.ema)
    net.metadata |= {"lora_rank": 3}
    ours, theirs = net.state_dict(), teacher.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {name for name, weight in ours.items() if weight.ndim > 1}
    call = lora_files.write(net, teacher, tmp_path / "lora")
    assert "load_lora_weights" in call
    assert "num_inference_steps=1" in call

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders["stable_diffusion"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "lora/scheduler")
    torch.manual_seed(3)
    z, width = torch.randn(2, 4, tiny_pipelines.SIZE, tiny_pipelines.SIZE), 2 * tiny_pipelines.SIZE
    how = {"num_inference_steps": 1, "guidance_scale": 1, "width": width, "height": width, "output_type": "latent"}
    found = pipeline(TEXTS[:2], latents=z, **how).images
    with torch.no_grad():
        condition = teacher.prompts.of_seeds([0, 1], CPU, None)
        expected, start = (Generator(of, Steps((level,))).sample(z, condition) for of in (net, teacher))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (start - expected).abs().max() > 1e-2 * expected.abs().max()

    whole = prepare(teacher, tiny_config(**options), CPU)
    whole.iteration()
    with pytest.raises(UserError, match="--lora-vectors=0"):
        lora_files.write(named(lora.merge(whole.state.ema), lora_rank=3), teacher, tmp_path / "other")
    with pytest.raises(UserError, match="more than a matrix of rank 1"):
        lora_files.write(named(net, lora_rank=1), teacher, tmp_path / "other")
    with pytest.raises(UserError, match=r"--init_sigma=2\.5017"):
        lora_files.write(named(net, lora_rank=3, init_sigma=2.505), teacher, tmp_path / "other")
    for wrong in (named(net, lora_rank=None), tiny_teacher()):
        with pytest.raises(UserError, match="--to=lora: is for generators"):
            lora_files.write(wrong, teacher, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def named(net, **metadata):
    net.metadata = {**getattr(net, "metadata", {}), **metadata}
    return net


def test_other_text_encoders_are_refused(folders, tmp_path):
    """A generator isn't asked by the words of another encoder."""
    net, other = zoo.load_denoiser(folders["stable_diffusion"]), tmp_path / "other"
    tiny_pipelines.stable_diffusion(encoder_scale=2.0).save_pretrained(other)
    net.metadata["text"]["source"] = str(other)
    with pytest.raises(UserError, match="aren't those that the network was trained with"):
        text_encoders.prompts_for(net, ["something new"])


def test_an_estimate_needs_no_weights(folders, tmp_path):
    """The memory estimate of a pipeline's configurations alone is that of the pipeline."""
    bare, absent = tmp_path / "bare", shutil.ignore_patterns("*.safetensors", "text_encoder*")
    shutil.copytree(folders["stable_diffusion"], bare, ignore=absent)
    net = zoo.load_denoiser(folders["stable_diffusion"])
    config = resolve(tiny_config(precision="bf16", augment=0), net, CPU)
    shapes = zoo.load_shapes(bare)
    assert next(shapes.parameters()).is_meta
    assert memory.estimate(shapes, config, 4, device=CPU) == memory.estimate(net, config, 4)
    with pytest.raises(UserError, match="has no diffusion_pytorch_model"):
        zoo.load_network(bare)


# --- prompts


def test_prompts_are_drawn_and_dropped():
    """Every prompt is as likely; as many seeds as there are prompts have each once; dropping gives the null."""
    rows = torch.arange(12.0).reshape(4, 3)
    prompts = Prompts(rows.numpy(), torch.full([3], -1.0), ["a", "b", "c", "d"])
    torch.manual_seed(0)
    counts = (prompts.draw(4000)[:, 0] / 3).long().bincount(minlength=4)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(750)
    numbers = prompts.numbers_of_seeds(range(8))
    assert sorted(numbers[:4]) == [0, 1, 2, 3]
    assert numbers[4:] == numbers[:4] != [0, 1, 2, 3]
    assert torch.equal(prompts.of_seeds(range(4), CPU, None), rows[numbers[:4]])
    assert Prompts(rows, prompts.null(1)[0], list("abcd"), in_order=True).numbers_of_seeds([2, 5]) == [2, 1]
    dropped = prompts.drop(rows.repeat(500, 1), 0.1)
    share = (dropped == -1).all(dim=1).float().mean()
    assert abs(share - 0.1) < 0.04
    assert torch.equal(dropped[dropped[:, 0] >= 0].unique(dim=0), rows)
    assert prompts.drop(rows, 0) is rows
    assert prompts.groups(rows) is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"caf\xe9", "no text in UTF-8"),
        ("a.txt", b"x" * 20_000, "line 1 has 20000 characters"),
        ("a.jsonl", b'{"prompt": "a"}\n{"words": 1}\n', 'line 2 is no JSON object with a "prompt"'),
        ("a.jsonl", b"[[[", "line 1 is no JSON object"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        text_encoders.read_prompts(tmp_path / name)


def test_files_of_prompts(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n\r\n  ein Hund auf der Straße \n".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "two\\nlines"}\n{"prompt": "b", "text": "c"}\n')
    assert text_encoders.read_prompts(tmp_path / "a.txt") == ["a cat", "ein Hund auf der Straße"]
    assert text_encoders.read_prompts(tmp_path / "a.jsonl") == ["two lines", "b"]
    with pytest.raises(UserError, match="no file of prompts"):
        text_encoders.read_prompts(tmp_path)


def test_long_prompts_are_named(folders, capsys):
    teacher_of(folders["stable_diffusion"], ["dogs", "a prompt of many letters, which are its tokens here"])
    assert "1 of 2 prompts are longer than the 16 tokens" in capsys.readouterr().err


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


def test_prompts_and_networks_that_do_not_fit(folders, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("dogs")
    with pytest.raises(UserError, match="makes no images of prompts"):
        distil(tiny_teacher(), tiny_config(), tmp_path / "run", prompts=str(prompts))
    net = zoo.load_denoiser(folders["stable_diffusion"])
    with pytest.raises(UserError, match="name some with --prompts=FILE"):
        distil(net, tiny_config(augment=0), tmp_path / "run")
    with pytest.raises(UserError, match="give some with --prompts=FILE"):
        conditions_of(net)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"text_encoder": ["transformers", "LlamaModel"]}, "its text_encoder is 'LlamaModel'"),
        ({"text_encoder": ["own_module", "CLIPTextModel"]}, "its text_encoder is"),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "a StableDiffusionUpscalePipeline"),
    ],
)
def test_pipelines_that_are_not_supported(folders, tmp_path, damage, words):
    folder = shutil.copytree(folders["stable_diffusion"], tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **damage}))
    with pytest.raises(UserError, match=words):
        zoo.load_network(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "there is no folder text_encoder/"),
        (lambda folder: (folder / "text_encoder/model.safetensors").rename(folder / "model.bin"), "no .safetensors"),
        (lambda folder: (folder / "text_encoder/model.safetensors").write_bytes(b"junk"), "can't be loaded"),
        (lambda folder: (folder / "tokenizer/tokenizer.json").write_bytes(b"{"), "can't be loaded"),
    ],
)
def test_damaged_pipelines(folders, tmp_path, change, words):
    folder = shutil.copytree(folders["stable_diffusion"], tmp_path / "copy")
    change(folder)
    with pytest.raises(UserError, match=words):
        teacher_of(folder, ["something else"])


def test_stable_diffusion_3_without_t5_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["stable_diffusion_3"], tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps({**index, **absent}))
    with pytest.raises(UserError, match="its tokenizer_3 is 'None'"):
        zoo.load_network(folder)


def test_a_model_without_its_pipeline(folders):
    with pytest.raises(UserError, match="name the folder of the whole pipeline"):
        zoo.load_network(folders["stable_diffusion"] / "unet")


def test_the_captioned_pictures():
    """Colour and place are the caption's; held-out pairs of picture and ground never appear in training."""
    if not pictures.EMOJI_FONT.is_file():
        pytest.skip("needs fonts-noto-color-emoji")
    source = captions.CaptionedEmoji(3)
    drawn, texts = source.draw(64)
    known, held_out = (source.captions(held_out=held) for held in (False, True))
    assert set(texts) <= set(known)
    assert not set(known) & set(held_out)
    assert 0.05 < len(held_out) / len(known) < 0.2
    corners = ((drawn[:, :, 0, 0] + 1) * 127.5).round()
    grounds = [next(name for name in captions.GROUNDS if f" {name} ground" in text) for text in texts]
    colours = [captions.GROUNDS[ground] for ground in grounds]
    assert torch.equal(corners, torch.tensor(colours, dtype=torch.float32))
    shown = (drawn - drawn[:, :, :1, :1]).abs().sum(dim=1) > 0.3
    centres = (shown.sum(dim=1) * torch.arange(32)).sum(dim=1) / shown.sum(dim=(1, 2))
    means = [centres[[text.endswith(place) for text in texts]].mean() for place in captions.PLACES]
    assert means[0] + 3 < means[1] < means[2] - 3


def test_a_text_to_image_teacher_of_our_own(tmp_path, monkeypatch):
    """examples/text_teacher.py at tiny length makes a pipeline that is a teacher."""
    if not pictures.EMOJI_FONT.is_file():
        pytest.skip("needs fonts-noto-color-emoji")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("text_teacher")
    monkeypatch.setattr(example, "BATCH", 2)
    monkeypatch.setattr(example, "VAE_BATCH", 2)
    sizes = ["--vae-kimg=0.002", "--kimg=0.002", "--width=8"]
    monkeypatch.setattr("sys.argv", ["text_teacher.py", f"--out={tmp_path}/teacher", *sizes])
    example.main()
    net = teacher_of(tmp_path / "teacher", text_encoders.read_prompts(tmp_path / "teacher/prompts.txt")[:2])
    assert (net.prediction, net.img_resolution, net.prompt_dim) == ("v", 8, 20 * 128)
    assert generate_all(net, [0], steps=1, sampler="one-step", init_sigma=2.5).shape == (1, 3, 32, 32)


def test_an_evaluator_of_our_own(tmp_path, monkeypatch, capsys):
    """examples/text_evaluator.py at tiny length makes a CLIP that is read and measured."""
    if not pictures.EMOJI_FONT.is_file():
        pytest.skip("needs fonts-noto-color-emoji")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("text_evaluator")
    monkeypatch.setattr(example, "BATCH", 2)
    monkeypatch.setattr("text_teacher.DEMO_PICTURES", ["hot dog", "red apple"])
    monkeypatch.setattr("sys.argv", ["text_evaluator.py", f"--out={tmp_path}/clip", "--kimg=0.002", "--pictures=demo"])
    example.main()
    assert "held out: clip" in capsys.readouterr().out
    assert sum(file.stat().st_size for file in (tmp_path / "clip").iterdir()) < 2e6
    assert ClipEncoder(tmp_path / "clip").embed_texts(["a red apple on a blue ground, left"]).shape == (1, 64)


# --- guidance


@pytest.mark.parametrize(
    ("text", "kappas"),
    [
        ("zero", (0, 0, 1)),
        ("anti=-1.5", (-1.5, -1.5, 1)),
        ("kappa=0.5:1:4.5", (0.5, 1, 4.5)),
        ("long-short=2", (2, 2, 2)),
        ("short=0", (0, 1, 1)),
    ],
)
def test_guidance_by_places(text, kappas):
    guidance = parse_guidance(text)
    assert (guidance.fake_score_step, guidance.fake_score, guidance.teacher) == kappas
    assert str(guidance) == text
    assert parse_guidance(str(guidance)) == guidance


@pytest.mark.parametrize("text", ["zero=1", "anti=1", "anti", "kappa=1:2", "kappa=1:2:inf", "zero,long=2", "kappa=2"])
def test_guidance_that_makes_no_sense(text):
    with pytest.raises(UserError, match=f"--guidance={text}"):
        parse_guidance(text)


def test_zero_guidance_asks_psi_without_its_condition():
    """One call, with null conditions; no image loses a condition that psi isn't shown anyway."""
    seen = []

    def net(x, sigma, condition):
        seen.append(condition)
        return x

    guided = class_guided(net, 0, Classes(3))
    guided(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 1, 1), torch.eye(3)[:2])
    assert len(seen) == 1
    assert not seen[0].any()
    assert parse_guidance("zero").label_dropout == 0 < parse_guidance("anti=-1").label_dropout


def test_a_network_goes_to_the_hub_with_its_text_encoders(folders, tmp_path, monkeypatch):
    import huggingface_hub

    shutil.copytree(folders["stable_diffusion"], tmp_path / "pipeline")
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
