"""The page and the summary of a run: python -m sid.report RUN_FOLDER"""

from pathlib import Path
from typing import Any

import click

from dnnlib import Command, UserError, WholeRange
from dnnlib.options import Idle
from edm.own_classes import classes_option, own_classes
from sid.guidance import parse_guidance
from sid.monitor.records import OPTIONS_FILE, is_training, read_any_options, read_run_options

WANTED = "a run folder of sid_train.py or edm.train"
CHECKS = (
    Idle(("port",), "without --serve", lambda options: not options["serves"]),
    Idle(("page_only", "beside"), "with --serve, which writes no page", lambda options: options["serves"]),
    Idle(("beside",), "with --page-only, which draws nothing", lambda options: options["page_only"]),
)


@click.command(cls=Command, checks=CHECKS)
@click.argument("run", type=click.Path(exists=True))
@click.option("--page-only", is_flag=True, help="Write the page from what is recorded, without drawing new samples")
@click.option(
    "--beside",
    type=click.Path(exists=True),
    help="Run folder of another generator of the same teacher, such as one of more steps, to compare as well",
)
@click.option(
    "--video",
    help="New .webp, .gif, .png or .mp4 file (needs ffmpeg) for the pictures of all snapshots, one after the other",
)
@click.option("--serve", "serves", is_flag=True, help="Show all runs in the folder RUN on a local page")
@click.option("--port", type=WholeRange(0, 65535), default=8000, show_default=True, help="With --serve; 0: any")
@classes_option
def main(
    run: str, page_only: bool, beside: str | None, video: str | None, serves: bool, port: int, classes: str | None
) -> None:
    """Summarise the run in the folder RUN: a page (index.html), and of a distillation a table of FID and a picture."""
    animation = None
    if video is not None:
        from sid.report.video import check_place, write_video

        if serves:
            raise UserError("--video: is of one run, and --serve shows many; leave one out")
        animation = check_place(video)
    if serves:
        from sid.report.serve import serve

        if not Path(run).is_dir():
            raise UserError(f"{run}: is not a folder; name one that holds run folders")
        serve(Path(run), port)
    else:
        from sid.report.embedded import GRID_COLUMNS, TRAINING_COLUMNS
        from sid.report.page import write_page

        run_dir, trains = Path(run), is_training(read_any_options(run, WANTED))
        if not trains:
            options, own = read_run_options(run), own_classes(classes)
            if not page_only:
                summarise_and_compare(run_dir, options, own, None if beside is None else Path(beside))
        print(f"Page:      {write_page(run_dir)}")
        if animation is not None:
            count = write_video(run_dir, animation, TRAINING_COLUMNS if trains else GRID_COLUMNS)
            print(f"Video:     {animation}  ({count} pictures)")


def summarise_and_compare(
    run_dir: Path, options: dict[str, Any], own: dict[str, Any], beside: Path | None = None
) -> None:
    """Prints the FID of teacher and generator and draws both.

    options: as the run recorded them. own: the user's network classes, by name. beside: the folder of another run,
    whose generator is drawn, too.
    Errors: UserError when a run has no snapshot yet, its records are damaged, or the other run has another teacher.
    """
    from sid.inputs import guided_teacher, load_guide, load_teacher
    from sid.report.pictures import TEACHER_EVALUATIONS, compare
    from sid.report.summary import summarise
    from training.steps import ONE_STEP, Steps

    snapshot, generator = load_newest(run_dir, own, "wait for the first one, or give --page-only")
    if "edm_model" not in options:
        raise UserError(f"{run_dir / OPTIONS_FILE}: names no edm_model; name a run folder of sid_train.py")
    teacher, generators = load_teacher(run_dir, options, own), [generator]
    if beside is not None:
        generators.append(load_newest(beside, own, "wait for the first one, or leave out --beside")[1])
        if len({net.metadata.get("teacher_sha256") for net in generators}) > 1:
            raise UserError(f"--beside={beside}: its generator has another teacher; name a run of the same one")
    if hasattr(teacher, "prompts"):
        for net in generators:
            net.prompts = teacher.prompts
    steps, *others = (Steps.of(net) or ONE_STEP for net in generators)
    guided = guided_teacher(teacher, load_guide(run_dir, options, own), parse_guidance(options.get("guidance")))
    rows = summarise(run_dir, teacher, options, guided is not teacher)
    picture = run_dir / "comparison.png"
    try:
        which = "Teacher" if guided is teacher else "Guided teacher"
        compare(guided, generators, picture, which)
        told = f"{which.lower()} at {TEACHER_EVALUATIONS} evaluations, at {len(steps)}, generator at {len(steps)}"
        told += "".join(f", another at {len(other)}" for other in others)
        pictures = f"{picture}  ({told})"
    except OSError as error:
        pictures = f"none, since {picture} can't be written ({error.strerror})"

    if rows:
        print(f"\n{'':30s} {'evaluations':>11s} {'FID':>8s}")
    else:
        print("No FID was measured; distil with --metrics and --data_stat or --data to have it here.")
    for name, evaluations, fid in rows:
        print(f"{name:30s} {evaluations:11d} {fid:8.4g}")
    if len(rows) > 1 and rows[-2][1] == rows[-1][1] and rows[-1][2] > 0:
        print(f"\nFID at the same number of evaluations fell by a factor of {rows[-2][2] / rows[-1][2]:.1f}.")
    print(f"Generator: {snapshot}")
    print(f"Pictures:  {pictures}")


def load_newest(run_dir: Path, own: dict[str, Any], remedy: str) -> tuple[Path, Any]:
    """(newest snapshot of a run, the generator in it). remedy: what to do without one.

    Errors: UserError when there is none, or it is no generator.
    """
    from edm import zoo
    from torch_utils import checkpoint
    from training.steps import Steps

    snapshots = checkpoint.snapshots(run_dir)
    if not snapshots:
        raise UserError(f"{run_dir}: has no snapshot yet; {remedy}")
    generator = zoo.load_denoiser(snapshots[0], own)
    if Steps.of(generator) is None:
        raise UserError(f"{snapshots[0]}: records no init_sigma, so it is no snapshot of a distillation")
    return snapshots[0], generator


if __name__ == "__main__":
    main()
