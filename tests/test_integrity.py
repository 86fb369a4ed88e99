"""Damage to any kind of file that this project writes is found by loading it and by `edm.zoo verify`."""

import json
import random

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_teacher
from torch.nn.parallel import DataParallel

from dnnlib import UserError
from edm import zoo
from edm.metrics.detector import load_detector, save_detector
from edm.metrics.reference import load_reference, save_reference
from edm.metrics.small_classifier import SmallClassifier
from edm.metrics.statistics import FeatureStatistics
from edm.zoo.__main__ import main as zoo_command
from torch_utils import checkpoint, persistence

ARGUMENTS = {"img_resolution": 8, "img_channels": 1, "num_classes": 3, "width": 4}


@persistence.persistent_class
class Toy(torch.nn.Module):
    """A network so small that half of its file is header."""

    def __init__(self, width=2, scale=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(3.0 * width).reshape(width, 3))
        self.register_buffer("counts", torch.arange(4))
        self.scale = scale


def network(path):
    net = zoo.load_network(path, {"Toy": Toy})
    return zoo.network_hash(net), net.init_args, net.init_kwargs, net.scale, net.metadata


def detector(path):
    found = load_detector(path)
    images = torch.arange(2 * 64, dtype=torch.uint8).reshape(2, 1, 8, 8)
    return found.metadata, *(answer.tolist() for answer in found.measure(images, probabilities=True))


def reference(path):
    found = load_reference(path)
    return found.mu.tolist(), found.sigma.tolist(), found.record


def state(path):
    return checkpoint.checksum(checkpoint.load_state(path))


def write_network(path):
    zoo.save_network(Toy(3, scale=0.5), path, kind="sid-generator", init_sigma=2.5, kimg=35.0)


def write_detector(path):
    torch.manual_seed(0)
    save_detector(SmallClassifier(**ARGUMENTS), path, ARGUMENTS, test_accuracy=0.5)


def write_reference(path):
    write_detector(path.with_name("detector.safetensors"))
    statistics = FeatureStatistics(3)
    statistics.append(torch.randn(10, 3, generator=torch.Generator().manual_seed(0)))
    save_reference(path, statistics, load_detector(path.with_name("detector.safetensors")), "tens", 1, 8)


def write_state(path):
    counters = {"nimg": 8, "tick": 0, "elapsed_sec": 0.5, "at_snapshot": False}
    checkpoint.save_state(path, {**counters, "net": {"weight": torch.arange(50.0)}})


KINDS = {
    "network.safetensors": (write_network, network),
    "network.pkl": (write_network, network),
    "network/config.json": (write_network, network),
    "network/network.safetensors": (write_network, network),
    "detector-a.safetensors": (write_detector, detector),
    "reference.npz": (write_reference, reference),
    "training-state-000000.008.pt": (write_state, state),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_flipped_bit_is_refused_or_harmless(tmp_path, name):
    write, read = KINDS[name]
    path = tmp_path / name
    whole = path.parent if path.parent != tmp_path else path  # of a folder each file is damaged in turn
    write(whole)
    content, good = path.read_bytes(), read(whole)
    rng, refused = random.Random(0), 0
    places = sorted(rng.sample(range(len(content)), min(len(content), 250)))
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.unlink()  # some file systems wait for the disk when a file is overwritten
        path.write_bytes(damaged)
        try:
            found = read(whole)
        except UserError as error:
            refused += 1
            found = good if "\n" not in error.message else error.message
        assert found == good, place
    assert refused > len(places) / 4  # a state's zip is padded
    for length in (0, 1, len(content) // 2, len(content) - 2):  # a text may end in a line break
        path.write_bytes(content[:length])
        with pytest.raises(UserError):
            read(whole)
    path.write_bytes(content)
    assert read(whole) == good


def test_most_flips_of_weights_were_finite_numbers_before(tmp_path):
    """Only a checksum finds them: the weight has the same name and shape and a plausible value."""
    path = tmp_path / "net.safetensors"
    write_network(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the largest byte of the last integer or float
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged, its contents don't have their checksum: fetch it again"):
        network(path)


def test_files_without_a_checksum_still_load(tmp_path):
    write_network(tmp_path / "net.pkl")
    content = (tmp_path / "net.pkl").read_bytes()
    (tmp_path / "old.pkl").write_bytes(content[: content.rindex(b"sha256 of the pickle")])
    assert network(tmp_path / "old.pkl") == network(tmp_path / "net.pkl")

    write_network(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert len(config.pop("_sha256")) == 64
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    assert network(tmp_path / "folder") == network(tmp_path / "net.pkl")

    write_reference(tmp_path / "reference.npz")
    arrays = dict(np.load(tmp_path / "reference.npz"))
    np.savez(tmp_path / "edm.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    assert reference(tmp_path / "edm.npz")[:2] == reference(tmp_path / "reference.npz")[:2]


def verify(*arguments, code=0):
    done = CliRunner().invoke(zoo_command, ["verify", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return dict(line.split(": ", 1) for line in done.output.splitlines() if ": " in line)


@pytest.fixture
def run(tmp_path):
    """A folder with all that a distillation leaves."""
    folder = tmp_path / "00000-run"
    folder.mkdir()
    zoo.save_network(tiny_teacher(), folder / "network-snapshot-000001.safetensors", kind="sid-generator")
    (folder / "best.safetensors").symlink_to("network-snapshot-000001.safetensors")
    zoo.save_network(tiny_teacher(), folder / "export.pkl")
    write_network(folder / "other.safetensors")
    write_state(folder / "training-state-000000.008.pt")
    write_reference(folder / "reference.npz")
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
        folder / "fakes.png"
    )
    record = {"kimg": 1.0, "metric": "fid1k", "value": 3.5, "values": {"fid": 3.5}}
    (folder / "metric-fid1k.jsonl").write_text(json.dumps(record) + "\n")
    best = {"snapshot": "network-snapshot-000001.safetensors", "kimg": 1.0, "metric": "fid1k", "value": 3.5}
    (folder / "best.json").write_text(json.dumps(best))
    (folder / "training_options.json").write_text("{}")
    (folder / "stats.jsonl").write_text('{"nimg": 8}\n')
    (folder / "log.txt").write_text("text")
    (folder / ".lock").touch()
    return folder


def test_a_whole_run(run):
    found = verify(run)
    assert {path.removeprefix(f"{run}/") for path in found} == {
        file.name for file in run.iterdir() if file.name != ".lock"
    }
    verified = {path.removeprefix(f"{run}/") for path, text in found.items() if text == "as it was written"}
    assert verified == {
        *("network-snapshot-000001.safetensors", "best.safetensors", "export.pkl", "detector.safetensors"),
        *("training-state-000000.008.pt", "reference.npz", "fakes.png"),
    }
    assert "'Toy', which isn't known here" in found[f"{run}/other.safetensors"]
    assert "no checksum" in found[f"{run}/best.json"]
    assert "not checked" in found[f"{run}/log.txt"]
    assert verify(run / "export.pkl", run / "fakes.png").keys() == {f"{run}/export.pkl", f"{run}/fakes.png"}
    assert "Error" in verify(run / "absent.pkl", code=2)


DAMAGED = ["network-snapshot-000001.safetensors", "export.pkl", "other.safetensors", "detector.safetensors"]
DAMAGED += ["training-state-000000.008.pt", "reference.npz", "fakes.png"]


@pytest.mark.parametrize("name", DAMAGED)
def test_one_damaged_file_of_a_run(run, name):
    content = bytearray((run / name).read_bytes())
    content[len(content) // 2] ^= 64
    (run / name).write_bytes(content)
    found = verify(run, code=2)
    damaged = {path.removeprefix(f"{run}/") for path, text in found.items() if text.startswith("DAMAGED")}
    linked = {"best.safetensors"} if name == DAMAGED[0] else set()
    assert damaged == {name, *linked}
    assert len(found) == 14  # one line for each file, and the count at the end


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("best.json", '{"snapshot": "absent.safetensors"}', "isn't there"),
        ("best.json", "{", "no JSON"),
        ("stats.jsonl", "null\n", "no record"),
        ("metric-fid1k.jsonl", '{"kimg": 1.0, "value": 3.0, "values": {"fid": 3.5}}\n', "no record of a metric"),
        ("metric-fid1k.jsonl", '{"kimg": 1.0, "value": 3.0, "values": {"fid": 3.0}}\n', "no record of its kimg"),
        ("network-snapshot-000001.safetensors", None, "links to"),
    ],
)
def test_records_that_do_not_fit(run, name, content, reason):
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    assert any(text.startswith("DAMAGED") and reason in text for text in verify(run, code=2).values())


# --- names of weights that others have changed


def saved_with(tmp_path, rename):
    """A network's file in which every tensor has another name."""
    from safetensors.torch import save_file

    net = tiny_teacher()
    path = tmp_path / "foreign.safetensors"
    header = {"class_name": "EDMPrecond", "init_args": list(net.init_args), "init_kwargs": net.init_kwargs}
    tensors = {new: tensor.clone() for name, tensor in net.state_dict().items() for new in rename(name)}
    save_file(tensors, path, {"network": json.dumps({**header, "metadata": {}})})
    return path


@pytest.mark.parametrize(
    ("rename", "names"),
    [
        (lambda name: [f"module.{name}"], ["'module.'", "DataParallel", "removeprefix('module.')"]),
        (lambda name: [f"_orig_mod.{name}"], ["'_orig_mod.'", "torch.compile", "removeprefix('_orig_mod.')"]),
        (lambda name: [f"module._orig_mod.{name}"], ["'module._orig_mod.'", "removeprefix('module._orig_mod.')"]),
        (lambda name: [f"state_dict.net.{name}"], ["'state_dict.net.'"]),
        (lambda name: [f"ema.{name}", f"model.{name}"], ["'ema.'", "'model.'"]),
        (lambda name: [name.replace("model.", "model._orig_mod.", 1)], ["'_orig_mod.'", "replace('_orig_mod.', '')"]),
        (lambda name: [name.removeprefix("model.")], ["lack 'model.'"]),
    ],
)
def test_a_prefix_is_named_with_its_cure(tmp_path, rename, names):
    with pytest.raises(UserError) as error:
        zoo.load_network(saved_with(tmp_path, rename))
    assert all(name in error.value.message for name in names), error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) < 400 + len(str(tmp_path))


def test_real_wrappers(tmp_path):
    """The names that PyTorch itself gives."""
    from safetensors.torch import save_file

    path = tmp_path / "wrapped.safetensors"
    for wrapper, prefix in ((DataParallel, "module."), (torch.compile, "_orig_mod.")):
        save_file(wrapper(tiny_teacher()).state_dict(), path)  # no header either
        with pytest.raises(UserError, match=f"save it by save_network; .*'{prefix}'.*removeprefix"):
            zoo.load_network(path)
    tensors = {name: tensor.clone() for name, tensor in tiny_teacher().state_dict().items()}
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"save it by save_network$"):
        zoo.load_network(path)


def test_other_shapes_are_still_named(tmp_path):
    path = saved_with(tmp_path, lambda name: [name])
    zoo.load_network(path)
    with pytest.raises(UserError, match="size mismatch"):
        zoo.clone_network(zoo.load_network(path), model_channels=16)
