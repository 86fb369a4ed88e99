"""How much half precision changes the direction of the generator's gradient, by noise level.

python -m sid.probe.gradients RUN_FOLDER    reads the newest training state there. Late in a run psi is close to phi,
and rounding matters most where the two differ least.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnnlib import Command, UserError, WholeRange

if TYPE_CHECKING:
    import torch

    from sid.distillation import Distillation


TIMES = (0.02, 0.2, 0.4, 0.5, 0.6, 0.8)  # of the Karras schedule, whatever the run's own, so that tables are comparable

HALF = {"bf16", "fp16"}


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--precisions", help="Compared with fp32", default="bf16,fp16")
@click.option("--batch", help="Images per gradient", type=WholeRange(1, 1 << 16), default=64)
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the first available]")
def main(run: str, precisions: str, batch: int, device: str | None) -> None:
    """Cosine between the generator's gradient in half precision and in fp32, for the state in the folder RUN."""
    names = precisions.split(",")
    if not set(names) <= HALF:
        raise UserError(f"--precisions={precisions}: give bf16, fp16 or both")
    compare(Path(run), names, batch, device)


def compare(run_dir: Path, names: list[str], batch: int, device: str | None) -> None:
    """Prints the table: one row per noise level."""
    from torch_utils import distributed

    distillation = load(run_dir, batch, distributed.init(device))
    print(f"{'sigma':>9s}" + "".join(f"{f'{name} image':>13s}{f'{name} theta':>13s}" for name in names))
    for t in TIMES:
        sigma, exact = gradients(distillation, "fp32", t, batch)
        cosines = [cosine(a, b) for name in names for a, b in zip(exact, gradients(distillation, name, t, batch)[1])]
        print(f"{sigma:9.3f}" + "".join(f"{value:13.5f}" for value in cosines))


def load(run_dir: Path, batch: int, device: "torch.device", classes: str | None = None) -> "Distillation":
    """The distillation in a run folder at its newest training state. Errors: UserError when it has none."""
    import dataclasses

    from edm.own_classes import own_classes
    from sid.config import DistillationConfig
    from sid.inputs import Inputs, load_guide, load_start, load_teacher
    from sid.prepare import prepare
    from sid.state import SavedState, WeightHashes
    from torch_utils import checkpoint, run_folder

    state = checkpoint.newest_good_state(run_dir)
    file = run_dir / run_folder.OPTIONS_FILE
    options = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if state is None or "edm_model" not in options:
        raise UserError(f"{run_dir}: no training state of a distillation here; name a run folder of sid_train.py")
    names = {field.name for field in dataclasses.fields(DistillationConfig)} & options.keys()
    changes = {"batch": batch, "batch_gpu": batch, "precision": "fp32", "dropout": 0.0, "gan": False}
    config = DistillationConfig(**{**{name: options[name] for name in names}, **changes})
    teacher = load_teacher(run_dir, options, own_classes(classes))
    start = load_start(options["transfer"], teacher, classes) if options.get("transfer") else None
    guide = load_guide(run_dir, options, own_classes(classes))
    hashes = WeightHashes.of(teacher, start, config, guide)
    saved = SavedState(state, hashes)
    moments = saved.start_moments(teacher)
    return prepare(Inputs(teacher, start, guide, moments=moments, hashes=hashes), config, device, saved)


def gradients(
    distillation: "Distillation", name: str, t: float, batch: int, seed: int = 0, score_gradient: bool | None = None
) -> tuple[float, list["torch.Tensor"]]:
    """(sigma, [gradient with respect to the images, gradient with respect to theta]), flattened; one noise level."""
    import torch

    from sid.schedules import Karras
    from torch_utils import seeding
    from torch_utils.precision import DTYPES, set_compute_dtype

    state, loss = distillation.state, distillation.loss
    for net in (distillation.teacher, state.fake_score, state.generator):
        set_compute_dtype(net, DTYPES[name])
    state.fake_score.eval().requires_grad_(False)
    state.generator.eval().zero_grad()
    seeding.seed_at(seed)
    labels = distillation.draw_conditions(batch)
    images = distillation.generate(labels)
    x_g = images.detach().requires_grad_()
    time = torch.full([batch, 1, 1, 1], t, device=x_g.device)
    sigma = Karras().sigma(time)
    noise = (sigma, torch.randn(x_g.shape, device=x_g.device))
    networks = distillation.teacher, state.fake_score
    loss.generator_loss(*networks, x_g, labels, noise, score_gradient=score_gradient).sum().backward()
    assert x_g.grad is not None
    images.backward(x_g.grad)
    theta = [p.grad.flatten() for p in state.generator.parameters() if p.grad is not None]
    return sigma.mean().item(), [x_g.grad.flatten(), torch.cat(theta)]


def cosine(a: "torch.Tensor", b: "torch.Tensor") -> float:
    """Cosine of the angle between two vectors, computed in float64."""
    a, b = a.double().cpu(), b.double().cpu()
    return (a @ b / (a.norm() * b.norm())).item()


if __name__ == "__main__":
    main()
