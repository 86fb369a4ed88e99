"""Classes whose instances remember how they were built, so that a snapshot can name a class and rebuild it."""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from dnnlib import UserError
from torch_utils.untrusted.bounds import MAX_SECONDS, Budget, Refused

Class = TypeVar("Class", bound=type)

FACTORIES = {torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn}
FACTORIES |= {torch.randint, torch.zeros, torch.logspace, torch.randperm}
GROWING = {torch.outer, torch.Tensor.outer}  # results far larger than their arguments, which a file can make long
SPARE_ELEMENTS = 1 << 20  # tables and intermediate values that a constructor makes in addition to its weights
ELEMENTS_PER_SECOND = 1e7  # drawn at random, on a slow machine
MAX_TORCH_CALLS = 200_000  # of a constructor; a large iDDPM network makes about 15 000
WRAPPERS = {  # parts that others add to the names of weights
    "module": "DataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
MAX_PREFIXES = 10


def persistent_class(cls: Class) -> Class:
    """Class decorator: every instance keeps deep copies of its constructor's arguments.

    They lie in the instance's `__dict__` as `_init_args` (tuple) and `_init_kwargs` (dict), and are read through the
    properties `init_args` and `init_kwargs`. The class itself stays an ordinary one: it can be subclassed, copied and
    pickled by reference; a subclass that is decorated too records its own arguments instead of its base's.

    A snapshot for EDM's tools embeds the source of the class's module, so that module may import only torch, numpy,
    the standard library, `torch_utils.persistence` and, by `from .name import ...`, modules next to it of the same
    kind, whose source is embedded too.
    """
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs):
        # Straight into __dict__: a Module's __setattr__ isn't ready before super().__init__() ran.
        if type(self) is cls or "_init_args" not in vars(self):
            vars(self).update(_init_args=copy.deepcopy(args), _init_kwargs=copy.deepcopy(kwargs))
        construct(self, *args, **kwargs)

    cls.__init__ = __init__
    cls.init_args = property(lambda self: copy.deepcopy(vars(self)["_init_args"]))
    cls.init_kwargs = property(lambda self: copy.deepcopy(vars(self)["_init_kwargs"]))
    cls._persistent_class = cls
    return cls


def is_persistent(obj: Any) -> bool:
    """Whether the class of `obj` itself (not only a base of it) carries `persistent_class`."""
    return getattr(type(obj), "_persistent_class", None) is type(obj)


def construct(
    cls: Callable[..., Any], args: tuple, kwargs: dict, state: dict[str, torch.Tensor] | None, source: Any
) -> Any:
    """`cls(*args, **kwargs)`, with the weights `state` if it is a module (None is for classes that aren't).

    The arguments may come from a file of strangers, so building may allocate no more than about what `state` holds,
    and takes a bounded number of steps.
    No random numbers are drawn from the global generator. `source` names the file in messages. A class that imports
    others when it is first built does so in a static method `import_library`, which isn't counted.

    Errors: UserError when the arguments or the weights don't fit the class.
    """
    elements = _stored_elements(state) if state is not None else 0
    getattr(cls, "import_library", lambda: None)()
    args, kwargs = _unrepeatable(args), {name: _unrepeatable(value) for name, value in kwargs.items()}
    try:
        with torch.random.fork_rng(devices=[]), _AllocationLimit(2 * elements + SPARE_ELEMENTS):
            obj = cls(*args, **kwargs)
        _make_ordinary(obj)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor raises on arguments that it wasn't made for
        raise UserError(
            f"{source}: {cls.__name__} refuses the constructor arguments there: {one_line(error)}"
        ) from None
    if state is not None:
        _check_kinds(obj, state, source)
        try:
            obj.load_state_dict(state, strict=True)
        except RuntimeError as error:
            reason = wrapper_hint(state, obj.state_dict()) or one_line(error)
            raise UserError(f"{source}: the weights don't fit {cls.__name__}: {reason}") from None
    return obj


def _check_kinds(net: torch.nn.Module, state: dict[str, torch.Tensor], source: Any) -> None:
    """Errors: UserError for a weight that loading would change: floating-point there, whole or complex in the file."""
    for name, weight in net.state_dict().items():
        stored = state.get(name)
        if stored is not None and weight.is_floating_point() and not stored.is_floating_point():
            kind = str(stored.dtype).removeprefix("torch.")
            raise UserError(f"{source}: its {name} holds {kind}, not floating-point numbers: damaged, or not a network")


def _refuse_to_repeat(sequence: Any, _: Any) -> Any:
    raise TypeError(f"a {type(sequence).__bases__[0].__name__} stands where a number is needed")


class _List(list):
    """A list that can't be repeated: a file could make a number of it that is multiplied by another."""

    __mul__ = __rmul__ = __imul__ = _refuse_to_repeat

    def __reduce_ex__(self, _: Any) -> Any:  # copies and pickles are ordinary
        return list, (list(self),)


class _Tuple(tuple):
    __slots__ = ()
    __mul__ = __rmul__ = _refuse_to_repeat

    def __reduce_ex__(self, _: Any) -> Any:
        return tuple, (list(self),)


class _Text(str):
    __slots__ = ()
    __mul__ = __rmul__ = _refuse_to_repeat

    def __reduce_ex__(self, _: Any) -> Any:
        return str, (self[:],)


def _unrepeatable(value: Any) -> Any:
    """`value` with its lists, tuples and texts as such that `n * value` is refused."""
    if type(value) is dict:
        return {key: _unrepeatable(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return (_List if type(value) is list else _Tuple)(map(_unrepeatable, value))
    return _Text(value) if type(value) is str else value


def _make_ordinary(obj: Any) -> None:
    """Makes the attributes of an object, and of a module's parts, that are unrepeatable ordinary again."""
    for part in obj.modules() if isinstance(obj, torch.nn.Module) else [obj]:
        attributes = getattr(part, "__dict__", {})
        attributes.update({k: copy.deepcopy(v) for k, v in attributes.items() if isinstance(v, _List | _Tuple | _Text)})


def wrapper_hint(found: Collection[str], expected: Collection[str] | None = None) -> str | None:
    """What wrappers have added to the names of weights, and the remedy; None if the names differ in anything else.

    found: the names in a file. expected: the names in the network; None if they aren't known.
    """
    prefixes = _prefixes(found, expected)
    if prefixes:
        shown = " or ".join(repr(prefix) for prefix in prefixes)
        cure = f"save the tensors again under their names without it (key.removeprefix({prefixes[0]!r}))"
        maker = WRAPPERS.get(prefixes[0].split(".")[0])
        return f"their names begin with {shown}{f', which {maker} adds' if maker else ''}: {cure}"
    lacking = _prefixes(expected, found) if expected and found else []
    if lacking:
        return f"their names lack {lacking[0]!r} in front: save the tensors again under their names with it"
    inside = [wrapper for wrapper in WRAPPERS if any(wrapper in name.split(".") for name in found)]
    if expected and inside and {_unwrapped(name) for name in found} == set(expected):
        shown = " and ".join(repr(f"{wrapper}.") for wrapper in inside)
        cure = f"save the tensors again under their names without it (key.replace('{inside[0]}.', ''))"
        return f"their names contain {shown}, which {WRAPPERS[inside[0]]} adds: {cure}"
    return None


def _prefixes(found: Collection[str], expected: Collection[str] | None) -> list[str]:
    """The prefixes before the expected names; if these aren't known, those that wrappers have put before all names."""
    if expected is None:
        prefixes = {
            "".join(f"{part}." for part in itertools.takewhile(WRAPPERS.__contains__, name.split(".")))
            for name in found
        }
        return sorted(prefixes) if len(prefixes) == 1 and "" not in prefixes else []
    first = next(iter(expected), "")
    candidates = {name[: -len(first)] for name in found if name.endswith(f".{first}")} if first else set()
    names = set(found)
    ordered = sorted(candidates, key=lambda prefix: (len(prefix), prefix))[:MAX_PREFIXES]
    return [prefix for prefix in ordered if all(prefix + name in names for name in expected)]


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def one_line(error: Exception, length: int = 300) -> str:
    """An error's text without line breaks, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}…"


def _stored_elements(state: dict[str, torch.Tensor]) -> int:
    """The number of elements that the weights store; elements that several of them share count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in state.values()}
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in storages.values())


class _AllocationLimit(TorchFunctionMode):
    """While active, torch may create tensors of `elements` elements in all.

    The number of calls of torch and their time are limited, too, since layers without elements also cost both.
    """

    def __init__(self, elements: int):
        super().__init__()
        self._left = elements
        self._budget = Budget(MAX_TORCH_CALLS, MAX_SECONDS + elements / ELEMENTS_PER_SECOND)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            self._budget.spend()
        except Refused:
            raise MemoryError("they ask for far more layers than any network has") from None
        if function in FACTORIES:
            # First on the meta device, which knows the shape and takes no memory.
            self._left -= math.prod(function(*args, **{**kwargs, "device": "meta"}).shape)
            if self._left < 0:
                raise MemoryError("they ask for far more weights than the file holds")
        result = function(*args, **kwargs)
        if function in GROWING:
            self._left -= result.numel()
        return result


def _reconstruct_persistent_obj(meta: dict) -> Any:
    """The name under which EDM's tools find their own function of this purpose; snapshots are opened otherwise here."""
    raise UserError("plain unpickling would run code from the snapshot: open it with edm.zoo.load_network")
