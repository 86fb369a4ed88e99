"""Snapshots in EDM's pickle format: read without running their code, written so that EDM's own tools open them."""

import ast
import copy
import hashlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from dnnlib import UserError
from torch_utils import persistence

from .bounds import Budget, Refused, weigh
from .inert_pickle import GLOBALS, Record, read_file

Network = TypeVar("Network", bound=torch.nn.Module)

MAX_PARTS = 50_000  # modules, parameters and buffers; the largest published network has below a tenth of it
MAX_DEPTH = 32
MAX_NAME = 100  # characters; the names of nested modules are joined
MAX_PLAIN_DEPTH, MAX_PLAIN_VALUES, MAX_PLAIN_TEXT = 4, 10_000, 1 << 20
MAX_PLAIN_NUMBER = 1 << 63
VERSION = 6  # of the format
TRAILER = b"sha256 of the pickle: "  # and then its hash: whoever unpickles the file stops before
HASHED_BYTES = 1 << 24  # at once


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The snapshot's items: plain values and `Record`s, which `build` turns into objects.

    Errors: UserError, one line that names the file.
    """
    contents = read_file(path)
    if not _is_whole(path):
        raise UserError(f"{path}: damaged, its contents don't have their checksum: fetch it again")
    if type(contents) is not dict:
        raise UserError(f"{path}: not a snapshot in EDM's format: it holds a {type(contents).__name__}")
    return contents


def has_checksum(path: str | os.PathLike) -> bool:
    """Whether a file ends in the hash of the pickle in it."""
    with open(path, "rb") as file:
        file.seek(_end(path))
        return file.read(len(TRAILER)) == TRAILER


def _end(path: str | os.PathLike) -> int:
    """Where the pickle in a file ends if its hash follows it."""
    return max(os.path.getsize(path) - len(TRAILER) - hashlib.sha256().digest_size, 0)


def _is_whole(path: str | os.PathLike) -> bool:
    """Whether a file ends with its pickle, or in the hash of that."""
    digest, left = hashlib.sha256(), _end(path)
    with open(path, "rb") as file:
        if not has_checksum(path):
            file.seek(-1, os.SEEK_END)
            return file.read() == pickle.STOP
        while left and (data := file.read(min(left, HASHED_BYTES))):
            digest.update(data)
            left -= len(data)
        return file.read() == TRAILER + digest.digest()


def build(record: Any, classes: Mapping[str, Callable[..., Any]], source: Any) -> Any:
    """An object of our class of the record's name, with its constructor arguments and, for a module, its weights.

    record:   a persistent object's `Record`.
    classes:  class name -> class; no other class is built.
    source:   the file, for messages.
    Errors: UserError when the class is unknown or the arguments or weights don't fit it.
    """
    if type(record) is not Record:
        raise UserError(f"{source}: a persistent object is missing where one is expected")
    if record.class_name not in classes:
        known = ", ".join(classes)
        raise UserError(
            f"{source}: holds a {record.class_name[:80]!r}, which is none of: {known}; give others as classes="
        )
    cls = classes[record.class_name]
    args, kwargs = record.state.get("_init_args"), record.state.get("_init_kwargs")
    if type(args) is not tuple or type(kwargs) is not dict or not is_plain((args, kwargs)):
        raise UserError(f"{source}: the constructor arguments of {record.class_name} are not plain values")
    is_network = not inspect.isclass(cls) or issubclass(cls, torch.nn.Module)  # a function builds a network
    state = state_dict(record, source) if is_network else None
    return persistence.construct(cls, args, {str(key): value for key, value in kwargs.items()}, state, source)


def state_dict(record: Record, source: Any) -> dict[str, torch.Tensor]:
    """{name: tensor} of a module's record, named as `Module.state_dict()` does it."""
    tensors, pending, parts = {}, [("", record, 0)], 0
    try:
        while pending:
            prefix, module, depth = pending.pop()
            kinds = [module.state[kind] for kind in ("_parameters", "_buffers", "_modules")]
            parts += 1 + sum(map(len, kinds))  # the same dict may be there many times
            if parts > MAX_PARTS or depth > MAX_DEPTH or any(len(name) > MAX_NAME for kind in kinds for name in kind):
                raise ValueError
            transient = module.state["_non_persistent_buffers_set"]
            if type(transient) is not set:  # a long list would be slow to search
                raise TypeError
            parameters, buffers, children = kinds
            for name, tensor in (*parameters.items(), *buffers.items()):
                if tensor is None or name in transient:
                    continue
                if type(tensor) is not torch.Tensor:
                    raise TypeError
                tensors[prefix + name] = tensor
            pending += [(f"{prefix}{name}.", child, depth + 1) for name, child in children.items() if child is not None]
    except (AttributeError, LookupError, TypeError, ValueError):
        raise UserError(f"{source}: the network in it is damaged: fetch the file again") from None
    return tensors


def is_plain(value: Any) -> bool:
    """Whether `value` consists of numbers, text and short nested containers of them."""
    try:
        weigh(value, Budget(MAX_PLAIN_VALUES), MAX_PLAIN_TEXT, MAX_PLAIN_DEPTH)
    except Refused:
        return False
    pending = [value]
    while pending:
        value = pending.pop()
        if type(value) in (list, tuple, dict):
            pending += value.values() if type(value) is dict else value
        elif not (value is None or type(value) in (bool, float, str) or _is_short_int(value)):
            return False
    return True


def _is_short_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= MAX_PLAIN_NUMBER


def write(file: BinaryIO, **contents: Any) -> None:
    """Pickles objects of persistent classes and plain values, as EDM does: `write(file, ema=net)`.

    The source of every class's module goes into the file, with what it imports from its own package, so that EDM's
    tools can rebuild the objects without this project. Modules go as they are: copy, move to the CPU and freeze them
    before. The checksum of the pickle comes after its end, where those tools don't look.

    Errors: UserError when something in it has a class that the format has no place for.
    """
    hashing = _Hashing(file)
    _Pickler(hashing, protocol=4).dump(contents)
    file.write(TRAILER + hashing.digest.digest())


class _Hashing:
    """A file that keeps the sha256 of what is written to it."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if persistence.is_persistent(obj):
            return persistence._reconstruct_persistent_obj, (self._meta(obj),)
        if inspect.isclass(obj) or inspect.isroutine(obj):  # pickled by name, which our reader and EDM's must admit
            name = f"{obj.__module__} {obj.__qualname__}"
            if name not in GLOBALS:
                raise UserError(f"{name.replace(' ', '.')} has no place in an EDM pickle: save as .safetensors instead")
        if isinstance(obj, torch.dtype):  # pickles as a bare name
            raise UserError(f"{obj} has no place in an EDM pickle: save as .safetensors instead")
        return NotImplemented

    def _meta(self, obj: Any) -> dict[str, Any]:
        cls = type(obj)
        return {
            "type": "class",
            "version": VERSION,
            "module_src": self._source(cls.__module__),
            "class_name": cls.__name__,
            "state": {name: _without_numpy(value) for name, value in vars(obj).items()},
        }

    def _source(self, module: str) -> str:
        """One string object for each module, so that the file holds it once."""
        sources = vars(self).setdefault("sources", {})
        if module not in sources:
            sources[module] = standalone_source(module)
        return sources[module]


def standalone_source(module: str) -> str:
    """The source of an imported module that runs without the module's package.

    Each `from .other import ...` at its top level is replaced by the source of `other`, once.
    """
    return "".join(_standalone_lines(module, {module}, nested=False))


def _standalone_lines(module: str, included: set[str], nested: bool) -> list[str]:
    """included: the modules whose source is in the text already. nested: whether this one is an inner part of it."""
    source, package = inspect.getsource(sys.modules[module]), sys.modules[module].__package__
    lines, text, done = source.splitlines(keepends=True), [], 0
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.end_lineno is None:
            continue
        is_relative = node.level == 1
        if is_relative or (nested and node.module == "__future__"):  # which only stands at the beginning
            text += lines[done : node.lineno - 1]
            done = node.end_lineno
        name = f"{package}.{node.module}"
        if is_relative and name not in included:
            included.add(name)
            text += _standalone_lines(name, included, nested=True)
        if is_relative:
            text += [f"{alias.asname} = {alias.name}\n" for alias in node.names if alias.asname]
    return text + lines[done:]


def _without_numpy(value: Any) -> Any:
    """Numpy scalars as Python numbers: their pickles name a module that differs between NumPy 1 and 2."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_without_numpy(v) for v in value)
    if type(value) is dict:
        return {key: _without_numpy(v) for key, v in value.items()}
    return value


def frozen_copy(net: Network) -> Network:
    """A copy on the CPU, in eval mode and without gradients, as snapshots hold it."""
    return copy.deepcopy(net).eval().requires_grad_(False).cpu()
