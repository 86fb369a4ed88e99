"""Small files that ask for much time or memory, and their readers: `python tests/bombs.py make FOLDER`, then `read`."""

import gzip
import io
import json
import resource
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import numpy as np
import torch
from PIL import Image

from dnnlib import UserError
from edm import integrity, zoo
from edm.metrics.detector import load_detector
from edm.metrics.reference import load_reference
from edm.metrics.sources import array_source
from sid.sweep.plan import load_plan
from torch_utils import checkpoint
from training.dataset import ImageFolderDataset

MARKS = {"nimg": 8, "tick": 0, "elapsed_sec": 1, "sha256": "0" * 64}
SONG = {"model_type": "SongUNet", "img_resolution": 8, "img_channels": 1}


def number(n: int) -> bytes:
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tensor(count: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """A tensor as torch.save pickles it, of a float32 storage with `count` elements."""
    storage = b"(" + hostile.text("storage") + name("torch", "FloatStorage") + hostile.text(key)
    storage += hostile.text("cpu") + number(count) + b"tQ"
    shape = b"".join(b"(" + b"".join(map(number, ns)) + b"t" for ns in (size, stride))
    rest = b"K\x00" + shape + b"\x89" + name("collections", "OrderedDict") + b")RtR"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + rest


def state(value: bytes, elements: int = 16) -> bytes:
    """A training state that holds one more item, given as pickled."""
    items = {key: hostile.text(v) if type(v) is str else number(v) for key, v in MARKS.items()}
    body = b"".join(hostile.text(key) + item for key, item in {**items, "a": value}.items())
    parts = {"data.pkl": b"\x80\x02}(" + body + b"u.", "byteorder": b"little", "data/0": bytes(4 * elements)}
    return hostile.zip_file({f"archive/{part}": data for part, data in parts.items()})


def laughs(levels: int) -> bytes:
    """Lists of four times the list before, pickled."""
    parts = [b"](" + (b"h" + bytes([i])) * 4 + b"eq" + bytes([i + 1]) for i in range(levels)]
    return b"(" + b"]K\x01aq\x00" + b"".join(parts) + b"t"


def states() -> dict[str, bytes]:
    overlaid = b"](" + b"".join(tensor(1 << 20, (1 << 20,), (1,)) for _ in range(2000)) + b"e"
    texts = hostile.text("x" * 1_000_000) + b"q\x00" + b"h\x00" * 100_000
    return {
        "nested lists": state(laughs(32)),
        "nested lists, shallow": state(laughs(16)),
        "byte arrays": state(b"](" + (name("builtins", "bytearray") + number(1 << 30) + b"\x85R") * 20 + b"e"),
        "stride 0": state(b"](" + b"".join(tensor(16, (750_000_000,), (0,)) for _ in range(60)) + b"e"),
        "shared tensors": state(overlaid, 1 << 20),
        "shared text": state(b"](" + texts + b"e"),
        "a claimed storage": state(tensor(1 << 40, (1 << 40,), (1,))),
        "colliding keys": state(b"}(" + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(60_000)) + b"u"),
        "a number to repeat": state(name("torch", "FloatStorage") + number(1 << 40) + b"\x85R"),
    }


def pickles() -> dict[str, bytes]:
    def network(**arguments) -> bytes:
        return hostile.snapshot({"w": torch.ones(1 << 14)}, class_name="EDMPrecond", init=((), {**SONG, **arguments}))

    many = [1, 2] * 2000
    return {
        "colliding keys": hostile.raw(b"}(", *(number(i * ((1 << 61) - 1)) + b"N" for i in range(60_000)), b"u"),
        "colliding members": hostile.raw(b"\x8f(", *(number(i * ((1 << 61) - 1)) for i in range(60_000)), b"\x90"),
        "channels multiplied": network(model_channels=many, channel_mult=[1 << 40]),
        "multiplier multiplied": network(model_channels=1 << 20, channel_mult=[many]),
        "embedding multiplied": network(model_channels=1 << 30, channel_mult_emb=tuple(many)),
        "text multiplied": network(model_channels=1 << 30, channel_mult_emb="ab"),
        "a long number": network(model_channels=1 << 4000),
        "operations": hostile.raw(b"N0" * 1_000_000, b"N"),
    }


def safetensors() -> dict[str, bytes]:
    def file(header: dict) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text

    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    values = '{"class_name": "Toy", "init_args": [' + "[]," * 2_000_000 + "[]]}"
    return {
        "tensors": file({f"w{i}": empty for i in range(200_000)}),
        "values": file({"__metadata__": {"network": values}}),
        "digits": file({"__metadata__": {"network": '{"class_name": "Toy", "init_args": [' + "9" * 4000 + "]}"}}),
    }


def arrays() -> dict[str, bytes]:
    side = 8000
    half = hostile.npz(np.savez_compressed, mu=np.zeros(side, np.float16), sigma=np.zeros((side, side), np.float16))
    small = {"mu": np.zeros(1), "sigma": np.eye(1)}
    return {
        "half precision": half,
        "records": hostile.npz(np.savez_compressed, **small, record=np.array(["x" * 1000] * 2000)),
        "a long record": hostile.npz(np.savez_compressed, **small, record=np.array("[" + "[]," * 2_000_000 + "[]]")),
        "values in a record": hostile.npz(**small, record=np.array("[" + "[]," * 80_000 + "[]]")),
        "entries": hostile.zip_file({f"{i}.npy": b"" for i in range(5000)}),
    }


def progressive(scans: int, side: int = 8000) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "jpeg", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * scans + b"\xff\xd9"


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(data: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data


def tags(count: int, size: int) -> bytes:
    """A TIFF directory whose entries share their bytes."""
    entries = b"".join(struct.pack("<HHII", i + 1, 7, size, 0) for i in range(count))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4)).ljust(size, b"\0")


def images() -> dict[str, bytes]:
    """Those that are refused by counting, so at once."""
    png, jpeg = hostile.image_file(), hostile.image_file("JPEG", "RGB")
    exif = segment(b"Exif\0\0" + tags(5000, 65_000))
    return {
        "scans": progressive(500),
        "chunks": png[:33] + chunk(b"abCd") * 1_000_000 + png[33:],
        "texts": png[:33] + chunk(b"tEXt", b"a\0b") * 1_000_000 + png[33:],
        "chunks at the end": png[:-12] + chunk(b"abCd") * 1_000_000 + png[-12:],
        "segments": jpeg[:2] + b"\xff\xfe\0\x02" * 1_000_000 + jpeg[2:],
        "Exif twice": jpeg[:2] + exif * 8 + jpeg[2:],
        "Exif of a PNG": png[:33] + chunk(b"eXIf", tags(60_000, 1 << 20)) + png[33:],
        "tags": tags(5000, 1_000_000),
        "comments": b"P3 4000 4000 255\n" + b"#\n" * 500_000,
        "pixels as text": b"P3 8000 8000 255\n" + b"0 " * 10_000_000,
    }


def slow_images() -> dict[str, bytes]:
    """Those that only the clock ends."""
    jpeg, bmp = hostile.image_file("JPEG", "RGB"), bytearray(hostile.image_file("BMP", "L", 16))
    bmp[18:26], bmp[30:34] = struct.pack("<II", 8000, 8000), struct.pack("<I", 1)  # packed in runs
    return {
        "pixels as text": b"P3 2000 2000 255\n" + b"0 " * 8_000_000,
        "filling": jpeg[:2] + b"\xff" * 20_000_000 + jpeg[2:],
        "spaces": b"P6" + b" " * 20_000_000,
        "runs": bytes(bmp[:1078]) + b"\1\0" * 10_000_000,
    }


def extension(kind: bytes, data: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0")


def sources() -> dict[str, bytes]:
    pixels = b"\x00\x00\x08\x03" + struct.pack(">3I", 1 << 22, 1, 1) + bytes(1 << 22)
    return {
        "small images": gzip.compress(pixels, 1),
        "members": gzip.compress(tarfile.TarInfo("x").tobuf() * 200_000, 1),
        "a pax header": extension(tarfile.XHDTYPE, b"1" * 200_000) + bytes(1024),
        "a long name": gzip.compress(extension(tarfile.GNUTYPE_LONGNAME, bytes(1 << 27)), 1),
        "pax headers": extension(tarfile.XHDTYPE, b"9 a=b\n\n\n\n\n") * 10_000,
    }


def labels() -> dict[str, bytes]:
    return {
        "values": b'{"labels": [' + b"[]," * 3000 + b"[]]}",
        "digits": b'{"labels": [["1.png", ' + b"1" * 4000 + b"]]}",
        "keys": b'{"labels": null' + b', "a": 0' * 1000 + b"}",
    }


def sweeps() -> dict[str, bytes]:
    return {
        "a deep key": b"a" + b".a" * 50_000 + b" = 1",
        "a deep table": b"[a" + b".a" * 50_000 + b"]",
        "deep arrays": b"a = " + b"[" * 50_000,
        "too long": b"#\n" * 500_000,
    }


def load_labelled(path: Path) -> None:
    hostile.write_images(path.parent)
    ImageFolderDataset(path.parent, use_labels=True)


def verify(path: Path) -> None:
    (finding,) = integrity.examine(path)
    if finding.damaged:
        raise UserError(finding.text)


READERS: dict[str, Callable[[Path], object]] = {
    "state": checkpoint.load_state,
    "pickle": hostile.load_pickle,
    "network": zoo.load_network,
    "detector": load_detector,
    "reference": load_reference,
    "array": array_source,
    "verify": verify,
    "image": hostile.load_image,
    "source": hostile.load_source,
    "labels": load_labelled,
    "sweep": lambda path: load_plan(str(path)),
}


def bombs() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """(reader, file name, {what: contents})."""
    yield "state", "training-state-000001.pt", states()
    yield "pickle", "x.pkl", pickles()
    for reader in ("network", "detector"):
        yield reader, "x.safetensors", safetensors()
    for reader in ("reference", "verify"):
        yield reader, "x.npz", arrays()
    yield "image", "x", images()
    yield "source", "x.gz", sources()
    yield "labels", "dataset.json", labels()
    yield "sweep", "x.toml", sweeps()
    blank = np.zeros((560, 400, 400, 3), np.uint8)
    yield "array", "x.npz", {"blank images": hostile.npz(np.savez_compressed, arr_0=blank)}
    many = hostile.zip_file({f"{i}.txt": bytes(1 << 25) for i in range(10)}, zipfile.ZIP_DEFLATED)
    yield "verify", "x.zip", {"zeros": many}


def make(folder: Path) -> None:
    """Writes each to a folder of its own, whose name tells the reader: `state: nested lists`."""
    for reader, file_name, files in bombs():
        for what, data in files.items():
            place = folder / f"{reader}: {what}"
            place.mkdir()
            (place / file_name).write_bytes(data)


def read(folder: Path) -> None:
    """Prints lines of JSON: [what, message of the refusal or None, seconds of this process, megabytes of growth]."""
    for place in sorted(folder.iterdir()):
        (path,) = place.iterdir()
        start, megabytes, message = time.process_time(), peak_megabytes(), None
        try:
            READERS[place.name.partition(":")[0]](path)
        except UserError as error:
            message = error.message
        growth = peak_megabytes() - megabytes
        print(json.dumps([place.name, message, time.process_time() - start, growth]), flush=True)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]))
