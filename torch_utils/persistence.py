"""Classes whose instances remember how they were built, so that a snapshot can name a class and rebuild it."""

import copy
import functools
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


def persistent_class(cls: Class) -> Class:
    """Class decorator: every instance keeps deep copies of its constructor's arguments.

    They lie in the instance's `__dict__` as `_init_args` (tuple) and `_init_kwargs` (dict), and are read through the
    properties `init_args` and `init_kwargs`. The class itself stays an ordinary one: it can be subclassed, copied and
    pickled by reference; a subclass that is decorated too records its own arguments instead of its base's.

    A snapshot for EDM's tools embeds the source of the class's module, so that module may import only torch, numpy,
    the standard library and `torch_utils.persistence`.
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
