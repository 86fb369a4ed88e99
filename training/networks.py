"""Denoisers of the EDM family: two U-Nets and four preconditioners around them (arXiv:2206.00364, Table 1).

A denoiser is called as `net(x, sigma, class_labels=None, augment_labels=None)` and predicts the clean image:

    x               [N, C, H, W] float32, noisy image; clean images lie in [-1, 1]
    sigma           [N], [N, 1, 1, 1] or scalar, standard deviation of the noise
    class_labels    [N, label_dim] float32, usually one-hot; None is all zeros
    augment_labels  [N, augment_dim] float32, see training/augment.py; None is all zeros
    returns         [N, C, H, W] float32

Its `round_sigma(sigma)` takes float32 of any shape and gives the nearest noise levels that it knows, shaped likewise.

Parameter names and shapes are those of the published EDM snapshots. Snapshots embed this file's source, so it
imports nothing but torch, numpy, the standard library and torch_utils.persistence.
"""

from __future__ import annotations  # EDM's tools may run the embedded source on an older Python

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from torch_utils import persistence

# ----------------------------------------------------------------------------
# Layers.


def _init_tensor(shape: Sequence[int], mode: str, fan_in: int, fan_out: int) -> torch.Tensor:
    """Random weights of the given initialisation mode."""
    if mode == "xavier_uniform":
        return math.sqrt(6 / (fan_in + fan_out)) * (torch.rand(*shape) * 2 - 1)
    if mode == "xavier_normal":
        return math.sqrt(2 / (fan_in + fan_out)) * torch.randn(*shape)
    if mode == "kaiming_uniform":
        return math.sqrt(3 / fan_in) * (torch.rand(*shape) * 2 - 1)
    if mode == "kaiming_normal":
        return math.sqrt(1 / fan_in) * torch.randn(*shape)
    raise ValueError(f"unknown init_mode {mode!r}")


@persistence.persistent_class
class Linear(torch.nn.Module):
    """Fully connected layer, [N, in_features] -> [N, out_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1.0,
        init_bias: float = 0.0,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        init = {"mode": init_mode, "fan_in": in_features, "fan_out": out_features}
        self.weight = torch.nn.Parameter(_init_tensor([out_features, in_features], **init) * init_weight)
        self.bias = torch.nn.Parameter(_init_tensor([out_features], **init) * init_bias) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


@persistence.persistent_class
class Conv2d(torch.nn.Module):
    """Convolution with optional resampling by 2, up before it or down after it; kernel 0 only resamples."""

    resample_filter: torch.Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[int] = (1, 1),
        fused_resample: bool = False,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1.0,
        init_bias: float = 0.0,
    ):
        assert not (up and down)
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.fused_resample = fused_resample
        self.box_filter = list(resample_filter) == [1, 1]
        init = {"mode": init_mode, "fan_in": in_channels * kernel**2, "fan_out": out_channels * kernel**2}
        shape = [out_channels, in_channels, kernel, kernel]
        self.weight = torch.nn.Parameter(_init_tensor(shape, **init) * init_weight) if kernel else None
        self.bias = torch.nn.Parameter(_init_tensor([out_channels], **init) * init_bias) if kernel and bias else None
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = taps.outer(taps)[None, None] / taps.sum().square()  # [1, 1, k, k]
        self.register_buffer("resample_filter", taps if up or down else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight  # read once: it may be computed
        weight = weight.to(x.dtype) if weight is not None else None
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        weight_pad = weight.shape[-1] // 2 if weight is not None else 0
        filter_pad = (self.resample_filter.shape[-1] - 1) // 2 if self.resample_filter is not None else 0

        if self.fused_resample and weight is not None and self.up:
            x = self._upsample(x, max(filter_pad - weight_pad, 0))
            return F.conv2d(x, weight, bias, padding=max(weight_pad - filter_pad, 0))
        if self.fused_resample and weight is not None and self.down:
            x = F.conv2d(x, weight, bias, padding=weight_pad + filter_pad)
            return self._downsample(x, 0)
        if self.up:
            x = self._upsample(x, filter_pad)
        if self.down:
            x = self._downsample(x, filter_pad)
        if weight is not None:
            x = F.conv2d(x, weight, bias, padding=weight_pad)
        return x

    def _upsample(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        if self.box_filter and padding == 0:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        assert self.resample_filter is not None
        taps = self.resample_filter.to(x.dtype).mul(4).tile([x.shape[1], 1, 1, 1])
        return F.conv_transpose2d(x, taps, groups=x.shape[1], stride=2, padding=padding)

    def _downsample(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        if self.box_filter and padding == 0:
            return F.avg_pool2d(x, 2)
        assert self.resample_filter is not None
        taps = self.resample_filter.to(x.dtype).tile([x.shape[1], 1, 1, 1])
        return F.conv2d(x, taps, groups=x.shape[1], stride=2, padding=padding)


@persistence.persistent_class
class GroupNorm(torch.nn.Module):
    """Group normalisation with at most `num_groups` groups of at least `min_channels_per_group` channels."""

    def __init__(self, num_channels: int, num_groups: int = 32, min_channels_per_group: int = 4, eps: float = 1e-5):
        super().__init__()
        self.num_groups = min(num_groups, num_channels // min_channels_per_group)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(num_channels))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v for q, k, v of shape [..., positions, C], the softmax in float32."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):  # where the fused kernel is slow
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1, dtype=torch.float32)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


@persistence.persistent_class
class UNetBlock(torch.nn.Module):
    """Residual block of both U-Nets: two convolutions modulated by the embedding, then optional self-attention."""

    checkpoint = False  # whether activations are recomputed in the backward pass

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[int] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: dict[str, Any] | None = None,
        init_zero: dict[str, Any] | None = None,
        init_attn: dict[str, Any] | None = None,
    ):
        super().__init__()
        init = init or {}
        init_zero = {"init_weight": 0} if init_zero is None else init_zero
        resample = {"up": up, "down": down, "resample_filter": resample_filter}
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_heads = 0 if not attention else num_heads or out_channels // channels_per_head
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale

        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resample, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            attn = init if init_attn is None else init_attn
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, **attn)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb)[:, :, None, None].to(x.dtype)  # [N, C or 2C, 1, 1]
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + modulation))
        h = self.conv1(F.dropout(h, p=self.dropout, training=self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            x = (self.proj(self._attend(self.norm2(x))) + x) * self.skip_scale
        return x

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(x).reshape(n, self.num_heads, c // self.num_heads, 3, height * width)
        q, k, v = (t.transpose(-1, -2).contiguous() for t in qkv.unbind(3))  # [N, heads, H*W, C/heads]
        attended = attention(q, k, v).transpose(-1, -2)
        if x.is_contiguous():  # with one head it would be a view that makes all later layers channels last
            attended = attended.contiguous()
        return attended.reshape(n, c, height, width)


@persistence.persistent_class
class PositionalEmbedding(torch.nn.Module):
    """Cosines and sines of a scalar at geometrically spaced frequencies, [N] -> [N, num_channels]."""

    def __init__(self, num_channels: int, max_positions: int = 10000, endpoint: bool = False):
        super().__init__()
        self.num_channels = num_channels
        self.max_positions = max_positions
        self.endpoint = endpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x.device) / (half - (1 if self.endpoint else 0))
        angles = x.outer((1 / self.max_positions) ** exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@persistence.persistent_class
class FourierEmbedding(torch.nn.Module):
    """Cosines and sines of a scalar at random frequencies, [N] -> [N, num_channels]."""

    freqs: torch.Tensor

    def __init__(self, num_channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = x.outer(2 * np.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


# ----------------------------------------------------------------------------
# U-Nets. They take (x, noise_labels [N], class_labels, augment_labels) and work in the dtype of x.


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


# ----------------------------------------------------------------------------
# Preconditioners: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), arXiv:2206.00364 eq. (7).

_UNETS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class _Preconditioner(torch.nn.Module):
    """What the four preconditioners share; a subclass defines `coefficients`, `sigma_min` and `sigma_max`."""

    # Of the U-Net's layers; None means float16 with use_fp16 on a GPU, else float32.
    compute_dtype: torch.dtype | None = None

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        model_type: str,
        out_channels: int | None = None,
        **model_kwargs: Any,
    ):
        if model_type not in _UNETS:
            raise ValueError(f"model_type must be one of {', '.join(_UNETS)}, not {model_type!r}")
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.model = _UNETS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=out_channels or img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    @property
    def augment_dim(self) -> int:
        """Length of the augmentation labels, 0 if the network takes none."""
        return self.model.map_augment.in_features if self.model.map_augment is not None else 0

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_skip, c_out, c_in, c_noise) for sigma [N, 1, 1, 1]."""
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        dtype = torch.float16 if self.use_fp16 and x.device.type != "cpu" else torch.float32
        dtype = torch.float32 if force_fp32 else self.compute_dtype or dtype

        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        out = self.model(
            (c_in * x).to(dtype),
            c_noise.flatten(),
            class_labels=class_labels,
            augment_labels=augment_labels,
            **model_kwargs,
        )
        return c_skip * x + c_out * out[:, : self.img_channels].to(torch.float32)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The nearest noise levels that the network knows, in the shape of `sigma`."""
        return torch.as_tensor(sigma)


@persistence.persistent_class
class VPPrecond(_Preconditioner):
    """Variance preserving (DDPM, arXiv:2011.13456)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.M = M
        self.epsilon_t = epsilon_t
        self.sigma_min = float(self.sigma(epsilon_t))
        self.sigma_max = float(self.sigma(1.0))

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """The noise level at time t, in the shape of t."""
        t = torch.as_tensor(t)
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The time at which the noise level is sigma, in the shape of sigma."""
        sigma = torch.as_tensor(sigma)
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


@persistence.persistent_class
class VEPrecond(_Preconditioner):
    """Variance exploding (score matching with Langevin dynamics, arXiv:2011.13456)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        return 1, sigma, torch.ones_like(sigma), (0.5 * sigma).log()


def iddpm_sigmas(C_1: float, C_2: float, M: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The noise levels u_0 > ... > u_M = 0 of improved DDPM, [M + 1] (arXiv:2206.00364, Table 1)."""
    alpha_bar = (0.5 * np.pi * torch.arange(M + 1, dtype=dtype) / M / (C_2 + 1)).sin() ** 2
    u = torch.zeros(M + 1, dtype=dtype)
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (alpha_bar[j - 1] / alpha_bar[j]).clip(min=C_1) - 1).sqrt()
    return u


@persistence.persistent_class
class iDDPMPrecond(_Preconditioner):
    """Improved DDPM (arXiv:2102.09672): a discrete set of noise levels; the network's variance output is unused."""

    u: torch.Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ):
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, model_type, out_channels=img_channels * 2, **model_kwargs
        )
        self.C_1 = C_1
        self.C_2 = C_2
        self.M = M
        self.register_buffer("u", iddpm_sigmas(C_1, C_2, M))

    @property
    def sigma_min(self) -> float:
        return float(self.u[self.M - 1])

    @property
    def sigma_max(self) -> float:
        return float(self.u[0])

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        c_noise = self.M - 1 - self._nearest(sigma).to(torch.float32)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        sigma = torch.as_tensor(sigma)
        return self.u.to(sigma.device)[self._nearest(sigma)].to(sigma.dtype)

    def _nearest(self, sigma: torch.Tensor) -> torch.Tensor:
        """Index of the nearest noise level, same shape as sigma."""
        distance = (sigma.to(torch.float32).reshape(-1, 1) - self.u.to(sigma.device)).abs()
        return distance.argmin(1).reshape(sigma.shape)


@persistence.persistent_class
class EDMPrecond(_Preconditioner):
    """EDM's own preconditioning (arXiv:2206.00364)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data

    def coefficients(
        self, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor, torch.Tensor, torch.Tensor]:
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return (self.sigma_data / total) ** 2, sigma * self.sigma_data / total, 1 / total, sigma.log() / 4
