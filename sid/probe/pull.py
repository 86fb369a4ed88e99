"""How strongly the generator's loss pulls its images towards the teacher, by noise level.

python -m sid.probe.pull RUN_FOLDER --class=7    reads the newest training state there. It shows whether the loss can
bring back a class that the generator has lost, and with which alpha and noise levels.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnnlib import Command, UserError, WholeRange

from .gradients import load

if TYPE_CHECKING:
    import torch

    from sid.distillation import Distillation

LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
ALPHAS = (0.0, 0.5, 1.0, 1.2)


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--class", "class_idx", help="Class of all images  [default: any]", type=WholeRange(0))
@click.option("--images", help="Number of images", type=WholeRange(1, 1 << 16), default=256)
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the first available]")
def main(run: str, class_idx: int | None, images: int, device: str | None) -> None:
    """The pull of SiD's loss towards the teacher, relative to --score-gradient=off, for the state in the folder RUN.

    1: it pulls the images as strongly as --score-gradient=off does; 0: it does not; below 0: it pushes them away.
    """
    report(Path(run), class_idx, images, device)


def report(run_dir: Path, class_idx: int | None, images: int, device: str | None) -> None:
    """Prints the table: one row per noise level. Errors: UserError when --class isn't one of the teacher's."""
    from torch_utils import distributed

    distillation = load(run_dir, images, distributed.init(device))
    label_dim = distillation.teacher.label_dim
    if class_idx is not None and class_idx >= label_dim:
        raise UserError(f"--class={class_idx}: the teacher has {label_dim} classes; give a lower one, or none")
    print(f"{'sigma':>9s}{'divergence':>13s}" + "".join(f"{f'alpha {alpha:g}':>13s}" for alpha in ALPHAS))
    for sigma in LEVELS:
        divergence, pulls = pull(distillation, sigma, class_idx)
        print(f"{sigma:9.3g}{divergence:13.4g}" + "".join(f"{value:13.3f}" for value in pulls), flush=True)


def pull(distillation: "Distillation", sigma: float, class_idx: int | None = None) -> tuple[float, list[float]]:
    """(divergence, for each of ALPHAS the pull) at one noise level, over one batch of the generator's images."""
    import torch

    from sid.loss import SiDLoss, divergence
    from torch_utils import seeding

    config, state = distillation.config, distillation.state
    for net in (state.fake_score, state.generator):
        net.eval().requires_grad_(False)
    seeding.seed_at(0)
    labels = distillation.draw_conditions(distillation.batch_gpu)
    if class_idx is not None:
        assert labels is not None
        labels = torch.eye(labels.shape[1], device=labels.device)[[class_idx] * len(labels)]
    x_g = distillation.generate(labels).requires_grad_()
    noise = torch.full([len(x_g), 1, 1, 1], sigma, device=x_g.device), torch.randn_like(x_g)
    x_t = (x_g + sigma * noise[1]).detach()
    networks = distillation.teacher, state.fake_score
    with torch.no_grad():
        f_phi, f_psi = (net(x_t, noise[0], labels) for net in distillation.loss.score_networks(*networks))

    def descent(**options) -> "torch.Tensor":
        """Descent of the loss along f_phi - f_psi, by its gradient with respect to the images."""
        shared = {name: getattr(distillation.loss, name) for name in ("guidance", "guide", "conditions")}
        loss = SiDLoss(weighting=config.weighting, **shared, **options)
        value = loss.generator_loss(*networks, x_g, labels, noise).sum()
        (gradient,) = torch.autograd.grad(value, x_g)
        return -(gradient * (f_phi - f_psi)).double().sum()

    home = descent(score_gradient=False)
    return divergence(x_g, f_phi, f_psi).mean().item(), [(descent(alpha=a) / home).item() for a in ALPHAS]


if __name__ == "__main__":
    main()
