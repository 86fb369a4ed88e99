"""Layers and blocks of the U-Nets in training/unets.py.

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


def inputs_in_float32(
    x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None, label_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A denoiser's inputs in float32: images, sigma [N or 1, 1, 1, 1], labels [N or 1, label_dim] or None without."""
    x = x.to(torch.float32)
    sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1, 1, 1)
    if label_dim == 0:
        return x, sigma, None
    if class_labels is None:
        return x, sigma, torch.zeros([1, label_dim], device=x.device)
    return x, sigma, class_labels.to(torch.float32).reshape(-1, label_dim)


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
