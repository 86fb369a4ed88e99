"""Makes small teachers to try settings on: python -m edm.small_teachers --only=digits,letters"""

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib import FiniteRange, LongCommand, UserError, WholeRange, format_time, write_atomically

if TYPE_CHECKING:
    from .presets import SmallTeacher

STEPS = 18  # of Heun's sampler: 35 evaluations


@click.command(cls=LongCommand)
@click.option("--outdir", help="Where each teacher gets a folder", default="small-teachers", show_default=True)
@click.option("--only", help="Names of teachers to make, separated by commas  [default: all]")
@click.option(
    "--kimg", help="Length of each training  [default: 80 to 200, by teacher]", type=FiniteRange(0, min_open=True)
)
@click.option("--num", help="Number of images for FID", type=WholeRange(2), default=2000, show_default=True)
@click.option("--device", help="[default: the first available]", type=click.Choice(["cuda", "mps", "cpu"]))
def main(outdir: str, only: str | None, kimg: float | None, num: int, device: str | None) -> None:
    """Make small data sets, detectors, reference statistics and teachers from pictures that come with packages.

    \b
    fashion          clothes, 16x16, no classes       apt: dataset-fashion-mnist
    fashion-classes  the same with 10 classes
    digits           handwritten, 8x8, 10 classes     pip: scikit-learn
    letters          of all fonts, 16x16, 26 classes  apt: fonts-*
    emoji            in colour, 16x16, on dark        apt: fonts-noto-color-emoji
    icons            in colour, 24x24, on white       apt: oxygen-icon-theme
    crops            of photographs, 32x32            pip: scikit-image

    A step whose file exists is skipped, so the same command continues after an interruption. A teacher takes ten
    minutes to an hour on a CPU.
    """
    from .presets import TEACHERS

    names = list(TEACHERS) if only is None else list(dict.fromkeys(only.split(",")))
    unknown = [name for name in names if name not in TEACHERS]
    if unknown:
        raise UserError(f"--only={only}: no teacher {unknown[0]!r}; there are {', '.join(TEACHERS)}")
    folders = {name: Path(outdir) / name for name in names}
    check_sources({name: TEACHERS[name] for name, folder in folders.items() if not (folder / "data.zip").exists()})
    results = {
        name: make(name, TEACHERS[name], folder, kimg or TEACHERS[name].kimg, num, device)
        for name, folder in folders.items()
    }
    click.echo("\n" + table(results))


def check_sources(teachers: "dict[str, SmallTeacher]") -> None:
    """Errors: UserError naming the missing packages, before any work is done."""
    missing = []
    for name, teacher in teachers.items():
        try:
            next(teacher.source(teacher.resolution))
        except UserError as error:
            missing.append(f"{name}: {error.message}")
    if missing:
        raise UserError("; ".join(missing) + "; or choose other teachers with --only")


def make(name: str, teacher: "SmallTeacher", folder: Path, kimg: float, num: int, device: str | None) -> dict[str, Any]:
    """Makes the files of one teacher that `folder` doesn't hold yet, and returns the teacher's row of the table."""
    from edm import train
    from edm.metrics import train_detector

    from .pictures import write_data

    folder.mkdir(parents=True, exist_ok=True)
    data, detector, reference = (folder / file for file in ("data.zip", "detector.safetensors", "reference.npz"))
    run, network, result = folder / "teacher", folder / "teacher.safetensors", folder / "teacher.json"
    on = [] if device is None else [f"--device={device}"]

    def training() -> None:
        place = [f"--data={data}", f"--cond={int(teacher.has_classes)}", f"--outdir={run}", "--nosubdir"]
        call("edm.train", train.main, ["--preset=small", *place, f"--duration={kimg / 1000:g}", "--tick=10", *on])
        keep_last_snapshot(run, network)

    def detecting() -> None:
        call("edm.metrics.train_detector", train_detector.main, [f"--data={data}", f"--dest={detector}", *on])

    step(name, data, lambda: write_data(teacher.source(teacher.resolution), data))
    step(name, detector, detecting)
    step(name, reference, lambda: write_reference(data, detector, reference, device))
    step(name, network, training)
    step(name, result, lambda: write_result(folder, num, device))
    return json.loads(result.read_text(encoding="utf-8"))


def step(name: str, file: Path, work: Callable[[], None]) -> None:
    """Makes a file unless it exists, and says how long that took."""
    if file.exists():
        click.echo(f"{name}: {file} exists")
        return
    click.echo(f"{name}: making {file}")
    start = time.time()
    work()
    click.echo(f"{name}: made {file} in {format_time(time.time() - start)}")


def call(module: str, command: click.Command, arguments: list[str]) -> None:
    """Runs another command of this project in this process, and shows its command line."""
    click.echo(shlex.join(["python", "-m", module, *arguments]))
    own, sys.argv = sys.argv, [module, *arguments]  # commands record it, and print it to say how to continue
    try:
        command.main(arguments, standalone_mode=False)
    finally:
        sys.argv = own


def write_reference(data: Path, detector: Path, dest: Path, device: str | None) -> None:
    """Writes the reference statistics of a data set, as `fid.py ref` does."""
    from edm.metrics.data_reference import make_reference
    from edm.metrics.detector import load_detector
    from edm.metrics.sources import open_data
    from torch_utils import distributed

    make_reference(open_data(str(data)), dest, load_detector(str(detector), distributed.init(device)), progress=True)


def keep_last_snapshot(run: Path, dest: Path) -> None:
    from torch_utils.checkpoint import snapshots

    with write_atomically(dest) as file:
        file.write(snapshots(run)[0].read_bytes())


def write_result(folder: Path, num: int, device: str | None) -> None:
    """Measures a teacher's FID, records it in its file, and writes teacher.json, its row of the table at the end."""
    from edm import zoo
    from edm.metrics.evaluate import evaluate, fid_name
    from edm.metrics.sources import NetworkSource, open_data
    from edm.snapshot_metrics import fid_metadata
    from torch_utils import distributed

    place, network = distributed.init(device), folder / "teacher.safetensors"
    net = zoo.load_network(network).to(place)
    source = NetworkSource(net, steps=STEPS, name="teacher.safetensors", sha256=zoo.network_hash(net))
    how = {"reference": folder / "reference.npz", "device": place, "batch": 250, "progress": True}
    (record,) = evaluate(source, [fid_name(num)], **how)
    zoo.save_network(net, network, **{**net.metadata, "fid": fid_metadata(record, net)})
    ticks = [json.loads(line) for line in (folder / "teacher/stats.jsonl").read_text(encoding="utf-8").splitlines()]
    result = {
        "images": open_data(str(folder / "data.zip")).size,
        "resolution": net.img_resolution,
        "channels": net.img_channels,
        "classes": net.label_dim,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "kimg": ticks[-1]["Progress/kimg"],
        "seconds": sum(tick["Timing/sec_per_tick"] for tick in ticks),
        "fid": record,
    }
    with write_atomically(folder / "teacher.json") as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per teacher, in Markdown, with the teacher's FID at 35 evaluations."""
    rows = [["teacher", "images", "shape", "classes", "parameters", "kimg", "seconds of training", "FID"]]
    rows.append(["---"] * len(rows[0]))
    for name, result in results.items():
        shape = f"{result['channels']}x{result['resolution']}x{result['resolution']}"
        numbers = [f"{result[key]:.0f}" for key in ("classes", "parameters", "kimg", "seconds")]
        rows.append([name, f"{result['images']}", shape, *numbers, f"{result['fid']['value']:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
