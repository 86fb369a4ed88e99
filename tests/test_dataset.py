"""ImageFolderDataset against the arrays that its files were made from, and what it says about broken input."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

from dnnlib import UserError
from training import dataset, file_tree
from training.dataset import FileTree, ImageFolderDataset, read_labels

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
CLASSES = [2, 0, 1, 2, 0]
NAMES = [f"00000/img{i:08d}.png" for i in range(5)]
LABELS = {"labels": [[name, label] for name, label in zip(NAMES, CLASSES)]}


def png(image):
    """The bytes of a PNG of a uint8 [C, H, W] array."""
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "png")
    return file.getvalue()


def files(images=IMAGES, labels=LABELS):
    return {**{name: png(image) for name, image in zip(NAMES, images)}, "dataset.json": json.dumps(labels).encode()}


def folder(path, contents):
    for name, data in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def archive(path, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in contents.items():
            file.writestr(name, data)
    return path


@pytest.fixture(params=["folder", "stored", "deflated"])
def source(request, tmp_path):
    if request.param == "folder":
        return folder(tmp_path / "set", files())
    return archive(tmp_path / "set.zip", files(), {"stored": 0, "deflated": 8}[request.param])


@pytest.mark.parametrize("cache", [False, True])
def test_items_are_the_images_and_labels(source, cache):
    data = ImageFolderDataset(source, use_labels=True, cache=cache)
    assert (data.name, data.resolution, data.num_channels, data.label_dim) == ("set", 8, 3, 3)
    images, labels = zip(*data)
    assert len(data) == 5
    assert images[0].dtype == np.uint8
    assert labels[0].dtype == np.float32
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(labels, np.eye(3)[CLASSES])
    assert np.array_equal(data.get_label(3), [0, 0, 1])
    images[0][:] = 0  # an item is the caller's own
    assert np.array_equal(data[0][0], IMAGES[0])


def test_without_labels(source):
    data = ImageFolderDataset(source)
    assert (data.label_dim, data[4][1].shape) == (0, (0,))
    with pytest.raises(IndexError):
        data[5]


def test_gray_images_have_one_channel(tmp_path):
    data = ImageFolderDataset(folder(tmp_path, files(IMAGES[:, :1])))
    assert data.num_channels == 1
    assert np.array_equal([image for image, _ in data], IMAGES[:, :1])


@pytest.mark.parametrize("cache", [False, True])
def test_xflip_appends_mirrored_images(source, cache):
    data = ImageFolderDataset(source, use_labels=True, xflip=True, cache=cache)
    assert len(data) == 10
    assert np.array_equal(data[7][0], IMAGES[2][:, :, ::-1])
    assert np.array_equal(data[7][1], data[2][1])


def test_max_size_takes_a_seeded_subset(source):
    whole = ImageFolderDataset(source, use_labels=True)
    subsets = [ImageFolderDataset(source, max_size=3, use_labels=True, seed=seed) for seed in (1, 1, 2, 3, 4)]
    chosen = []
    for subset in subsets:
        assert (len(subset), subset.label_dim) == (3, 3)  # classes are counted over the whole set
        where = [next(i for i in range(5) if np.array_equal(image, IMAGES[i])) for image, _ in subset]
        assert all(np.array_equal(label, whole[i][1]) for i, (_, label) in zip(where, subset))
        chosen.append(tuple(where))
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1
    assert len(ImageFolderDataset(source, max_size=9)) == 5


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_data_loader_workers(tmp_path, cache, context):
    """They inherit the data set, or get it pickled, as spawned ones do."""
    data = ImageFolderDataset(archive(tmp_path / "a.zip", files()), use_labels=True, cache=cache)
    data[0]  # the zip is open here before the workers start
    workers = 2 if context == "fork" else 1
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=workers, multiprocessing_context=context)
    images, labels = (torch.cat(parts) for parts in zip(*loader))
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(labels.argmax(1), CLASSES)


def test_pickling_leaves_the_open_file_behind(source):
    copy = pickle.loads(pickle.dumps(ImageFolderDataset(source, use_labels=True)))
    assert np.array_equal(copy[1][0], IMAGES[1])


def message(path, **kwargs):
    """The one line that reading everything in `path` ends with."""
    with pytest.raises(UserError) as error:
        list(ImageFolderDataset(path, **kwargs))
    assert f"--data={path}" in error.value.message
    assert "\n" not in error.value.message
    return error.value.message


def test_errors_of_the_path(tmp_path):
    assert "doesn't exist" in message(tmp_path / "missing")
    assert "no images" in message(tmp_path)
    folder(tmp_path, {"a.txt": b"", ".hidden.png": b"", "__MACOSX/b.png": b""})
    assert "no images" in message(tmp_path)
    assert "neither" in message(tmp_path / "a.txt")
    (tmp_path / "cut.zip").write_bytes(archive(tmp_path / "a.zip", files()).read_bytes()[:-200])
    message(tmp_path / "cut.zip")


def corrupt(data):
    return data[:-30]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({NAMES[1]: corrupt(png(IMAGES[1]))}, NAMES[1]),
        ({NAMES[1]: b"%!PS-Adobe-3.0 EPSF-3.0"}, f"{NAMES[1]} is not a usable image: it is damaged, or in none of"),
        ({NAMES[1]: b""}, f"{NAMES[1]} is not a usable image: the file is empty"),
        ({NAMES[1]: png(IMAGES[1, :, :4, :4])}, "4x4x3"),
        ({NAMES[1]: png(IMAGES[1, :1])}, "8x8x1"),
        ({NAMES[0]: png(IMAGES[0, :, :4])}, "not square"),
    ],
)
def test_errors_of_images(tmp_path, change, expected):
    for path in (folder(tmp_path / "set", files() | change), archive(tmp_path / "set.zip", files() | change)):
        assert expected in message(path)
        assert expected in message(path, cache=True)


def test_an_error_in_a_worker_is_one_line(tmp_path):
    data = ImageFolderDataset(folder(tmp_path, files() | {NAMES[4]: b"broken"}))
    try:
        data[4]
    except UserError:
        passed_on = ExceptionWrapper(where="in DataLoader worker process 0")  # what a worker sends to its parent
    with pytest.raises(UserError) as error:
        passed_on.reraise()
    assert error.value.message.startswith(f"--data={tmp_path}: {NAMES[4]} is not a usable image")
    assert "\n" not in error.value.message


def test_size_limits(tmp_path, monkeypatch):
    path = folder(tmp_path, files())
    monkeypatch.setattr(dataset, "MAX_PIXELS", 63)
    assert "8x8 pixels" in message(path)
    monkeypatch.setattr(file_tree, "MAX_FILE_BYTES", 20)
    assert "larger" in message(path)


def test_a_large_set_is_not_cached(source, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_CACHE_BYTES", IMAGES.nbytes - 1)
    data = ImageFolderDataset(source, cache=True)
    assert data._cache is None
    assert np.array_equal(data[2][0], IMAGES[2])


@pytest.mark.parametrize(
    "labels",
    [
        b"{",
        b"[" * 100_000,
        b"\xff",
        b"[]",
        b"{}",
        b'{"Labels": []}',
        b'{"labels": 1}',
        b'{"labels": [["00000/img00000000.png"]]}',
        b'{"labels": [[0, 0]]}',
        b'{"labels": [["00000/img00000000.png", true]]}',
        b'{"labels": [["00000/img00000000.png", 1.5]]}',
        b'{"labels": [["00000/img00000000.png", -1]]}',
        b'{"labels": [["00000/img00000000.png", 1000000000000]]}',
        json.dumps({"labels": LABELS["labels"][:4]}).encode(),
        json.dumps({"labels": [*LABELS["labels"], ["../../secret.png", 0]]}).encode(),
        json.dumps({"labels": None}).encode(),
    ],
)
def test_errors_of_labels(tmp_path, labels):
    path = folder(tmp_path, files() | {"dataset.json": labels})
    assert "dataset.json" in message(path, use_labels=True)
    assert len(ImageFolderDataset(path)) == 5


def test_labels_that_would_be_lost_are_refused(tmp_path):
    path = folder(tmp_path, files())
    for content in ({"Labels": LABELS["labels"]}, {"classes": {}}, {}):
        (path / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="file name, class number"):
            read_labels(FileTree(path), NAMES)


def test_an_encrypted_zip(tmp_path):
    path = archive(tmp_path / "set.zip", files())
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the first entry's flags in the zip's directory
    path.write_bytes(data)
    assert f"can't read {NAMES[0]}: it is encrypted" in message(path)


def test_labels_need_a_file(tmp_path):
    contents = files()
    del contents["dataset.json"]
    assert "--cond=0" in message(folder(tmp_path, contents), use_labels=True)
    with pytest.raises(UserError, match="at least 1"):
        ImageFolderDataset(tmp_path, max_size=0)
