"""Malicious files, good files, and ways to damage them, for the tests and for tests/fuzz/run.py."""

import functools
import gzip
import io
import json
import operator
import os
import pickle
import random
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dnnlib import UserError
from edm import dataset_tool, network_files, zoo
from edm.metrics.detector import load_detector, save_detector
from edm.metrics.reference import load_reference
from edm.metrics.small_classifier import SmallClassifier
from edm.metrics.sources import array_source
from torch_utils import checkpoint, persistence
from training.dataset import ImageFolderDataset
from training.networks import EDMPrecond

GIGA = 10**9
IMAGES = ["1.png", "a/0.png"]


@persistence.persistent_class
class Toy(torch.nn.Module):
    """The smallest network that the format can hold."""

    def __init__(self, width=2, scale=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, 3))
        self.scale = scale


CLASSES = {"Toy": Toy}

# --- pickles


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *args: Any, state: Any = None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """So that a call can be the function of another."""


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def ask(module: str, qualname: str) -> bytes:
    """Pickles as a lookup of an object by name."""
    return text(module) + text(qualname) + b"\x93"


def raw(*parts: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."


def module(parameters=(), modules=(), class_name="Toy", source="raise SystemExit('run')", init=((), {}), **state):
    """A network's object, as EDM pickles it."""
    state = {"_parameters": dict(parameters), "_buffers": {}, "_non_persistent_buffers_set": set(), **state}
    state |= {"_modules": dict(modules), "_init_args": init[0], "_init_kwargs": init[1]}
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Call(persistence._reconstruct_persistent_obj, meta)


def snapshot(*args: Any, **kwargs: Any) -> bytes:
    return pickle.dumps({"ema": module(*args, **kwargs)}, protocol=4)


def storage(tensor: torch.Tensor) -> bytes:
    """What a pickled tensor embeds."""
    file = io.BytesIO()
    torch.save(tensor.__reduce_ex__(4)[1][0], file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def small_snapshot() -> bytes:
    """A good one."""
    return snapshot({"weight": torch.ones(2, 3)}, init=((2,), {"scale": 0.5}))


def running(mark: Path) -> dict[str, bytes]:
    """{name: pickle}: each would run code, and so create `mark`, if Python's pickle or torch.load opened it."""
    touch, write = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    evil = Call(eval, write)
    load, rebuild = torch.storage._load_from_bytes, torch._utils._rebuild_tensor_v2
    inner = pickle.dumps(evil)
    saved = io.BytesIO()
    torch.save({"a": evil}, saved)
    legacy = io.BytesIO()
    torch.save({"a": evil}, legacy, _use_new_zipfile_serialization=False)
    values = {
        "os.system": Call(os.system, touch),
        "os.popen": Call(os.popen, touch),
        "subprocess": Call(subprocess.check_output, ["touch", str(mark)]),
        "exec": Call(exec, write),
        "compile and exec": Call(exec, Call(compile, write, "x", "exec")),
        "getattr chain": Call(Call(getattr, Call(__import__, "os"), "system"), touch),
        "reduce chain": Call(Call(getattr, Call(Call, eval, write), "__reduce__")),
        "partial": Call(functools.partial(eval, write)),
        "functools.reduce": Call(functools.reduce, eval, [write, {}]),
        "operator.methodcaller": Call(operator.methodcaller("touch"), mark),
        "operator.attrgetter": Call(operator.attrgetter("system"), Call(__import__, "os")),
        "operator.call": Call(Call(getattr, Call(__import__, "operator"), "call"), eval, write),
        "map in a list": Call(list, Call(map, eval, [write])),
        "torch.hub": Call(torch.hub.load, "owner/name", "x"),
        "numpy.load": Call(np.load, str(mark)),
        "pickle in a pickle": Call(pickle.loads, inner),
        "storage: a pickle": Call(load, inner),
        "storage: a zip": Call(load, saved.getvalue()),
        "storage: legacy": Call(load, legacy.getvalue()),
        "storage: after the facts": Call(load, storage(torch.ones(1))[:50] + inner),
        "storage of a storage": Call(load, Call(load, inner)),
        "a size": Call(rebuild, Call(load, storage(torch.ones(4))), 0, evil, (1,)),
        "hooks": Call(rebuild, Call(load, storage(torch.ones(4))), 0, (4,), (1,), False, evil),
        "in the network": module({"weight": evil}),
        "beside it": {"ema": module({"weight": torch.ones(2, 3)}), "loss_fn": evil},
        "arguments": module({"weight": torch.ones(2, 3)}, init=((evil,), {})),
        "nested persistent": module(modules={"a": module(modules={"b": module({"w": evil})})}),
        "source is an object": module({"weight": torch.ones(2, 3)}, source=evil),
        "state of a dict": Call(dict, state={"__reduce__": evil}),
        "a class of torch": Call(torch.nn.Linear, 2, 2, state={"__setstate__": evil}),
        "object array": np.array([evil], dtype=object),
        "object scalar": Call(np.float64(0).__reduce__()[0], np.dtype("O"), evil),
    }
    files = {what: pickle.dumps(value, protocol=4) for what, value in values.items()}
    files |= {f"eval in protocol {p}": pickle.dumps({"ema": evil}, protocol=p) for p in range(6)}
    files |= {
        "copyreg._reconstructor": raw(ask("copyreg", "_reconstructor"), ask("builtins", "eval"), text(write), b"\x86R"),
        "copyreg.__newobj__": raw(ask("copyreg", "__newobj__"), ask("builtins", "eval"), text(write), b"\x86R"),
        "newobj of eval": raw(ask("builtins", "eval"), text(write), b"\x85\x81"),
        "newobj_ex of eval": raw(ask("builtins", "eval"), text(write), b"\x85}\x92"),
        "inst": b"(S" + repr(write).encode() + b"\nibuiltins\neval\n.",
        "obj": raw(b"(", ask("builtins", "eval"), text(write), b"o"),
        "import alone": b"cthis\nd\n.",
        "torch.load": raw(ask("torch", "load"), text(str(mark)), b"\x85R"),
        "dotted name": raw(ask("dnnlib.util", "os.system"), text(touch), b"\x85R"),
        "dunder name": raw(ask("collections", "OrderedDict.__init__.__globals__")),
        "unicode name": raw(ask("оs", "system"), text(touch), b"\x85R"),
        "surrogate name": raw(ask("\ud800os", "sys\udcfftem"), text(touch), b"\x85R"),
        "name of bytes": raw(b"C\x02osC\x06system\x93", text(touch), b"\x85R"),
        "name with a space": raw(ask("dnnlib.util EasyDict\nos", "system"), text(touch), b"\x85R"),
        "build __setstate__": raw(
            ask("collections", "OrderedDict"), b")R}", text("__setstate__"), ask("os", "system"), b"sb"
        ),
        "build slots": raw(ask("collections", "OrderedDict"), b")RN}", text("__class__"), text("x"), b"s\x86b"),
        "build on a name": raw(ask("collections", "OrderedDict"), b"}", text("build"), text(touch), b"sb"),
    }
    return files


def malformed() -> dict[str, bytes]:
    """{name: pickle}: each is no network, or no pickle that EDM's tools would write."""
    ordered = ask("collections", "OrderedDict")
    values = {
        "no module": {"ema": 3},
        "an array": np.zeros(3),
        "unknown class": {"ema": module(class_name="Evil")},
        "unknown class inside": {"ema": module(init=((2,), {"x": module(class_name="Evil")}))},
        "child is a tensor": {"ema": module(modules={"a": torch.zeros(1)})},
        "weight is a module": {"ema": module({"weight": module()})},
        "wrong shape": {"ema": module({"weight": torch.zeros(2, 4)})},
        "wider than its weights": {"ema": module({"weight": torch.zeros(2, 3)}, init=((1 << 40,), {}))},
        "no such argument": {"ema": module({"weight": torch.zeros(2, 3)}, init=((2,), {"colour": 3}))},
    }
    for what, (size, stride, offset) in {
        "expanded": ((1 << 20, 1 << 20), (0, 0), 0),
        "outside": ((4,), (2,), 0),
        "before": ((2,), (1,), -1),
        "behind": ((2,), (1,), 3),
    }.items():
        tensor = Call(torch.storage._load_from_bytes, storage(torch.zeros(4))), offset, size, stride, False, {}
        values[what] = Call(torch._utils._rebuild_tensor_v2, *tensor)
    files = {what: pickle.dumps(value, protocol=4) for what, value in values.items()}
    return files | {
        "name with a line break": raw(b"cos\nsystem\n"),
        "obj": raw(b"(", ordered, b"o"),
        "state of a list": raw(b"]}b"),
        "call of a list": raw(b"])R"),
        "state without a dtype": raw(ask("numpy", "dtype"), text("O"), b"\x85R"),
        "missing memo": raw(b"h\x05"),
        "underflow": raw(b"R"),
        "below a mark": raw(b"](\x85"),
        "odd items": raw(b"}(K\x01u"),
        "two values": raw(b"]]"),
        "deep key": raw(b"}", b")" + b"\x85" * 200_000, b"K\x01s"),
        "a web page": b"<!DOCTYPE html>",
    }


def heavy() -> dict[str, bytes]:
    """{name: pickle}: each claims or would take far more memory or time than its size suggests, or isn't a pickle."""
    good, many = storage(torch.ones(4)), 200_000
    load, rebuild = torch.storage._load_from_bytes, torch._utils._rebuild_tensor_v2
    shared = torch.ones(2, 3)
    wide, plain = {}, [1] * 900
    for _ in range(2):
        plain = [plain] * 900
    for _ in range(6):
        wide = module(
            modules=dict.fromkeys("abcdefghijklmnopqrstuvwxyz", wide) if wide else {}, parameters={"w": shared}
        )
    unet = {"model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "attn_resolutions": []}
    tiny = {**unet, "model_channels": 4, "channel_mult": [1], "num_blocks": 1}
    filters = {**tiny, "channel_mult": [1] * 900, "resample_filter": [1.0] * 900}
    weight = {"weight": torch.ones(1 << 16)}
    files = {
        "names nested": snapshot(modules={"x" * 100_000: module(modules={"y" * 100_000: module()})}),
        "modules nested": pickle.dumps({"ema": wide}, protocol=4),
        "shared weights": snapshot({f"w{i}": shared for i in range(40_000)}, init=((1 << 20,), {})),
        "shared arguments": snapshot({"weight": shared}, init=(tuple(plain), {})),
        "a list to search": snapshot(
            {f"w{i}": shared for i in range(9_000)}, _non_persistent_buffers_set=list(range(9_000))
        ),
        "empty layers": snapshot(
            weight, class_name="EDMPrecond", init=((), {**unet, "model_channels": 0, "num_blocks": GIGA})
        ),
        "wide layers": snapshot(weight, class_name="EDMPrecond", init=((), {**unet, "model_channels": 1 << 40})),
        "many blocks": snapshot(
            weight, class_name="EDMPrecond", init=((), {**unet, "model_channels": 4, "num_blocks": GIGA})
        ),
        "wide filters": snapshot(weight, class_name="EDMPrecond", init=((), filters)),
        "many noise levels": snapshot(weight, class_name="iDDPMPrecond", init=((), {**tiny, "M": 1 << 19})),
        "no noise levels": snapshot(weight, class_name="iDDPMPrecond", init=((), {**tiny, "M": 0})),
        "size of a tensor": pickle.dumps(Call(rebuild, Call(load, good), 0, (GIGA,), (0,), False, {})),
        "count of a storage": pickle.dumps(Call(load, good.replace(struct.pack("<q", 4), struct.pack("<q", GIGA)))),
        "bytes": raw(b"\x8e", struct.pack("<Q", GIGA), b"x"),
        "bytes of 32 bits": raw(b"B", struct.pack("<I", 0xFFFFFFFF), b"x"),
        "bytes of 2^62": raw(b"\x8e", struct.pack("<Q", 1 << 62), b"x"),
        "text": raw(b"\x8d", struct.pack("<Q", GIGA), b"x"),
        "text of 2^62": raw(b"\x8d", struct.pack("<Q", 1 << 62), b"x"),
        "bytearray": raw(b"\x96", struct.pack("<Q", GIGA), b"x", protocol=5),
        "long": raw(b"\x8b", struct.pack("<i", GIGA), b"x"),
        "long below zero": raw(b"\x8b", struct.pack("<i", -GIGA), b"x"),
        "frame": raw(b"\x95", struct.pack("<Q", GIGA)),
        "memo": raw(b"]r", struct.pack("<I", 0xFFFFFFFF), b"j", struct.pack("<I", 0xFFFFFFF0)),
        "memo in text": b"]p999999999\ng999999998\n.",
        "memo without a value": raw(b"\x94"),
        "number in text": b"I" + b"9" * 100_000 + b"\n.",
        "long in text": b"L" + b"9" * 100_000 + b"L\n.",
        "deep tuples": raw(b")", b"\x85" * many),
        "deep lists": raw(b"]" * many, b"a" * (many - 1)),
        "deep dicts": raw(b"}" + b"K\x01}" * many, b"s" * many),
        "deep modules": raw(*[ask("torch.nn.modules.container", "ModuleDict") + b")R"] * 9_000),
        "itself": raw(b"]q\x00h\x00a"),
        "dict with itself as key": raw(b"}q\x00h\x00K\x01s"),
        "marks": raw(b"(" * many),
        "extension": raw(b"\x82\x01"),
        "extension 2": raw(b"\x83\x01\x01"),
        "extension 4": raw(b"\x84", struct.pack("<i", GIGA)),
        "persistent id": b"Pstorage\n.",
        "persistent id of a list": raw(b"]Q"),
        "next buffer": raw(b"\x97", protocol=5),
        "read-only buffer": raw(b"\x97\x98", protocol=5),
        "unknown operation": raw(b"\xff"),
        "unknown protocol": raw(b"]", protocol=200),
        "no end": b"\x80\x04]",
        "nothing": b"",
        "zeros": bytes(1000),
        "a zip": b"PK\x03\x04" + bytes(100),
    }
    whole = small_snapshot()
    files |= {f"cut at {size}": whole[:size] for size in range(1, len(whole), len(whole) // 20)}
    return files


# --- readers, each with good files


@dataclass
class Reader:
    """What reads one kind of file: good files of it, their suffix, and `load(path)`, which raises at most UserError.

    wrap: if only a part of the file gets damaged, makes the file from that part, with correct lengths and checksums.
    """

    suffix: str
    good: list[bytes]
    load: Callable[[Path], Any]
    wrap: Callable[[bytes], bytes] = bytes


def load_pickle(path: Path) -> Any:
    return network_files.read(path, {**zoo.NETWORK_CLASSES, **CLASSES})


def load_images(path: Path) -> Any:
    return list(ImageFolderDataset(path, use_labels=True))


def load_labels(path: Path) -> Any:
    """A dataset.json for images that are in the folder already."""
    return load_images(path.parent)


def load_source(path: Path) -> Any:
    source = dataset_tool.open_source(path)
    return [source.image(i) for i in range(min(source.count, 4))]


def write_images(folder: Path) -> None:
    """Two images, as the good dataset.json labels them."""
    for name_ in IMAGES:
        (folder / name_).parent.mkdir(exist_ok=True)
        (folder / name_).write_bytes(image_file())


def image_file(kind: str = "PNG", mode: str = "L", size: int = 4) -> bytes:
    file = io.BytesIO()
    pixels = np.arange(size * size * len(mode), dtype=np.uint8).reshape(size, size, -1).squeeze()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def zip_file(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name_, data in files.items():
            archive.writestr(name_, data)
    return file.getvalue()


def npz(save: Callable = np.savez, **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def cifar10(batch: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = len(batch)
        tar.addfile(info, io.BytesIO(batch))
    return file.getvalue()


def readers(folder: Path) -> dict[str, Reader]:
    """{kind: its Reader}. folder: for temporary files; the damaged files must be in it, too."""
    torch.manual_seed(0)
    kwargs = {
        "model_type": "SongUNet",
        "model_channels": 4,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    made = {}
    for kind in ("pkl", "safetensors"):
        zoo.save_network(Toy(2, scale=0.5), folder / f"toy.{kind}", init_sigma=2.5)
        zoo.save_network(EDMPrecond(8, 1, **kwargs), folder / f"net.{kind}")
        made[kind] = [(folder / f"{name_}.{kind}").read_bytes() for name_ in ("toy", "net")]
    detector = {"img_resolution": 8, "img_channels": 1, "num_classes": 2, "width": 4}
    save_detector(SmallClassifier(**detector), folder / "detector.safetensors", detector)
    checkpoint.save_state(folder / "state.pt", {"nimg": 1, "tick": 1, "elapsed_sec": 0.5, "net": {"w": torch.ones(2)}})
    labels = json.dumps({"labels": [["a/0.png", 0], ["1.png", 2]]}).encode()
    labelled = {**dict.fromkeys(IMAGES, image_file()), "dataset.json": labels}
    batch = {b"data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, -1), b"labels": [1, 2]}
    formats = [
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("BMP", "L"),
        ("PPM", "RGB"),
        ("TIFF", "L"),
    ]
    idx = b"\x00\x00\x08\x03" + struct.pack(">3I", 2, 4, 4) + bytes(32)
    toy = made["safetensors"][0]
    start = 8 + int.from_bytes(toy[:8], "little")
    state = zipfile.ZipFile(folder / "state.pt")
    parts = {name_: state.read(name_) for name_ in state.namelist()}
    program = next(name_ for name_ in parts if name_.endswith("data.pkl"))
    reference = npz(mu=np.zeros(3), sigma=np.eye(3), record=json.dumps({"detector": "x", "channels": 1}))
    packed = npz(np.savez_compressed, mu=np.zeros(3), sigma=np.eye(3))
    return {
        "pickle": Reader(".pkl", [small_snapshot(), *made["pkl"]], load_pickle),
        "header": Reader(
            ".safetensors",
            [toy[8:start]],
            load_pickle,
            lambda data: len(data).to_bytes(8, "little") + data + toy[start:],
        ),
        "array": Reader(
            ".npz",
            [npy(np.zeros(3))],
            load_reference,
            lambda data: zip_file({"mu.npy": data, "sigma.npy": npy(np.eye(3))}),
        ),
        "batch": Reader(".tar", [pickle.dumps(batch, 2), PYTHON_2], load_source, cifar10),
        "state's pickle": Reader(
            ".pt", [parts[program]], checkpoint.load_state, lambda data: zip_file({**parts, program: data})
        ),
        "safetensors": Reader(".safetensors", made["safetensors"], load_pickle),
        "detector": Reader(".safetensors", [(folder / "detector.safetensors").read_bytes()], load_detector),
        "state": Reader(".pt", [(folder / "state.pt").read_bytes()], checkpoint.load_state),
        "zip": Reader(".zip", [zip_file(labelled), zip_file(labelled, zipfile.ZIP_DEFLATED)], load_images),
        "labels": Reader("dataset.json", [labels], load_labels),
        "image": Reader("", [image_file(*kind) for kind in formats], load_image),
        "reference": Reader(".npz", [reference, packed], load_reference),
        "images": Reader(".npz", [npz(arr_0=np.zeros((2, 4, 4, 3), np.uint8))], array_source),
        "idx": Reader(".gz", [gzip.compress(idx), idx], load_source),
        "cifar10": Reader(".tar", [cifar10(pickle.dumps(batch, 2)), cifar10(PYTHON_2)], load_source),
    }


def load_image(path: Path) -> Any:
    from training.dataset import decode_image

    return decode_image(path.read_bytes(), str(path))


PYTHON_2 = (  # a batch as Python 2 wrote CIFAR-10's: byte strings, arrays by numpy.core
    b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03K\x07aU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray"
    b"\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\x09(K\x03U\x01|NNN"
    b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + bytes(range(256)) * 12 + b"tbu."
)

RUNNING_BATCHES = [
    pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": Call(print, "run")}, 2),
    raw(b"}r", struct.pack("<I", 0x7FFFFFFF), b"."),
    raw(ask("numpy", "dtype"), text("u1"), b"\x85R}b"),
    raw(ask("_codecs", "encode"), text("x"), text("zlib_codec"), b"\x86R"),
]

# --- damage

NUMBERS = [0, 1, 2, 3, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, GIGA, 1 << 62]


def mutate(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """`data` with a few seeded changes: bytes, numbers, pieces cut, doubled, moved, or taken from `other`."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        place, length = rng.randrange(len(damaged) + 1), min(rng.choice([1, 2, 4, 8, 16, 64, 256]), 1 + len(damaged))
        kind = rng.randrange(8)
        if kind <= 2 and damaged:
            damaged[min(place, len(damaged) - 1)] = rng.randrange(256)
        elif kind == 3:
            number = rng.choice(NUMBERS).to_bytes(8, rng.choice(["little", "big"]))
            width = rng.choice([1, 2, 4, 8])
            damaged[place : place + width] = number[:width]
        elif kind == 4:
            del damaged[place : place + length]
        elif kind == 5:
            damaged[place:place] = damaged[place : place + length]
        elif kind == 6:
            start = rng.randrange(len(other) + 1)
            damaged[place : place + length] = other[start : start + length]
        elif rng.random() < 0.2:
            del damaged[place:]
    return bytes(damaged)


def outcome(reader: Reader, path: Path, data: bytes) -> str:
    """The message with which `data` is refused, '' if it is read. Other errors aren't caught."""
    path.unlink(missing_ok=True)  # some file systems wait for the disk when a file is overwritten
    path.write_bytes(reader.wrap(data))
    message = ""
    try:
        reader.load(path)
    except UserError as error:
        message = error.message
    assert "\n" not in message
    return message
