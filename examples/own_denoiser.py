"""Distils a network of a class from another repository through the Python API.

    python examples/own_denoiser.py --out=RUN

`NoiseNet` stands for the other repository's network: it predicts the noise at one of 1000 integer time steps, as DDPM
does. `NoiseNetDenoiser` is all that this project needs to know about it. The images are white rectangles on black, 8x8;
the generator's are in `RUN/generated.png`. Commands that open the networks in the run folder need the class:

    cd examples && python -m sid.report RUN --classes=own_denoiser:NoiseNetDenoiser
"""

import argparse
from pathlib import Path

import torch

from edm.images import save_grid
from sid import distil
from sid.config import DistillationConfig

SIZE, STEPS = 8, 1000


class NoiseNet(torch.nn.Module):
    """Another repository's network: eps(x_t, t) for x_t = sqrt(a_t) x + sqrt(1 - a_t) n, with t an integer [N]."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.time = torch.nn.Embedding(STEPS, width)
        self.enter = torch.nn.Conv2d(1, width, 3, padding=1)
        self.hidden = torch.nn.ModuleList([torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(4)])
        self.leave = torch.nn.Conv2d(width, 1, 3, padding=1)
        self.register_buffer("a", torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS), dim=0))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.enter(x) + self.time(t)[:, :, None, None]
        for layer in self.hidden:
            x = x + layer(torch.nn.functional.silu(x))
        return self.leave(torch.nn.functional.silu(x))


class NoiseNetDenoiser(torch.nn.Module):
    """The clean image instead of the noise, at a noise level instead of a time: what is distilled.

    With sigma = sqrt((1 - a)/a), x + sigma n is x_t / sqrt(a), and the clean image is x - sigma eps(x sqrt(a), t).
    """

    img_resolution, img_channels, label_dim = SIZE, 1, 0

    def __init__(self, net: NoiseNet | None = None):
        super().__init__()
        self.net = NoiseNet() if net is None else net
        self.register_buffer("levels", ((1 - self.net.a) / self.net.a).sqrt())  # rising, [1000]
        self.sigma_min, self.sigma_max = self.levels[0].item(), self.levels[-1].item()

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time whose noise level is nearest to each sigma, in the shape of sigma."""
        return (sigma.flatten()[:, None].log() - self.levels.log()).abs().argmin(dim=1).reshape(sigma.shape)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        sigma = torch.as_tensor(sigma)
        return self.levels[self.time(sigma.to(self.levels))].to(sigma)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        return x - sigma * self.net(x / (1 + sigma**2).sqrt(), self.time(sigma.flatten()))


def rectangles(n: int) -> torch.Tensor:
    """n images of one white rectangle each on black, [n, 1, 8, 8], -1 for black."""
    corners = torch.rand(n, 2, 2).mul(SIZE + 1).floor().sort(dim=1).values  # [n, low and high, x and y]
    inside = (torch.arange(SIZE) >= corners[:, :1].transpose(1, 2)) & (
        torch.arange(SIZE) < corners[:, 1:].transpose(1, 2)
    )
    return 2.0 * (inside[:, 0, None, :] & inside[:, 1, :, None])[:, None] - 1


def train_teacher(steps: int) -> NoiseNet:
    """DDPM's training, as the other repository would have done it."""
    net = NoiseNet()
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x, t = rectangles(128), torch.randint(STEPS, [128])
        a, noise = net.a[t].reshape(-1, 1, 1, 1), torch.randn(128, 1, SIZE, SIZE)
        loss = (net(a.sqrt() * x + (1 - a).sqrt() * noise, t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def main(out: Path, teacher_steps: int, kimg: float) -> None:
    torch.manual_seed(0)
    teacher = NoiseNetDenoiser(train_teacher(teacher_steps))
    config = DistillationConfig(
        total_kimg=kimg,
        batch=64,
        batch_gpu=64,
        alpha=1.0,
        lr=2e-4,
        glr=1e-4,
        kimg_per_tick=max(kimg / 10, 0.064),
        ema_rampup_ratio=0.5,
        snapshot_ticks=5,
    )
    generator = distil(teacher, config, out, device="cpu")
    save_grid(generator(64, seed=0), out / "generated.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Distils a denoiser of another repository's class.")
    parser.add_argument("--out", type=Path, required=True, help="run folder to make")
    parser.add_argument("--teacher-steps", type=int, default=2000, help="iterations of the teacher's training")
    parser.add_argument("--kimg", type=float, default=50, help="length of the distillation in thousands of images")
    arguments = parser.parse_args()
    main(arguments.out, arguments.teacher_steps, arguments.kimg)
