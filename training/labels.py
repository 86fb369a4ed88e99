"""Class labels of the images of a folder or zip: from dataset.json, or from the names of their folders."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from torch_utils.untrusted.bounds import parse_json

from .file_tree import DatasetError, FileTree

LABELS_FILE = "dataset.json"
MAX_LABELS_BYTES = 1 << 26  # of dataset.json; ImageNet's is 45 MB
MAX_LABEL_BYTES = 1 << 10  # of dataset.json for each image; parsed, a byte can take more than twenty
MAX_LABEL_VALUES = 16  # for each image, of which an entry takes three
MAX_CLASSES = 1 << 16


def read_labels(tree: FileTree, images: list[str]) -> list[int] | None:
    """The class of each of `images` by dataset.json = {"labels": [[name, class], …] or null}; None if it has no labels.

    The file lies at the top, or in the one folder that holds all images; its names are relative to its own folder.
    Errors: DatasetError when the file is malformed, gives an image two classes, or its names aren't exactly `images`.
    """
    file = _labels_file(tree, images)
    if file is None:
        return None
    what, folder = f"{tree.what}: {file}", file.removesuffix(LABELS_FILE)
    content = tree.read(file, min(MAX_LABELS_BYTES, MAX_LABEL_BYTES * (len(images) + 64)))
    try:
        content = parse_json(content, MAX_LABEL_VALUES * (len(images) + 64), _without_repeats)
    except ValueError as error:
        raise DatasetError(f"{what} is not valid JSON: {str(error) or type(error).__name__}") from None
    entries = content.get("labels", "missing") if isinstance(content, dict) else "malformed"
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise DatasetError(f'{what} must be {{"labels": [[file name, class number], …]}}, or {{"labels": null}}')
    known, labels, by_letters = set(images), {}, _by_letters(images)
    for entry in entries:
        match entry:
            case [str() as name, int() as label] if type(label) is int and 0 <= label < MAX_CLASSES:
                name = folder + name if folder + name in known else folder + _clean(name)
                name = name if name in known else by_letters.get(_letters(name), name)
                if labels.setdefault(name, label) != label:
                    raise DatasetError(f"{what} gives {name} two classes, {labels[name]} and {label}; remove one entry")
            case _:
                raise DatasetError(
                    f"{what}: {str(entry)[:80]} is not [file name, class number from 0 to {MAX_CLASSES - 1}];"
                    " number the classes, or make them folders for edm.dataset_tool --labels-from-folders"
                )
    for name in sorted(labels.keys() - known)[:1]:
        raise DatasetError(f"{what} labels {name}, which isn't there; remove the entry, or add the image")
    for name in sorted(known - labels.keys())[:1]:
        raise DatasetError(f"{what} has no label for {name}; add one, or remove the image")
    return [labels[name] for name in images]


def _labels_file(tree: FileTree, images: list[str]) -> str | None:
    files = [name for name in tree.names() if name.split("/")[-1] == LABELS_FILE]
    if not files or LABELS_FILE in files:
        return LABELS_FILE if files else None
    if len(files) > 1:
        raise DatasetError(f"{tree.what} holds {files[0]} and {files[1]}; name the folder of one, or remove one")
    folder = files[0].removesuffix(LABELS_FILE)
    for image in images:
        if not image.startswith(folder):
            raise DatasetError(f"{tree.what}: {files[0]} knows the images in {folder} only, but there is {image} too")
    return files[0]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"it repeats the key {key[:80]!r}")
        content[key] = value
    return content


def _clean(name: str) -> str:
    """A name as FileTree writes it: `.\\a\\0.png` is `a/0.png`."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _letters(name: str) -> str:
    """A name in one of Unicode's two spellings of letters such as é, of which macOS prefers the other."""
    return unicodedata.normalize("NFC", name)


def _by_letters(names: list[str]) -> dict[str, str]:
    """The names by their letters, except for names that differ in their spelling only."""
    counts = Counter(map(_letters, names))
    return {_letters(name): name for name in names if counts[_letters(name)] == 1}


def labels_from_folders(tree: FileTree, images: list[str]) -> tuple[list[int], dict[int, str]]:
    """(class of each of `images`, {class: folder}), a class being a folder of the topmost level that has several.

    If all their names are whole numbers, a folder's number is its class. Otherwise the class is the folder's place in
    natural order: image2 comes before image10.
    Errors: DatasetError when an image lies in no such folder, or when it isn't clear which folders are the classes.
    """
    parents = [tuple(image.split("/")[:-1]) for image in images]
    distinct = set(parents)
    depth = _common_depth(distinct) if len(distinct) > 1 else len(parents[0]) - 1
    folders: dict[str, set[str]] = {}  # class folder -> the folders in which its images lie
    for image, parent in zip(images, parents):
        if len(parent) <= max(depth, 0):
            raise DatasetError(f"{tree.what}: {image} lies in no class folder; --labels-from-folders needs one")
        folders.setdefault(parent[depth], set()).add("/".join(parent))
    for name, places in folders.items():
        if len(places) > 1:
            first, second = sorted(places)[:2]
            raise DatasetError(
                f"{tree.what}: images of {name} lie in {first} and in {second}, so it isn't clear which folders are the"
                " classes; name a folder that holds class folders without folders in them"
            )
    classes = _number(tree, folders)
    return [classes[parent[depth]] for parent in parents], {number: name for name, number in classes.items()}


def _common_depth(parents: Iterable[tuple[str, ...]]) -> int:
    """How many folders all paths begin with."""
    return sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*parents)))


def _number(tree: FileTree, folders: Iterable[str]) -> dict[str, int]:
    """The class of each folder, in ascending order."""
    names = sorted(folders, key=_natural)
    numbered = all(re.fullmatch("[0-9]{1,9}", name) for name in names)
    first_of: dict[int | str, str] = {}
    for name in names:
        first = first_of.setdefault(int(name) if numbered else _letters(name).casefold().strip(), name)
        if first != name:
            raise DatasetError(f"{tree.what}: are the class folders {first} and {name} one class? Rename or merge them")
    classes = {name: int(name) if numbered else i for i, name in enumerate(names)}
    if max(classes.values()) >= MAX_CLASSES:
        raise DatasetError(
            f"{tree.what}: the class folders go up to {names[-1]}, but classes to {MAX_CLASSES - 1} only; rename them"
        )
    return classes


def _natural(name: str) -> list[tuple[int, str, str]]:
    """A sort key by which numbers inside names count as numbers."""
    parts = re.split("([0-9]+)", name)
    digits = [part.lstrip("0") if part.isdecimal() else "" for part in parts]
    return [(len(number), number, part) for number, part in zip(digits, parts)]
