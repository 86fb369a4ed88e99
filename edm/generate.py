"""Generates images with a diffusion model or a one-step generator.

python -m edm.generate --network=runs/network-snapshot-000035.safetensors --outdir=out --seeds=0-63
python -m edm.generate --network=runs/network-snapshot-000035.safetensors --grid=strips.png --seeds=0-4 --interpolate=9
"""

import re
from pathlib import Path
from typing import Any

import click

from dnnlib import FiniteRange, LongCommand, UserError, WholeRange, check_new_file
from dnnlib.options import Idle
from edm.own_classes import classes_option, own_classes

MAX_SEEDS = 10_000_000
MAX_SEED = 2**32 - 1  # as edm.sampler
MAX_SIGMA = 1e6
MAX_STEPS = 100_000
MAX_GRID = 10_000
GUIDANCE, PROMPTS = ("guidance", "guide"), ("prompt", "prompts")
ABLATION = ("solver", "discretization", "schedule", "scaling")
POSITIVE = FiniteRange(0, MAX_SIGMA, min_open=True)
CHECKS = (
    Idle(("S_min", "S_max", "S_noise"), "without --S_churn", lambda options: options["S_churn"] is None),
    Idle(("rho",), "with a --disc that isn't edm", lambda options: options["discretization"] not in (None, "edm")),
)


class SeedRanges(click.ParamType):
    """Seeds as numbers and ranges: `0-63,100`."""

    name = "seeds"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        seeds: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip())
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last > MAX_SEED:
                self.fail(f"{value!r}: seeds go up to {MAX_SEED}; beyond it, the same images come again", param, ctx)
            if first > last or len(seeds) + last - first >= MAX_SEEDS:
                self.fail(f"{value!r} is no list of seeds; write for instance 0-63,100", param, ctx)
            seeds += range(first, last + 1)
        return list(dict.fromkeys(seeds))  # without repetitions


@click.command(cls=LongCommand, checks=CHECKS, context_settings={"show_default": True})
@click.option("--network", help="Short name, path or URL of a teacher or generator", required=True)
@classes_option
@click.option("--outdir", help="Folder or .zip file for the PNG images, one per seed")
@click.option("--grid", help="PNG file for all images in one picture")
@click.option("--seeds", help="One image per seed, such as 0-63,100", type=SeedRanges(), default="0-63")
@click.option(
    "--interpolate",
    metavar="N",
    type=WholeRange(2, MAX_GRID),
    help="N images on the way from each seed to the next, both included; a row of --grid each  [default: none]",
)
@click.option("--class", "class_idx", help="Class of all images  [default: one per seed]", type=WholeRange(0))
@click.option("--prompt", help="Prompt of all images, for a text-to-image network")
@click.option("--prompts", help="Their prompts, one per line: seed 0 has the first, and so on")
@click.option("--batch", help="Images at once", type=WholeRange(1), default=64)
@click.option("--steps", help="Sampler steps  [default: a generator's own, else 18]", type=WholeRange(1, MAX_STEPS))
@click.option("--init_sigma", help="Start noise level of one step  [default: the network's]", type=POSITIVE)
@click.option("--sigma_min", type=POSITIVE, help="Lowest noise level  [default: 0.002]")
@click.option("--sigma_max", type=POSITIVE, help="Highest noise level  [default: 80]")
@click.option("--rho", type=FiniteRange(0.1, 1000), help="Spacing of the noise levels  [default: 7]")
@click.option("--S_churn", "S_churn", type=FiniteRange(0), help="Stochasticity  [default: 0]")
@click.option("--S_min", "S_min", type=FiniteRange(0), help="Stochastic from this noise level  [default: 0]")
@click.option(
    "--S_max", "S_max", type=FiniteRange(0, or_inf=True), help="Stochastic up to this noise level  [default: inf]"
)
@click.option("--S_noise", "S_noise", type=POSITIVE, help="Scale of the added noise  [default: 1]")
@click.option("--solver", type=click.Choice(["euler", "heun"]), help="Of the ablation sampler")
@click.option("--disc", "discretization", type=click.Choice(["vp", "ve", "iddpm", "edm"]), help="Likewise")
@click.option("--schedule", type=click.Choice(["vp", "ve", "linear"]), help="Likewise")
@click.option("--scaling", type=click.Choice(["vp", "none"]), help="Likewise")
@click.option(
    "--guidance",
    type=FiniteRange(0),
    help="How strongly --guide, or without it the classes, guide a diffusion model; 1: not at all",
)
@click.option("--guide", help="A weaker network that guides --network away from its own images (autoguidance)")
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the first there]")
def main(
    network: str,
    classes: str | None,
    outdir: str | None,
    grid: str | None,
    seeds: list[int],
    interpolate: int | None,
    device: str | None,
    **options,
):
    """Generate images: in one step with a distilled generator, by Heun's method with a diffusion model.

    The network's file says which it is. Any of --solver, --disc, --schedule, --scaling takes EDM's ablation sampler.
    An image depends on its seed alone, not on the batch or the device. With --interpolate, noise moves along the arc
    from one seed's to the next one's, and classes mix.
    """
    if outdir is None and grid is None:
        raise UserError("give --outdir (folder or .zip) or --grid (one picture), or both")
    count = len(seeds) if interpolate is None else interpolate * (len(seeds) - 1)
    if interpolate is not None:
        check_strips(seeds, options)
    if grid is not None:
        check_grid(grid, count)
    import contextlib

    import torch

    from dnnlib.progress import ProgressBar
    from edm import zoo
    from edm.images import image_writer, save_grid
    from edm.sampler import generate_images
    from edm.seeds import strips
    from torch_utils import distributed

    place = distributed.init(device)
    if grid is not None and distributed.world_size() > 1:
        raise UserError("--grid needs one process; several write a folder, --outdir")
    given = {name: value for name, value in options.items() if value is not None}
    net = zoo.load_denoiser(network, own_classes(classes))
    given, _ = prompted(net, given, place)
    net, options, _ = guided(net, sampler_options(net, given), own_classes(classes))
    net = net.to(place)
    kept = []
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(image_writer(outdir)) if outdir else None
        mine = slice(distributed.rank(), None, distributed.world_size())
        wanted = (seeds if interpolate is None else strips(seeds, interpolate))[mine]
        numbers = (seeds if interpolate is None else list(range(count)))[mine]
        bar = stack.enter_context(ProgressBar(len(wanted), hidden=distributed.rank() > 0))
        done = 0
        for images in generate_images(net, wanted, **options):
            if write is not None:
                for image in images:
                    write(image, numbers[done])
                    done += 1
            if grid:
                kept.append(images)
            bar.update(len(images))
    if grid:
        save_grid(torch.cat(kept), grid, interpolate)
    distributed.print0(f"{count} {'image' if count == 1 else 'images'}: {', '.join(filter(None, (outdir, grid)))}")
    distributed.shutdown()


def check_strips(seeds: list[int], options: dict[str, Any]) -> None:
    """Errors: UserError naming --interpolate when nothing lies between the seeds."""
    if len(seeds) < 2:
        raise UserError("--interpolate goes from one seed to the next: give at least two, such as --seeds=0,1")
    if options["prompts"] is not None:
        raise UserError("--interpolate: prompts can't be mixed; give one for all images with --prompt")


def check_grid(path: str, count: int) -> None:
    """Errors: UserError naming --grid when a picture of so many images can't be made there."""
    check_new_file(path, "--grid")
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"--grid={path}: the picture is a PNG; name a file that ends in .png")
    if count > MAX_GRID:
        raise UserError(f"--grid shows at most {MAX_GRID} images, not {count}; use --outdir")


def sampler_options(net: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The sampler that the options belong to. Errors: UserError when they belong to different ones."""
    from edm.sampler import default_sampler

    ablation = any(name in options for name in ABLATION)
    sampler = "ablation" if ablation else default_sampler(net, options.get("steps"))
    stochastic = {"S_churn", "S_min", "S_max", "S_noise"}
    of_diffusion = {"sigma_min", "sigma_max", "rho", *stochastic, *GUIDANCE}
    name, foreign = {
        "one-step": ("one step", of_diffusion),
        "few-step": ("the steps of a generator", of_diffusion | {"init_sigma"}),
        "ablation": ("the ablation sampler", stochastic | {"init_sigma"}),
        "heun": ("Heun's sampler", {"init_sigma"}),
    }[sampler]
    wrong = options.keys() & foreign
    if wrong:
        raise UserError(f"--{sorted(wrong)[0]} means nothing to {name}; leave it out")
    return {**options, "sampler": sampler}


def prompted(
    net: Any, options: dict[str, Any], device: Any, num: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the options without --prompt and --prompts, which the network gets; what a metric's record says about them).

    num: how many images a metric takes. Unless every prompt gets the same number of them, the prompts are shuffled, so
    that the first ones of a sorted file aren't preferred. None: the seeds take the prompts in the order of the file.
    Errors: UserError when a text-to-image network has no prompts, or another network has some.
    """
    from edm.text_encoders import prompts_for, read_prompts

    prompt, path = options.get("prompt"), options.get("prompts")
    options = {name: value for name, value in options.items() if name not in PROMPTS}
    if prompt is not None and path is not None:
        raise UserError("--prompt and --prompts: give one of them")
    if prompt is None and path is None:
        if getattr(net, "prompt_dim", 0):
            raise UserError(
                "--network: it makes images of prompts; give --prompt=TEXT, or --prompts=FILE, one per line"
            )
        return options, {}
    texts = read_prompts(path) if path is not None else [str(prompt)]
    in_order = num is None or num % len(texts) == 0
    net.prompts = prompts_for(net, texts, device, in_order)
    told: dict[str, Any] = {"prompts": len(texts) if path is None else Path(path).name}
    return options, told if in_order else {**told, "prompts_shuffled": True}


def guided(net: Any, options: dict[str, Any], classes: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(the network guided as --guidance and --guide say, the other options, what a metric's record says about it).

    Errors: UserError when the network can't be guided so.
    """
    from edm import zoo
    from torch_utils import distributed
    from training.guidance import GuidedDenoiser, check_class_guidance, check_guide

    weight, source = options.get("guidance"), options.get("guide")
    options = {name: value for name, value in options.items() if name not in GUIDANCE}
    if weight is None:
        if source is not None:
            raise UserError("--guide: say how strongly the weaker network guides with --guidance=W, such as 1.7")
        return net, options, {}
    record: dict[str, Any] = {"guidance": weight}
    if source is None:
        guide, warning = None, check_class_guidance(net, f"--guidance={weight:g}")
    else:
        guide = zoo.load_denoiser(source, classes)
        warning = check_guide(guide, net)
        record |= {"guide": Path(source).name, "guide_sha256": zoo.network_hash(guide)}
    if warning:
        distributed.print0(f"Warning: {warning}")
    return GuidedDenoiser(net, guide, weight).eval(), options, record


if __name__ == "__main__":
    main()
