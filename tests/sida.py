"""Tiny distillations with real images, for tests of SiDA."""

import torch
from tiny import CPU, tiny_config, tiny_teacher

from sid.adversarial import RealImages
from sid.inputs import Inputs
from sid.prepare import prepare
from training.dataset import ImageFolderDataset
from training.networks import EDMPrecond

GAN = {"gan": True, "gan_freeze_kimg": 0.008, "gan_start_kimg": 0.016}  # one iteration each


def images_of(data, label_dim=3):
    return ImageFolderDataset(data, use_labels=label_dim > 0)


def reals_of(data, label_dim=3):
    return RealImages(images_of(data, label_dim), label_dim, CPU)


def make(data, resume=None, **changes):
    inputs = Inputs(tiny_teacher(), dataset=images_of(data))
    return prepare(inputs, tiny_config(**{**GAN, **changes}), CPU, resume)


def network(model_type, **changes):
    torch.manual_seed(0)
    kwargs = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1}
    net = EDMPrecond(8, 1, 3, model_type=model_type, **kwargs, **changes)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net
