"""Classifier-free guidance of the score networks in a distillation (SiD-LSG, arXiv:2406.01561)."""

from collections.abc import Callable

import torch

from dnnlib import UserError
from torch_utils import distributed

from .config import DistillationConfig, parse_guidance


def guided(net: Callable, kappa: float) -> Callable:
    """f_kappa = f_uncond + kappa (f_cond - f_uncond) of a denoiser; with kappa = 1 the denoiser itself.

    Asked without labels, a network gets zeros, as in EDM's training with label dropout. It is called once with and then
    once without labels: each call has as many images as one without guidance, so --batch-gpu and --chunk say what
    they say.
    """
    if kappa == 1:
        return net

    def call(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        conditional = net(x, sigma, labels, **kwargs)
        unconditional = net(x, sigma, torch.zeros_like(labels), **kwargs)
        return unconditional + kappa * (conditional - unconditional)

    return call


def drop_labels(labels: torch.Tensor | None, probability: float) -> torch.Tensor | None:
    """Zeroes each image's label [label_dim] with the given probability; draws from torch's default generator."""
    if not probability:
        return labels
    return labels * (torch.rand([len(labels), 1], device=labels.device) >= probability)


def check_guidance(config: DistillationConfig, teacher: torch.nn.Module) -> None:
    """Warns of a teacher that never learnt to do without labels. Errors: UserError for one that has none."""
    if config.guidance is None:
        return
    parse_guidance(config.guidance)
    if not teacher.label_dim:
        raise UserError(f"--guidance={config.guidance}: the teacher has no classes to guide by; leave the option out")
    if getattr(getattr(teacher, "model", None), "label_dropout", None) == 0:
        distributed.print0(
            "Warning: --guidance asks the teacher without labels, which it never saw in training;"
            " edm.train --label-dropout=0.1 makes one that did"
        )
