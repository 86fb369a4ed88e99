"""Text-to-image models of the diffusers library as denoisers: Stable Diffusion 1, 2, XL and 3, FLUX.1, SANA.

A denoiser's condition is one row of numbers per image: the outputs of the pipeline's text encoders for the prompt, one
after the other (`condition_parts`). `edm.text_encoders` makes the rows.
"""

import math
from typing import Any

import torch

from dnnlib import UserError
from torch_utils.persistence import persistent_class

from .diffusers_folder import build, library
from .diffusers_models import LATENT_SIGMA_DATA, LibraryDenoiser, times_of
from .text_families import MODEL_FOLDERS, Family, Parts, family_of_model

MAX_LENGTH = 4096


def condition_parts(family: Family, config: dict[str, Any], length: int) -> Parts:
    """`Family.condition_parts`, checked. Errors: UserError when a size is missing or isn't a number."""
    parts = family.condition_parts(config, length)
    if not all(type(n) is int and n > 0 for shape in parts.values() for n in shape):
        raise UserError(f"its conditions have the sizes {parts}, which isn't supported")
    return parts


@persistent_class
class TextDenoiser(LibraryDenoiser):
    """The denoiser of a text-to-image model of the diffusers library.

    model, scheduler: their configurations as the library's JSON files hold them, `_class_name` included.
    length:           tokens of a prompt.
    sample_size:      width of its latents; None: the model's own, which FLUX.1's doesn't have.
    image_size:       width of the images in pixels, a condition of SDXL; None: eight times that of the latents.
    dropout:          of the model; None leaves it as the configuration says.
    prompt_dim:       how many numbers a condition has (attribute).

    Errors: UserError when the model or the scheduler isn't supported, or the library isn't installed.
    """

    supported = tuple(MODEL_FOLDERS)

    def __init__(
        self,
        model: dict[str, Any],
        scheduler: dict[str, Any],
        length: int,
        sample_size: int | None = None,
        image_size: int | None = None,
        dropout: float | None = None,
        sigma_data: float = LATENT_SIGMA_DATA,
    ):
        library()
        family = family_of_model(model)
        if family is None:
            name, known = str(model.get("_class_name"))[:80], ", ".join(MODEL_FOLDERS)
            raise UserError(f"its model is a {name!r}; of text-to-image, {known} are known")
        if type(length) is not int or not 0 < length <= MAX_LENGTH:
            raise UserError(f"prompts of {str(length)[:80]} tokens aren't supported")
        for setting, usual in family.usual.items():
            if model.get(setting, usual[0]) not in usual:
                raise UserError(f"its {setting} is {str(model[setting])[:80]!r}, which isn't supported")
        given = {} if dropout is None or not family.takes_dropout else {"dropout": dropout}
        net = build(family.model, {**model, **given})
        channels, resolution = family.shape_of(net.config, sample_size)
        prediction, times = times_of(scheduler, nearest=False)
        super().__init__(net, prediction, times, resolution, channels, 0, sigma_data)
        self.family, self.parts = family, condition_parts(family, net.config, length)
        self.prompt_dim = sum(math.prod(shape) for shape in self.parts.values())
        self.image_size = image_size or 8 * resolution

    def answer(self, x_s: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        if condition is None:
            raise ValueError("a text-to-image network needs its prompts")
        return self.family.answer(self.model(), x_s, t, self.split(condition), self.image_size)

    def split(self, condition: torch.Tensor) -> dict[str, torch.Tensor]:
        """{part: [N, ...]} of conditions [N, prompt_dim]."""
        sizes = [math.prod(shape) for shape in self.parts.values()]
        parts = zip(self.parts.items(), condition.split(sizes, dim=1))
        return {name: part.unflatten(1, shape) for (name, shape), part in parts}
