"""Signal and noise of the generator's gradient, by noise level.

python -m sid.probe.noise RUN_FOLDER    reads the newest training state there. It shows at which noise levels the
gradient of one batch has a direction, and how much noise the path through the score networks adds.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnnlib import Command, WholeRange

from .gradients import TIMES, gradients, load

if TYPE_CHECKING:
    import torch

    from sid.distillation import Distillation


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--batch", help="Images per batch", type=WholeRange(1, 1 << 16), default=32)
@click.option("--batches", help="Number of batches", type=WholeRange(2, 1 << 16), default=16)
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the first available]")
def main(run: str, batch: int, batches: int, device: str | None) -> None:
    """Squared signal over the noise of one batch in the generator's gradient, for the state in the folder RUN.

    Gradients are scaled as Adam scales them, by the root of each weight's mean square so far. Projected objectives are
    measured with gradients through both score networks (on) and without (off).
    """
    report(Path(run), batch, batches, device)


def report(run_dir: Path, batch: int, batches: int, device: str | None) -> None:
    """Prints the table: one row per noise level."""
    from sid.objectives import PROJECTED
    from torch_utils import distributed

    distillation = load(run_dir, batch, distributed.init(device))
    modes = {"on": True, "off": False} if distillation.config.objective in PROJECTED else {"on": True}
    heads = [f"{mode} {what}" for mode in modes for what in ("signal^2", "noise^2", "ratio")]
    print(f"{'sigma':>9s}" + "".join(f"{head:>13s}" for head in heads))
    for t in TIMES:
        cells = []
        for score_gradient in modes.values():
            sigma, vectors = _scaled_gradients(distillation, t, batch, batches, score_gradient)
            signal, noise = signal_and_noise(vectors)
            cells += [signal, noise, signal / noise]
        print(f"{sigma:9.3f}" + "".join(f"{cell:13.4g}" for cell in cells), flush=True)


def signal_and_noise(vectors: "torch.Tensor") -> tuple[float, float]:
    """(squared norm of the mean, mean squared distance from it) of the distribution of draws [R, n]; both unbiased."""
    mean = vectors.mean(dim=0)
    noise = (vectors - mean).square().sum() / (len(vectors) - 1)
    return float(mean.square().sum() - noise / len(vectors)), float(noise)


def _scaled_gradients(
    distillation: "Distillation", t: float, batch: int, batches: int, score_gradient: bool
) -> tuple[float, "torch.Tensor"]:
    """(sigma, theta's gradients [batches, n], float64) as Adam scales them."""
    import torch

    moments = distillation.state.generator_updater.optimizer.state
    weights = [p for p in distillation.state.generator.parameters() if p in moments]
    scale = torch.cat([moments[p]["exp_avg_sq"].flatten().float().sqrt() for p in weights]).clamp(min=1e-8)
    draws = [gradients(distillation, "fp32", t, batch, seed, score_gradient) for seed in range(batches)]
    return draws[0][0], torch.stack([(theta / scale).double().cpu() for _, (_, theta) in draws])


if __name__ == "__main__":
    main()
