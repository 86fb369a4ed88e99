"""The two U-Nets of the EDM family. They take (x, noise_labels [N], class_labels, augment_labels), in the dtype of x.

Parameter names and shapes are those of the published EDM snapshots. Snapshots embed this file's source, with
training/layers.py in place of the import, so it imports nothing else but torch, the standard library and
torch_utils.persistence.
"""

from __future__ import annotations  # EDM's tools may run the embedded source on an older Python

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils import persistence

from .layers import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, UNetBlock


@persistence.persistent_class
class SongUNet(torch.nn.Module):
    """DDPM++ and NCSN++ (arXiv:2011.13456).

    DDPM++ is embedding_type positional, encoder_type standard, channel_mult_noise 1, resample_filter [1, 1];
    NCSN++ is embedding_type fourier, encoder_type residual, channel_mult_noise 2, resample_filter [1, 3, 3, 1].
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ):
        if embedding_type not in ("positional", "fourier"):
            raise ValueError(f"embedding_type must be positional or fourier, not {embedding_type!r}")
        if encoder_type not in ("standard", "skip", "residual") or decoder_type not in ("standard", "skip"):
            raise ValueError(f"unknown encoder_type {encoder_type!r} or decoder_type {decoder_type!r}")
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init: dict[str, Any] = {"init_mode": "xavier_uniform"}
        init_zero: dict[str, Any] = {"init_mode": "xavier_uniform", "init_weight": 1e-5}
        init_attn: dict[str, Any] = {"init_mode": "xavier_uniform", "init_weight": math.sqrt(0.2)}
        block_kwargs: dict[str, Any] = {
            "emb_channels": emb_channels,
            "num_heads": 1,
            "dropout": dropout,
            "skip_scale": math.sqrt(0.5),
            "eps": 1e-6,
            "resample_filter": resample_filter,
            "resample_proj": True,
            "adaptive_scale": False,
            "init": init,
            "init_zero": init_zero,
            "init_attn": init_attn,
        }
        resample: dict[str, Any] = {"resample_filter": resample_filter}
        _check_resolution(img_resolution, len(channel_mult))

        # Mapping.
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)

        # Encoder. aux is the network's input, carried down alongside the features by encoders residual and skip.
        self.enc = torch.nn.ModuleDict()
        channels, aux_channels, skip_channels = in_channels, in_channels, []
        for level, mult in enumerate(channel_mult):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            if level == 0:
                self.enc[f"{res}_conv"] = Conv2d(channels, model_channels, kernel=3, **init)
                channels = model_channels
            else:
                self.enc[f"{res}_down"] = UNetBlock(channels, channels, down=True, **block_kwargs)
            skip_channels.append(channels)
            if level > 0 and encoder_type == "skip":
                self.enc[f"{res}_aux_down"] = Conv2d(aux_channels, aux_channels, kernel=0, down=True, **resample)
                self.enc[f"{res}_aux_skip"] = Conv2d(aux_channels, channels, kernel=1, **init)
            if level > 0 and encoder_type == "residual":
                self.enc[f"{res}_aux_residual"] = Conv2d(
                    aux_channels, channels, kernel=3, down=True, fused_resample=True, **resample, **init
                )
                aux_channels = channels
            for i in range(num_blocks):
                attention = img_resolution >> level in attn_resolutions
                out = model_channels * mult
                self.enc[f"{res}_block{i}"] = UNetBlock(channels, out, attention=attention, **block_kwargs)
                channels = out
                skip_channels.append(channels)

        # Decoder.
        self.dec = torch.nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            deepest = level == len(channel_mult) - 1
            if deepest:
                self.dec[f"{res}_in0"] = UNetBlock(channels, channels, attention=True, **block_kwargs)
                self.dec[f"{res}_in1"] = UNetBlock(channels, channels, **block_kwargs)
            else:
                self.dec[f"{res}_up"] = UNetBlock(channels, channels, up=True, **block_kwargs)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and img_resolution >> level in attn_resolutions
                out = model_channels * mult
                self.dec[f"{res}_block{i}"] = UNetBlock(
                    channels + skip_channels.pop(), out, attention=attention, **block_kwargs
                )
                channels = out
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and not deepest:
                    self.dec[f"{res}_aux_up"] = Conv2d(out_channels, out_channels, kernel=0, up=True, **resample)
                self.dec[f"{res}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{res}_aux_conv"] = Conv2d(channels, out_channels, kernel=3, **init_zero)

    def _embed(
        self, noise_labels: torch.Tensor, class_labels: torch.Tensor | None, augment_labels: torch.Tensor | None
    ) -> torch.Tensor:
        emb = torch.cat(self.map_noise(noise_labels).chunk(2, dim=1)[::-1], dim=1)  # sines first
        if self.map_label is not None:
            class_labels = _drop_labels(class_labels, self.label_dropout if self.training else 0)
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        emb = self._embed(noise_labels, class_labels, augment_labels)

        skips, aux = [], x
        for key, module in self.enc.items():
            role = key.partition("_")[2]
            if role == "aux_down":
                aux = module(aux)
            elif role == "aux_skip":
                x = skips[-1] = x + module(aux)
            elif role == "aux_residual":
                x = skips[-1] = aux = (x + module(aux)) / math.sqrt(2)
            else:
                x = module(x) if role == "conv" else module(x, emb)
                skips.append(x)

        aux, normed = None, None
        for key, module in self.dec.items():
            role = key.partition("_")[2]
            if role == "aux_up":
                aux = module(aux)
            elif role == "aux_norm":
                normed = module(x)
            elif role == "aux_conv":
                out = module(F.silu(normed))
                aux = out if aux is None else out + aux
            else:
                x = module(_with_skip(x, skips, module.in_channels), emb)
        assert aux is not None
        return aux


@persistence.persistent_class
class DhariwalUNet(torch.nn.Module):
    """ADM (arXiv:2105.05233)."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ):
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        init = {"init_mode": "kaiming_uniform", "init_weight": math.sqrt(1 / 3), "init_bias": math.sqrt(1 / 3)}
        init_zero = {"init_mode": "kaiming_uniform", "init_weight": 0, "init_bias": 0}
        block_kwargs: dict[str, Any] = {
            "emb_channels": emb_channels,
            "channels_per_head": 64,
            "dropout": dropout,
            "init": init,
            "init_zero": init_zero,
        }
        _check_resolution(img_resolution, len(channel_mult))

        # Mapping.
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.map_label = None
        if label_dim:
            self.map_label = Linear(label_dim, emb_channels, bias=False, init_weight=math.sqrt(label_dim))

        # Encoder.
        self.enc = torch.nn.ModuleDict()
        channels, skip_channels = in_channels, []
        for level, mult in enumerate(channel_mult):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            out = model_channels * mult
            if level == 0:
                self.enc[f"{res}_conv"] = Conv2d(channels, out, kernel=3, **init)
                channels = out
            else:
                self.enc[f"{res}_down"] = UNetBlock(channels, channels, down=True, **block_kwargs)
            skip_channels.append(channels)
            attention = img_resolution >> level in attn_resolutions
            for i in range(num_blocks):
                self.enc[f"{res}_block{i}"] = UNetBlock(channels, out, attention=attention, **block_kwargs)
                channels = out
                skip_channels.append(channels)

        # Decoder.
        self.dec = torch.nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            if level == len(channel_mult) - 1:
                self.dec[f"{res}_in0"] = UNetBlock(channels, channels, attention=True, **block_kwargs)
                self.dec[f"{res}_in1"] = UNetBlock(channels, channels, **block_kwargs)
            else:
                self.dec[f"{res}_up"] = UNetBlock(channels, channels, up=True, **block_kwargs)
            attention = img_resolution >> level in attn_resolutions
            for i in range(num_blocks + 1):
                out = model_channels * mult
                self.dec[f"{res}_block{i}"] = UNetBlock(
                    channels + skip_channels.pop(), out, attention=attention, **block_kwargs
                )
                channels = out
        self.out_norm = GroupNorm(channels)
        self.out_conv = Conv2d(channels, out_channels, kernel=3, **init_zero)

    def _embed(
        self, noise_labels: torch.Tensor, class_labels: torch.Tensor | None, augment_labels: torch.Tensor | None
    ) -> torch.Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            class_labels = _drop_labels(class_labels, self.label_dropout if self.training else 0)
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        emb = self._embed(noise_labels, class_labels, augment_labels)
        skips = []
        for key, module in self.enc.items():
            x = module(x) if key.endswith("_conv") else module(x, emb)
            skips.append(x)
        for module in self.dec.values():
            x = module(_with_skip(x, skips, module.in_channels), emb)
        return self.out_conv(F.silu(self.out_norm(x)))


def _check_resolution(img_resolution: int, levels: int) -> None:
    """Errors: ValueError when images of this size can't be halved between all levels and doubled again."""
    multiple = 2 ** (levels - 1)
    if img_resolution % multiple:
        raise ValueError(
            f"img_resolution={img_resolution} must be a multiple of {multiple}, since {levels} levels halve it"
            f" {levels - 1} times"
        )


def _drop_labels(class_labels: torch.Tensor | None, probability: float) -> torch.Tensor:
    """Zeroes the labels of an image with the given probability."""
    assert class_labels is not None
    if not probability:
        return class_labels
    keep = torch.rand([class_labels.shape[0], 1], device=class_labels.device) >= probability
    return class_labels * keep.to(class_labels.dtype)


def _with_skip(x: torch.Tensor, skips: list[torch.Tensor], in_channels: Any) -> torch.Tensor:
    """x, joined with the next skip connection when the coming block has channels for it."""
    return x if x.shape[1] == in_channels else torch.cat([x, skips.pop()], dim=1)
