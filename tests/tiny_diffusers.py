"""Tiny teachers whose networks and schedulers are the diffusers library's."""

import pytest
import torch
from tiny import TINY_VAE

from edm import diffusers_models, latents
from edm.diffusers_models import DiffusersDenoiser

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()

UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_embeds_ada_norm": 3,
}
LATENT = {"in_channels": 2, "out_channels": 2}
VAE = {**TINY_VAE, "_class_name": "AutoencoderKL", "scaling_factor": 0.7}
DDPM = {"_class_name": "DDPMScheduler", "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
ZERO_SNR_V = {**DDPM, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def randomise(net):
    """Weights that make every part matter, some of which the library initialises to zero."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


def denoiser(model=None, scheduler=None, **changes):
    return randomise(DiffusersDenoiser(model={**UNET, **(model or {})}, scheduler=scheduler or DDPM, **changes))


def less_contrast(net):
    """Few pixels beyond white and black."""
    last = net.net.conv_out if hasattr(net.net, "conv_out") else net.net.proj_out_2
    for parameter in last.parameters():
        parameter.data /= 10
    return net


def of_latents(folder, model, scheduler, level=None, **vae):
    net = less_contrast(randomise(DiffusersDenoiser(model=model, scheduler=scheduler)))
    torch.manual_seed(0)
    diffusers.AutoencoderKL.from_config({**VAE, **vae}).save_pretrained(folder / "vae")
    net.metadata = {"kind": "teacher", "vae": latents.record_of(folder / "vae")}
    if level is not None:
        net.metadata |= {"kind": "sid-generator", "init_sigma": level}
    return net


def write(folder, net, pipeline="DDPMPipeline"):
    """The library's own folder of the model and the scheduler behind a denoiser."""
    scheduler = diffusers_models.scheduler_of(net)
    getattr(diffusers, pipeline)(unet=net.net, scheduler=scheduler).save_pretrained(folder)
    return folder


def write_parts(net, folder):
    """Its model and its scheduler, next to its VAE."""
    net.net.save_pretrained(folder)
    diffusers_models.scheduler_of(net).save_pretrained(folder)
