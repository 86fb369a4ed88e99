"""Names, links and labels in folders and zips: each image is found under one name, or refused in one line."""

import io
import json
import os
import pickle
import stat
import zipfile

import pytest
from PIL import Image

from dnnlib import UserError
from training.dataset import ImageFolderDataset, image_names
from training.file_tree import FileTree
from training.labels import labels_from_folders, read_labels


def png(value=0):
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "png")
    return file.getvalue()


def archive(path, names, labels=None, labels_name="dataset.json"):
    """A zip with an image for each of `names`, exactly as they are spelled, and perhaps labels."""
    contents = [(name, png(i) if name[-1] not in "/\\" else b"") for i, name in enumerate(names)]
    if labels is not None:
        contents.append((labels_name, json.dumps({"labels": labels}).encode()))
    with zipfile.ZipFile(path, "w") as file:
        for name, data in contents:
            info = zipfile.ZipInfo("x")
            info.filename = name
            file.writestr(info, data)
    return path


def folder(path, names, labels=None, labels_name="dataset.json"):
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(i))
    if labels is not None:
        (path / labels_name).write_text(json.dumps({"labels": labels}))
    return path


def refused(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in error.value.message
    return error.value.message


def labels_of(path):
    tree = FileTree(path)
    return read_labels(tree, image_names(tree))


def classes_of(path):
    tree = FileTree(path)
    return labels_from_folders(tree, image_names(tree))


@pytest.mark.parametrize("spelling", ["{}", "./{}", "/{}", ".//./{}", "{backslash}", ".\\{backslash}"])
def test_spellings_of_names_in_a_zip(tmp_path, spelling):
    plain = ["a/0.png", "a/1.png", "b/0.png"]
    names = [spelling.format(name, backslash=name.replace("/", "\\")) for name in plain]
    path = archive(tmp_path / "x.zip", names, [list(pair) for pair in zip(plain, [2, 0, 1])])
    assert FileTree(path).names() == [*plain, "dataset.json"]
    data = ImageFolderDataset(path, use_labels=True)
    assert [(int(image[0, 0, 0]), int(label.argmax())) for image, label in data] == [(0, 2), (1, 0), (2, 1)]
    assert classes_of(path) == ([0, 0, 1], {0: "a", 1: "b"})
    copy = pickle.loads(pickle.dumps(data))
    assert copy[2][0][0, 0, 0] == 2


def test_spellings_of_names_in_the_labels(tmp_path):
    labels = [[".\\a\\0.png", 1], ["./b//1.png", 0]]
    assert labels_of(folder(tmp_path / "set", ["a/0.png", "b/1.png"], labels)) == [1, 0]


def test_unicode_spellings_of_names_in_the_labels(tmp_path):
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    for i, (name, labelled) in enumerate([(composed, decomposed), (decomposed, composed)]):
        path = archive(tmp_path / f"{i}.zip", ["1.png", name], [["1.png", 0], [labelled, 1]])
        assert labels_of(path) == [0, 1]
    both = archive(tmp_path / "both.zip", [composed, decomposed], [[composed, 0], [decomposed, 1]])
    assert dict(zip(image_names(FileTree(both)), labels_of(both))) == {composed: 0, decomposed: 1}


@pytest.mark.parametrize("make", [archive, folder])
def test_a_wrapping_folder(tmp_path, make):
    names = ["my data/a/0.png", "my data/b/1.png"]
    path = make(tmp_path / "x.zip", names, [["b/1.png", 5], ["a/0.png", 3]], "my data/dataset.json")
    assert labels_of(path) == [3, 5]
    assert classes_of(path) == ([0, 1], {0: "a", 1: "b"})
    names.append("other/2.png")
    path = make(tmp_path / "y.zip", names, [["b/1.png", 5], ["a/0.png", 3]], "my data/dataset.json")
    assert "other/2.png" in refused(labels_of, path)


def test_several_labels_files(tmp_path):
    path = folder(tmp_path, ["train/0.png", "val/0.png"])
    for part in ("train", "val"):
        (path / part / "dataset.json").write_text('{"labels": [["0.png", 0]]}')
    assert "train/dataset.json and val/dataset.json" in refused(labels_of, path)
    (path / "dataset.json").write_text('{"labels": [["train/0.png", 0], ["val/0.png", 1]]}')
    assert labels_of(path) == [0, 1]


def test_ambiguous_entries_of_a_zip(tmp_path):
    assert "a/0.png" in refused(FileTree(archive(tmp_path / "1.zip", ["a/0.png", "a\\0.png"])).names)
    with pytest.warns(UserWarning, match="Duplicate"):
        path = archive(tmp_path / "2.zip", ["0.png", "0.png"])
    assert "two files" in refused(FileTree(path).names)
    assert "'..'" in refused(FileTree(archive(tmp_path / "3.zip", ["a/..\\..\\0.png"])).names)
    with zipfile.ZipFile(tmp_path / "4.zip", "w") as file:
        info = zipfile.ZipInfo("cat")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "../far/cat")
    assert "cat is a link" in refused(FileTree(tmp_path / "4.zip").names)


def test_links_to_folders_are_followed(tmp_path):
    path = folder(tmp_path / "set", ["dog/0.png"])
    folder(tmp_path / "far", ["cat/1.png", "cat/deep/2.png"])
    (path / "cat").symlink_to(tmp_path / "far" / "cat")
    assert FileTree(path).names() == ["cat/1.png", "cat/deep/2.png", "dog/0.png"]
    assert len(list(ImageFolderDataset(path))) == 3


@pytest.mark.parametrize("target", [".", "..", "/", "dog", "../back", "../outside"])
def test_links_that_lead_in_circles_or_to_the_same_images(tmp_path, target):
    path = folder(tmp_path / "set", ["dog/0.png"])
    (tmp_path / "back").symlink_to(path)
    folder(tmp_path / "outside", ["x/0.png"])
    (tmp_path / "outside" / "again").symlink_to(tmp_path / "outside")
    (path / "link").symlink_to(target, target_is_directory=True)
    assert "the same folder" in refused(FileTree(path).names)


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_links_to_nothing(tmp_path, target):
    path = folder(tmp_path / "set", ["dog/0.png"])
    (path / "link").symlink_to(target)
    assert "link is a link to what isn't there" in refused(FileTree(path).names)
    (path / "link").rename(path / ".link")
    assert FileTree(path).names() == ["dog/0.png"]


def test_a_folder_that_can_not_be_listed(tmp_path, monkeypatch):
    path, scandir = folder(tmp_path / "set", ["dog/0.png", "cat/0.png"]), os.scandir

    def forbid(place):
        if str(place).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", forbid)
    assert "can't list the folder cat: Permission denied" in refused(FileTree(path).names)


def test_hidden_files_and_empty_folders(tmp_path):
    names = ["a/0.png", "a/.1.png", ".git/2.png", "__MACOSX/a/3.png", "__MACOSX_4.png", "c/.DS_Store"]
    path = folder(tmp_path / "set", names)
    (path / "b" / "deep").mkdir(parents=True)
    for tree in (FileTree(path), FileTree(archive(tmp_path / "x.zip", [*names, "b/", "b\\deep\\", "c/", "a/"]))):
        assert tree.names() == ["__MACOSX_4.png", "a/0.png"]
        assert tree.empty_folders() == ["b/deep", "c"]
        assert "a/.1.png" in tree.hidden()


def test_names_that_are_not_unicode(tmp_path):
    path = folder(tmp_path / "set", ["0.png"])
    try:
        with open(os.fsencode(path) + b"/caf\xe9.png", "wb") as file:
            file.write(png(7))
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    assert len(list(ImageFolderDataset(path))) == 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b", "a", "c"], {0: "a", 1: "b", 2: "c"}),
        ([str(i) for i in range(12)], {i: str(i) for i in range(12)}),
        (["1", "2", "10"], {1: "1", 2: "2", 10: "10"}),
        (["007", "011"], {7: "007", 11: "011"}),
        (["image10", "image2", "image1"], {0: "image1", 1: "image2", 2: "image10"}),
        (["x", "10", "9"], {0: "9", 1: "10", 2: "x"}),
        (["9" * 150, "cat"], {0: "9" * 150, 1: "cat"}),
    ],
)
def test_numbers_of_class_folders(tmp_path, names, expected):
    path = folder(tmp_path / "set", [f"{name}/0.png" for name in names])
    labels, folders = classes_of(path)
    assert folders == expected
    assert [folders[label] for label in labels] == sorted(names)


def test_class_folders_with_one_folder_each(tmp_path):
    path = folder(tmp_path, ["train/n01/images/0.png", "train/n02/images/0.png", "train/n02/images/1.png"])
    assert classes_of(path) == ([0, 1, 1], {0: "n01", 1: "n02"})
    assert classes_of(folder(tmp_path / "one", ["only/0.png", "only/1.png"])) == ([0, 0], {0: "only"})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0.png", "1.png"], "0.png lies in no class folder"),
        (["0.png", "a/1.png"], "0.png lies in no class folder"),
        (["set/0.png", "set/a/1.png"], "set/0.png lies in no class folder"),
        (["a/0.png", "a/deep/1.png", "b/2.png"], "a and in a/deep"),
        ([f"{s}/{c}/0.png" for s in ("train", "val") for c in ("cat", "dog")], "train/cat and in train/dog"),
        (["7/0.png", "07/1.png"], "07 and 7"),
        (["Cat/0.png", "cat/1.png"], "Cat and cat"),
        (["cat /0.png", "cat/1.png"], "cat and cat "),
        (["caf\u00e9/0.png", "cafe\u0301/1.png"], "are the class folders"),
        (["1/0.png", "70000/0.png"], "70000"),
    ],
)
def test_ambiguous_class_folders(tmp_path, names, expected):
    assert expected in refused(classes_of, archive(tmp_path / "x.zip", names))


def test_labels_that_contradict(tmp_path):
    names = ["a/0.png", "a/1.png"]
    twice = [["a/0.png", 0], ["./a/0.png", 2], ["a/1.png", 1]]
    assert "a/0.png two classes, 0 and 2" in refused(labels_of, folder(tmp_path / "1", names, twice))
    twice[1][1] = 0
    assert labels_of(folder(tmp_path / "2", names, twice)) == [0, 1]
    path = folder(tmp_path / "3", names, [])
    (path / "dataset.json").write_text('{"labels": [["a/0.png", 0], ["a/1.png", 1]], "labels": null}')
    assert "repeats the key 'labels'" in refused(labels_of, path)
