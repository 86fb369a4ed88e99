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
from .diffusers_models import LATENT_SIGMA_DATA, LibraryDenoiser, shape_of, times_of

TEXT_MODELS = {  # class: its folder in a pipeline
    "UNet2DConditionModel": "unet",
    "SD3Transformer2DModel": "transformer",
    "FluxTransformer2DModel": "transformer",
    "SanaTransformer2DModel": "transformer",
}
MAX_LENGTH = 4096
TIME_IDS = 6  # SDXL takes height, width, top, left, target height and width in pixels
UNUSUAL: dict[str, dict[str, tuple]] = {  # settings that want further conditions, and their usual values
    "UNet2DConditionModel": {
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "time_cond_proj_dim": (None,),
        "addition_embed_type": (None, "text_time"),
        "center_input_sample": (False, None),
    },
    "SanaTransformer2DModel": {"guidance_embeds": (False, None)},
}
TAKE_DROPOUT = tuple(UNUSUAL)  # classes whose configuration has a dropout
FLUX_PATCH = 2  # latents are packed so many pixels wide and high into one token
FLUX_TIME = 1000  # the scale of a flow's time in the library
FLUX_GUIDANCE = 3.5  # the library's default for FLUX.1-dev, into which guidance has been distilled


def condition_parts(model: dict[str, Any], length: int) -> dict[str, tuple[int, ...]]:
    """{part: its shape} of the condition of a model by its configuration, in order.

    tokens [length, C], the text encoders' states; pooled [P], their summaries, where the model takes them;
    mask [length], 1 for the tokens of the prompt and 0 for those after its end, which SANA takes.
    Errors: UserError when a size is missing or isn't a number.
    """
    name, parts = model["_class_name"], {}
    if name == "UNet2DConditionModel":
        parts["tokens"] = (length, model.get("cross_attention_dim", 1280))
        if model.get("addition_embed_type") == "text_time":
            size, times = model.get("projection_class_embeddings_input_dim"), model.get("addition_time_embed_dim")
            if type(size) is not int or type(times) is not int:
                raise UserError("its configuration doesn't say how large its summary of a prompt is")
            parts["pooled"] = (size - TIME_IDS * times,)
    elif name == "SanaTransformer2DModel":
        parts["tokens"], parts["mask"] = (length, model.get("caption_channels", 2304)), (length,)
    else:
        defaults = {"SD3Transformer2DModel": 2048, "FluxTransformer2DModel": 768}
        parts["tokens"] = (length, model.get("joint_attention_dim", 4096))
        parts["pooled"] = (model.get("pooled_projection_dim", defaults[name]),)
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

    supported = tuple(TEXT_MODELS)

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
        name = model.get("_class_name")
        if name not in TEXT_MODELS:
            raise UserError(f"its model is a {str(name)[:80]!r}; of text-to-image, {', '.join(TEXT_MODELS)} are known")
        if type(length) is not int or not 0 < length <= MAX_LENGTH:
            raise UserError(f"prompts of {str(length)[:80]} tokens aren't supported")
        for setting, usual in UNUSUAL.get(name, {}).items():
            if model.get(setting, usual[0]) not in usual:
                raise UserError(f"its {setting} is {str(model[setting])[:80]!r}, which isn't supported")
        given = {} if dropout is None or name not in TAKE_DROPOUT else {"dropout": dropout}
        net = build(name, {**model, **given})
        if name == "FluxTransformer2DModel":
            channels, resolution = net.config.in_channels // FLUX_PATCH**2, sample_size
            if type(resolution) is not int or resolution % FLUX_PATCH:
                raise UserError(f"sample_size={resolution}: give the width of FLUX.1's latents, such as 128")
        else:
            channels, resolution = shape_of(net.config)
            resolution = sample_size or resolution
        prediction, times = times_of(scheduler, nearest=False)
        super().__init__(net, prediction, times, resolution, channels, 0, sigma_data)
        self.parts = condition_parts({**net.config, "_class_name": name}, length)
        self.prompt_dim = sum(math.prod(shape) for shape in self.parts.values())
        self.image_size = image_size or 8 * resolution

    def answer(self, x_s: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        net = self.model()
        if condition is None:
            raise ValueError("a text-to-image network needs its prompts")
        parts = self.split(condition)
        kind = type(net).__name__
        if kind == "SD3Transformer2DModel":
            return net(x_s, parts["tokens"], parts["pooled"], t, return_dict=False)[0]
        if kind == "FluxTransformer2DModel":
            return self._flux(x_s, parts, t)
        if kind == "SanaTransformer2DModel":
            t = t * net.config.get("timestep_scale", 1.0)
            return net(x_s, parts["tokens"], t, encoder_attention_mask=parts["mask"], return_dict=False)[0]
        added = None
        if "pooled" in parts:
            size = float(self.image_size)
            times = x_s.new_tensor([size, size, 0, 0, size, size]).expand(len(x_s), -1)
            added = {"text_embeds": parts["pooled"], "time_ids": times}
        return net(x_s, t, parts["tokens"], added_cond_kwargs=added, return_dict=False)[0]

    def split(self, condition: torch.Tensor) -> dict[str, torch.Tensor]:
        """{part: [N, ...]} of conditions [N, prompt_dim]."""
        sizes = [math.prod(shape) for shape in self.parts.values()]
        parts = zip(self.parts.items(), condition.split(sizes, dim=1))
        return {name: part.unflatten(1, shape) for (name, shape), part in parts}

    def _flux(self, x_s: torch.Tensor, parts: dict[str, torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        net: Any = self.net
        width, n, tokens = x_s.shape[-1] // FLUX_PATCH, len(x_s), parts["tokens"]
        packed = torch.nn.functional.pixel_unshuffle(x_s, FLUX_PATCH).flatten(2).transpose(1, 2)
        y, x = torch.meshgrid(*[torch.arange(width, device=x_s.device).float()] * 2, indexing="ij")
        places = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3)
        answer = net(
            hidden_states=packed,
            timestep=t / FLUX_TIME,  # the model itself multiplies by 1000
            guidance=x_s.new_full([n], FLUX_GUIDANCE) if net.config.guidance_embeds else None,
            pooled_projections=parts["pooled"],
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros([tokens.shape[1], 3], device=x_s.device),
            img_ids=places,
            return_dict=False,
        )[0]
        answer = answer.transpose(1, 2).unflatten(2, (width, width))
        return torch.nn.functional.pixel_shuffle(answer, FLUX_PATCH)
