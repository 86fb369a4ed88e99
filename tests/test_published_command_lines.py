"""Command lines for the published SiD code work unchanged: its options and its names of the teachers."""

import json
import os

import pytest
import torch
from click.testing import CliRunner

import sid_train
from dnnlib import UserError
from dnnlib.download import cache_path
from edm import published, zoo
from edm.zoo.__main__ import main as zoo_command
from training.networks import EDMPrecond

TEACHERS = {  # SiD's name: (EDM's name, reference statistics)
    "cifar10-uncond": ("edm-cifar10-32x32-uncond-vp", "cifar10-32x32"),
    "cifar10-cond": ("edm-cifar10-32x32-cond-vp", "cifar10-32x32"),
    "imagenet64-cond": ("edm-imagenet-64x64-cond-adm", "imagenet-64x64"),
    "ffhq64": ("edm-ffhq-64x64-uncond-vp", "ffhq-64x64"),
    "afhq64-v2": ("edm-afhqv2-64x64-uncond-vp", "afhqv2-64x64"),
}
EVERY_OPTION = (  # that the published code has; each with the value of a published recipe, or its default
    "--outdir runs --data datasets/cifar10-32x32.zip"
    " --data_stat https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz"
    " --cond 1 --arch ddpmpp --precond edm --duration 800 --batch 256 --batch-gpu 16 --cbase 8 --cres 2,2,2 --ema 0.5"
    " --dropout 0.13 --augment 0.12 --xflip False --bench True --cache True --workers 1 --desc cifar10 --nosubdir"
    " --tick 10 --snap 50 --dump 500 --seed 0 --metrics fid50k_full,is50k,kid50k_full,pr50k3_full"
    " --edm_model cifar10-cond --init_sigma 2.5 --fp16 0 --ls 1 --lsg 100 --alpha 1.2 --tmax 800"
    " --lr 0.00001 --glr 0.00001 --g_beta1 0 --dry-run"
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A small network of cifar10-cond's kind in the cache, where a download would put the published one."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DNNLIB_MIRROR", str(tmp_path / "nothing"))  # nothing is fetched
    torch.manual_seed(0)
    net = EDMPrecond(
        32,
        3,
        10,
        model_type="SongUNet",
        model_channels=8,
        channel_mult=[2, 2, 2],
        num_blocks=1,
        attn_resolutions=[],
        augment_dim=9,
    )
    path = cache_path(published.FILES["edm-cifar10-32x32-cond-vp"].url)
    path.parent.mkdir(parents=True)
    zoo.save_network(net, path)
    monkeypatch.chdir(tmp_path)
    return path


def test_every_option_is_taken(stand_in):
    result = CliRunner().invoke(sid_train.main, [*EVERY_OPTION.split(), "--dry-run=json"])
    assert result.exit_code == 0, result.output
    options = json.loads(result.output)
    assert options["edm_model"] == "cifar10-cond"
    assert (options["alpha"], options["batch"], options["batch_gpu"], options["total_kimg"]) == (1.2, 256, 16, 800_000)
    assert (options["lr"], options["glr"], options["dropout"], options["augment"]) == (1e-5, 1e-5, 0.13, 0.12)
    assert options["metrics"] == ["fid50k_full", "is50k", "kid50k_full", "pr50k3_full"]
    assert options["memory_GB"]["peak"] > 0  # the stand-in was loaded and held against the options
    assert not os.path.exists("runs")


@pytest.mark.parametrize("more", [["--transfer", "cifar10-cond"], ["-n"], ["--metrics", "none"]], ids=" ".join)
def test_other_spellings(stand_in, more):
    result = CliRunner().invoke(sid_train.main, ["--edm_model=cifar10-cond", "--batch=2", *more, "-n"])
    assert result.exit_code == 0, result.output


def test_the_reference_is_chosen(stand_in):
    result = CliRunner().invoke(sid_train.main, ["--edm_model=cifar10-cond", "--batch=2", "--dry-run=json"])
    options = json.loads(result.output)
    assert (options["data_stat"], options["metrics"]) == ("cifar10-32x32", ["fid50k_full"])


@pytest.mark.parametrize("name", TEACHERS)
def test_names_of_the_teachers(name, monkeypatch):
    full, reference = TEACHERS[name]
    assert zoo.published(name) is zoo.published(full) is published.FILES[full]
    assert published.reference_of(zoo.published(name)) == reference
    asked = []
    monkeypatch.setattr(zoo, "local_path", lambda url, sha256: asked.append((url, sha256)) or __file__)
    assert zoo.resolve(name) == zoo.resolve(full)
    assert asked[0] == asked[1] == (published.FILES[full].url, published.FILES[full].sha256)


def test_generators_have_no_reference():
    assert published.reference_of(published.FILES["sid-ffhq64"]) is None


def test_loaded_by_its_name(stand_in):
    net = zoo.load_network("cifar10-cond")
    assert net.metadata["name"] == "edm-cifar10-32x32-cond-vp"
    assert zoo.is_here("cifar10-cond")
    assert not zoo.is_here("ffhq64")


def test_zoo_commands(stand_in):
    listed = CliRunner().invoke(zoo_command, ["list"]).output
    assert all(f"also {name}\n" in listed for name in TEACHERS)
    assert CliRunner().invoke(zoo_command, ["fetch", "cifar10-cond"]).output.strip() == str(stand_in)
    assert "cifar10-cond: " in CliRunner().invoke(zoo_command, ["verify", "cifar10-cond"]).output
    with pytest.raises(UserError, match="cifar10-cond is a published teacher, but a reference"):
        zoo.resolve("cifar10-cond", "reference")
    with pytest.raises(UserError, match="published: cifar10-cond"):
        zoo.resolve("cifar10-con")


@pytest.mark.parametrize("what", ["file", "folder", "run"])
def test_a_network_here_of_the_same_name_is_not_passed_over(stand_in, tmp_path, what):
    net = zoo.load_network("cifar10-cond")
    if what == "file":
        (tmp_path / "cifar10-cond").write_bytes(stand_in.read_bytes())
    elif what == "folder":
        zoo.save_network(net, tmp_path / "cifar10-cond")
    else:
        (tmp_path / "cifar10-cond").mkdir()
        zoo.save_network(net, tmp_path / "cifar10-cond" / "network-snapshot-000001.safetensors")
    with pytest.raises(UserError, match=r"write \./cifar10-cond"):
        zoo.load_network("cifar10-cond")
    if what == "folder":
        assert type(zoo.load_network("./cifar10-cond")) is EDMPrecond


def test_a_folder_of_images_of_the_same_name_is_no_network(stand_in, tmp_path):
    (tmp_path / "cifar10-cond").mkdir()
    assert type(zoo.load_network("cifar10-cond")) is EDMPrecond
