"""Distilling text-to-image teachers: the published losses with guidance, snapshots, LoRA files, CLIP scores."""

import html
import importlib
import json
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
from edm import generate, lora_files, text_encoders, zoo
from edm.metrics import ground_colour
from edm.metrics.caption_template import template_beside
from edm.metrics.clip import ClipEncoder
from edm.sampler import generate_all
from edm.small_teachers import captions, pictures
from edm.text_models import TextDenoiser
from sid import lora
from sid.guidance import Guidance
from sid.inputs import Inputs
from sid.loss import SiDLoss
from sid.prepare import prepare
from sid.run import distil
from training.conditions import Classes, Prompts
from training.generator import Generator
from training.guidance import class_guided
from training.steps import Steps

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import tiny_pipelines  # noqa: E402
from tiny_pipelines import TEXTS, teacher_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")
KAPPAS = [(1, 1, 1, 1.0), (1, 1, 3.0, 1.0), (0.5, 1, 1, 1.0), (1.5, 1.5, 1.5, 1.0), (4.5, 4.5, 4.5, 1.2)]


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


# --- distillation


def test_distilling_a_pipeline(text_pipelines, tmp_path, monkeypatch):
    """With long-short guidance from prompts to a snapshot, again from a state, and images of it by the command line."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS), encoding="utf-8")
    teacher = zoo.load_denoiser(text_pipelines["stable_diffusion"])
    names = {"fake_sigma_schedule": "times=20,980", "sigma_schedule": "times=20,980", "augment": 0}
    config = tiny_config(guidance="long-short=1.5", fake_score_weighting="noise", total_kimg=0.024, **names)
    made = distil(teacher, config, tmp_path / "whole", prompts=str(prompts)).net.prompts
    shown = json.loads((tmp_path / "whole" / "prompts.json").read_text())["prompts"]
    assert shown == [made.texts[number] for number in made.numbers_of_seeds(range(8))]
    assert (tmp_path / "whole" / "prompts.png").is_file()
    assert html.escape(shown[0]) in (tmp_path / "whole" / "index.html").read_text()

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
    shutil.move(text_pipelines["stable_diffusion"], tmp_path / "elsewhere")
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
        shutil.move(tmp_path / "elsewhere", text_pipelines["stable_diffusion"])


def test_clip_scores(text_pipelines, tmp_path):
    """By fid.py eval, with a table of all prompts."""
    clip, prompts = tiny_pipelines.save_clip(tmp_path / "clip"), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS), encoding="utf-8")
    options = [
        "eval",
        f"--network={text_pipelines['stable_diffusion']}",
        f"--prompts={prompts}",
        "--steps=1",
        "--device=cpu",
    ]
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
    images = generate_all(teacher_of(text_pipelines["stable_diffusion"]), range(5, 11), steps=1)
    pairs = zip(encoder.embed_images(images), encoder.embed_texts([TEXTS[i % 3] for i in range(5, 11)]))
    scores = [100 * max(torch.cosine_similarity(*pair, dim=0).item(), 0) for pair in pairs]
    assert np.mean(scores) == pytest.approx(record["trials"]["values"]["clip"][0], rel=1e-4)


def test_fewer_images_than_prompts_are_of_prompts_of_the_whole_file(text_pipelines, tmp_path):
    """Not of its first lines, since files are often sorted; one image for each prompt keeps their order."""
    (tmp_path / "prompts.txt").write_text(
        "\n".join([*TEXTS, *(f"a picture of {i}" for i in range(9))]), encoding="utf-8"
    )
    net, given = teacher_of(text_pipelines["stable_diffusion"]), {"prompts": tmp_path / "prompts.txt"}
    for num in (None, 12, 24):
        assert generate.prompted(net, given, CPU, num) == ({}, {"prompts": "prompts.txt"})
        assert net.prompts.numbers_of_seeds(range(12)) == list(range(12))
    for num in (4, 13):
        assert generate.prompted(net, given, CPU, num) == ({}, {"prompts": "prompts.txt", "prompts_shuffled": True})
        numbers = net.prompts.numbers_of_seeds(range(12))
        assert sorted(numbers) == list(range(12)) != numbers


def test_low_rank_updates_as_a_lora_file(text_pipelines, tmp_path):
    """The library's pipeline with the file makes our images; the generator's vectors stay the teacher's."""
    teacher = teacher_of(text_pipelines["stable_diffusion"])
    level = teacher.times.sigma(torch.tensor([625.0], dtype=torch.float64)).item()
    options = {"lora_rank": 3, "augment": 0, "init_sigma": level, "lr": 0.01, "glr": 0.01, "ema_halflife_kimg": 0}
    made = prepare(Inputs(teacher), tiny_config(**options, lora_vectors=False), CPU)
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

    pipeline = diffusers.DiffusionPipeline.from_pretrained(text_pipelines["stable_diffusion"])
    found, (expected, start) = compared_with_lora(pipeline, tmp_path / "lora", level, net, teacher)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (start - expected).abs().max() > 1e-2 * expected.abs().max()

    whole = prepare(Inputs(teacher), tiny_config(**options), CPU)
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


def compared_with_lora(pipeline, file, level, *networks):
    """(latents of the library's pipeline with a LoRA file, of our one-step generators), of the same noise"""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(file)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(file / "scheduler")
    torch.manual_seed(3)
    z, width = torch.randn(2, 4, tiny_pipelines.SIZE, tiny_pipelines.SIZE), 2 * tiny_pipelines.SIZE
    how = {"num_inference_steps": 1, "guidance_scale": 1, "width": width, "height": width, "output_type": "latent"}
    with torch.no_grad():
        condition = networks[-1].prompts.of_seeds([0, 1], CPU, None)
        ours = [Generator(net, Steps((level,))).sample(z, condition) for net in networks]
    return pipeline(TEXTS[:2], latents=z, **how).images, ours


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_lora_file_of_a_base_in_half_precision(text_pipelines, tmp_path, kind):
    """The updates belong to the teacher's matrices as training had rounded them."""
    teacher = teacher_of(text_pipelines[kind])
    level = teacher.times.sigma(torch.tensor([625.0], dtype=torch.float64)).item()
    options = {"lora_rank": 3, "augment": 0, "init_sigma": level, "lr": 0.01, "glr": 0.01, "ema_halflife_kimg": 0}
    options |= {"precision": "bf16", "lora_base": "half", "lora_vectors": False}
    made = prepare(Inputs(teacher), tiny_config(**options), CPU)
    made.iteration()
    made.iteration()
    rounded = [name for name, weight in teacher.net.named_parameters() if weight.dtype == torch.bfloat16]
    assert len(rounded) > 10
    net = named(lora.merge(made.state.ema), lora_rank=3, lora_base="bf16")
    plain = teacher_of(text_pipelines[kind])
    call = lora_files.write(net, plain, tmp_path / "lora")
    assert call.startswith("pipeline.to(torch.bfloat16); pipeline.load_lora_weights")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(text_pipelines[kind])
    for name in rounded:
        weight = pipeline.unet.get_parameter(name)
        weight.data = weight.data.bfloat16().float()
    found, (expected, start) = compared_with_lora(pipeline, tmp_path / "lora", level, net, plain)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (start - expected).abs().max() > 1e-2 * expected.abs().max()


def named(net, **metadata):
    net.metadata = {**getattr(net, "metadata", {}), **metadata}
    return net


# --- the examples' teacher and evaluator


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
    found = ground_colour.colours(((drawn + 1) * 127.5).round().to(torch.uint8))
    assert ground_colour.share_right(found, texts, captions.template(source.names)) == 1
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
    monkeypatch.setattr(example, "DEMO_PICTURES", ["hot dog", "red apple"])
    sizes = ["--pictures=demo", "--vae-kimg=0.002", "--kimg=0.002", "--width=8", "--half"]
    monkeypatch.setattr("sys.argv", ["text_teacher.py", f"--out={tmp_path}/teacher", *sizes])
    example.main()
    for file in (tmp_path / "teacher").rglob("*.*"):
        assert bytes(tmp_path) not in file.read_bytes(), file
    net = teacher_of(tmp_path / "teacher", text_encoders.read_prompts(tmp_path / "teacher/prompts.txt")[:2])
    assert (net.prediction, net.img_resolution, net.prompt_dim) == ("v", 16, 20 * 128)
    template = template_beside(tmp_path / "teacher/prompts.txt")
    assert sorted(template.names) == ["a hot dog", "a red apple"]
    assert template.parts(net.prompts.texts[0]).keys() == {"name", "ground", "place"}
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
