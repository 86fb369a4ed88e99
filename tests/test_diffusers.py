"""Teachers in the layout of the diffusers library, against the library itself."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_diffusers import (
    DDPM,
    DIT,
    denoiser,
    diffusers,
    randomise,
    write,
)

from dnnlib import UserError
from edm import diffusers_folder, diffusers_models, diffusers_reader, zoo
from edm.diffusers_models import DiffusersDenoiser
from edm.generate import main as generate
from sid.guidance import Guidance, check_guidance
from sid.recipes import TEXT_DEMO
from torch_utils.persistence import is_persistent
from training.denoiser import known_sigma

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "trained_betas")
TIMES = (0, 20, 500, 979, 998)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A pipeline's folder; it isn't changed."""
    return write(tmp_path_factory.mktemp("diffusers") / "teacher", denoiser())


CASES = [
    (schedule, prediction, zero_snr, variance)
    for schedule in SCHEDULES
    for prediction in ("epsilon", "v_prediction", "sample")
    for zero_snr in (False, True)
    for variance in ("learned_range", *(["fixed_small", "learned"] if schedule == "linear" else []))
]


@pytest.mark.parametrize(("schedule", "prediction", "zero_snr", "variance"), CASES)
def test_the_clean_image_is_the_one_of_the_library(schedule, prediction, zero_snr, variance):
    """At several training steps, with and without a network that also predicts a variance."""
    config = {"beta_schedule": schedule, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    config |= {"variance_type": variance}
    if schedule == "trained_betas":
        betas = 0.0002 + 0.01 * torch.linspace(0, 1, 1000) ** 2
        config |= {"beta_schedule": "linear", "trained_betas": betas.tolist()}
    net = denoiser({"out_channels": 1 if variance == "fixed_small" else 2}, {**DDPM, **config})
    scheduler = diffusers.DDPMScheduler(**config, clip_sample=False)
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
    assert not str(error.value).startswith(f"{folder}: {folder}")
    assert "\n" not in str(error.value)
    if "weights" not in wrong and wrong not in ("pickled", "too large", "another width"):  # needs no weights
        with pytest.raises(UserError, match=message) as error:
            diffusers_reader.shapes(folder)
        assert str(error.value).startswith(str(folder))


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
        UserError,
        match=r"^someone/digits: no such file or folder here, and it can't be downloaded from the Hugging Face",
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


def test_a_library_that_does_not_fit_what_is_installed(monkeypatch):
    """As the library tells it: when one of its classes is asked for, or at once."""

    class Unfit:
        def __getattr__(self, name):
            raise RuntimeError(f"Failed to import diffusers.{name} because of the following error:\nNo module named x")

    monkeypatch.setitem(sys.modules, "diffusers", Unfit())
    told = r"the diffusers library can't be loaded \(No module named x\): pip install -U diffusers transformers"
    with pytest.raises(UserError, match=told):
        diffusers_folder.library().UNet2DModel  # noqa: B018
    with pytest.raises(UserError, match=told):
        zoo.load_denoiser(TEXT_DEMO / "teacher")
