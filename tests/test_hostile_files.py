"""Nothing that a file contains is executed, and no claim in it is believed: hostile and damaged files of every kind."""

import ast
import contextlib
import gzip
import json
import os
import pickle
import random
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import forked
import hostile
import numpy as np
import pytest
import torch

from dnnlib import UserError
from edm import zoo
from edm.metrics import npz
from edm.metrics.detector import load_detector, save_detector
from edm.metrics.reference import load_reference
from edm.metrics.small_classifier import SmallClassifier
from torch_utils import checkpoint
from torch_utils.untrusted import inert_pickle
from training import dataset

ROOT = Path(__file__).resolve().parents[1]
# Damaged files of each kind; tests/fuzz/run.py tries as many as one likes.
KINDS = {"pickle": 2_000, "safetensors": 500, "zip": 300, "labels": 200, "reference": 150, "images": 200}
KINDS |= {"image": 500, "idx": 150, "cifar10": 150, "detector": 60, "state": 60}
KINDS |= {"header": 500, "array": 300, "batch": 300, "state's pickle": 150}


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return hostile.readers(tmp_path_factory.mktemp("readers"))


def refused(load, path):
    with pytest.raises(UserError) as error:
        load(path)
    assert "\n" not in error.value.message
    return error.value.message


# --- pickles


def test_nothing_in_a_pickle_runs(tmp_path):
    mark, path, before = tmp_path / "mark", tmp_path / "x.pkl", set(sys.modules)
    for what, data in {**hostile.running(mark), **hostile.malformed()}.items():
        path.write_bytes(data)
        assert str(path) in refused(hostile.load_pickle, path), what
        assert not mark.exists(), what
        assert not {"this", "antigravity"} & (set(sys.modules) - before), what


def test_a_pickle_of_endless_operations_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(inert_pickle, "MAX_OPERATIONS", 10_000)
    path = tmp_path / "x.pkl"
    path.write_bytes(hostile.raw(b"]" + b"]0" * 10_000))
    assert str(path) in refused(hostile.load_pickle, path)


def test_they_would_run_elsewhere(tmp_path):
    """Most of these files work when pickle opens them, so the tests above can fail."""
    mark, ran = tmp_path / "mark", set()
    files = hostile.running(mark)
    for what, data in files.items():
        if any(word in what for word in ("hub", "import", "numpy", "torch.load")):
            continue
        with contextlib.suppress(BaseException):  # some raise after they ran
            pickle.loads(data)
        if mark.exists():
            ran.add(what)
            mark.unlink()
    assert len(ran) > len(files) / 2


def test_the_source_in_a_snapshot_is_not_executed(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(hostile.small_snapshot())  # its module_src ends the process
    net, _ = hostile.load_pickle(path)
    assert net.init_args == (2,)


LIMITED = """
import json, resource, sys
from pathlib import Path
import hostile
path = Path(sys.argv[1])
hostile.readers(path.parent)["pickle"].load(path.parent / "toy.pkl")
start, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
for what, data in hostile.heavy().items():
    message = hostile.outcome(hostile.Reader(".pkl", [], hostile.load_pickle), path, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found[what] = (bool(message) and "\\n" not in message, (peak - start) // 1024)
    start = peak
print(json.dumps(found))
"""


def test_heavy_pickles_are_refused_in_little_memory(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LIMITED)
    found = json.loads(forked.run([script, tmp_path / "x.pkl"], tmp_path).splitlines()[-1])
    assert found.keys() == hostile.heavy().keys()
    assert not [what for what, (is_refused, _) in found.items() if not is_refused]
    assert max(megabytes for _, megabytes in found.values()) < 200, found


# --- damage


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(readers, tmp_path, kind):
    reader, rng, refusals = readers[kind], random.Random(0), 0
    path = tmp_path / f"x{reader.suffix}"
    if kind == "labels":
        path = tmp_path / "dataset.json"
        hostile.write_images(tmp_path)
    good = reader.good[:1] if kind in ("pickle", "safetensors") else reader.good  # the small ones
    for data in good:
        assert hostile.outcome(reader, path, data) == ""
    for _ in range(KINDS[kind]):
        refusals += hostile.outcome(reader, path, hostile.mutate(rng, rng.choice(good), rng.choice(good))) != ""
    assert refusals > KINDS[kind] / 10


# --- claims and bombs of the other formats


def header_of(path, **changes):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = {**json.loads(data[8 : 8 + length]), **changes}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_headers_of_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    deep = "[" * 100_000
    for network in (
        deep,
        '{"class_name": "Toy", "init_args": ' + "9" * 5000 + "}",
        json.dumps({"class_name": "Toy", "init_args": [1 << 40], "metadata": {}}),
        json.dumps({"class_name": "Toy", "metadata": {"init_sigma": "2.5"}}),
        json.dumps({"class_name": "Toy", "metadata": {"init_sigma": -1}}),
    ):
        zoo.save_network(hostile.Toy(), path)
        header_of(path, __metadata__={"network": network})
        refused(hostile.load_pickle, path)
    for size in (1 << 62, 1 << 24, 1 << 40):
        path.write_bytes(size.to_bytes(8, "little") + b"{}")
        refused(hostile.load_pickle, path)


def test_headers_of_detectors(tmp_path):
    path, good = tmp_path / "x.safetensors", {"img_resolution": 8, "img_channels": 1, "num_classes": 2, "width": 4}
    for change in ({"width": 1 << 20}, {"num_classes": 1 << 40}, {"img_resolution": 1 << 20}, {"img_resolution": "8"}):
        save_detector(SmallClassifier(**good), path, good)
        header = {"class_name": "SmallClassifier", "init_kwargs": json.dumps({**good, **change})}
        header_of(path, __metadata__=header)
        assert "--detector" in refused(load_detector, path)
    for wrong in ("[" * 100_000, "[1]", '{"width": {"a": [[[[1]]]]}}'):
        header_of(path, __metadata__={"class_name": "SmallClassifier", "init_kwargs": wrong})
        assert "--detector" in refused(load_detector, path)


@pytest.mark.parametrize("change", [{"img_resolution": 1 << 20}, {"sigma_max": "80"}, {"sigma_data": float("nan")}])
def test_networks_that_would_not_work(tmp_path, change):
    kwargs = {
        "img_resolution": 8,
        "img_channels": 1,
        "model_type": "SongUNet",
        "model_channels": 4,
        "channel_mult": [1],
    }
    path = tmp_path / "x.safetensors"
    zoo.save_network(zoo.NETWORK_CLASSES["EDMPrecond"](**{**kwargs, **change}), path)
    assert next(iter(change)) in refused(hostile.load_pickle, path)


def test_arrays(tmp_path):
    path = tmp_path / "x.npz"
    bomb = {"mu": np.zeros(8), "sigma": np.zeros((1 << 12, 1 << 12))}  # 128 MB in 128 kB
    np.savez_compressed(path, **bomb)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        npz.read_arrays(path, {"mu": "f", "sigma": "f"}, 1 << 26)
    for arrays in (
        {"mu": np.array([hostile.Call(print, "run")], dtype=object), "sigma": np.eye(1)},
        {"mu": np.zeros(1), "sigma": np.eye(1), "record": np.array(json.dumps({"detector": 3}))},
        {"mu": np.zeros(1), "sigma": np.eye(1), "record": np.array("[" * 100_000)},
        {"mu": np.zeros(1, complex), "sigma": np.eye(1)},
        {"sigma": np.eye(1)},
    ):
        np.savez(path, **arrays)
        refused(load_reference, path)
    np.save(tmp_path / "x.npy", np.zeros(3))
    for data in ((tmp_path / "x.npy").read_bytes(), pickle.dumps(hostile.Call(print, "run")), b""):
        path.write_bytes(data)
        refused(load_reference, path)


def test_labels_take_no_more_than_the_images_warrant(tmp_path):
    hostile.write_images(tmp_path)
    for content in ('{"labels": [' + "[]," * 50_000 + "[]]}", "[" * 60_000, '{"labels": {"a/0.png": 0}}'):
        (tmp_path / "dataset.json").write_text(content)
        refused(hostile.load_images, tmp_path)


def test_images_of_many_pixels(tmp_path, monkeypatch, recwarn):
    data = bytearray(hostile.image_file("BMP"))
    data[18:26] = (1 << 15).to_bytes(4, "little") * 2  # 2^30 pixels: beyond PIL's own limit, which only warns at first
    with pytest.raises(UserError):
        dataset.decode_image(bytes(data), "x")
    data[18:26] = (10_000).to_bytes(4, "little") * 2
    with pytest.raises(UserError, match="too many"):
        dataset.decode_image(bytes(data), "x")
    assert not recwarn.list


def test_paths_in_archives_lead_nowhere(tmp_path):
    for name, expected in (("/abs.png", 1), ("C:\\x.png", 1), ("../out.png", None), ("a/../../b.png", None)):
        (tmp_path / "x.zip").write_bytes(hostile.zip_file({name: hostile.image_file()}))
        before = sorted(tmp_path.rglob("*"))
        if expected is None:
            assert "'..'" in refused(dataset.ImageFolderDataset, tmp_path / "x.zip")
        else:
            assert len(list(dataset.ImageFolderDataset(tmp_path / "x.zip"))) == expected  # read in place
        assert sorted(tmp_path.rglob("*")) == before


def test_entries_without_a_name(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"")
        archive.writestr("1.png", hostile.image_file())
        archive.infolist()[0].filename = ""  # in the directory, which is written last
    assert "" in zipfile.ZipFile(path).NameToInfo
    assert len(dataset.ImageFolderDataset(path)) == 1


def test_pipes_in_folders(tmp_path):
    if hasattr(os, "mkfifo"):
        hostile.write_images(tmp_path)
        os.mkfifo(tmp_path / "2.png")
        assert "plain file" in refused(lambda path: list(dataset.ImageFolderDataset(path)), tmp_path)


def test_tars(tmp_path):
    pax = tarfile.TarInfo("data_batch_1")
    pax.size, pax.type = 1 << 33, tarfile.XHDTYPE  # a header that claims 8 GB
    endless = tarfile.TarInfo("data_batch_1").tobuf(tarfile.GNU_FORMAT)[:-512] + pax.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(endless + bytes(1 << 24)))
    refused(hostile.load_source, tmp_path / "x.tar.gz")
    for batch in hostile.RUNNING_BATCHES:
        (tmp_path / "x.tar").write_bytes(hostile.cifar10(batch))
        refused(hostile.load_source, tmp_path / "x.tar")


def test_states(tmp_path):
    path, state = tmp_path / "x.pt", {"nimg": 1, "tick": 1, "elapsed_sec": 0.0}
    checkpoint.save_state(path, state)
    assert checkpoint.load_state(path) == state
    mark = tmp_path / "mark"
    torch.save({**state, "x": hostile.Call(eval, f"open({str(mark)!r}, 'w')")}, path)
    refused(checkpoint.load_state, path)
    for wrong in ({"nimg": -1}, {"nimg": "1"}, {"tick": 1.5}, {"elapsed_sec": float("nan")}):
        torch.save({**state, **wrong}, path)
        refused(checkpoint.load_state, path)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert "begin" in refused(checkpoint.load_state, path)
    torch.save(state, path)
    assert "checksum" in refused(checkpoint.load_state, path)
    for odd in ({1}, [[]] * 9, {"deep": torch.ones(2)}):  # with a checksum of something else
        torch.save({**state, "odd": odd, "sha256": checkpoint.checksum(state)}, path)
        refused(checkpoint.load_state, path)
    checkpoint.save_state(path, state)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    path.write_bytes(hostile.zip_file(parts, zipfile.ZIP_DEFLATED))
    assert "compressed" in refused(checkpoint.load_state, path)
    path.write_bytes(hostile.zip_file({**parts, "archive/constants.pkl": b""}))
    assert "program" in refused(checkpoint.load_state, path)
    assert not mark.exists()


class Program(torch.nn.Module):
    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        return x.to(torch.float32).mean([2, 3])


def test_a_reference_starts_no_program(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Program()).save(str(tmp_path / "x.pt"))
    record = json.dumps({"detector": "x", "detector_file": "x.pt"})
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3), record=np.array(record))
    reference = load_reference(tmp_path / "ref.npz")
    assert "--detector" in refused(lambda _: reference.load_detector(), None)
    assert reference.load_detector(override=str(tmp_path / "x.pt")).feature_dim == 3


READERS_THAT_RUN_CODE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.jit.load", "np.load"}
READERS_THAT_RUN_CODE |= {"eval", "exec", "compile", "marshal.loads", "shelve.open", "yaml.load", "joblib.load"}
ALLOWED = {("edm/metrics/detector.py", "torch.jit.load")}


def test_no_other_reader_that_runs_code_is_called():
    folders = ("dnnlib", "torch_utils", "training", "edm", "sid")
    called = set()
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in READERS_THAT_RUN_CODE:
                called.add((path.relative_to(ROOT).as_posix(), ast.unparse(node.func)))
    assert called == ALLOWED
