"""edm.zoo: networks and published files by name, path or URL, in both formats."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny import tiny_teacher

from dnnlib import UserError
from dnnlib.download import cache_path
from edm import network_files, zoo
from edm.published import FILES, NETWORK_KINDS
from edm.zoo.__main__ import main as zoo_command
from torch_utils.persistence import persistent_class
from training.networks import EDMPrecond, VPPrecond

SUFFIXES = ("", ".pkl", ".safetensors")  # a folder, EDM's pickle, this project's file
DATA = Path(__file__).parent / "data"
TINY = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1]}
TINY |= {"num_blocks": 1, "attn_resolutions": [], "dropout": 0.13}


@persistent_class
class Linear(torch.nn.Module):
    def __init__(self, width, scale=1.0):
        super().__init__()
        self.scale = scale
        self.weight = torch.nn.Parameter(torch.randn(width, width))


class Foreign(torch.nn.Linear):
    pass


def refused(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in error.value.message
    return error.value.message


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def safetensors_header(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path, header, rest):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    return path


@pytest.mark.parametrize("path", sorted(DATA.glob("edm-format-*.pkl")), ids=lambda path: path.stem)
def test_edm_files_load_and_survive_both_formats(path, tmp_path):
    expected = {name: torch.from_numpy(array) for name, array in np.load(path.with_suffix(".npz")).items()}
    net = zoo.load_network(path)
    assert not net.training
    assert net.metadata == {}
    assert {(p.dtype, p.device.type, p.requires_grad) for p in net.parameters()} == {(torch.float32, "cpu", False)}
    D = net(expected["x"], expected["sigma"], expected.get("class_labels"))
    assert (D - expected["D"]).abs().max() < 1e-5 * expected["D"].abs().max()
    for suffix in (".safetensors", ".pkl"):
        zoo.save_network(net, tmp_path / f"net{suffix}", kind="sid-generator", init_sigma=2.5)
        back = zoo.load_network(str(tmp_path / f"net{suffix}"))
        assert equal(back, net)
        assert (type(back), back.init_args, back.init_kwargs) == (type(net), net.init_args, net.init_kwargs)
        assert back.metadata == {"kind": "sid-generator", "init_sigma": 2.5}
        assert torch.equal(back(expected["x"], expected["sigma"], expected.get("class_labels")), D)


def test_buffers_are_used_as_stored(tmp_path):
    net = VPPrecond(**{**TINY, "channel_mult": [1, 2], "resample_filter": [1, 3, 3, 1]})
    buffers = dict(net.named_buffers())
    assert buffers
    for buffer in buffers.values():
        buffer.mul_(2)
    for suffix in SUFFIXES:
        zoo.save_network(net, tmp_path / f"net{suffix}")
        assert equal(zoo.load_network(tmp_path / f"net{suffix}"), net)


def test_saving_changes_neither_network_nor_file_on_failure(tmp_path, monkeypatch):
    net, path = EDMPrecond(**TINY).train(), tmp_path / "net.safetensors"
    path.write_bytes(b"before")
    for suffix in SUFFIXES:
        zoo.save_network(net, tmp_path / f"other{suffix}")
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    monkeypatch.setattr(network_files, "_tensors_bytes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        zoo.save_network(net, path)
    with pytest.raises(ZeroDivisionError):
        zoo.save_network(net, tmp_path / "folder")
    assert path.read_bytes() == b"before"
    assert ".pt" in refused(zoo.save_network, net, tmp_path / "net.pt")
    assert "absent" in refused(zoo.save_network, net, tmp_path / "absent" / "net.pkl")
    assert "persistent_class" in refused(zoo.save_network, Foreign(1, 1), tmp_path / "net.pkl")
    assert {file.name for file in tmp_path.iterdir()} == {"net.safetensors", "other.safetensors", "other.pkl", "other"}


def test_equal_networks_make_equal_files(tmp_path):
    net = EDMPrecond(**TINY)
    for suffix in SUFFIXES:
        files = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for file in files:
            zoo.save_network(net, file, init_sigma=2.5, kind="sid-generator")
        hashes = {zoo.network_hash(zoo.load_network(file)) for file in files}
        assert hashes == {zoo.network_hash(net)}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_classes_of_others(tmp_path):
    net = Linear(3, scale=2.0)
    for suffix in SUFFIXES:
        path = tmp_path / f"net{suffix}"
        zoo.save_network(net, path)
        assert "Linear" in refused(zoo.load_network, path)
        back = zoo.load_network(path, classes={"Linear": Linear})
        assert equal(back, net)
        assert back.scale == 2.0


def test_classes_that_record_no_arguments(tmp_path):
    net, path = Foreign(2, 3), tmp_path / "net.safetensors"
    zoo.save_network(net, path, init_sigma=2.5)
    assert "Foreign" in refused(zoo.load_network, path)
    assert "refuses" in refused(zoo.load_network, path, classes={"Foreign": Foreign})
    assert "don't fit" in refused(zoo.load_network, path, classes={"Foreign": lambda: Foreign(3, 3)})
    back = zoo.load_network(path, classes={"Foreign": lambda: Foreign(2, 3)})
    assert equal(back, net)
    assert back.metadata == {"init_sigma": 2.5}


def test_clones():
    net = EDMPrecond(8, 1, **{key: value for key, value in TINY.items() if not key.startswith("img")}).eval()
    net.requires_grad_(False)
    net.metadata = {"kind": "teacher"}
    rng = torch.get_rng_state()
    clone = zoo.clone_network(net, dropout=0.5, use_fp16=True, label_dim=0)
    assert torch.equal(rng, torch.get_rng_state())
    assert clone.init_kwargs == {**TINY, "dropout": 0.5, "use_fp16": True, "label_dim": 0}
    assert clone.use_fp16
    assert not clone.training
    assert not any(parameter.requires_grad for parameter in clone.parameters())
    for copied in (clone, zoo.clone_network(net)):
        assert equal(copied, net)
        assert copied.metadata == net.metadata
        with torch.no_grad():
            next(copied.parameters()).add_(1)
        assert not equal(copied, net)
    assert "img_channels=3" in refused(zoo.clone_network, net, img_channels=3)
    assert "colour" in refused(zoo.clone_network, net, colour=3)
    foreign = Foreign(2, 2)
    assert equal(zoo.clone_network(foreign), foreign)
    assert "dropout" in refused(zoo.clone_network, foreign, dropout=0.1)


def test_hash_sees_names_shapes_types_and_values():
    net = Linear(2)
    expected = hashlib.sha256(b"weight torch.float32 [2, 2]\n" + net.weight.detach().numpy().tobytes()).hexdigest()
    assert zoo.network_hash(net) == expected
    changed = Linear(2)
    assert zoo.network_hash(changed) != expected
    assert zoo.network_hash(net.bfloat16()) != expected


def test_damaged_safetensors_are_refused(tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    zoo.save_network(Linear(2), good)
    header, rest = safetensors_header(good)
    network = json.loads(header["__metadata__"]["network"])

    def changed(**changes):
        metadata = {"network": json.dumps({**network, **changes})}
        return with_header(bad, {**header, "__metadata__": metadata}, rest)

    classes = {"Linear": Linear}
    assert zoo.load_network(changed(), classes).init_args == (2,)
    cases = {
        "none of": {"class_name": "os.system"},
        "far more": {"init_args": [1 << 20]},
        "plain": {"init_kwargs": {"scale": [[[[[[1]]]]]]}},
        "don't fit": {"init_args": [3]},
        "refuses": {"init_args": []},
        "metadata": {"metadata": 3},
    }
    for message, changes in cases.items():
        assert message in refused(zoo.load_network, changed(**changes), classes)
    assert "how to build" in refused(zoo.load_network, with_header(bad, {**header, "__metadata__": {}}, rest), classes)
    for data in (b"", b"\xff" * 16, good.read_bytes()[:-1], good.read_bytes()[:20], (1 << 30).to_bytes(8, "little")):
        bad.write_bytes(data)
        assert str(bad) in refused(zoo.load_network, bad, classes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("dropout", value) for value in (5, "x", None, [0.1])),
        *(("label_dropout", value) for value in (-1, float("nan"))),
        *(("M", value) for value in ("x", float("inf"))),
        ("beta_min", True),
    ],
)
def test_constructor_arguments_that_are_no_numbers_are_refused(tmp_path, name, value):
    """They would first be used when the network is called."""
    path = tmp_path / "net.safetensors"
    zoo.save_network(VPPrecond(**TINY), path)
    header, rest = safetensors_header(path)
    network = json.loads(header["__metadata__"]["network"])
    del network["sha256"]  # as files of others have none
    for good in (True, False):
        network["init_kwargs"] |= {"dropout": 1, "M": 10.0, "beta_min": 1} if good else {name: value}
        with_header(path, {**header, "__metadata__": {"network": json.dumps(network)}}, rest)
        if good:
            zoo.load_network(path)
    assert f"{path}: its {name}=" in refused(zoo.load_network, path)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.complex64, torch.float16, torch.float64])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    """Loading would round them, or drop the imaginary part, in silence."""
    net, path = Linear(2), tmp_path / "net.safetensors"
    header = {"network": json.dumps(network_files._header(net, {}))}
    save_file({"weight": net.weight.detach().to(dtype)}, path, header)
    if dtype.is_floating_point:
        assert zoo.load_network(path, {"Linear": Linear}).weight.dtype == torch.float32
    else:
        expected = f"its weight holds {str(dtype).removeprefix('torch.')}, not floating-point numbers"
        assert expected in refused(zoo.load_network, path, {"Linear": Linear})


def test_sources_that_name_nothing(tmp_path):
    assert "edm-cifar10-32x32-uncond-vp" in refused(zoo.load_network, "edm-cifar10-32x32-uncond")
    assert "no published reference" in refused(zoo.resolve, tmp_path / "absent.npz", "reference")
    assert "published reference" in refused(zoo.load_network, "cifar10-32x32")
    (tmp_path / "state.pt").touch()
    assert "not weights alone, or damaged" in refused(zoo.load_network, tmp_path / "state.pt")
    (tmp_path / "loss.pkl").write_bytes(b"\x80\x04}.")
    assert "ema" in refused(zoo.load_network, tmp_path / "loss.pkl")


def test_published_names(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    known = json.loads((DATA / "published_networks.json").read_text())
    teachers = {name for name, file in FILES.items() if file.kind == "teacher"}
    assert set(known) == {name for name in teachers if not name.startswith("edm2-")}  # test_edm2.py has the others
    assert len({file.url for file in FILES.values()}) == len(FILES)
    for name, file in FILES.items():
        assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
        path = cache_path(file.url)
        if file.sha256 is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())  # put there by hand
            assert zoo.resolve(name, "network" if file.kind in NETWORK_KINDS else file.kind) == path
            assert zoo.resolve(file.url) == path


def test_what_is_published_about_a_generator_travels_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    path = cache_path(FILES["sid-ffhq64"].url)
    path.parent.mkdir(parents=True)
    path.write_bytes((DATA / "edm-format-edm-ddpmpp.pkl").read_bytes())
    for source in ("sid-ffhq64", FILES["sid-ffhq64"].url, path):
        metadata = zoo.load_network(source).metadata
        assert (metadata["kind"], metadata["init_sigma"], metadata["name"]) == ("sid-generator", 2.5, "sid-ffhq64")
    path = cache_path(FILES["sid-cifar10-cond"].url)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"tampered with")
    assert FILES["sid-cifar10-cond"].sha256 in refused(zoo.load_network, "sid-cifar10-cond")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def invoke(*arguments, code=0):
    done = CliRunner().invoke(zoo_command, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("path", sorted(DATA.glob("edm-format-*.pkl")), ids=lambda path: path.stem)
def test_conversions_in_a_circle_are_exact(path, tmp_path):
    source_net = zoo.load_network(path)
    zoo.save_network(source_net, tmp_path / "0.pkl", kind="sid-generator", init_sigma=2.5)
    expected = zoo.network_hash(source_net)
    for source, destination in (
        ("0.pkl", "1"),
        ("1", "2.safetensors"),
        ("2.safetensors", "3"),
        ("3", "4.pkl"),
        ("4.pkl", "5.safetensors"),
    ):
        assert expected in invoke("convert", tmp_path / source, tmp_path / destination)
    first, last = (zoo.load_network(tmp_path / name) for name in ("0.pkl", "4.pkl"))
    for name in ("init_args", "init_kwargs", "metadata"):
        assert getattr(first, name) == getattr(last, name)
    assert (tmp_path / "2.safetensors").read_bytes() == (tmp_path / "5.safetensors").read_bytes()
    for name in ("config.json", "network.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    net = zoo.load_network(tmp_path / "1")
    assert net.init_kwargs.items() <= config.items()
    assert config["_class_name"] == type(net).__name__
    for taken in ("1", "2.safetensors", "4.pkl"):
        before = contents(tmp_path)
        said = invoke("convert", path, tmp_path / taken, code=2)
        assert said.endswith(f"{taken} exists already; remove it or choose another name\n")
        assert contents(tmp_path) == before


def test_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "net"
    zoo.save_network(Linear(2), folder)
    classes, config = {"Linear": Linear}, json.loads((folder / "config.json").read_text())
    assert equal(zoo.load_network(folder, classes), zoo.load_network(folder, classes))
    cases = {"how to build": [], "none of": {**config, "_class_name": "os.system"}, "refuses": {**config, "depth": 3}}
    cases |= {"metadata": {**config, "_metadata": 3}, "plain": {**config, "_init_args": {}}}
    for message, content in cases.items():
        (folder / "config.json").write_text(json.dumps(content))
        assert message in refused(zoo.load_network, folder, classes)
    (folder / "config.json").write_text("{")
    assert "config.json" in refused(zoo.load_network, folder, classes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "network.safetensors").unlink()
    assert "network.safetensors" in refused(zoo.load_network, folder, classes)


def test_folders_with_the_former_name_of_the_weights_are_read(tmp_path):
    zoo.save_network(Linear(2), tmp_path / "net")
    (tmp_path / "net" / "network.safetensors").rename(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    assert zoo.load_network(tmp_path / "net", {"Linear": Linear}).metadata == {}


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    listed = invoke("list")
    for name, file in FILES.items():
        assert name in listed
        assert file.url in listed
        assert file.licence in listed
    assert "FID 1.923 (1)" in listed
    assert "223 MB" in listed
    invoke("fetch", "unknown", code=2)


def test_metadata_of_any_name_are_converted(tmp_path):
    network = EDMPrecond(8, 3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    zoo.save_network(network, tmp_path / "net.safetensors", path="x", net="y")
    invoke("convert", str(tmp_path / "net.safetensors"), str(tmp_path / "again.safetensors"))
    assert zoo.load_network(tmp_path / "again.safetensors").metadata == {"path": "x", "net": "y"}


def test_mirror_and_verify(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DNNLIB_MIRROR", "")  # --mirror changes it: put back afterwards
    names = ["cifar10-32x32", "sid-cifar10-cond"]  # without and with a published hash
    for name in names:
        path = cache_path(FILES[name].url, tmp_path / "mirror")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"statistics")
    fetched = cache_path(FILES[names[0]].url)
    assert str(fetched) in invoke("fetch", names[0], f"--mirror={tmp_path / 'mirror'}")
    assert "as published" in invoke("fetch", names[1], f"--mirror={tmp_path / 'mirror'}", code=2)  # another file there
    assert invoke("verify").startswith(f"{names[0]}: as first seen, sha256 ")
    assert "not downloaded" in invoke("verify", *names, code=2)
    fetched.write_bytes(b"STATISTICS")
    assert "WRONG" in invoke("verify", code=2)
    assert "no published file" in invoke("verify", "unknown", code=2)


# --- a run folder stands for a network


@pytest.fixture
def run(tmp_path):
    """A run folder with three snapshots, the newest in EDM's format."""
    folder = tmp_path / "run"
    folder.mkdir()
    for number, suffix in ((1, "safetensors"), (20, "safetensors"), (100, "pkl")):
        torch.manual_seed(number)
        zoo.save_network(tiny_teacher(), folder / f"network-snapshot-{number:06d}.{suffix}", kimg=number)
    return folder


def test_a_run_folder_stands_for_its_newest_snapshot(run, capsys):
    for source in (run, f"{run}/"):
        assert zoo.load_network(source).metadata["kimg"] == 100
        assert capsys.readouterr().err == f"{source}: takes its newest snapshot, network-snapshot-000100.pkl\n".replace(
            "/:", ":"
        )


@pytest.mark.parametrize("links", [True, False])
def test_a_run_folder_stands_for_its_best_snapshot(run, capsys, links):
    best = run / "network-snapshot-000020.safetensors"
    if links:
        (run / "best.safetensors").symlink_to(best.name)
    else:
        shutil.copy(best, run / "best.safetensors")
    assert zoo.load_network(run).metadata["kimg"] == 20
    told = best.name if links else "best.safetensors"
    assert capsys.readouterr().err == f"{run}: takes its best snapshot, {told}\n"
    best.unlink()
    (run / "best.safetensors").unlink()
    (run / "best.safetensors").symlink_to(best.name)  # to nothing
    assert zoo.load_network(run).metadata["kimg"] == 100


def test_a_folder_without_a_network(tmp_path):
    with pytest.raises(UserError, match=r"no network-snapshot-\* in it; name a network's file or a run folder"):
        zoo.load_network(tmp_path)
