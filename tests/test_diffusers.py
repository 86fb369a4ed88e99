"""Teachers and generators in the layout of the diffusers library, against the library itself."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import TINY_VAE

from dnnlib import UserError
from edm import diffusers_models, diffusers_pipelines, latents, zoo
from edm.diffusers_models import DiffusersDenoiser
from edm.generate import main as generate
from edm.sampler import generate_all
from edm.zoo.__main__ import main as zoo_command
from sid.guidance import Guidance, check_guidance
from torch_utils.persistence import is_persistent
from training.denoiser import known_sigma

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_embeds_ada_norm": 3,
}
DDPM = {"_class_name": "DDPMScheduler", "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
TIMES = (0, 20, 500, 979, 998)


def randomise(net):
    """Weights that make every part matter, some of which the library initialises to zero."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


def denoiser(model=None, scheduler=None, **changes):
    return randomise(DiffusersDenoiser(model={**UNET, **(model or {})}, scheduler=scheduler or DDPM, **changes))


def write(folder, net, pipeline="DDPMPipeline"):
    """The library's own folder of the model and the scheduler behind a denoiser."""
    scheduler = diffusers_models.scheduler_of(net)
    getattr(diffusers, pipeline)(unet=net.net, scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A pipeline's folder; it isn't changed."""
    return write(tmp_path_factory.mktemp("diffusers") / "teacher", denoiser())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_clean_image_is_the_one_of_the_library(schedule, prediction, zero_snr):
    """At several training steps, with and without a network that also predicts a variance."""
    config = {"beta_schedule": schedule, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    net = denoiser({"out_channels": 2}, {**DDPM, **config, "variance_type": "learned_range"})
    scheduler = diffusers.DDPMScheduler(**config, clip_sample=False, variance_type="learned_range")
    for t in TIMES:
        x_s = torch.randn(2, 1, 8, 8)
        answer = net.net(x_s, torch.tensor([t])).sample
        expected = scheduler.step(answer, t, x_s).pred_original_sample
        a = scheduler.alphas_cumprod[t].double().sqrt()
        sigma = ((1 - a**2).sqrt() / a).float().expand(2, 1, 1, 1)
        found = net((x_s.double() / a).float(), sigma)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * (1 + sigma[0].item()))
    if zero_snr and prediction != "epsilon":
        x_s = torch.randn(2, 1, 8, 8)
        expected = scheduler.step(net.net(x_s, torch.tensor([999])).sample, 999, x_s).pred_original_sample
        found = net.scaled(x_s, torch.full([2, 1, 1, 1], torch.inf))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert net.sigma_max < 1e6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_the_one_of_the_library(shift):
    """One Euler step to t = 0 gives the clean image; a shift of the sampler's times changes nothing at one time."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    net, scheduler = denoiser(scheduler=config), diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    for s in (0.05, 0.5, 0.95):
        scheduler.set_timesteps(sigmas=[s])
        t = scheduler.sigmas[0]
        x_s = torch.randn(2, 1, 8, 8)
        expected = scheduler.step(net.net(x_s, scheduler.timesteps[:1]).sample, scheduler.timesteps[0], x_s).prev_sample
        found = net(x_s / (1 - t), (t / (1 - t)).expand(2, 1, 1, 1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_schedulers_add_the_same_noise():
    expected = denoiser().times.levels
    for name in sorted(diffusers_models.SCHEDULERS - diffusers_models.FLOW_SCHEDULERS - {"LMSDiscreteScheduler"}):
        betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
        net = denoiser(scheduler={"_class_name": name, **betas})
        torch.testing.assert_close(net.times.levels, expected, msg=name)


def test_classes_are_passed_as_numbers():
    net = denoiser({"num_class_embeds": 3})
    x, sigma = torch.randn(3, 1, 8, 8), torch.full([3, 1, 1, 1], 2.0)
    found = net(x, sigma, torch.eye(3))
    t = net.times.time(sigma.flatten())
    answer = net.net(x / 5**0.5, t, class_labels=torch.arange(3)).sample
    torch.testing.assert_close(found, x - 2 * answer)
    assert (found[0] - net(x, sigma, torch.eye(3)[[1, 1, 1]])[0]).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"--guidance=.*no class"):
        check_guidance(Guidance(teacher=2.0), net)


def test_a_transformer_of_pixels():
    net = randomise(DiffusersDenoiser(model=DIT, scheduler=DDPM))
    x, sigma = torch.randn(3, 1, 8, 8), torch.full([3, 1, 1, 1], 2.0)
    t = net.times.time(sigma.flatten())
    for condition, index in ((torch.eye(3), torch.arange(3)), (torch.zeros(3, 3), torch.full([3], 3))):
        answer = net.net(x / 5**0.5, timestep=t, class_labels=index).sample[:, :1]
        torch.testing.assert_close(net(x, sigma, condition), x - 2 * answer)
    assert check_guidance(Guidance(teacher=2.0), net) is None
    assert torch.equal(net.train()(x, sigma, torch.eye(3)), net.eval()(x, sigma, torch.eye(3)))  # drops no classes


def test_an_embedding_table_of_times_gets_whole_numbers():
    net = denoiser({"time_embedding_type": "learned", "num_train_timesteps": 1000})
    sigma = torch.tensor([0.02, 2.5]).reshape(-1, 1, 1, 1)
    known = known_sigma(net, sigma)
    assert not torch.equal(known, sigma)
    assert net(torch.randn(2, 1, 8, 8), known).isfinite().all()


def layouts(folder, teacher):
    """{name: the same model in another layout}"""
    made = {"pipeline": teacher, "model": teacher / "unet"}
    for name in ("flat", "alone", "sharded", "former names"):
        made[name] = folder / name
        shutil.copytree(teacher if name in ("sharded", "former names") else teacher / "unet", made[name])
    shutil.copy(teacher / "model_index.json", made["flat"])
    for name in ("flat", "alone"):
        shutil.copy(teacher / "scheduler" / "scheduler_config.json", made[name])
    weights = "diffusion_pytorch_model.safetensors"
    state = load_file(teacher / "unet" / weights)
    (made["sharded"] / "unet" / weights).unlink()
    diffusers.UNet2DModel.from_pretrained(teacher / "unet").save_pretrained(
        made["sharded"] / "unet", max_shard_size="10KB"
    )
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, old in former.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    assert renamed.keys() != state.keys()
    save_file(renamed, made["former names"] / "unet" / weights)
    return made


def test_every_layout_of_a_folder_is_read(teacher, tmp_path):
    x, sigma = torch.randn(2, 1, 8, 8), torch.full([2, 1, 1, 1], 2.0)
    reference = diffusers.UNet2DModel.from_pretrained(teacher / "unet")
    for name, folder in layouts(tmp_path, teacher).items():
        net = zoo.load_denoiser(folder)
        assert net.metadata == {"kind": "teacher"}, name
        t = net.times.time(sigma.flatten())
        torch.testing.assert_close(net(x, sigma), x - 2 * reference(x / 5**0.5, t).sample, msg=name)
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1


def test_half_precision_and_the_licence_are_read(teacher, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(teacher, folder)
    model = diffusers.UNet2DModel.from_pretrained(teacher / "unet").half()
    shutil.rmtree(folder / "unet")
    model.save_pretrained(folder / "unet", variant="fp16")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    net = zoo.load_denoiser(folder)
    assert net.metadata == {"kind": "teacher", "licence": "apache-2.0"}
    assert next(net.parameters()).dtype == torch.float32


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


WRONG = {  # what is done to the folder: what the message says
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler_config.json"),
    "no weights": (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "has no diffusion_pytorch"),
    "cut weights": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\x10" + bytes(20)),
        "damaged, or not a safetensors file",
    ),
    "pickled": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/diffusion_pytorch_model.bin"),
        "pickled .*safe_serialization=True",
    ),
    "config that isn't JSON": (lambda f: (f / "unet/config.json").write_text("{"), "can't be read"),
    "another class": (
        lambda f: edit(f / "unet/config.json", _class_name="UNet2DConditionModel"),
        "a DDPMPipeline; of text-to-image, StableDiffusionPipeline",
    ),
    "another width": (lambda f: edit(f / "unet/config.json", block_out_channels=[8, 16]), "weights don't fit"),
    "too large": (lambda f: edit(f / "unet/config.json", block_out_channels=[1 << 20, 8]), "far more"),
    "latents": (lambda f: edit(f / "unet/config.json", in_channels=4, out_channels=3), "takes 4 channels"),
    "no size": (lambda f: edit(f / "unet/config.json", sample_size=None), "sample_size is None"),
    "Fourier times": (lambda f: edit(f / "unet/config.json", time_embedding_type="fourier"), "'fourier'"),
    "classes as times": (
        lambda f: edit(f / "unet/config.json", class_embed_type="timestep"),
        "embedded as 'timestep'",
    ),
    "a VAE": (lambda f: edit(f / "model_index.json", vae=["diffusers", "AutoencoderKL"]), "names a VAE"),
    "own code": (lambda f: edit(f / "model_index.json", unet=None), "names neither a unet"),
    "another scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="CMStochasticIterativeScheduler"),
        "scheduler is a 'CMStochasticIterativeScheduler'.*DDPMScheduler",
    ),
    "another prediction": (
        lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="score"),
        "prediction_type is 'score'",
    ),
    "too many steps": (
        lambda f: edit(f / "scheduler/scheduler_config.json", num_train_timesteps=10**12),
        "num_train_timesteps is 1000000000000",
    ),
    "falling noise": (
        lambda f: edit(f / "scheduler/scheduler_config.json", trained_betas=[0.1, -0.1, 0.1]),
        "noise levels must",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_one_line(wrong, teacher, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    change, message = WRONG[wrong]
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        zoo.load_denoiser(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_without_the_library_one_line_says_how_to_install_it(teacher, tmp_path, monkeypatch):
    zoo.save_network(zoo.load_network(teacher), tmp_path / "teacher.safetensors")
    for library, sources in {
        "diffusers": (teacher, tmp_path / "teacher.safetensors"),
        "huggingface_hub": ("someone/unknown-model",),
    }.items():
        monkeypatch.setitem(sys.modules, library, None)
        for source in sources:
            with pytest.raises(UserError, match=f"pip install {library}"):
                zoo.load_network(source)


def test_a_name_on_the_hub_is_read_from_the_cache(teacher, tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--digits"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    with pytest.raises(
        UserError, match=r"^someone/digits: no such file or folder here, and it can't be had from the Hugging Face Hub"
    ):
        zoo.load_denoiser("someone/digits")
    shutil.copytree(teacher, repository / "snapshots" / ("0" * 40))
    net = zoo.load_denoiser("someone/digits")
    assert zoo.network_hash(net) == zoo.network_hash(zoo.load_denoiser(teacher))


def test_snapshots_load_again(teacher, tmp_path):
    net = zoo.load_denoiser(teacher)
    assert is_persistent(net)
    x, sigma = torch.randn(2, 1, 8, 8), torch.full([2, 1, 1, 1], 2.0)
    for name in ("net.safetensors", "folder"):
        zoo.save_network(net, tmp_path / name, kind="sid-generator", init_sigma=2.5)
        loaded = zoo.load_denoiser(tmp_path / name)
        assert torch.equal(loaded(x, sigma), net(x, sigma))
        assert loaded.metadata["init_sigma"] == 2.5
    with pytest.raises(UserError, match=r"save as \.safetensors"):
        zoo.save_network(net, tmp_path / "net.pkl")
    clone = zoo.clone_network(net, dropout=0.5)
    assert torch.equal(clone(x, sigma), net(x, sigma))
    assert not torch.equal(clone.train()(x, sigma), net(x, sigma))


def test_the_library_refuses_folders_of_this_project(tmp_path):
    """If the files had the library's names, it would load them as one of its own models, with other weights."""
    zoo.save_network(denoiser(), tmp_path / "folder")
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        diffusers.UNet2DModel.from_pretrained(tmp_path / "folder")


ZERO_SNR_V = {**DDPM, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
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


def less_contrast(net):
    """Few pixels beyond white and black."""
    last = net.net.conv_out if hasattr(net.net, "conv_out") else net.net.proj_out_2
    for parameter in last.parameters():
        parameter.data /= 10
    return net


def convert(net, folder):
    """The library's pipeline of a generator, by the command; and what the command prints."""
    zoo.save_network(net, folder / "net.safetensors", **net.metadata)
    command = ["convert", str(folder / "net.safetensors"), str(folder / "pipeline"), "--to=diffusers"]
    done = CliRunner().invoke(zoo_command, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, done.output


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


def test_a_pipeline_goes_to_the_hub(teacher, tmp_path):
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


VAE = {**TINY_VAE, "_class_name": "AutoencoderKL", "scaling_factor": 0.7}
LATENT = {"in_channels": 2, "out_channels": 2}
PIPELINES_OF_LATENTS = {
    "UNet2DModel, epsilon": ({**UNET, **LATENT}, DDPM, 2.5),
    "UNet2DModel, flow": ({**UNET, **LATENT}, FLOW, 2.5),
    "DiT, epsilon, learned variance": ({**DIT, "in_channels": 2, "out_channels": 4}, DDPM, 2.5),
    "DiT, epsilon, a low level": ({**DIT, **LATENT}, DDPM, 0.8),
    "DiT, v": ({**DIT, **LATENT}, ZERO_SNR_V, 2.5),
    "DiT, image": ({**DIT, **LATENT}, {**DDPM, "prediction_type": "sample"}, 2.5),
    "DiT, flow": ({**DIT, **LATENT}, FLOW, 2.5),
}


def write_parts(net, folder):
    """Its model and its scheduler, next to its VAE."""
    net.net.save_pretrained(folder)
    diffusers_models.scheduler_of(net).save_pretrained(folder)


def of_latents(folder, model, scheduler, level=None, **vae):
    net = less_contrast(randomise(DiffusersDenoiser(model=model, scheduler=scheduler)))
    torch.manual_seed(0)
    diffusers.AutoencoderKL.from_config({**VAE, **vae}).save_pretrained(folder / "vae")
    net.metadata = {"kind": "teacher", "vae": latents.record_of(folder / "vae")}
    if level is not None:
        net.metadata |= {"kind": "sid-generator", "init_sigma": level}
    return net


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
        (tiny_teacher(), "a EDMPrecond isn't"),
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


def test_commands_distil_resume_and_sample(teacher, tmp_path, monkeypatch):
    import sid_train

    monkeypatch.chdir(tmp_path)
    common = [f"--edm_model={teacher}", "--batch=8", "--batch-gpu=8", "--device=cpu", "--outdir=run", "--nosubdir"]
    for duration in ("0.000016", "0.000032"):
        options = [*common, f"--duration={duration}", "--tick=0.008", "--snap=1", "--dump=1", "--dropout=0.1"]
        done = CliRunner().invoke(sid_train.main, options, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    net = zoo.load_denoiser("run")
    assert net.metadata["kind"] == "sid-generator"
    assert zoo.network_hash(net) != zoo.network_hash(zoo.load_denoiser(teacher))
    for network, grid in (("run", "one.png"), (str(teacher), "many.png")):
        command = [f"--network={network}", f"--grid={grid}", "--seeds=0-3", "--device=cpu"]
        assert CliRunner().invoke(generate, command, catch_exceptions=False).exit_code == 0
        assert Path(grid).is_file()
