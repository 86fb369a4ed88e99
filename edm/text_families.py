"""What differs between the text-to-image pipelines of the diffusers library: one class per kind, all in `FAMILIES`.

To add a pipeline, add its class here. The class says which text encoders the pipeline has and how it encodes a prompt
(`edm.text_encoders` asks for this), how its model is called (`edm.text_models`), and what an exported generator needs
(`edm.text_pipelines`).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dnnlib import UserError

from .diffusers_models import shape_of

FIRST, SECOND, THIRD = (  # folders of a pipeline
    ("tokenizer", "text_encoder"),
    ("tokenizer_2", "text_encoder_2"),
    ("tokenizer_3", "text_encoder_3"),
)
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "Gemma2Model")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
TOKENIZERS += ("GemmaTokenizer", "GemmaTokenizerFast")

Parts = dict[str, tuple[int, ...]]


class Family(ABC):
    """A kind of text-to-image pipeline. Its methods get the library's pipeline (without its image model) or model."""

    # The pipeline.
    pipeline: str  # its class
    generators: tuple[str, ...] = ()  # classes of pipelines that were distilled from it
    folders: tuple[str, ...] = FIRST  # of its tokenizers and text encoders
    optional: tuple[str, ...] = ()  # of these folders, the ones that a pipeline may lack, all together
    settings: ClassVar[Mapping[str, Any]] = {}  # arguments of its constructor
    indexed: tuple[str, ...] = ()  # of these settings, the ones that model_index.json may override
    has_clip_tokens = True  # whether a condition has the states of CLIP's tokens, as many as its tokenizer takes
    other_tokens = 0  # of a prompt, as the pipeline calls its other encoder; their states are in the condition

    # The model.
    model: str  # its class
    folder = "transformer"
    is_flow = True
    takes_dropout = False  # whether its configuration has a dropout
    sample_size: int | None = None  # width of its latents, where its configuration doesn't give one
    usual: ClassVar[Mapping[str, tuple]] = {}  # {setting: its supported values, the default first}

    # The pipeline of a generator of a flow.
    first_layer = ""
    runs_twice = True  # for guidance, unless it is called with guidance_scale=1
    image_size: int | None = None  # in pixels, where the pipeline doesn't make images of the model's own size

    def has_model(self, config: Mapping[str, Any]) -> bool:
        """Whether a model of this configuration is of this family."""
        return config.get("_class_name") == self.model

    @abstractmethod
    def encode(self, pipeline: Any, texts: list[str], device: Any) -> tuple[Tensor, Tensor | None]:
        """(conditions of prompts, null conditions if the pipeline makes them at the same time), rows on the CPU."""

    def null(self, pipeline: Any, device: Any) -> Tensor:
        """The null condition, where `encode` didn't return one."""
        encoded, null = self.encode(pipeline, [""], device)
        return encoded if null is None else null

    def limit(self, pipeline: Any) -> tuple[Any, int]:
        """(the tokenizer that takes the longest prompts, how many tokens it takes)."""
        return pipeline.tokenizer, pipeline.tokenizer.model_max_length

    @abstractmethod
    def condition_parts(self, config: Mapping[str, Any], length: int) -> Parts:
        """{part: its shape} of a condition, in order.

        tokens [length, C], the text encoders' states; pooled [P], their summaries, where the model takes them;
        mask [length], 1 for the tokens of the prompt and 0 for those after its end, which SANA takes.
        """

    def shape_of(self, config: Any, sample_size: int | None) -> tuple[int, int]:
        """(channels, width) of the latents. sample_size: replaces the configuration's."""
        channels, resolution = shape_of(config)
        return channels, sample_size or resolution

    @abstractmethod
    def answer(self, net: Any, x_s: Tensor, t: Tensor, parts: dict[str, Tensor], size: int) -> Tensor:
        """What the model answers to scaled noisy latents at times t. size: of the images, in pixels."""


class StableDiffusion(Family):
    """Stable Diffusion 1 and 2."""

    pipeline = "StableDiffusionPipeline"
    settings: ClassVar = {"requires_safety_checker": False}
    model = "UNet2DConditionModel"
    folder = "unet"
    is_flow = False
    takes_dropout = True
    usual: ClassVar = {  # settings that want further conditions
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "time_cond_proj_dim": (None,),
        "addition_embed_type": (None, "text_time"),
        "center_input_sample": (False, None),
    }

    def has_model(self, config: Mapping[str, Any]) -> bool:
        return super().has_model(config) and not _takes_sizes(config)

    def encode(self, pipeline: Any, texts: list[str], device: Any) -> tuple[Tensor, Tensor | None]:
        return _with_null(pipeline, texts, device)

    def condition_parts(self, config: Mapping[str, Any], length: int) -> Parts:
        return {"tokens": (length, config.get("cross_attention_dim", 1280))}

    def answer(self, net: Any, x_s: Tensor, t: Tensor, parts: dict[str, Tensor], size: int) -> Tensor:
        return net(x_s, t, parts["tokens"], return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    """SDXL, whose model also takes sizes of images and a summary of the prompt."""

    pipeline = "StableDiffusionXLPipeline"
    folders = (*FIRST, *SECOND)
    settings: ClassVar = {"force_zeros_for_empty_prompt": True, "add_watermarker": False}
    indexed = ("force_zeros_for_empty_prompt",)
    SIZES = 6  # height, width, top, left, target height and width in pixels

    def has_model(self, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") == self.model and _takes_sizes(config)

    def condition_parts(self, config: Mapping[str, Any], length: int) -> Parts:
        width, times = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
        if type(width) is not int or type(times) is not int:
            raise UserError("its configuration doesn't say how large its summary of a prompt is")
        return {**super().condition_parts(config, length), "pooled": (width - self.SIZES * times,)}

    def answer(self, net: Any, x_s: Tensor, t: Tensor, parts: dict[str, Tensor], size: int) -> Tensor:
        sizes = x_s.new_tensor([float(size), size, 0, 0, size, size]).expand(x_s.shape[0], -1)
        added = {"text_embeds": parts["pooled"], "time_ids": sizes}
        return net(x_s, t, parts["tokens"], added_cond_kwargs=added, return_dict=False)[0]


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5, with two CLIPs and, if it is there, T5."""

    pipeline = "StableDiffusion3Pipeline"
    folders = (*FIRST, *SECOND, *THIRD)
    optional = THIRD
    other_tokens = 256  # of T5
    model = "SD3Transformer2DModel"
    first_layer = "pos_embed.proj"

    def encode(self, pipeline: Any, texts: list[str], device: Any) -> tuple[Tensor, Tensor | None]:
        return _with_null(pipeline, texts, device, prompt_2=None, prompt_3=None)

    def limit(self, pipeline: Any) -> tuple[Any, int]:
        return super().limit(pipeline) if pipeline.tokenizer_3 is None else (pipeline.tokenizer_3, self.other_tokens)

    def condition_parts(self, config: Mapping[str, Any], length: int) -> Parts:
        return _joint_parts(config, length, 2048)

    def answer(self, net: Any, x_s: Tensor, t: Tensor, parts: dict[str, Tensor], size: int) -> Tensor:
        return net(x_s, parts["tokens"], parts["pooled"], t, return_dict=False)[0]


class Flux(Family):
    """FLUX.1, with T5's states and CLIP's summary; its model takes packed latents and a guidance scale."""

    pipeline = "FluxPipeline"
    folders = (*FIRST, *SECOND)
    has_clip_tokens = False
    other_tokens = 512  # of T5
    model = "FluxTransformer2DModel"
    sample_size = 128
    first_layer = "x_embedder"
    runs_twice = False
    image_size = 1024
    PATCH = 2  # latents are packed so many pixels wide and high into one token
    TIME = 1000  # the scale of a flow's time in the library
    GUIDANCE = 3.5  # the library's default for FLUX.1-dev, into which guidance has been distilled

    def encode(self, pipeline: Any, texts: list[str], device: Any) -> tuple[Tensor, Tensor | None]:
        tokens, pooled, _ = _encode_prompt(pipeline, texts, device, prompt_2=None)
        return _rows(tokens, pooled), None

    def limit(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer_2, self.other_tokens

    def condition_parts(self, config: Mapping[str, Any], length: int) -> Parts:
        return _joint_parts(config, length, 768)

    def shape_of(self, config: Any, sample_size: int | None) -> tuple[int, int]:
        if type(sample_size) is not int or sample_size % self.PATCH:
            raise UserError(f"sample_size={sample_size}: give the width of FLUX.1's latents, such as 128")
        return config.in_channels // self.PATCH**2, sample_size

    def answer(self, net: Any, x_s: Tensor, t: Tensor, parts: dict[str, Tensor], size: int) -> Tensor:
        width, n, tokens = x_s.shape[-1] // self.PATCH, x_s.shape[0], parts["tokens"]
        packed = torch.nn.functional.pixel_unshuffle(x_s, self.PATCH).flatten(2).transpose(1, 2)
        y, x = torch.meshgrid(*[torch.arange(width, device=x_s.device).float()] * 2, indexing="ij")
        places = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3)
        answer = net(
            hidden_states=packed,
            timestep=t / self.TIME,  # the model itself multiplies by 1000
            guidance=x_s.new_full([n], self.GUIDANCE) if net.config.guidance_embeds else None,
            pooled_projections=parts["pooled"],
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros([tokens.shape[1], 3], device=x_s.device),
            img_ids=places,
            return_dict=False,
        )[0]
        answer = answer.transpose(1, 2).unflatten(2, (width, width))
        return torch.nn.functional.pixel_shuffle(answer, self.PATCH)


class Sana(Family):
    """SANA, with Gemma's states and a mask of the prompt's tokens."""

    pipeline = "SanaPipeline"
    generators = ("SanaSprintPipeline",)
    has_clip_tokens = False
    other_tokens = 300  # of Gemma
    model = "SanaTransformer2DModel"
    takes_dropout = True
    usual: ClassVar = {"guidance_embeds": (False, None)}
    first_layer = "patch_embed.proj"
    image_size = 1024

    def encode(self, pipeline: Any, texts: list[str], device: Any) -> tuple[Tensor, Tensor | None]:
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        how = {"do_classifier_free_guidance": False, "complex_human_instruction": instruction}
        return _rows(*_encode_prompt(pipeline, texts, device, **how)[:2]), None

    def null(self, pipeline: Any, device: Any) -> Tensor:
        """The empty prompt without the instruction."""
        return _rows(*pipeline.encode_prompt([""], device=device)[2:])

    def limit(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer, self.other_tokens - 1  # the window also holds the instruction's last token

    def condition_parts(self, config: Mapping[str, Any], length: int) -> Parts:
        return {"tokens": (length, config.get("caption_channels", 2304)), "mask": (length,)}

    def answer(self, net: Any, x_s: Tensor, t: Tensor, parts: dict[str, Tensor], size: int) -> Tensor:
        t = t * net.config.get("timestep_scale", 1.0)
        return net(x_s, parts["tokens"], t, encoder_attention_mask=parts["mask"], return_dict=False)[0]


FAMILIES: Sequence[Family] = (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux(), Sana())
BY_PIPELINE = {family.pipeline: family for family in FAMILIES}
MODEL_FOLDERS = {family.model: family.folder for family in FAMILIES}


def family_of_model(config: Mapping[str, Any]) -> Family | None:
    """The family of a model, by its configuration with `_class_name`; None if it isn't a text-to-image model."""
    return next((family for family in FAMILIES if family.has_model(config)), None)


def _takes_sizes(config: Mapping[str, Any]) -> bool:
    """Whether a UNet2DConditionModel is one of SDXL's."""
    return config.get("addition_embed_type") == "text_time"


def _joint_parts(config: Mapping[str, Any], length: int, pooled: int) -> Parts:
    """For models that take all text encoders' states in one sequence. pooled: the default width of the summary."""
    return {
        "tokens": (length, config.get("joint_attention_dim", 4096)),
        "pooled": (config.get("pooled_projection_dim", pooled),),
    }


def _encode_prompt(pipeline: Any, texts: list[str], device: Any, **how: Any) -> Sequence[Tensor]:
    return pipeline.encode_prompt(prompt=texts, device=device, num_images_per_prompt=1, **how)


def _with_null(pipeline: Any, texts: list[str], device: Any, **how: Any) -> tuple[Tensor, Tensor]:
    """For pipelines that return each part of the conditions followed by that part of the null conditions."""
    found = _encode_prompt(pipeline, texts, device, do_classifier_free_guidance=True, **how)
    return _rows(*found[0::2]), _rows(*found[1::2])


def _rows(*parts: Tensor) -> Tensor:
    return torch.cat([part.detach().to("cpu", torch.float32).flatten(1) for part in parts], dim=1)
