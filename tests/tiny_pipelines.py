"""Tiny text-to-image pipelines of the diffusers library, with random weights."""

import json
import string

import diffusers
import torch
import transformers
from tiny import TINY_VAE
from tokenizers.processors import TemplateProcessing

from edm import text_encoders, zoo
from sid import lora

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

TEXTS = ["a red apple", "dogs", "a cat in a hat"]
LENGTH = 16  # tokens of CLIP's prompts
SIZE = 8  # of latents; images are twice as wide
VAE = {**TINY_VAE, "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 16}
UNET = {
    "sample_size": SIZE,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
BETAS["steps_offset"] = 1


def seeded(build):
    torch.manual_seed(0)
    return build().eval().requires_grad_(False)


def clip_tokenizer():
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocabulary = [*letters, "<|startoftext|>", "<|endoftext|>"]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    return transformers.CLIPTokenizer(vocab=numbers, merges=[], model_max_length=LENGTH)


def clip(tokenizer, projected=False, scale=1.0):
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=scale,
    )
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return seeded(lambda: cls(config))


def save_clip(folder):
    """A CLIP with images that sees 24x24 pixels, as the library saves it, with its tokenizer and image processor."""
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**sizes, **special, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    vision = {**sizes, "image_size": 24, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    seeded(lambda: transformers.CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**size, "image_std": [0.2, 0.3, 0.4]}))
    return folder


def t5(width):
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefghij")]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(tokenizer), **sizes)
    return tokenizer, seeded(lambda: transformers.T5EncoderModel(config))


def vae():
    return seeded(lambda: diffusers.AutoencoderKL(**VAE))


def stable_diffusion(prediction="epsilon", encoder_scale=1.0):
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae(),
        clip(tokenizer, scale=encoder_scale),
        tokenizer,
        seeded(lambda: diffusers.UNet2DConditionModel(**UNET, cross_attention_dim=16)),
        diffusers.DDIMScheduler(**BETAS, prediction_type=prediction),
        None,
        None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl():
    tokenizer = clip_tokenizer()
    added = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8}
    return diffusers.StableDiffusionXLPipeline(
        vae(),
        clip(tokenizer),
        clip(tokenizer, projected=True),
        tokenizer,
        tokenizer,
        seeded(
            lambda: diffusers.UNet2DConditionModel(
                **UNET, **added, cross_attention_dim=32, addition_embed_type="text_time"
            )
        ),
        diffusers.DDIMScheduler(**BETAS),
        add_watermarker=False,
    )


def stable_diffusion_3():
    tokenizer, (tokenizer_3, encoder_3) = clip_tokenizer(), t5(32)
    transformer = seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=SIZE,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=SIZE,
        )
    )
    encoders = [part for _ in range(2) for part in (clip(tokenizer, projected=True), tokenizer)]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae(), *encoders, encoder_3, tokenizer_3)


def flux():
    tokenizer, (tokenizer_2, encoder_2) = clip_tokenizer(), t5(16)
    transformer = seeded(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, vae(), clip(tokenizer), tokenizer, encoder_2, tokenizer_2, transformer)


def gemma():
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    tokenizer = transformers.GemmaTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[])
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary.index("<bos>"))])
    tokenizer.backend_tokenizer.post_processor = begin
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    config = transformers.Gemma2Config(
        vocab_size=len(vocabulary), num_attention_heads=2, num_key_value_heads=1, query_pre_attn_scalar=8, **sizes
    )
    return tokenizer, seeded(lambda: transformers.Gemma2Model(config))


DC_VAE = {  # an AutoencoderDC, whose images are twice as wide as its latents
    **{f"{part}_block_types": ["ResBlock", "EfficientViTBlock"] for part in ("encoder", "decoder")},
    **{f"{part}_block_out_channels": [4, 8] for part in ("encoder", "decoder")},
    **{f"{part}_layers_per_block": [1, 1] for part in ("encoder", "decoder")},
    **{f"{part}_qkv_multiscales": [[], [5]] for part in ("encoder", "decoder")},
    "latent_channels": 4,
    "attention_head_dim": 4,
    "scaling_factor": 0.41407,
}


def sana(timestep_scale=1.0):
    tokenizer, encoder = gemma()
    transformer = seeded(
        lambda: diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=SIZE,
            timestep_scale=timestep_scale,
        )
    )
    # The published pipelines' own.
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
    vae = seeded(lambda: diffusers.AutoencoderDC(**DC_VAE))
    return diffusers.SanaPipeline(tokenizer, encoder, vae, transformer, scheduler)


def save_all(root):
    """{kind: the folder of a pipeline, in `root`}"""
    for make in (stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux):
        make().save_pretrained(root / make.__name__)
    return {path.name: path for path in root.iterdir()}


def teacher_of(folder, texts=TEXTS):
    """A pipeline's denoiser with prompts, of which seed n has the n-th."""
    net = zoo.load_denoiser(folder)
    net.prompts = text_encoders.prompts_for(net, texts, in_order=True)
    return net


def updated(net, rank):
    """The network with random updates of low rank, as training with --lora-vectors=0 makes them."""
    metadata, prompts = net.metadata, net.prompts
    lora.adapt(net.requires_grad_(True), rank, matrices_only=True)
    torch.manual_seed(5)
    for name, parameter in net.named_parameters():
        if name.endswith(".b"):
            parameter.data += 0.02 * torch.randn_like(parameter)
    made = lora.merge(net)
    made.metadata, made.prompts = metadata | {"lora_rank": rank}, prompts
    return made
