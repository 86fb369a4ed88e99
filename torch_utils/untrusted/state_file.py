"""Reads what `torch.save` wrote of nested dicts, lists, plain values and tensors, without running any of it.

torch.load isn't asked: its weights_only mode could be made to run code before torch 2.6 (CVE-2025-32434), and takes
the memory and the time that a file claims.
"""

import io
import math
import os
import zipfile
from collections import OrderedDict
from typing import Any

import torch

from dnnlib import open_plain

from .bounds import Budget, Refused, open_zip, weigh
from .inert_pickle import MAX_DIMENSIONS, MAX_OPERATIONS, STORAGE_DTYPES, Global, Machine, Storage, typed

MAX_PROGRAM_BYTES = 1 << 26  # of the pickle, which holds everything but the tensors' elements
MAX_REPEATED_BYTES = 1 << 26  # that all tensors may have beyond the elements stored, because they share them
LOCAL_HEADER_BYTES = 30  # of an entry in a zip, before its name
MAX_STATE_VALUES = 500_000


def read_state(path: str | os.PathLike) -> Any:
    """The value saved in a file, its tensors on the CPU.

    Errors: OSError when the file can't be read; ValueError (Refused is one) and others of damaged data otherwise.
    """
    with open_plain(path) as file:
        if file.read(4) != b"PK\x03\x04":  # older layouts, which are pickles
            raise ValueError("it doesn't begin as one")
        with open_zip(path) as archive:
            entries = _checked_entries(archive, os.fstat(file.fileno()).st_size)
            reader = _Reader(file, archive, entries)
            return reader.read()


def _checked_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """{name without the archive's own: entry}. Raises ValueError unless the archive is laid out as torch.save does."""
    found = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in found):
        raise ValueError("it is compressed")
    if any(entry.filename.endswith("constants.pkl") for entry in found):
        raise ValueError("it is a program")
    if sum(entry.file_size for entry in found) > size:
        raise ValueError("its parts overlap")
    entries = {entry.filename.partition("/")[2]: entry for entry in found}
    if len(entries) < len(found):
        raise ValueError("a part of it is there twice")
    return entries


class _Reader:
    """One file being read; storages are read when a tensor first asks for them."""

    def __init__(self, file: io.BufferedReader, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]):
        self._file, self._archive, self._entries = file, archive, entries
        self._storages: dict[str, Storage] = {}
        self._stored, self._claimed = 0, 0  # bytes

    def read(self) -> Any:
        if "byteorder" in self._entries and self._archive.read(self._entries["byteorder"]) != b"little":
            raise ValueError("it was written on a big-endian machine")
        if self._entries["data.pkl"].file_size > MAX_PROGRAM_BYTES:
            raise Refused("has more parts than any sound file of its kind")
        with self._archive.open(self._entries["data.pkl"]) as program:
            names = {**GLOBALS, "torch._utils _rebuild_tensor_v2": Global("tensor", self._tensor)}
            value = Machine(names, Budget(MAX_OPERATIONS, math.inf), self._storage).run(program)
        weigh(value, Budget(MAX_STATE_VALUES, math.inf))
        return value

    def _storage(self, identity: tuple) -> Storage:
        kind, storage_type, key, _device, count = identity
        if kind != "storage" or typed(count, int) < 0:
            raise ValueError("it refers to something that isn't stored in it")
        dtype = STORAGE_DTYPES[typed(storage_type, Global).name.removeprefix("torch ")]
        if key not in self._storages:
            entry = self._entries[f"data/{typed(key, str)}"]
            if entry.file_size != count * dtype.itemsize:
                raise ValueError("a tensor's elements are not as many as it claims")
            self._storages[key] = Storage(self._elements(entry).view(dtype))
            self._stored += entry.file_size
        storage = self._storages[key]
        if storage.values.dtype != dtype or len(storage.values) != count:
            raise ValueError("two tensors disagree about the elements that they share")
        return storage

    def _elements(self, entry: zipfile.ZipInfo) -> torch.Tensor:
        """The bytes of an entry, uint8 [file_size], read straight into the tensor's memory."""
        self._file.seek(entry.header_offset)
        header = self._file.read(LOCAL_HEADER_BYTES)
        lengths = [int.from_bytes(header[at : at + 2], "little") for at in (26, 28)]  # of its name and extra field
        self._file.seek(sum(lengths), os.SEEK_CUR)
        elements = torch.empty(entry.file_size, dtype=torch.uint8)
        if self._file.readinto(elements.numpy()) != entry.file_size:  # pyright: ignore[reportArgumentType]
            raise ValueError("it ends too early")
        return elements

    def _tensor(self, _: Machine, args: tuple) -> torch.Tensor:
        flat = typed(args[0], Storage).values
        offset = typed(args[1], int)
        size, stride = (tuple(typed(n, int) for n in typed(ns, tuple)[:MAX_DIMENSIONS]) for ns in args[2:4])
        if min(offset, *size, *stride, 0) < 0 or len(size) != len(stride):
            raise ValueError("a tensor has another shape than its elements")
        self._claimed += math.prod(size) * flat.element_size()
        if self._claimed > 2 * self._stored + MAX_REPEATED_BYTES:
            raise Refused("claims far larger tensors than it holds")
        return flat.as_strided(size, stride, offset)  # checks that the last element lies inside


def _no_call(_: Machine, __: tuple) -> Any:
    raise Refused("calls a type")


def _ordered_dict(_: Machine, args: tuple) -> OrderedDict:
    if args:
        raise Refused("builds a dict in a way that torch.save does not")
    return OrderedDict()


GLOBALS = {f"torch {name}": Global(f"torch {name}", _no_call) for name in STORAGE_DTYPES}
GLOBALS["collections OrderedDict"] = Global("collections OrderedDict", _ordered_dict)
