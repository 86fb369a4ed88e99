"""Transformers for diffusion in the layout of the published DiT and SiT checkpoints, as denoisers.

DiT (arXiv:2212.09748) predicts noise at DDPM's 1000 times; SiT (arXiv:2401.08740) has the same network and predicts the
velocity x0 - n of a flow whose time is 0 for noise and 1 for images. The names of the weights are the published ones.
"""

import math

import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from torch_utils.persistence import persistent_class

from .denoiser import SIGMA_DATA
from .parameterisations import DiscreteTimes, FlowTimes, WrappedDenoiser, ddpm_sigmas

KINDS = ("dit", "sit")
FREQUENCIES, MAX_PERIOD = 128, 10_000.0  # of the embedding of times
EPS = 1e-6  # of layer norms, which have no weights


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A layer norm with its own scale and shift for each image. x: [N, T, D]; shift, scale: [N, D]."""
    return layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


class Attention(torch.nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


class Mlp(torch.nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


def modulation(width: int, outputs: int) -> torch.nn.Sequential:
    """What makes shifts, scales and gates of an embedding."""
    return torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(width, outputs * width))


class Block(torch.nn.Module):
    """Attention and an MLP, shifted, scaled and gated by the embedding of time and class (adaLN)."""

    checkpoint = False  # `torch_utils.precision.checkpoint_blocks` sets it: recompute activations

    def __init__(self, width: int, num_heads: int, mlp_width: int):
        super().__init__()
        self.attn, self.mlp = Attention(width, num_heads), Mlp(width, mlp_width)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, c, use_reentrant=False)
        return self._forward(x, c)

    def _forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulated(x, shift, scale))
        return x + mlp_gate[:, None] * self.mlp(modulated(x, mlp_shift, mlp_scale))


class PatchEmbedding(torch.nn.Module):
    def __init__(self, channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = torch.nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, patches, width]"""
        return self.proj(x).flatten(2).transpose(1, 2)


def time_features(t: torch.Tensor) -> torch.Tensor:
    """[N] -> [N, 2 FREQUENCIES]"""
    steps = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * (-math.log(MAX_PERIOD) / FREQUENCIES * steps).exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        layers = torch.nn.Linear(2 * FREQUENCIES, width), torch.nn.SiLU(), torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(*layers)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.mlp(time_features(t))


class ClassEmbedding(torch.nn.Module):
    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = torch.nn.Embedding(classes, width)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(index)


class FinalLayer(torch.nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear, self.adaLN_modulation = torch.nn.Linear(width, outputs), modulation(width, 2)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


class Transformer(torch.nn.Module):
    """The network of DiT and SiT: images [N, C, H, H], times [N] and class numbers [N] to [N, out_channels, H, H].

    The class number after the last stands for no class.
    """

    def __init__(
        self,
        resolution: int,
        channels: int,
        out_channels: int,
        classes: int,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int = 2,
        mlp_width: int | None = None,
    ):
        super().__init__()
        self._patch_size, self._out_channels = patch_size, out_channels
        self.x_embedder = PatchEmbedding(channels, width, patch_size)
        self.t_embedder, self.y_embedder = TimeEmbedding(width), ClassEmbedding(classes + 1, width)
        self.pos_embed: torch.Tensor
        self.register_buffer("pos_embed", torch.zeros(1, (resolution // patch_size) ** 2, width))
        self.blocks = torch.nn.ModuleList(Block(width, num_heads, mlp_width or 4 * width) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * out_channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        n, side, size = x.shape[0], x.shape[-1] // self._patch_size, self._patch_size
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(index)
        for block in self.blocks:
            x = block(x, c)
        patches = self.final_layer(x, c).reshape(n, side, side, size, size, self._out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(n, self._out_channels, side * size, side * size)


@persistent_class
class DiTDenoiser(WrappedDenoiser):
    """The denoiser of a DiT or SiT.

    kind: 'dit' or 'sit'. out_channels: more than img_channels where a variance is predicted as well, which is ignored.
    width, depth, num_heads, patch_size, mlp_width: of the transformer.
    """

    def __init__(
        self,
        kind: str,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int = 2,
        mlp_width: int | None = None,
        out_channels: int | None = None,
        sigma_data: float = SIGMA_DATA,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
        times = FlowTimes(scale=1.0, is_reversed=True) if kind == "sit" else DiscreteTimes(ddpm_sigmas())
        outputs = out_channels or img_channels
        net = Transformer(
            img_resolution, img_channels, outputs, label_dim, width, depth, num_heads, patch_size, mlp_width
        )
        prediction = "flow" if kind == "sit" else "epsilon"
        super().__init__(net, prediction, times, img_resolution, img_channels, label_dim, sigma_data)
        self.null_class = label_dim

    def answer(self, x_s: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        if class_labels is None:
            index = torch.full([x_s.shape[0]], self.label_dim, device=x_s.device)
        else:
            index = torch.where(class_labels.any(dim=1), class_labels.argmax(dim=1), self.label_dim)
        return self.net(x_s, t, index)
