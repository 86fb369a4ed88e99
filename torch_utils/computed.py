"""Parameters that a module computes whenever they are read."""

import functools
from collections.abc import Mapping

import torch


def compute_parameters(
    net: torch.nn.Module, computed: Mapping[torch.nn.Parameter, torch.nn.Module], suffix: str
) -> None:
    """Replaces parameters of `net` by what modules answer, in place.

    computed: the module for each parameter, one for all places that share the parameter. It becomes the submodule
    NAME + suffix of the module whose parameter NAME it computes. The parameter's place stays, empty. The names are in
    `computed_names` of the module's class, which is derived from its former class.
    """
    for module in list(net.modules()):
        found = {name: computed[p] for name, p in module._parameters.items() if p is not None and p in computed}
        for name, part in found.items():
            module.add_module(name + suffix, part)
            module._parameters[name] = None
        if found:
            module.__class__ = _derived_class(type(module), tuple(found), suffix)


@functools.cache
def _derived_class(cls: type, names: tuple[str, ...], suffix: str) -> type:
    """`cls` with attributes `names` that are computed whenever they are read."""
    computed = {name: property(lambda module, name=name: getattr(module, name + suffix)()) for name in names}
    return type(f"Computed{cls.__name__}", (cls,), {**computed, "computed_names": names})
