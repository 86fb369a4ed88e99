"""Reads the pickles of EDM and SiD without running anything that they contain.

A pickle is a program for a small stack machine, and Python's own machine calls whatever function the file names. The
machine here calls nothing from the file: it knows the handful of names that such snapshots use, builds plain values and
tensors for them itself, and turns every persistent object into an inert `Record`. Any other name is refused.
"""

import io
import math
import mmap
import os
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dnnlib import UserError, open_plain

from .bounds import Budget, Refused

MAX_OPERATIONS = 1_000_000  # the largest published network's snapshot takes less than a fifth of it
MAX_KEY = 1 << 32  # of whole numbers as keys: with larger ones a file can make them all collide in Python's dicts
MAX_DIMENSIONS = 8
STORAGE_MAGIC = 0x1950A86A20F9469CFC6C  # torch's legacy format, which storages inside a pickle have
STORAGE_PROTOCOL = 1001
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
NUMBER_CODES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


@dataclass(slots=True, eq=False)
class Record:
    """A pickled object as plain data, without behaviour: the name of its class and its `__dict__`."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


def read_file(path: str | os.PathLike) -> Any:
    """The value pickled in a file: plain values, CPU tensors, `Array`s and `Record`s.

    Errors: UserError, one line that names the file, when it isn't such a pickle, is damaged or names anything else.
    """
    try:
        with open_plain(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            # Mapped: a claimed length cannot allocate more than the file has.
            return Machine({**GLOBALS, **ARRAY_GLOBALS}).run(view)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: check the file name") from None
    except Refused as refusal:
        raise UserError(f"{path}: the file {refusal}; only snapshots in EDM's format are read") from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path}: not a snapshot in EDM's format, or damaged: fetch it again") from None


def read_cifar10(data: bytes) -> tuple[np.ndarray, list[Any]]:
    """(pixels uint8 [N, 3072], labels) of a batch of CIFAR-10's Python version. Errors: ValueError when it is none."""
    try:
        batch = Machine({**ARRAY_GLOBALS, **CIFAR10_GLOBALS}).run(io.BytesIO(data))
        values = {key.decode() if type(key) is bytes else key: value for key, value in typed(batch, dict).items()}
        return _cifar10_pixels(typed(values["data"], Array).numpy()), typed(values["labels"], list)
    except Refused as refusal:
        raise ValueError(f"a batch {refusal}, which CIFAR-10 has no use for") from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        raise ValueError(f"not a batch of CIFAR-10, or damaged: {error}") from None


def _cifar10_pixels(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise TypeError(f"an array of {pixels.dtype} {list(pixels.shape)}, not uint8 [N, 3072]")
    return pixels


# --- values that stand for the admitted names: markers of our own, never the real functions


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """An admitted name; `build(machine, args)` does what calling it would."""

    name: str
    build: Callable[["Machine", tuple], Any]


@dataclass(slots=True, eq=False)
class _Dtype:
    code: str
    order: str = "="


@dataclass(slots=True, eq=False)
class Storage:
    """One flat tensor, `[elements]`."""

    values: torch.Tensor


@dataclass(slots=True, eq=False)
class Array:
    """A pickled numpy array of plain numbers.

    state: (version, shape, dtype, whether in Fortran order, bytes), as numpy pickles it.
    """

    state: tuple = ()

    def numpy(self) -> np.ndarray:
        """The array, read-only. Errors: TypeError or ValueError when the parts don't fit together."""
        _, shape, dtype, fortran, data = self.state
        numbers = np.dtype(typed(dtype, _Dtype).code).newbyteorder(dtype.order)
        shape = tuple(typed(n, int) for n in typed(shape, tuple)[:MAX_DIMENSIONS])
        values = np.frombuffer(_bytes(data), numbers)
        if min(shape, default=0) < 0:  # numpy would choose that dimension itself
            raise ValueError("an array has a negative size")
        return values.reshape(shape, order="F" if typed(fortran, bool) else "C")


def _bytes(text: Any) -> bytes:
    """The bytes of Python 2's strings, which are read as Latin-1."""
    return text.encode("latin1") if type(text) is str else typed(text, bytes)


def _persistent_object(_: "Machine", args: tuple) -> Record:
    (meta,) = args
    if meta["type"] != "class" or meta["version"] != 6:
        raise Refused("holds a persistent object of another version")
    return Record(typed(meta["class_name"], str), typed(meta["state"], dict))


def _dtype(_: "Machine", args: tuple) -> _Dtype:
    code = typed(args[0], str)
    if code not in NUMBER_CODES:
        raise Refused("holds a numpy type that is not a plain number")
    return _Dtype(code)


def _scalar(_: "Machine", args: tuple) -> int | float | bool:
    dtype, data = typed(args[0], _Dtype), typed(args[1], bytes)
    (value,) = np.frombuffer(data, np.dtype(dtype.code).newbyteorder(dtype.order))
    return value.item()


def _tensor(_: "Machine", args: tuple) -> torch.Tensor:
    flat = typed(args[0], Storage).values
    offset = typed(args[1], int)
    size, stride = (tuple(typed(n, int) for n in typed(ns, tuple)[:MAX_DIMENSIONS]) for ns in args[2:4])
    if min(offset, *size, *stride, 0) < 0 or len(size) != len(stride) or math.prod(size) > flat.numel():
        raise ValueError("a tensor is larger than its storage")  # stride 0 would make few bytes look like many
    return flat.as_strided(size, stride, offset)  # checks that the last element lies inside


def _plain_dict(_: "Machine", args: tuple) -> dict:
    if args:
        raise Refused("builds a dict in a way that snapshots do not")
    return {}


def typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    return value


def _storage(machine: "Machine", args: tuple) -> Storage:
    """A storage in torch's legacy format: five small pickles, then the element count and the elements.

    Read here rather than by torch.load, whose weights_only mode could be made to run code before torch 2.6.
    """
    data = typed(args[0], bytes)
    if id(data) not in machine.storages:  # once for each, so that repeats take no memory
        file = io.BytesIO(data)
        read = Machine({f"torch {name}": Global(name, _no_call) for name in STORAGE_DTYPES}, machine.budget).run
        if read(file) != STORAGE_MAGIC or read(file) != STORAGE_PROTOCOL:
            raise ValueError("not a storage")
        read(file)  # facts about the machine that wrote it; the elements are little-endian on all
        # The device that wrote it doesn't matter: what was on a GPU is read onto the CPU.
        kind, storage_type, key, _device, count, view = typed(read(file), _PersistentId).value
        if kind != "storage" or view is not None or read(file) != [typed(key, str)]:
            raise ValueError("not a plain storage")
        dtype = STORAGE_DTYPES[typed(storage_type, Global).name]
        elements = file.read()
        claimed = int.from_bytes(elements[:8], "little", signed=True)
        if claimed != typed(count, int) or len(elements) - 8 != count * dtype.itemsize:
            raise ValueError("a storage has another size than it claims")
        flat = torch.frombuffer(bytearray(elements[8:]), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        machine.storages[id(data)] = (data, Storage(flat))  # `data` stays, so that its id does
    return machine.storages[id(data)][1]


def _no_call(_: "Machine", __: tuple) -> Any:
    raise Refused("calls a type")


def _module_dict(_: "Machine", args: tuple) -> Record:
    if args:
        raise Refused("builds a ModuleDict in a way that snapshots do not")
    return Record("ModuleDict")


GLOBALS = {
    key: Global(key, build)
    for key, build in {
        "torch_utils.persistence _reconstruct_persistent_obj": _persistent_object,
        "torch.nn.modules.container ModuleDict": _module_dict,
        "torch._utils _rebuild_parameter": lambda _, args: typed(args[0], torch.Tensor),
        "torch._utils _rebuild_tensor_v2": _tensor,
        "torch.storage _load_from_bytes": _storage,
        "collections OrderedDict": _plain_dict,
        "dnnlib.util EasyDict": _plain_dict,
        "numpy dtype": _dtype,
        "numpy.core.multiarray scalar": _scalar,
        "numpy._core.multiarray scalar": _scalar,
    }.items()
}
ARRAY_GLOBALS = {  # of numpy arrays, which only the files of others hold
    key: Global(key, build)
    for key, build in {
        "numpy ndarray": _no_call,
        "numpy dtype": _dtype,
        "numpy.core.multiarray _reconstruct": lambda _, args: Array(),
        "numpy._core.multiarray _reconstruct": lambda _, args: Array(),
    }.items()
}
# How Python 3 writes bytes for Python 2.
CIFAR10_GLOBALS = {"_codecs encode": Global("_codecs encode", lambda _, args: _bytes(args[0]))}


# --- the stack machine


@dataclass(frozen=True, slots=True)
class _PersistentId:
    value: tuple


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *(
        "SHORT_BINSTRING",
        "BINSTRING",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "SHORT_BINBYTES",
        "BINBYTES",
        "BINBYTES8",
    ),
}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
IGNORED = {"PROTO", "FRAME", "STOP"}


class Machine:
    """One stack, one memo; the `budget` of operations is shared by the pickles within a pickle.

    storage_of: gives the storage that a persistent id stands for; without it, ids stay what they are.
    """

    def __init__(
        self,
        admitted: Mapping[str, Global],
        budget: Budget | None = None,
        storage_of: Callable[[tuple], "Storage"] | None = None,
    ):
        self._admitted, self._storage_of = admitted, storage_of
        self.budget = budget or Budget(MAX_OPERATIONS, math.inf)  # of time: storages may be large
        self.storages: dict[int, tuple[bytes, Storage]] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        """Reads the pickle at the file's position and returns its value; the position is behind it afterwards."""
        self._stack, self._marks, self._memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            self.budget.spend()
            self._step(opcode.name, argument)
        (value,) = self._stack
        return value

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name not in IGNORED:
            operation = getattr(self, f"_op_{name.lower()}", None)
            if operation is None:
                raise Refused(f"uses the pickle operation {name}")
            operation(argument)

    def _pop(self, count: int) -> list[Any]:
        """The last `count` values, which must lie above the last mark."""
        start = len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise IndexError("stack underflow")
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _pop_mark(self) -> list[Any]:
        values = self._pop(len(self._stack) - self._marks[-1])
        self._marks.pop()
        return values

    def _top(self, kind: type) -> Any:
        top = self._stack[-1]
        return top if kind is dict and type(top) is OrderedDict else typed(top, kind)

    def _op_pop(self, _: None) -> None:
        self._pop(1)

    def _op_tuple(self, _: None) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _op_tuple1(self, _: None) -> None:
        self._stack.append(tuple(self._pop(1)))

    def _op_tuple2(self, _: None) -> None:
        self._stack.append(tuple(self._pop(2)))

    def _op_tuple3(self, _: None) -> None:
        self._stack.append(tuple(self._pop(3)))

    def _op_append(self, _: None) -> None:
        values = self._pop(1)
        self._top(list).extend(values)

    def _op_appends(self, _: None) -> None:
        values = self._pop_mark()
        self._top(list).extend(values)

    def _op_additems(self, _: None) -> None:
        values = self._pop_mark()
        self._top(set).update(_key(value) for value in values)

    def _op_setitem(self, _: None) -> None:
        key, value = self._pop(2)
        self._top(dict)[_key(key)] = value

    def _op_setitems(self, _: None) -> None:
        values = self._pop_mark()
        if len(values) % 2:
            raise ValueError("a key without a value")
        self._top(dict).update((_key(key), value) for key, value in zip(values[::2], values[1::2]))

    def _op_global(self, name: str) -> None:
        if name not in self._admitted:
            raise Refused(f"asks for {name.replace(' ', '.')[:80]!r}")
        self._stack.append(self._admitted[name])

    def _op_stack_global(self, _: None) -> None:
        module, name = self._pop(2)
        self._op_global(f"{typed(module, str)} {typed(name, str)}")

    def _op_reduce(self, _: None) -> None:
        function, args = self._pop(2)
        self._stack.append(typed(function, Global).build(self, typed(args, tuple)))

    _op_newobj = _op_reduce

    def _op_build(self, _: None) -> None:
        (state,) = self._pop(1)
        target = self._stack[-1]
        if type(target) is Record:
            target.state = typed(state, dict)
        elif type(target) is _Dtype:
            target.order = typed(typed(state, tuple)[1], str)
        elif type(target) is Array:
            target.state = typed(state, tuple)
        elif type(target) is OrderedDict:  # a module's state, which notes the versions of its parts
            metadata = typed(typed(state, dict).get("_metadata"), OrderedDict)
            target._metadata = metadata  # pyright: ignore[reportAttributeAccessIssue]
        elif type(target) is not dict:  # a dict's own attributes mean nothing here
            raise Refused("sets the state of something other than a module")

    def _op_binpersid(self, _: None) -> None:
        identity = typed(self._pop(1)[0], tuple)
        self._stack.append(self._storage_of(identity) if self._storage_of else _PersistentId(identity))


def _key(value: Any) -> str | bytes | int:
    if type(value) not in (str, bytes, int):  # nested tuples, for one, can exhaust the interpreter's stack when hashed
        raise TypeError("a key is neither text nor a number")
    if type(value) is int and abs(value) > MAX_KEY:
        raise ValueError("a key is too large a number")
    return value
