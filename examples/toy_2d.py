"""Score identity Distillation on a mixture of eight Gaussians in the plane, in about a minute on one core.

    python examples/toy_2d.py --out=toy.png        # needs pip install '.[plots]'

The teacher is exact: the denoiser of a Gaussian mixture is known in closed form. The generator and the fake score are
small networks. The loss and the noise levels are the library's, and the loop is Algorithm 1 of arXiv:2404.04057.
A point of the plane is an "image" of shape [2, 1, 1].
"""

import argparse
import copy
import math

import torch

from sid import SiDLoss

SIGMA_DATA = 0.5  # standard deviation of each coordinate of the data
SIGMA_INIT = 2.5  # noise level at which the generator starts
RADIUS, SPREAD, MODES = 0.7, 0.05, 8  # the data: Gaussians on a circle
ANGLES = torch.arange(MODES) * (2 * math.pi / MODES)
CENTRES = RADIUS * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # [8, 2]


def data(n: int) -> torch.Tensor:
    """n points of the mixture, [n, 2, 1, 1]."""
    points = CENTRES[torch.randint(MODES, [n])] + SPREAD * torch.randn(n, 2)
    return points[:, :, None, None]


def teacher(x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of the clean point given the noisy one, exactly. x [N, 2, 1, 1], sigma [N, 1, 1, 1]."""
    x, sigma = x[:, :, 0, 0], sigma.reshape(-1, 1)
    variance = SPREAD**2 + sigma**2
    distance = (x[:, None] - CENTRES).square().sum(dim=2)  # [N, 8]
    centre = (-distance / (2 * variance)).softmax(dim=1) @ CENTRES  # the expected centre, [N, 2]
    mean = centre + SPREAD**2 / variance * (x - centre)
    return mean[:, :, None, None]


class MLPDenoiser(torch.nn.Module):
    """A small network with EDM's preconditioning (arXiv:2206.00364, Table 1)."""

    def __init__(self, width: int = 128):
        super().__init__()
        layers: list[torch.nn.Module] = [torch.nn.Linear(3, width), torch.nn.SiLU()]
        for _ in range(2):
            layers += [torch.nn.Linear(width, width), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x, sigma = x[:, :, 0, 0], sigma.reshape(-1, 1)
        scale = (sigma**2 + SIGMA_DATA**2).sqrt()
        answer = self.layers(torch.cat([x / scale, sigma.log() / 4], dim=1))
        mean = SIGMA_DATA**2 / scale**2 * x + sigma * SIGMA_DATA / scale * answer
        return mean[:, :, None, None]


def generate(generator: torch.nn.Module, n: int) -> torch.Tensor:
    """n points in one evaluation each, [n, 2, 1, 1]."""
    noise = SIGMA_INIT * torch.randn(n, 2, 1, 1)
    return generator(noise, torch.full([n, 1, 1, 1], SIGMA_INIT))


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    """One step of Adam at a learning rate. loss: per coordinate, [N, 2, 1, 1]."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.sum(dim=[1, 2, 3]).mean().backward()
    optimizer.step()


def pretrain(loss: SiDLoss, steps: int, batch: int) -> MLPDenoiser:
    """An ordinary diffusion model of the data, which the generator and the fake score start from."""
    net = MLPDenoiser()
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(steps):
        update(optimizer, loss.fake_score_loss(net, data(batch)), rate=2e-3 * (1 - step / steps))
    return net


def distil(start: MLPDenoiser, loss: SiDLoss, steps: int, batch: int) -> MLPDenoiser:
    """The generator after `steps` iterations, with its weights averaged. The data is not used here."""
    generator, fake_score, average = (copy.deepcopy(start) for _ in range(3))
    for_generator, for_fake_score = (
        torch.optim.Adam(net.parameters(), betas=(0.0, 0.999)) for net in (generator, fake_score)
    )
    for step in range(steps):
        rate = 1e-3 * (1 - step / steps)
        with torch.no_grad():
            x_g = generate(generator, batch)
        update(for_fake_score, loss.fake_score_loss(fake_score, x_g), rate)  # it learns to denoise x_g

        x_g = generate(generator, batch)
        update(for_generator, loss.generator_loss(teacher, fake_score, x_g), rate)  # which moves the generator only
        for mean, value in zip(average.parameters(), generator.parameters()):
            mean.data.lerp_(value.data, 0.01)
    return average


def quality(points: torch.Tensor) -> tuple[float, float]:
    """(share of the points that lie within four standard deviations of a centre, share of the rarest mode times 8).

    Both are close to 1 for a perfect generator and many points.
    """
    distance, mode = (points[:, None, :, 0, 0] - CENTRES).norm(dim=2).min(dim=1)
    near = distance < 4 * SPREAD
    shares = torch.bincount(mode[near], minlength=MODES) / len(points)
    return near.float().mean().item(), MODES * shares.min().item()


def plot(panels: dict[str, torch.Tensor], path: str) -> None:
    """One panel of points for each title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(3 * len(panels), 3.3), sharex=True, sharey=True)
    for axis, (title, points) in zip(axes, panels.items()):
        axis.scatter(points[:, 0].flatten(), points[:, 1].flatten(), s=2, linewidths=0, alpha=0.5)
        axis.set(title=title, aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(steps: int, batch: int, out: str | None) -> tuple[float, float]:
    """Trains, prints the quality before and after, and returns the latter."""
    torch.manual_seed(0)
    loss = SiDLoss(alpha=1.0)
    start = pretrain(loss, steps, batch)
    generator = distil(start, loss, steps, batch)
    with torch.no_grad():
        before, after = generate(start, 4000), generate(generator, 4000)
    for name, points in (("before", before), ("after SiD", after)):
        near, rarest = quality(points)
        print(f"{name}: {near:.1%} of the points lie on a mode; the rarest mode has {rarest:.0%} of its share")
    if out:
        plot({"the data": data(4000), "one evaluation, before": before, "one evaluation, after SiD": after}, out)
    return quality(after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Distils a mixture of Gaussians in the plane.")
    parser.add_argument("--steps", type=int, default=2000, help="iterations of both trainings")
    parser.add_argument("--batch", type=int, default=256, help="points per iteration")
    parser.add_argument("--out", help="where to save a picture (.png)")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.batch, arguments.out)
