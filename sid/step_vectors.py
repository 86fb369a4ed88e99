"""A fake score that knows which step of the generator made its images.

With one fake score for all steps, only the mixture of their images is drawn to the teacher's: on letters, one of two
steps became darker and the other brighter, since both errors cancel (docs/ablations.md). So each step has biases,
gains and other vectors of its own here, and the matrices are common to all: about what a class has in a network that is
conditioned on classes.
"""

import copy
import functools
from typing import Any

import torch

SUFFIX = "_of_step"  # `bias` is computed by the module `bias_of_step`


class Choice:
    """Which step the network serves; one for all its vectors."""

    step = 0


class StepVector(torch.nn.Module):
    """One parameter per step, all starting as `vector`; it answers with that of the chosen step."""

    def __init__(self, vector: torch.nn.Parameter, steps: int, choice: Choice):
        super().__init__()
        self.values = torch.nn.ParameterList(copy.deepcopy(vector) for _ in range(steps))
        self._choice = choice

    def forward(self) -> torch.Tensor:
        return self.values[self._choice.step]


def split(net: torch.nn.Module, steps: int) -> Choice:
    """Gives each step its own copy of every trainable parameter of `net` with fewer than two dimensions, in place.

    Returns the choice of the step that the network serves from then on.
    """
    choice = Choice()
    vectors = [p for p in net.parameters() if p.requires_grad and p.ndim < 2]
    made = {vector: StepVector(vector, steps, choice) for vector in vectors}
    for module in list(net.modules()):
        found = {name: made[p] for name, p in module._parameters.items() if p is not None and p in made}
        for name, vector in found.items():
            module.add_module(name + SUFFIX, vector)  # one for all that share the parameter
            del module._parameters[name]
        if found:
            module.__class__ = _class_of_steps(type(module), tuple(found))
    return choice


@functools.cache
def _class_of_steps(cls: type, names: tuple[str, ...]) -> type:
    """`cls` with attributes `names` that are computed whenever they are read."""
    computed: dict[str, Any] = {
        name: property(lambda module, name=name: getattr(module, name + SUFFIX)()) for name in names
    }
    return type(f"Stepwise{cls.__name__}", (cls,), computed)
