"""The VAE of a network of latents: next to it, named by its file, on the Hub, or not the right one."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from parity import DATA
from tiny_latents import DIT, randomised, toy_vae

from dnnlib import UserError
from edm import latents, zoo
from edm.sampler import generate_all
from edm.zoo.__main__ import main as zoo_command
from training.decoder import PixelDecoder

diffusers = pytest.importorskip("diffusers")


def broken(change):
    """A test's folder in which `change(folder)` was done to a copy of the pipeline."""

    def make(pipeline, folder):
        shutil.copytree(pipeline, folder / "dit")
        change(folder / "dit")
        return folder / "dit"

    return make


def set_config(part, **values):
    def change(folder):
        file = folder / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def other_vae(folder):
    shutil.rmtree(folder / "vae")
    toy_vae(latent_channels=4).save_pretrained(folder / "vae")


def no_vae(folder):
    shutil.rmtree(folder / "vae")
    (folder / "model_index.json").write_text('{"_class_name": "X", "transformer": ["diffusers", "X"]}')


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_vae, "latents of 4 channels, but the network has 2"),
        (lambda folder: shutil.rmtree(folder / "vae"), "names a VAE, but there is no vae/config.json"),
        (no_vae, "2 channels are latents, but there is no VAE"),
        (set_config("vae", _class_name="VQModel"), "VQModel"),
        (set_config("vae", scaling_factor=0), "damaged"),
        (set_config("vae", latents_std=[1, 0], latents_mean=[0, 0]), "damaged"),
        (set_config("vae", in_channels=5), "weights don't fit AutoencoderKL"),
    ],
)
def test_a_vae_that_does_not_fit(latent_pipeline, tmp_path, change, words):
    folder = broken(change)(latent_pipeline, tmp_path)
    with pytest.raises(UserError, match=words) as error:
        zoo.load_denoiser(folder)
    assert "\n" not in error.value.message


@pytest.mark.parametrize("channels", [1, 2])
def test_a_vae_next_to_a_models_folder_is_its_own_only_if_it_makes_latents(vae, tmp_path, channels):
    shutil.copytree(vae, tmp_path / "vae")
    config = {**DIT, "in_channels": channels, "out_channels": channels, "norm_num_groups": 1}
    randomised(diffusers.DiTTransformer2DModel.from_config(config)).save_pretrained(tmp_path / "model")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "model")
    net = zoo.load_denoiser(tmp_path / "model")
    assert ("vae" in net.metadata, net.sigma_data) == ((True, 1.0) if channels == 2 else (False, 0.5))
    assert latents.image_shape(net) == ((1, 16) if channels == 2 else (1, 8))


def test_a_snapshot_without_its_vae(latent_pipeline, tmp_path):
    net = zoo.load_denoiser(broken(lambda folder: None)(latent_pipeline, tmp_path))
    zoo.save_network(net, tmp_path / "net.safetensors", **{**net.metadata, "init_sigma": 2.5})
    shutil.rmtree(tmp_path / "dit" / "vae")
    loaded = zoo.load_denoiser(tmp_path / "net.safetensors")  # as a network it is whole
    with pytest.raises(UserError, match="next to the network's file"):
        generate_all(loaded, [0])
    randomised(toy_vae(), 0.01).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="isn't the VAE that the network was trained with"):
        generate_all(zoo.load_denoiser(tmp_path / "net.safetensors"), [0])


@pytest.mark.parametrize("record", ["text", {}, {"source": "x", "sha256": "0", "channels": 2, "scale": 0, "shift": 0}])
def test_damaged_records(latent_pipeline, tmp_path, record):
    net = zoo.load_denoiser(latent_pipeline)
    zoo.save_network(net, tmp_path / "net.safetensors", vae=record)
    with pytest.raises(UserError, match="VAE"):
        generate_all(zoo.load_denoiser(tmp_path / "net.safetensors"), [0], steps=2)


def test_latents_of_edm2(tmp_path):
    """Its snapshots name a VAE, without a hash; latents are raw scale + bias."""
    shutil.copy(DATA / "edm2-format-latent.pkl", tmp_path / "teacher.pkl")
    vae = toy_vae(in_channels=3, out_channels=3, latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    net = zoo.load_network(tmp_path / "teacher.pkl")
    record, z = net.metadata["vae"], torch.randn(2, 4, 8, 8)
    bias = [-shift * scale for shift, scale in zip(record["shift"], record["scale"])]
    scale, bias = (torch.tensor(values).reshape(1, 4, 1, 1) for values in (record["scale"], bias))
    expected = PixelDecoder.to_images(vae.decode((z - bias) / scale).sample)
    found = latents.decoder_of(net).to_images(z)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert generate_all(net, range(2), steps=2).shape == (2, 3, 16, 16)
    shutil.rmtree(tmp_path / "vae")
    alone = zoo.load_network(tmp_path / "teacher.pkl")
    alone.metadata["vae"]["source"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="the VAE of these latents isn't available"):
        latents.decoder_of(alone)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub and its cache: the function makes a repository of a folder; `downloads` lists the files that were sent."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repositories, downloads = {}, []

    def snapshot_download(name, allow_patterns, ignore_patterns=None, local_files_only=False):
        cached = tmp_path / "cache" / name
        if local_files_only:
            if not cached.is_dir():
                raise FileNotFoundError(name)
            return str(cached)
        source = repositories[name]
        files = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
        for file in sorted(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)):
            if not (cached / file).is_file():
                downloads.append(file)
                (cached / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / file, cached / file)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    repositories["downloads"] = downloads
    return repositories


def named_vae(net, name, sha256=""):
    net.metadata = {"vae": {**net.metadata["vae"], "source": name, "sha256": sha256}}
    latents._decoder.cache_clear()
    return latents.decoder_of(net)


@pytest.mark.parametrize("in_a_pipeline", [False, True])
def test_a_vae_that_a_file_names_is_fetched_alone_and_said(hub, latent_pipeline, vae, tmp_path, capsys, in_a_pipeline):
    net = zoo.load_denoiser(latent_pipeline)
    repository = tmp_path / "repository"
    shutil.copytree(latent_pipeline if in_a_pipeline else vae, repository)
    folder = "vae/" if in_a_pipeline else ""
    for name in ("pytorch_model.bin", "code.py", f"{folder}diffusion_pytorch_model.bin"):
        (repository / name).write_text("import os")
    hub["someone/vae"] = repository
    named_vae(net, "someone/vae", net.metadata["vae"]["sha256"])
    assert hub["downloads"] == [f"{folder}config.json", f"{folder}diffusion_pytorch_model.safetensors"]
    assert capsys.readouterr().err.count("\n") == 1
    named_vae(net, "someone/vae")
    assert len(hub["downloads"]) == 2
    assert capsys.readouterr().err == ""  # from the cache


def test_a_pipeline_is_fetched_without_what_is_not_used(hub, latent_pipeline, tmp_path):
    repository = shutil.copytree(latent_pipeline, tmp_path / "repository")
    weights = "diffusion_pytorch_model.safetensors"
    for name in (
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "whole.safetensors",
        "safety_checker/model.safetensors",
    ):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"unused")
    (repository / "transformer" / weights).rename(repository / "transformer/diffusion_pytorch_model.fp16.safetensors")
    (repository / "code.py").write_text("import os")
    hub["someone/model"] = repository
    net = zoo.load_denoiser("someone/model")
    assert zoo.network_hash(net) == zoo.network_hash(zoo.load_denoiser(latent_pipeline))
    assert [name for name in hub["downloads"] if not name.endswith(".json")] == [
        f"vae/{weights}",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_nothing_but_a_vae_is_fetched(hub, latent_pipeline, tmp_path):
    net = zoo.load_denoiser(latent_pipeline)
    hub["someone/model"] = latent_pipeline / "transformer"
    with pytest.raises(UserError, match="a DiTTransformer2DModel, not an AutoencoderKL"):
        named_vae(net, "someone/model")
    hub["someone/text"] = tmp_path
    with pytest.raises(UserError, match=r"has neither config\.json nor vae/config\.json"):
        named_vae(net, "someone/text")
    assert hub["downloads"] == ["config.json"]
    hub["someone/vae"] = latent_pipeline
    with pytest.raises(UserError, match="isn't the VAE that the network was trained with"):
        named_vae(net, "someone/vae", "0" * 64)


def test_a_network_goes_to_the_hub_with_a_vae_of_ones_own_and_names_others(hub, latent_pipeline, tmp_path):
    net = zoo.load_denoiser(latent_pipeline)
    zoo.save_network(net, tmp_path / "net.safetensors", **net.metadata)
    command = ["push", str(tmp_path / "net.safetensors"), "someone/net", "--dry-run", str(tmp_path / "out")]
    result = CliRunner().invoke(zoo_command, command)
    assert result.exit_code == 0, result.output
    assert str(latent_pipeline) not in "".join(
        (tmp_path / "out" / name).read_text() for name in ("README.md", "config.json")
    )
    hub["someone/net"] = tmp_path / "out"
    again = zoo.load_network("someone/net")
    assert again.metadata["vae"] == {**net.metadata["vae"], "source": "someone/net"}
    assert torch.equal(generate_all(again, range(2), steps=2), generate_all(net, range(2), steps=2))

    hub["someone/vae"] = latent_pipeline / "vae"
    again.metadata["vae"]["source"] = "someone/vae"
    zoo.save_network(again, tmp_path / "named.safetensors", **again.metadata)
    command[1], command[-1] = str(tmp_path / "named.safetensors"), str(tmp_path / "named")
    result = CliRunner().invoke(zoo_command, command)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "named" / "vae").exists()
    hub["someone/named"] = tmp_path / "named"
    assert zoo.load_network("someone/named").metadata["vae"]["source"] == "someone/vae"
