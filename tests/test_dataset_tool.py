"""The data set tool on every kind of source, read back through ImageFolderDataset."""

import gzip
import io
import json
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edm.dataset_tool import fit, main
from training.dataset import ImageFolderDataset

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
CLASSES = [3, 1, 4, 1, 9]


def run(*options, **named):
    """The output of the tool."""
    arguments = [*options, *(f"--{name.replace('_', '-')}={value}" for name, value in named.items())]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def error(*options, **named):
    """The one line of the tool's refusal; nothing is written."""
    arguments = [*options, *(f"--{name.replace('_', '-')}={value}" for name, value in named.items())]
    before = listing(Path(named["dest"]).parent)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("Error: --")
    assert result.output.count("\n") == 1
    assert listing(Path(named["dest"]).parent) == before
    return result.output


def listing(folder):
    return sorted(folder.rglob("*"))


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist(folder, images=GRAY, labels=CLASSES):
    path = folder / "t-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(images)))
    if labels is not None:
        (folder / "t-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array(labels, np.uint8))))
    return path


def cifar10(path, batches, names=("data_batch_2", "data_batch_1", "test_batch")):
    """A tar.gz with a pickle for each of `batches`, an object or bytes as they are."""
    with tarfile.open(path, "w:gz") as tar:
        for name, batch in zip(names, batches):
            data = batch if isinstance(batch, bytes) else pickle.dumps(batch, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def batch(images, labels):
    return {b"data": images.reshape(len(images), -1), b"labels": list(labels), b"filenames": [b"x"]}


def tree(folder, images, names):
    for image, name in zip(images, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image if image.ndim == 2 else image.transpose(1, 2, 0)).save(folder / name)
    return folder


@pytest.mark.parametrize("dest", ["out.zip", "deep/out"])
def test_mnist_with_labels(tmp_path, dest):
    line = run(source=mnist(tmp_path), dest=tmp_path / dest)
    assert line.splitlines() == [
        "class   images",
        "    0        0  (such a class is never drawn)",
        "    1        2",
        "    2        0  (such a class is never drawn)",
        "    3        1",
        "    4        1",
        "  5-8        0  (such a class is never drawn)",
        "    9        1",
        f"{tmp_path / dest}: 5 images, 28x28, gray, 4 classes",
    ]
    images, labels = zip(*ImageFolderDataset(tmp_path / dest, use_labels=True))
    assert np.array_equal(images, GRAY[:, None])
    assert np.array_equal(labels, np.eye(10)[CLASSES])


def test_mnist_without_labels_and_max_images(tmp_path):
    assert "no labels" in run(source=mnist(tmp_path, labels=None), dest=tmp_path / "out.zip", max_images=3)
    data = ImageFolderDataset(tmp_path / "out.zip")
    assert np.array_equal([image for image, _ in data], GRAY[:3, None])


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_by_its_other_spelling(tmp_path, packed):
    (tmp_path / "t-images.idx3-ubyte").write_bytes(idx(GRAY))
    labels = idx(np.array(CLASSES, np.uint8))
    name = "t-labels.idx1-ubyte"
    (tmp_path / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(labels) if packed else labels)
    assert "4 classes" in run(source=tmp_path / "t-images.idx3-ubyte", dest=tmp_path / "out.zip")


def test_layout_of_the_output(tmp_path):
    run(source=mnist(tmp_path), dest=tmp_path / "a.zip", max_images=2)
    run(source=mnist(tmp_path), dest=tmp_path / "b.zip", max_images=2)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    names = ["00000/img00000000.png", "00000/img00000001.png"]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == [*names, "dataset.json"]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert json.loads(archive.read("dataset.json")) == {"labels": [[names[0], 3], [names[1], 1]]}


@pytest.mark.parametrize("side", [16, 32])
def test_resolution(tmp_path, side):
    run(source=mnist(tmp_path, np.full_like(GRAY, 77)), dest=tmp_path / "out.zip", resolution=f"{side}x{side}")
    image = ImageFolderDataset(tmp_path / "out.zip")[4][0]
    assert image.shape == (1, side, side)
    assert np.all(image == 77)


def test_resizing_antialiases():
    stripes = Image.fromarray(np.tile(np.uint8([[0, 255]]), (32, 16)))  # above what 8 pixels can carry
    assert np.ptp(np.array(fit(stripes, (8, 8)))[:, 1:-1]) <= 8


def test_cropping():
    ramp = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8), (20, 1)))  # 60 wide, 20 high, value = column
    assert fit(ramp, None) is ramp
    assert np.array_equal(np.array(fit(ramp, (20, 20), "center-crop"))[5], np.arange(20, 40))
    wide = np.array(fit(ramp, (40, 20), "center-crop-wide"))
    assert wide.shape == (40, 40)
    assert np.array_equal(wide[10:30], np.tile(np.arange(10, 50), (20, 1)))
    assert not wide[:10].any()
    assert not wide[30:].any()


def test_cifar10(tmp_path):
    batches = [batch(COLOUR[3:], CLASSES[3:]), batch(COLOUR[:3], CLASSES[:3]), batch(COLOUR[:1], [0])]
    run(source=cifar10(tmp_path / "cifar-10-python.tar.gz", batches), dest=tmp_path / "out.zip")
    images, labels = zip(*ImageFolderDataset(tmp_path / "out.zip", use_labels=True))
    assert np.array_equal(images, COLOUR)
    assert np.array_equal(np.argmax(labels, 1), CLASSES)


def test_cifar10_in_fortran_order(tmp_path):
    pixels = batch(COLOUR, CLASSES)
    pixels[b"data"] = np.asfortranarray(pixels[b"data"])
    assert not pixels[b"data"].flags.c_contiguous
    run(source=cifar10(tmp_path / "f.tar.gz", [pixels]), dest=tmp_path / "out.zip")
    assert np.array_equal([image for image, _ in ImageFolderDataset(tmp_path / "out.zip")], COLOUR)


@pytest.mark.parametrize("dtype", ["i1", "u2", ">u2", "f4", "i8", "?", [("x", "u1")]])
def test_cifar10_of_other_types(tmp_path, dtype):
    pixels = batch(COLOUR, CLASSES)
    pixels[b"data"] = np.zeros((5, 3072), dtype)
    assert "--source" in error(source=cifar10(tmp_path / "x.tar.gz", [pixels]), dest=tmp_path / "out.zip")


def test_cifar10_of_other_shapes(tmp_path):
    for shape in ((5, 32, 32, 3), (3072, 5), (15360,), (10, 1536)):
        pixels = batch(COLOUR, CLASSES)
        pixels[b"data"] = COLOUR.reshape(shape)
        assert "--source" in error(source=cifar10(tmp_path / "x.tar.gz", [pixels]), dest=tmp_path / "out.zip")


def test_cifar10_says_what_it_leaves_out(tmp_path):
    part = batch(COLOUR, CLASSES)
    archive = cifar10(tmp_path / "x.tar.gz", [part, part], ("data_batch_1", "test_batch"))
    assert "left out (not data_batch_1 to 5): cifar-10-batches-py/test_batch\n" in run(
        source=archive, dest=tmp_path / "out.zip"
    )
    archive = cifar10(tmp_path / "y.tar.gz", [part, part], ("data_batch_1", "copy/data_batch_1"))
    assert "two files with the name data_batch_1" in error(source=archive, dest=tmp_path / "b.zip")


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_cifar10_pickles_execute_nothing(tmp_path, capfd):
    for i, content in enumerate(
        [
            Hostile(),
            batch(COLOUR, CLASSES) | {b"x": Hostile()},
            b"cnumpy\nload\n(S'x'\ntR.",
            batch(COLOUR, CLASSES[:4]),
            batch(COLOUR, [10] * 5),
            {b"data": COLOUR},
            {b"data": [1], b"labels": [1]},
            [],
            b"",
        ]
    ):
        path = cifar10(tmp_path / f"{i}.tar.gz", [content])
        assert "--source" in error(source=path, dest=tmp_path / "out.zip")
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("colour", [False, True])
def test_folder_and_zip(tmp_path, colour):
    originals = COLOUR if colour else GRAY
    names = [f"{c}/{i}.png" for i, c in enumerate("abcde")]
    folder = tree(tmp_path / "in", originals, names)
    (folder / "dataset.json").write_text(json.dumps({"labels": [list(pair) for pair in zip(names, CLASSES)]}))
    run(source=folder, dest=tmp_path / "1.zip")
    run(source=tmp_path / "1.zip", dest=tmp_path / "2")
    images, labels = zip(*ImageFolderDataset(tmp_path / "2", use_labels=True))
    assert np.array_equal(images, originals if colour else originals[:, None])
    assert np.array_equal(np.argmax(labels, 1), CLASSES)


def test_labels_from_folders(tmp_path):
    folder = tree(tmp_path / "in", GRAY, ["cat/0.png", "ant/1.png", "bee/2.png", "cat/3.png", "bee/4.png"])
    run("--labels-from-folders", source=folder, dest=tmp_path / "out.zip")
    _, labels = zip(*ImageFolderDataset(tmp_path / "out.zip", use_labels=True))
    assert np.argmax(labels, 1).tolist() == [0, 1, 1, 2, 2]
    assert "folders" in error("--labels-from-folders", source=mnist(tmp_path), dest=tmp_path / "b.zip")


def test_what_was_left_out(tmp_path):
    folder = tree(tmp_path / "in", GRAY[:2], ["cat/0.png", "ant/1.png"])
    for name in ("notes.txt", "cat/inner.zip", ".hidden.png"):
        (folder / name).write_bytes(b"x")
    (folder / "bee").mkdir()
    expected = [
        "left out (not images by their suffixes): cat/inner.zip, notes.txt",
        "left out (hidden): .hidden.png",
        "left out (empty folders): bee/",
    ]
    lines = run("--labels-from-folders", source=folder, dest=tmp_path / "1.zip").splitlines()
    assert lines[:6] == [*expected, "class   images  folder", "    0        1  ant", "    1        1  cat"]
    lines = run(source=folder, dest=tmp_path / "2.zip").splitlines()
    assert lines[:3] == expected
    assert "--labels-from-folders" in lines[3]
    assert lines[4].endswith("2 images, 28x28, gray, no labels")


def test_only_classes_that_were_taken_are_counted(tmp_path):
    folder = tree(tmp_path / "in", GRAY[:3], ["2/0.png", "2/1.png", "4/2.png"])
    text = run("--labels-from-folders", source=folder, dest=tmp_path / "out.zip", max_images=2)
    assert text.splitlines()[1:-1] == ["  0-1        0  (such a class is never drawn)", "    2        2  2"]
    assert ImageFolderDataset(tmp_path / "out.zip", use_labels=True).classes == [2]


def test_folder_names_that_no_terminal_shows(tmp_path):
    folder = tree(tmp_path / "in", GRAY[:2], ["a\x1b[2J/0.png", "b/1.png"])
    text = run("--labels-from-folders", source=folder, dest=tmp_path / "out.zip")
    assert "\x1b" not in text
    assert r"a\x1b[2J" in text


def test_gray_images_join_colour_ones(tmp_path):
    folder = tree(tmp_path / "in", [GRAY[0], COLOUR[0, :, :28, :28]], ["0.png", "1.png"])
    run(source=folder, dest=tmp_path / "out.zip")
    data = ImageFolderDataset(tmp_path / "out.zip")
    assert np.array_equal(data[0][0], np.stack([GRAY[0]] * 3))


def test_lmdb(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(GRAY[0]).save(file, "png")
    monkeypatch.setitem(sys.modules, "lmdb", fake_lmdb({b"k": file.getvalue()}))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data.mdb").touch()
    run(source=tmp_path / "in", dest=tmp_path / "out.zip")
    assert np.array_equal(ImageFolderDataset(tmp_path / "out.zip")[0][0], GRAY[:1])
    monkeypatch.setitem(sys.modules, "lmdb", None)  # not installed
    assert "pip install lmdb" in error(source=tmp_path / "in", dest=tmp_path / "b.zip")


def fake_lmdb(content):
    """Those parts of lmdb that the tool calls, for a dict."""

    class Transaction:
        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def cursor(self):
            return self

        def iternext(self, values):
            return iter(sorted(content))

        def get(self, key):
            return memoryview(content[key])

    class Environment:
        def begin(self, buffers=False):
            return Transaction()

    return types.SimpleNamespace(open=lambda *args, **kwargs: Environment(), Error=OSError)


def test_refuses_to_overwrite(tmp_path):
    source, dest = mnist(tmp_path), tmp_path / "out"
    dest.mkdir()
    run(source=source, dest=dest, max_images=1)  # an empty folder is no loss
    assert "--dest" in error(source=source, dest=dest)
    (tmp_path / "out.zip").write_bytes(b"precious")
    assert "--dest" in error(source=source, dest=tmp_path / "out.zip")
    assert (tmp_path / "out.zip").read_bytes() == b"precious"


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_failure_leaves_nothing(tmp_path, dest):
    folder = tree(tmp_path / "in", [*COLOUR, COLOUR[0, :, :30, :30]], [f"{i}.png" for i in range(6)])
    assert "image 5 is 30x30" in error(source=folder, dest=tmp_path / dest)
    (folder / "5.png").write_bytes(b"broken")
    assert "5.png" in error(source=folder, dest=tmp_path / dest)


def test_errors_of_the_source(tmp_path):
    dest = tmp_path / "out.zip"
    assert "doesn't exist" in error(source=tmp_path / "missing", dest=dest)
    path = mnist(tmp_path, labels=[1, 2])
    assert "2 labels" in error(source=path, dest=dest)
    path.write_bytes(path.read_bytes()[:-100])
    assert "--source" in error(source=path, dest=dest)
    for content in (b"", b"text", idx(GRAY)[:-1], idx(GRAY) + b"\0", idx(GRAY[0]), b"\0\0\x08\x03" + b"\xff" * 12):
        path.write_bytes(content)
        assert "--source" in error(source=path, dest=dest)


def test_errors_of_options(tmp_path):
    source, dest = mnist(tmp_path), tmp_path / "out.zip"
    for value in ("16", "0x0", "16x16x16", "-1x1", "9000x9000", "16x8", "8x16"):
        assert "--resolution" in error(source=source, dest=dest, resolution=value)
    assert "--resolution" in error(source=source, dest=dest, transform="center-crop")
    assert "--resolution" in error(source=source, dest=dest, transform="center-crop-wide", resolution="8x16")
