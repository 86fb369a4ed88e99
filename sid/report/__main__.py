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
    Idle(("page_only",), "with --serve, which writes no page", lambda options: options["serves"]),
)


@click.command(cls=Command, checks=CHECKS)
@click.argument("run", type=click.Path(exists=True))
@click.option("--page-only", is_flag=True, help="Write the page from what is recorded, without drawing new samples")
@click.option(
    "--video",
    help="New .webp, .gif, .png or .mp4 file (needs ffmpeg) for the pictures of all snapshots, one after the other",
)
@click.option("--serve", "serves", is_flag=True, help="Show all runs in the folder RUN on a local page")
@click.option("--port", type=WholeRange(0, 65535), default=8000, show_default=True, help="With --serve; 0: any")
@classes_option
def main(run: str, page_only: bool, video: str | None, serves: bool, port: int, classes: str | None) -> None:
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
                summarise_and_compare(run_dir, options, own)
        print(f"Page:      {write_page(run_dir)}")
        if animation is not None:
            count = write_video(run_dir, animation, TRAINING_COLUMNS if trains else GRID_COLUMNS)
            print(f"Video:     {animation}  ({count} pictures)")


def summarise_and_compare(run_dir: Path, options: dict[str, Any], own: dict[str, Any]) -> None:
    """Prints the FID of teacher and generator and draws both.

    options: as the run recorded them. own: the user's network classes, by name.
    Errors: UserError when the run has no snapshot yet or its records are damaged.
    """
    from edm import zoo
    from sid.inputs import guided_teacher, load_guide, load_teacher
    from sid.report.pictures import TEACHER_EVALUATIONS, compare
    from sid.report.summary import summarise
    from torch_utils import checkpoint
    from training.steps import Steps

    snapshots = checkpoint.snapshots(run_dir)
    if not snapshots:
        raise UserError(f"{run_dir}: has no snapshot yet; wait for the first one, or give --page-only")
    if "edm_model" not in options:
        raise UserError(f"{run_dir / OPTIONS_FILE}: names no edm_model; name a run folder of sid_train.py")
    teacher = load_teacher(run_dir, options, own)
    generator = zoo.load_denoiser(snapshots[0], own)
    steps = Steps.of(generator)
    if steps is None:
        raise UserError(f"{snapshots[0]}: records no init_sigma, so it is no snapshot of a distillation")
    if hasattr(teacher, "prompts"):
        generator.prompts = teacher.prompts
    guided = guided_teacher(teacher, load_guide(run_dir, options, own), parse_guidance(options.get("guidance")))
    rows = summarise(run_dir, teacher, options, guided is not teacher)
    picture = run_dir / "comparison.png"
    try:
        which = "Teacher" if guided is teacher else "Guided teacher"
        compare(guided, generator, picture, which)
        told = f"{which.lower()} at {TEACHER_EVALUATIONS} evaluations, at {len(steps)}, generator at {len(steps)}"
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
    print(f"Generator: {snapshots[0]}")
    print(f"Pictures:  {pictures}")


if __name__ == "__main__":
    main()
