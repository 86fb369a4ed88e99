"""A fake score that knows which step of the generator made its images.

With one fake score for all steps, only the mixture of their images is drawn to the teacher's: on letters, one of two
steps became darker and the other brighter, since both errors cancel (docs/ablations.md). So each step has biases,
gains and other vectors of its own here, and the matrices are common to all: about what a class has in a network that is
conditioned on classes.
"""

import copy

import torch

from torch_utils.computed import compute_parameters

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
    compute_parameters(net, made, SUFFIX)
    return choice
