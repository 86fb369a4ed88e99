"""A tiny VAE, a tiny model of its latents and images for it, with random weights of the diffusers library."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_VAE

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

VAE = {**TINY_VAE, "sample_size": 16, "scaling_factor": 0.7, "shift_factor": 0.1}
DIT = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_embeds_ada_norm": 3,
    "norm_num_groups": 2,
}


def randomised(net, scale=0.3):
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


def toy_vae(**changes):
    torch.manual_seed(1)
    return randomised(diffusers.AutoencoderKL.from_config({**VAE, **changes}), 0.05)


def save_vae(folder):
    toy_vae().save_pretrained(folder)
    return folder


def save_pipeline(folder):
    """A DiT of latents with its VAE, as the library saves them."""
    model = randomised(diffusers.DiTTransformer2DModel.from_config(DIT))
    diffusers.DiTPipeline(model, toy_vae(), diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


def save_images(folder):
    """Twelve gray images of three classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, [16, 16], dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"{i:02d}.png", i % 3] for i in range(12)]}))
    return folder
