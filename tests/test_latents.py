"""Latents of a VAE: data sets, teachers, generators and their pictures, with toy networks of the diffusers library."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from parity import DATA
from PIL import Image
from safetensors.torch import load_file
from tiny import CPU, TINY_VAE, tiny_config

from dnnlib import UserError
from edm import dataset_tool, generate, latents, zoo
from edm import train as edm_train
from edm.onnx_file import can_trace
from edm.sampler import generate_all, sample
from edm.zoo.__main__ import main as zoo_command
from sid.generator import OneStepGenerator
from sid.inputs import Inputs, load_dataset
from sid.prepare import prepare
from sid.run import distil
from sid.teacher_distance import TeacherDistance
from training.decoder import LatentDecoder, PixelDecoder, clean_samples
from training.latent_dataset import LatentDataset

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

VAE = {**TINY_VAE, "sample_size": 16, "scaling_factor": 0.7, "shift_factor": 0.1}
DIT = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_embeds_ada_norm": 3,
    "norm_num_groups": 2,
}


def randomised(net, scale=0.3):
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


def toy_vae(**changes):
    torch.manual_seed(1)
    return randomised(diffusers.AutoencoderKL.from_config({**VAE, **changes}), 0.05)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "toy"
    toy_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A DiT of latents as the library saves it; it isn't changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    model = randomised(diffusers.DiTTransformer2DModel.from_config(DIT))
    diffusers.DiTPipeline(model, toy_vae(), diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve gray images of three classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, [16, 16], dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"{i:02d}.png", i % 3] for i in range(12)]}))
    return folder


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, images, vae):
    path = tmp_path_factory.mktemp("encoded") / "latents.safetensors"
    dataset_tool.convert(images, path, vae=str(vae))
    return path


def pixels(folder):
    return torch.stack([torch.from_numpy(np.array(Image.open(path)))[None] for path in sorted(folder.glob("*.png"))])


def test_decoding_and_encoding_are_the_librarys(vae):
    net = diffusers.AutoencoderKL.from_pretrained(vae)
    z, x = torch.randn(10, 2, 8, 8), torch.randint(256, [10, 1, 16, 16], dtype=torch.uint8)
    decoder = LatentDecoder(toy_vae(), 0.7, 0.1)
    with torch.no_grad():
        expected = PixelDecoder.to_images(net.decode(z / 0.7 + 0.1).sample)
        distribution = net.encode(PixelDecoder.from_images(x)).latent_dist
    assert (decoder.to_images(z).int() - expected.int()).abs().max() <= 1
    found = decoder.encode(x)
    torch.testing.assert_close(found[:, 0], (distribution.mean - 0.1) * 0.7)
    torch.testing.assert_close(found[:, 1], distribution.std * 0.7)
    assert torch.equal(decoder.from_images(x), found[:, 0])
    per_channel = LatentDecoder(toy_vae(), [0.7, -2.0], [0.1, 0.3])
    torch.testing.assert_close(per_channel.encode(x)[:, 0, 1], (distribution.mean[:, 1] - 0.3) * -2)
    assert (per_channel.encode(x)[:, 1] > 0).all()


def test_decoding_is_in_float32_and_refuses_what_overflows():
    decoder = LatentDecoder(toy_vae(), 0.7)
    z = torch.randn(2, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder.to_images(z), LatentDecoder(toy_vae(), 0.7).to_images(z))
    with pytest.raises(UserError, match="NaN or infinity"):
        LatentDecoder(toy_vae(), 1e-38).to_images(z)


def test_a_latent_is_drawn_with_its_mean_and_deviation():
    items = torch.stack([torch.full([2, 50, 50], 3.0), torch.full([2, 50, 50], 0.5)])[None]
    torch.manual_seed(0)
    drawn = clean_samples(items)
    torch.manual_seed(0)
    assert torch.equal(drawn, 3 + 0.5 * torch.randn(1, 2, 50, 50))


def test_a_data_set_of_latents(encoded, images, vae):
    """Means and deviations are the VAE's; over the data, each channel has mean 0 and standard deviation 0.5."""
    dataset = LatentDataset(encoded, use_labels=True)
    assert (len(dataset), dataset.num_channels, dataset.resolution, dataset.label_dim) == (12, 2, 8, 3)
    assert (dataset.classes, dataset.get_label(4).tolist()) == ([0, 1, 2], [0, 1, 0])
    items = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(12)])
    assert items.mean(dim=(0, 3, 4))[0].tolist() == pytest.approx([0, 0], abs=1e-5)
    variance = items[:, 0].square().mean(dim=(0, 2, 3)) + items[:, 1].square().mean(dim=(0, 2, 3))
    assert variance.tolist() == pytest.approx([0.25, 0.25], rel=1e-4)
    record = dataset.metadata["vae"]
    expected = LatentDecoder(toy_vae(), record["scale"], record["shift"]).encode(pixels(images))
    torch.testing.assert_close(items, expected)
    assert set(load_file(encoded)) == {"latents", "labels"}  # other programs can read it


def test_a_data_set_with_the_vaes_own_scale(images, vae, tmp_path):
    command = ["--source", images, "--dest", tmp_path / "x.safetensors", "--vae", vae, "--vae-scale"]
    result = CliRunner().invoke(dataset_tool.main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert "12 images, 16x16, gray, 3 classes, as latents of 2 x 8 x 8 (scale 0.7)" in result.output
    record = LatentDataset(tmp_path / "x.safetensors").metadata["vae"]
    assert (record["scale"], record["shift"], record["channels"]) == (0.7, 0.1, 2)


def test_a_data_set_with_the_scale_of_edm2(images, tmp_path):
    """It is what a published snapshot expects, so EDM2's teachers can go on with real images (SiDA)."""
    toy_vae(in_channels=3, out_channels=3, latent_channels=4).save_pretrained(tmp_path / "vae")
    path = tmp_path / "x.safetensors"
    command = [f"--source={images}", f"--dest={path}", f"--vae={tmp_path / 'vae'}", "--vae-scale=edm2"]
    result = CliRunner().invoke(dataset_tool.main, command)
    assert result.exit_code == 0, result.output
    dataset = LatentDataset(path)
    teacher = zoo.load_network(DATA / "edm2-format-latent.pkl")
    latents.check_same_vae(teacher, dataset.metadata["vae"], str(path))
    raw = torch.as_tensor(load_file(path)["latents"])
    mean, std = (torch.tensor(v).reshape(4, 1, 1) for v in ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)))
    torch.testing.assert_close(torch.from_numpy(dataset[3][0][0]), (raw[3, 0] - mean) / std / 2)
    assert (
        len(load_dataset(str(path), teacher, tiny_config(gan=True, augment=0), {"xflip": False, "cache": False})) == 12
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vae-scale=edm2"], "is for the 4 channels of"),
        (["--dest=x.zip"], "ends in .safetensors"),
        (["--resolution=15x15"], "2 pixels each, but the images are 15 wide"),
        (["--vae=nothing"], "nothing"),
    ],
)
def test_what_the_tool_refuses(images, vae, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    command = [f"--source={images}", "--dest=x.safetensors", f"--vae={vae}", *options]
    result = CliRunner().invoke(dataset_tool.main, command)
    assert result.exit_code != 0
    assert words in str(result.exception) + result.output
    assert not list(tmp_path.iterdir())


def test_a_pipeline_of_latents_is_a_teacher(pipeline):
    net = zoo.load_denoiser(pipeline)
    assert (net.img_channels, net.img_resolution, net.label_dim, net.sigma_data) == (2, 8, 3, 1.0)
    record = net.metadata["vae"]
    assert (record["scale"], record["shift"]) == (0.7, 0.1)
    assert latents.image_shape(net) == (1, 16)
    found = generate_all(net, range(3), steps=2)
    assert found.shape == (3, 1, 16, 16)
    z = sample(net, range(3), "heun", num_steps=2).float()
    assert torch.equal(found, LatentDecoder(toy_vae(), 0.7, 0.1).to_images(z))


def test_distilling_a_pipeline_of_latents(pipeline, images, tmp_path, monkeypatch):
    """Training never decodes; snapshots make pictures by themselves, and also where the VAE lies next to them."""
    teacher = zoo.load_denoiser(pipeline)
    calls = []
    decode = LatentDecoder.to_images
    monkeypatch.setattr(LatentDecoder, "to_images", lambda self, x: calls.append(len(x)) or decode(self, x))
    distillation = prepare(Inputs(teacher), tiny_config(augment=0), CPU)
    distillation.iteration()
    assert not calls
    out = tmp_path / "run"
    generator = distil(teacher, tiny_config(total_kimg=0.008, augment=0), out, device="cpu", data=str(images))
    assert generator(2).shape == (2, 1, 16, 16)
    assert calls
    (snapshot,) = out.glob("network-snapshot-*.safetensors")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(snapshot, moved)
    toy_vae().save_pretrained(moved / "vae")
    copied = OneStepGenerator.from_pretrained(moved / snapshot.name)
    assert copied.net.metadata["vae"]["source"] == str(moved / "vae")
    assert torch.equal(copied(2), generator(2))
    result = CliRunner().invoke(generate.main, [f"--network={snapshot}", f"--outdir={tmp_path}/made", "--seeds=0,1"])
    assert result.exit_code == 0, result.output
    assert Image.open(next((tmp_path / "made").rglob("*.png"))).size == (16, 16)


@pytest.mark.slow
@pytest.mark.skipif(not can_trace(), reason="a PyTorch that can't write ONNX")
def test_an_onnx_file_decodes(pipeline, tmp_path):
    """It runs from noise to the images that OneStepGenerator makes of it, for any number of them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    net = zoo.load_denoiser(pipeline)
    net.metadata |= {"kind": "sid-generator", "init_sigma": 2.5}
    zoo.save_network(net, tmp_path / "net.onnx", **net.metadata)
    model = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 70):
        z = torch.stack([torch.randn([2, 8, 8], generator=torch.Generator().manual_seed(i)) for i in range(n)])
        labels = np.eye(3, dtype=np.float32)[[1] * n]
        (images,) = model.run(["images"], {"z": z.numpy(), "class_labels": labels})
        expected = OneStepGenerator(net)(n, class_idx=1).numpy()
        assert (images.dtype, images.shape) == (np.uint8, (n, 1, 16, 16))
        assert np.abs(images.astype(int) - expected).max() <= 1
        assert images.std() > 5


def test_the_distance_from_the_teacher_is_of_images(pipeline, monkeypatch):
    monkeypatch.setattr("sid.teacher_distance.NUM_IMAGES", 4)
    teacher = zoo.load_denoiser(pipeline)
    distance = TeacherDistance(teacher)
    assert distance.samples.shape == (4, 1, 16, 16)
    assert distance(teacher, sampler="one-step", init_sigma=2.5).value >= -1


def test_training_on_latents(encoded, tmp_path):
    """edm.train: pictures are decoded, snapshots name the VAE, a run on other latents isn't resumed."""
    options = ["--arch=ddpmpp", "--cbase=8", "--cres=1", "--blocks=1", "--attn=none", "--dropout=0", "--workers=0"]
    options += [
        "--batch=4",
        "--duration=0.000016",
        "--cond=1",
        f"--outdir={tmp_path}/run",
        "--nosubdir",
        "--device=cpu",
    ]
    run = ["--augment=0", f"--data={encoded}", *options]
    result = CliRunner().invoke(edm_train.main, run)
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    net = zoo.load_network(tmp_path / "run")
    assert net.metadata["vae"] == LatentDataset(encoded).metadata["vae"]
    assert Image.open(next((tmp_path / "run").glob("fakes*.png"))).size[0] % 16 == 0
    shown = np.asarray(Image.open(tmp_path / "run" / "reals.png"))  # the 12 images of the data set, enlarged
    zoom = shown.shape[1] // (8 * 16)
    latent = torch.as_tensor(LatentDataset(encoded)[9][0][:1])
    assert np.array_equal(shown[::zoom, ::zoom][16:32, 16:32], latents.decoder_of(net).to_images(latent)[0, 0].numpy())
    assert generate_all(net, [0], steps=2).shape == (1, 1, 16, 16)
    result = CliRunner().invoke(edm_train.main, [f"--data={encoded}", *options])
    assert "latents can't be augmented; use --augment=0" in result.output
    teacher = zoo.load_network(tmp_path / "run")
    config, given = tiny_config(gan=True, augment=0), {"xflip": False, "cache": False}
    assert len(load_dataset(str(encoded), teacher, config, given)) == 12


def test_sida_learns_from_latents_of_the_teachers_vae(encoded, images, pipeline, tmp_path):
    teacher = zoo.load_denoiser(pipeline)
    given = {"xflip": False, "cache": False}
    for path, gan, words in (
        (images, True, "the teacher makes latents, but these are images; encode them by edm.dataset_tool --vae"),
        (encoded, True, "another VAE, scale or shift"),
        (encoded, False, "only --gan learns from latents"),
    ):
        with pytest.raises(UserError, match=words):
            load_dataset(str(path), teacher, tiny_config(gan=gan, augment=0), given)


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
def test_a_vae_that_does_not_fit(pipeline, tmp_path, change, words):
    folder = broken(change)(pipeline, tmp_path)
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


def test_a_snapshot_without_its_vae(pipeline, tmp_path):
    net = zoo.load_denoiser(broken(lambda folder: None)(pipeline, tmp_path))
    zoo.save_network(net, tmp_path / "net.safetensors", **{**net.metadata, "init_sigma": 2.5})
    shutil.rmtree(tmp_path / "dit" / "vae")
    loaded = zoo.load_denoiser(tmp_path / "net.safetensors")  # as a network it is whole
    with pytest.raises(UserError, match="next to the network's file"):
        generate_all(loaded, [0])
    randomised(toy_vae(), 0.01).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="isn't the VAE that the network was trained with"):
        generate_all(zoo.load_denoiser(tmp_path / "net.safetensors"), [0])


@pytest.mark.parametrize("record", ["text", {}, {"source": "x", "sha256": "0", "channels": 2, "scale": 0, "shift": 0}])
def test_damaged_records(pipeline, tmp_path, record):
    net = zoo.load_denoiser(pipeline)
    zoo.save_network(net, tmp_path / "net.safetensors", vae=record)
    with pytest.raises(UserError, match="VAE"):
        generate_all(zoo.load_denoiser(tmp_path / "net.safetensors"), [0], steps=2)


@pytest.mark.parametrize("damage", ["cut", "text", "header", "labels"])
def test_damaged_files_of_latents(encoded, tmp_path, damage):
    path = tmp_path / "x.safetensors"
    data = encoded.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "text":
        path.write_text("nothing")
    elif damage == "header":
        path.write_bytes(data.replace(b'"F32"', b'"I32"'))
    else:
        path.write_bytes(data[:-8] + b"\xff" * 8)
    with pytest.raises(UserError, match="--data="):
        LatentDataset(path, use_labels=True)


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
def test_a_vae_that_a_file_names_is_fetched_alone_and_said(hub, pipeline, vae, tmp_path, capsys, in_a_pipeline):
    net = zoo.load_denoiser(pipeline)
    repository = tmp_path / "repository"
    shutil.copytree(pipeline if in_a_pipeline else vae, repository)
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


def test_a_pipeline_is_fetched_without_what_is_not_used(hub, pipeline, tmp_path):
    repository = shutil.copytree(pipeline, tmp_path / "repository")
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
    assert zoo.network_hash(net) == zoo.network_hash(zoo.load_denoiser(pipeline))
    assert [name for name in hub["downloads"] if not name.endswith(".json")] == [
        f"vae/{weights}",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_nothing_but_a_vae_is_fetched(hub, pipeline, tmp_path):
    net = zoo.load_denoiser(pipeline)
    hub["someone/model"] = pipeline / "transformer"
    with pytest.raises(UserError, match="a DiTTransformer2DModel, not an AutoencoderKL"):
        named_vae(net, "someone/model")
    hub["someone/text"] = tmp_path
    with pytest.raises(UserError, match=r"has neither config\.json nor vae/config\.json"):
        named_vae(net, "someone/text")
    assert hub["downloads"] == ["config.json"]
    hub["someone/vae"] = pipeline
    with pytest.raises(UserError, match="isn't the VAE that the network was trained with"):
        named_vae(net, "someone/vae", "0" * 64)


def test_a_network_goes_to_the_hub_with_a_vae_of_ones_own_and_names_others(hub, pipeline, tmp_path):
    net = zoo.load_denoiser(pipeline)
    zoo.save_network(net, tmp_path / "net.safetensors", **net.metadata)
    command = ["push", str(tmp_path / "net.safetensors"), "someone/net", "--dry-run", str(tmp_path / "out")]
    result = CliRunner().invoke(zoo_command, command)
    assert result.exit_code == 0, result.output
    assert str(pipeline) not in "".join((tmp_path / "out" / name).read_text() for name in ("README.md", "config.json"))
    hub["someone/net"] = tmp_path / "out"
    again = zoo.load_network("someone/net")
    assert again.metadata["vae"] == {**net.metadata["vae"], "source": "someone/net"}
    assert torch.equal(generate_all(again, range(2), steps=2), generate_all(net, range(2), steps=2))

    hub["someone/vae"] = pipeline / "vae"
    again.metadata["vae"]["source"] = "someone/vae"
    zoo.save_network(again, tmp_path / "named.safetensors", **again.metadata)
    command[1], command[-1] = str(tmp_path / "named.safetensors"), str(tmp_path / "named")
    result = CliRunner().invoke(zoo_command, command)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "named" / "vae").exists()
    hub["someone/named"] = tmp_path / "named"
    assert zoo.load_network("someone/named").metadata["vae"]["source"] == "someone/vae"
