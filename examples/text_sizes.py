"""What distilling a published text-to-image teacher takes in memory, without its weights.

    python examples/text_sizes.py sdxl --out=sdxl
    python sid_train.py --edm_model=sdxl --prompts=captions.txt --batch=256 --dry-run

The first command writes the configurations of a pipeline of that size, about what the published folder holds without
its weights and text encoders; `--dry-run` needs no more.
"""

import argparse
import json
from pathlib import Path
from typing import Any

CLIP = {"tokenizer": "CLIPTokenizer", "text_encoder": "CLIPTextModel"}
CLIP_2 = {"tokenizer_2": "CLIPTokenizer", "text_encoder_2": "CLIPTextModelWithProjection"}
TOKENS = 77  # of CLIP's prompts
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}

SIZES: dict[str, dict[str, Any]] = {  # pipeline, its model, VAE, scheduler, tokenizers and text encoders
    "sd15": {
        "pipeline": "StableDiffusionPipeline",
        "unet": {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768},
        "vae": {**VAE, "latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None},
        "scheduler": {"_class_name": "PNDMScheduler", **BETAS},
        "text": CLIP,
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline",
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        "vae": {**VAE, "latent_channels": 4, "scaling_factor": 0.13025, "shift_factor": None},
        "scheduler": {"_class_name": "EulerDiscreteScheduler", **BETAS},
        "text": CLIP | CLIP_2,
    },
    "sd35-medium": {
        "pipeline": "StableDiffusion3Pipeline",
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
        "vae": VAE,
        "scheduler": FLOW,
        "text": CLIP
        | {"text_encoder": "CLIPTextModelWithProjection"}
        | CLIP_2
        | {"tokenizer_3": "T5TokenizerFast", "text_encoder_3": "T5EncoderModel"},
    },
    "sana-600m": {
        "pipeline": "SanaPipeline",
        "transformer": {
            "_class_name": "SanaTransformer2DModel",
            "num_attention_heads": 36,
            "num_layers": 28,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "sample_size": 16,
        },
        "vae": {
            "_class_name": "AutoencoderDC",
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "scaling_factor": 0.41407,
        },
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
        "text": {"tokenizer": "GemmaTokenizerFast", "text_encoder": "Gemma2Model"},
    },
    "flux-dev": {
        "pipeline": "FluxPipeline",
        "transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},  # the class's defaults
        "vae": VAE,
        "scheduler": FLOW,
        "text": CLIP | {"tokenizer_2": "T5TokenizerFast", "text_encoder_2": "T5EncoderModel"},
    },
}


def write(name: str, folder: Path) -> None:
    """Writes the configurations of a pipeline into a new folder."""
    size = SIZES[name]
    part = "unet" if "unet" in size else "transformer"
    index = {place: ["diffusers", size[place]["_class_name"]] for place in (part, "vae", "scheduler")}
    index |= {place: ["transformers", class_name] for place, class_name in size["text"].items()}
    files = {
        "model_index.json": {"_class_name": size["pipeline"], **index},
        f"{part}/config.json": size[part],
        "vae/config.json": size["vae"],
        "scheduler/scheduler_config.json": size["scheduler"],
        "tokenizer/tokenizer_config.json": {"model_max_length": TOKENS},
    }
    for file, values in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(values, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    arguments = parser.parse_args()
    write(arguments.size, arguments.out)


if __name__ == "__main__":
    main()
