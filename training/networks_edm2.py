"""EDM2's denoiser: a magnitude-preserving U-Net (arXiv:2312.02696), called like those of training/networks.py.

Every layer keeps the mean square of its activations at one, so it needs neither biases nor group norms. Weights are
normalised whenever they are used: only their directions matter. Training also normalises the stored weights after every
update, by `Precond.normalize_weights` ("forced weight normalisation"), so that they don't grow and the effective
learning rate stays as it was set. The network also learns u(sigma), the logarithm of its error's variance, which
balances the noise levels in its training loss (`training.loss.EDM2Loss`).

Class and parameter names, and shapes, are those of the published EDM2 snapshots. Snapshots embed this file's source,
with training/layers.py in place of the import, so it imports nothing else but torch, the standard library and
torch_utils.persistence.
"""

from __future__ import annotations  # EDM's tools may run the embedded source on an older Python

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from torch_utils import persistence

from .layers import attention, inputs_in_float32

__all__ = [
    "Block",
    "MPConv",
    "MPFourier",
    "Precond",
    "UNet",
    "freeze_logvar",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "normalize",
    "normalize_weights",
]

EPSILON = 1e-4  # of `normalize`
SILU_GAIN = 0.596  # root mean square of silu(x) for standard normal x


def normalize(x: torch.Tensor, dims: Sequence[int] | None = None) -> torch.Tensor:
    """x [N, ...] with root mean square 1 over `dims`, by default over all but the first, in its own dtype."""
    dims = list(range(1, x.ndim)) if dims is None else list(dims)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    rms = norm * math.sqrt(norm[:1].numel() / x[:1].numel())  # of one item, since their number may be symbolic
    return x / (EPSILON + rms).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU of standard normal values, with mean square 1."""
    return F.silu(x) / SILU_GAIN


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """a + t (b - a), divided by what keeps the mean square of independent a and b at 1."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """[N, C_a + C_b, ...], weighted so that b contributes the share t whatever the numbers of channels are."""
    channels_a, channels_b = a.shape[1], b.shape[1]
    scale = math.sqrt((channels_a + channels_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(channels_a)), b * (scale * t / math.sqrt(channels_b))], dim=1)


@persistence.persistent_class
class MPFourier(torch.nn.Module):
    """Cosines of a scalar at random frequencies and phases, [N] -> [N, num_channels]."""

    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, num_channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = x.to(torch.float32).outer(self.freqs.to(torch.float32)) + self.phases.to(torch.float32)
        return (angles.cos() * math.sqrt(2)).to(x.dtype)


@persistence.persistent_class
class MPConv(torch.nn.Module):
    """Convolution, or linear layer for kernel [], whose weights are normalised per output channel when used."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int]):
        super().__init__()
        self.out_channels = out_channels
        self.weight = torch.nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        """x: [N, in_channels] or [N, in_channels, H, W]. gain: scalar, multiplies the output."""
        weight = self.weight.to(torch.float32)  # read once: it may be computed
        weight = (normalize(weight) * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @torch.no_grad()
    def normalize_weight(self) -> None:
        """Gives the stored weights of each output channel root mean square 1."""
        weight = self._parameters.get("weight")
        if weight is not None:  # a low-rank update (`sid.lora`) has its base in common with other networks
            weight.copy_(normalize(weight.to(torch.float32)))


@persistence.persistent_class
class Block(torch.nn.Module):
    """Residual block: two convolutions modulated by the embedding, then optional self-attention."""

    checkpoint = False  # whether activations are recomputed in the backward pass

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: str = "enc",
        resample_mode: str = "keep",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float = 256.0,
    ):
        if flavor not in ("enc", "dec") or resample_mode not in ("keep", "up", "down"):
            raise ValueError(f"unknown flavor {flavor!r} or resample_mode {resample_mode!r}")
        super().__init__()
        self.out_channels = out_channels
        self.flavor = flavor
        self.resample_mode = resample_mode
        if type(channels_per_head) is not int or channels_per_head < 1:
            raise ValueError(f"channels_per_head={channels_per_head} is not a number of channels")
        self.num_heads = out_channels // channels_per_head if attention else 0
        if attention and out_channels % channels_per_head:
            raise ValueError(f"attention on {out_channels} channels, no multiple of channels_per_head")
        self.dropout = dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act

        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, [3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels, [])
        self.conv_res1 = MPConv(out_channels, out_channels, [3, 3])
        self.conv_skip = MPConv(in_channels, out_channels, [1, 1]) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, [1, 1]) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, [1, 1]) if self.num_heads else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.resample_mode == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.resample_mode == "down":
            x = F.avg_pool2d(x, 2)
        if self.flavor == "enc":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dims=[1])

        y = self.conv_res0(mp_silu(x))
        modulation = self.emb_linear(emb, gain=self.emb_gain) + 1  # [N, C]
        y = mp_silu(y * modulation[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, p=self.dropout, training=self.training))

        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attend(x)), self.attn_balance)
        return x.clamp(-self.clip_act, self.clip_act)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        assert self.attn_qkv is not None
        n, c, height, width = x.shape
        qkv = self.attn_qkv(x).reshape(n, self.num_heads, c // self.num_heads, 3, height * width)
        q, k, v = (t.transpose(-1, -2).contiguous() for t in normalize(qkv, dims=[2]).unbind(3))
        return attention(q, k, v).transpose(-1, -2).reshape(n, c, height, width)


@persistence.persistent_class
class UNet(torch.nn.Module):
    """The network F(x; c_noise): images [N, C, H, W] of any dtype, c_noise [N] and class labels in float32."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        **block_kwargs: Any,
    ):
        super().__init__()
        multiple = 2 ** (len(channel_mult) - 1)
        if img_resolution % multiple:
            raise ValueError(
                f"img_resolution={img_resolution} must be a multiple of {multiple}, since {len(channel_mult)} levels"
                f" halve it {len(channel_mult) - 1} times"
            )
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb_channels = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        self.out_gain = torch.nn.Parameter(torch.zeros([]))

        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels, [])
        self.emb_label = MPConv(label_dim, emb_channels, []) if label_dim else None

        def block(in_channels: int, out_channels: int, resolution: int, **kwargs: Any) -> Block:
            attends = kwargs.pop("attention", resolution in attn_resolutions)
            return Block(in_channels, out_channels, emb_channels, attention=attends, **kwargs, **block_kwargs)

        self.enc = torch.nn.ModuleDict()
        channels, skip_channels = img_channels + 1, []
        for level, width in enumerate(widths):
            size = img_resolution >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = MPConv(channels, width, [3, 3])
                channels = width
            else:
                self.enc[f"{size}x{size}_down"] = block(channels, channels, size, attention=False, resample_mode="down")
            skip_channels.append(channels)
            for i in range(num_blocks):
                self.enc[f"{size}x{size}_block{i}"] = block(channels, width, size)
                channels = width
                skip_channels.append(channels)

        self.dec = torch.nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            size, plain = img_resolution >> level, {"flavor": "dec", "attention": False}
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block(channels, channels, size, flavor="dec", attention=True)
                self.dec[f"{size}x{size}_in1"] = block(channels, channels, size, **plain)
            else:
                self.dec[f"{size}x{size}_up"] = block(channels, channels, size, resample_mode="up", **plain)
            for i in range(num_blocks + 1):
                self.dec[f"{size}x{size}_block{i}"] = block(channels + skip_channels.pop(), width, size, flavor="dec")
                channels = width
        self.out_conv = MPConv(channels, img_channels, [3, 3])

    def forward(
        self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            assert class_labels is not None
            emb_label = self.emb_label(class_labels * math.sqrt(class_labels.shape[1]))
            emb = mp_sum(emb, emb_label.expand_as(emb), self.label_balance)
        emb = mp_silu(emb)

        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for key, module in self.enc.items():
            x = module(x) if key.endswith("_conv") else module(x, emb)
            skips.append(x)
        for key, module in self.dec.items():
            if "block" in key:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = module(x, emb)
        return self.out_conv(x, gain=self.out_gain)


@persistence.persistent_class
class Precond(torch.nn.Module):
    """EDM2's denoiser: EDM's preconditioning around `UNet`, and u(sigma).

    use_fp16:        whether layers work in float16 on a GPU; true in published files, which don't record it.
    sigma_data:      standard deviation of the images or latents.
    logvar_channels: Fourier features of u(sigma).
    """

    # Of the U-Net's layers; None means float16 with use_fp16 on a GPU, else float32.
    compute_dtype: torch.dtype | None = None
    sigma_min, sigma_max = 0.0, float("inf")
    augment_dim = 0

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        **unet_kwargs: Any,
    ):
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.sigma_data = sigma_data
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, [])

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        return_logvar: bool = False,
        augment_labels: None = None,
    ) -> Any:
        """The clean image [N, C, H, W]; with return_logvar, a pair of it and `logvar(sigma)`."""
        if augment_labels is not None:
            raise ValueError("EDM2's network takes no augmentation labels")
        x, sigma, class_labels = inputs_in_float32(x, sigma, class_labels, self.label_dim)
        dtype = torch.float16 if self.use_fp16 and x.device.type != "cpu" else torch.float32
        dtype = torch.float32 if force_fp32 else self.compute_dtype or dtype

        total = (sigma**2 + self.sigma_data**2).sqrt()
        out = self.unet((x / total).to(dtype), sigma.flatten().log() / 4, class_labels).to(torch.float32)
        denoised = (self.sigma_data / total) ** 2 * x + sigma * self.sigma_data / total * out
        return (denoised, self.logvar(sigma)) if return_logvar else denoised

    def logvar(self, sigma: torch.Tensor) -> torch.Tensor:
        """u(sigma), the logarithm of the variance of the weighted error, [N, 1, 1, 1] for N noise levels."""
        return self.logvar_linear(self.logvar_fourier(sigma.to(torch.float32).flatten().log() / 4)).reshape(-1, 1, 1, 1)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """`sigma` itself: the network knows all noise levels."""
        return torch.as_tensor(sigma)

    def normalize_weights(self) -> None:
        """Normalises the stored weights of all layers, to be called after every update. Outputs stay the same."""
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalize_weight()


def normalize_weights(net: torch.nn.Module) -> None:
    """Normalises the stored weights of a network that has a method for it (`Precond.normalize_weights`)."""
    method = getattr(net, "normalize_weights", None)
    if method is not None:
        method()


def freeze_logvar(net: torch.nn.Module) -> None:
    """Excludes u(sigma) of an EDM2 network from training, where it gets no gradient; other networks have none."""
    if isinstance(net, Precond):
        net.logvar_linear.requires_grad_(False)
