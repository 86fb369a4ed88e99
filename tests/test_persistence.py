"""Snapshots: EDM's files are read without running anything, ours open by executing the source that they embed."""

import copy
import importlib
import io
import pickle
import random
from pathlib import Path

import forked
import hostile
import numpy as np
import pytest
import torch

from dnnlib import EasyDict, UserError
from torch_utils import persistence
from torch_utils.untrusted import edm_pickle, inert_pickle
from training import networks

DATA = Path(__file__).parent / "data"
EDM_FILES = sorted(DATA.glob("edm-format-*.pkl"))


@persistence.persistent_class
class Toy(torch.nn.Module):
    def __init__(self, width, *, sizes=(1, 2), init_seed=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, 3))
        self.register_buffer("table", torch.arange(width))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.children_ = torch.nn.ModuleDict({"bias": Bias(width)})
        self.absent = None
        self.scale = np.sqrt(np.float64(0.5))


@persistence.persistent_class
class Bias(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(width))


@persistence.persistent_class
class Wide(Toy):
    def __init__(self, factor=2):
        super().__init__(4 * factor, sizes=[factor])


class Undecorated(Toy):
    pass


CLASSES = {"EDMPrecond": networks.EDMPrecond, "VPPrecond": networks.VPPrecond, "Toy": Toy}


# --- the decorator


def test_constructor_arguments_are_recorded():
    sizes = [3]
    toy = Toy(2, sizes=sizes)
    sizes.append(4)
    toy.init_kwargs["sizes"].append(5)
    assert (toy.init_args, toy.init_kwargs) == ((2,), {"sizes": [3]})
    wide = Wide(factor=3)
    assert (wide.init_args, wide.init_kwargs) == ((), {"factor": 3})
    assert persistence.is_persistent(wide)
    assert not persistence.is_persistent(Undecorated(1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda toy: pickle.loads(pickle.dumps(toy))])
def test_copies_keep_them(duplicate):
    toy = Toy(2)
    other = duplicate(toy)
    assert type(other) is Toy
    assert (other.init_args, other.init_kwargs) == ((2,), {})
    assert torch.equal(other.weight, toy.weight)


# --- reading


def load(path):
    return edm_pickle.build(edm_pickle.read(path)["ema"], CLASSES, path)


@pytest.mark.parametrize("path", EDM_FILES, ids=lambda path: path.stem)
def test_edm_snapshots_give_the_reference_outputs(path):
    expected = {name: torch.from_numpy(array) for name, array in np.load(path.with_suffix(".npz")).items()}
    rng = torch.get_rng_state()
    net = load(path).eval()
    assert torch.equal(rng, torch.get_rng_state())
    with torch.no_grad():
        D = net(expected["x"], expected["sigma"], expected.get("class_labels"))
    assert (D - expected["D"]).abs().max() < 1e-5 * expected["D"].abs().max()


def test_other_items_are_built_only_when_asked_for():
    contents = edm_pickle.read(EDM_FILES[0])
    assert contents["dataset_kwargs"]["class_name"] == "training.dataset.ImageFolderDataset"
    assert contents["loss_fn"].class_name == "EDMLoss"
    with pytest.raises(UserError, match="EDMLoss"):
        edm_pickle.build(contents["loss_fn"], CLASSES, "file")

    class EDMLoss:
        def __init__(self, P_mean=-1.2):
            self.P_mean = P_mean

    assert edm_pickle.build(contents["loss_fn"], {"EDMLoss": EDMLoss}, "file").P_mean == -1.2


@pytest.mark.parametrize("dtype", inert_pickle.STORAGE_DTYPES.values(), ids=str)
def test_tensors_of_every_type_and_layout(tmp_path, dtype):
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensors = [base, base.transpose(0, 2), base[:, 1:, ::2], base[0, 0, 0], base[:0], base[1]]
    (tmp_path / "tensors.pkl").write_bytes(pickle.dumps(tensors, protocol=4))
    for ours, theirs in zip(inert_pickle.read_file(tmp_path / "tensors.pkl"), tensors):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_plain_values_as_pickle_reads_them(tmp_path):
    values = {"a": [1, -2, 3.5, True, None, "ü", b"x" * 300, 1 << 40], 4: ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))}
    values |= {"set": {"x", "y"}, "scalars": [np.float64(0.1), np.float32(0.1), np.int64(-7), np.bool_(True)]}
    values["big endian"] = np.dtype(">f8").type(0.25)
    values["again"] = values["a"]
    for protocol in (4, 5):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps({**values, "easy": EasyDict(a=EasyDict(b=2))}, protocol=protocol))
        assert inert_pickle.read_file(path) == {**values, "easy": {"a": {"b": 2}}}


# --- refusing; tests/test_hostile_files.py has files that would run code or take much memory


def test_a_module_that_holds_itself_or_shares_its_children_ends(tmp_path):
    def record(**children):
        state = {"_parameters": {}, "_buffers": {}, "_non_persistent_buffers_set": set(), "_modules": children}
        return inert_pickle.Record("Toy", {**state, "_init_args": (1,), "_init_kwargs": {}})

    loop = record()
    loop.state["_modules"]["a"] = loop
    shared = record()
    for _ in range(40):
        shared = record(a=shared, b=shared)
    for module_ in (loop, shared):
        with pytest.raises(UserError, match="damaged"):
            edm_pickle.build(module_, CLASSES, "file")


def test_damaged_files_never_fail_otherwise(tmp_path):
    content, rng, path = EDM_FILES[0].read_bytes(), random.Random(0), tmp_path / "damaged.pkl"
    messages = []
    for attempt in range(24):
        damaged = bytearray(content[: rng.randrange(len(content))] if attempt % 3 == 0 else content)
        for _ in range(4):
            damaged[rng.randrange(min(len(damaged), 20_000))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load(path)
        except UserError as error:
            messages.append(error.message)
    assert len(messages) > 12
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_plain_unpickling_of_our_files_is_refused():
    with pytest.raises(UserError, match="load_network"):
        pickle.loads(pickle.dumps(hostile.module()))


# --- writing

FOREIGN_PERSISTENCE = '''
"""A reader that trusts its files: the embedded source is executed, its class found, its state restored."""
import sys
import types

def persistent_class(cls):
    cls.decorated_elsewhere = True
    return cls

def _reconstruct_persistent_obj(meta):
    assert meta["type"] == "class" and meta["version"] == 6
    name = f"_imported_{abs(hash(meta['module_src']))}"
    if name not in sys.modules:
        module = sys.modules[name] = types.ModuleType(name)
        exec(meta["module_src"], module.__dict__)
    cls = sys.modules[name].__dict__[meta["class_name"]]
    obj = cls.__new__(cls)
    obj.__dict__.update(meta["state"])
    return obj
'''

FOREIGN_USE = """
import pathlib, pickle, sys
import torch
folder = pathlib.Path.cwd()
assert "training" not in sys.modules
for path in sorted(folder.glob("*.pkl")):
    net = pickle.loads(path.read_bytes())["ema"]
    assert net.decorated_elsewhere and not net.training and net.model.decorated_elsewhere
    assert "_imported_" in type(net.model).__module__ and "training" not in sys.modules
    x, sigma, labels, expected = torch.load(path.with_suffix(".pt"))
    assert torch.equal(net(x, sigma, labels), expected), path
    print(path.stem, type(net).__name__)
"""


def test_our_pickles_open_where_their_source_is_executed(tmp_path):
    (tmp_path / "torch_utils").mkdir()
    (tmp_path / "torch_utils" / "__init__.py").touch()
    (tmp_path / "torch_utils" / "persistence.py").write_text(FOREIGN_PERSISTENCE)
    for path in EDM_FILES:
        net = edm_pickle.frozen_copy(load(path))
        with open(tmp_path / path.name, "wb") as file:
            edm_pickle.write(file, ema=net)
        inputs = np.load(path.with_suffix(".npz"))
        x, sigma = torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["sigma"])
        labels = torch.from_numpy(inputs["class_labels"]) if "class_labels" in inputs else None
        torch.save((x, sigma, labels, net(x, sigma, labels)), tmp_path / f"{path.stem}.pt")
    printed = forked.run(["-c", FOREIGN_USE], tmp_path, modules=tmp_path)
    assert len(printed.splitlines()) == len(EDM_FILES)


def test_embedded_source_holds_what_it_imports_from_its_package(tmp_path, monkeypatch):
    folder = tmp_path / "package_of_our_own"
    folder.mkdir()
    (folder / "__init__.py").touch()
    future = "from __future__ import annotations\n"
    (folder / "low.py").write_text(f'"""Low."""\n{future}import math\nTWO = math.sqrt(4)\nTHREE = 3\n')
    (folder / "middle.py").write_text(f"{future}from .low import TWO as two\nFOUR = two + two\n")
    top = (
        '"""Top."""\n'
        + future
        + "from .low import (\n    THREE,\n    TWO,\n)\nfrom .middle import FOUR\nSUM = TWO + THREE + FOUR\n"
    )
    (folder / "top.py").write_text(top)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("package_of_our_own.top")
    source = edm_pickle.standalone_source("package_of_our_own.top")
    found = {}
    exec(source, found)
    assert (found["SUM"], found["two"]) == (9, 2)
    assert source.count("THREE = 3") == 1


def test_our_reader_reads_them_back_exactly(tmp_path):
    path = tmp_path / "toy.pkl"
    toy = Toy(2, sizes=[3])
    with open(path, "wb") as file:
        edm_pickle.write(file, ema=edm_pickle.frozen_copy(toy), metadata={"init_sigma": 2.5})
    contents = edm_pickle.read(path)
    assert contents["metadata"] == {"init_sigma": 2.5}
    assert contents["ema"].state["scale"] == toy.scale
    assert type(contents["ema"].state["scale"]) is float
    back = load(path)
    assert (back.init_args, back.init_kwargs) == ((2,), {"sizes": [3]})
    assert back.state_dict().keys() == toy.state_dict().keys()
    assert all(torch.equal(back.state_dict()[key], value) for key, value in toy.state_dict().items())


@pytest.mark.parametrize("foreign", [torch.nn.SiLU(), torch.float32, len, np.zeros(2), torch.device("cpu")], ids=str)
def test_what_the_format_has_no_place_for_is_not_written(foreign):
    toy = Toy(1)
    vars(toy)["foreign"] = foreign
    with pytest.raises(UserError, match="no place"):
        edm_pickle.write(io.BytesIO(), ema=toy)
