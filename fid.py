"""Scores images and generators: FID, inception score, KID, precision and recall, CLIP score."""

import contextlib
import json
from pathlib import Path
from typing import Any

import click

import dnnlib
from dnnlib.options import Idle
from edm import generate
from edm.own_classes import own_classes

WHOLE, POSITIVE, COUNT = (dnnlib.WholeRange(least) for least in range(3))
NOT_SAMPLING = ("network", "outdir", "grid", "seeds", "batch", "device")  # the other options of edm.generate are


def shared(*names):
    """The options that several commands have, by name."""
    options = {
        "ref": click.option("--ref", help="Reference statistics: .npz, URL or name  [default: of --data]", type=str),
        "data": click.option("--data", help="Real images: folder, zip, .npz with arr_0, or name", type=str),
        "detector": click.option(
            "--detector", help="Detector: file, URL or name  [default: the reference's]", type=str
        ),
        "batch": click.option(
            "--batch", help="Images per process and step", type=POSITIVE, default=64, show_default=True
        ),
        "json": click.option("--json", "json_file", help="Append the records to a file instead of printing", type=str),
        "device": click.option("--device", help="cuda, mps or cpu  [default: the first that is there]", type=str),
    }

    def decorate(function):
        for name in reversed(names):
            function = options[name](function)
        return function

    return decorate


def has_only(options, *kinds):
    """Whether all of --metrics are of these kinds."""
    return all(name.startswith(kinds) for name in options["metrics"].split(",") if name)


OF_PROMPTS = ("clip", "ground", "name")  # kinds of metrics that compare images with their prompts alone
CALC_CHECKS = (Idle(("data",), "with --ref, which holds its statistics", lambda options: options["ref"] is not None),)
EVAL_CHECKS = (
    *generate.CHECKS,
    Idle(
        ("ref", "data", "detector"),
        "for CLIP scores, grounds and names alone",
        lambda options: has_only(options, *OF_PROMPTS),
    ),
    Idle(
        ("data",),
        "without kid or pr in --metrics, or fid without --ref",
        lambda options: has_only(options, "is", *OF_PROMPTS, *([] if options["ref"] is None else ["fid"])),
    ),
)


@click.group(cls=dnnlib.Group)
def main():
    """Scores images and generators. Works on one process and under torchrun, with the same numbers.

    \b
    python fid.py ref --data=datasets/cifar10-32x32.zip --dest=cifar10-32x32.npz
    python fid.py calc --images=generated.zip --ref=cifar10-32x32.npz
    torchrun --standalone --nproc_per_node=8 fid.py eval --network=network.pkl --ref=cifar10-32x32.npz --metrics=fid50k
    """


@main.command(checks=CALC_CHECKS)
@click.option("--images", help="Images to score: folder or zip", type=str, required=True)
@click.option("--num", help="Number of images", type=COUNT, default=50000, show_default=True)
@click.option("--seed", help="Of the subset, where there are more", type=WHOLE, default=0, show_default=True)
@shared("ref", "data", "detector", "batch", "json", "device")
def calc(images, num, seed, ref, data, detector, batch, json_file, device):
    """FID of a folder or zip of images."""
    with running(device, json_file) as device:
        from edm.metrics.evaluate import evaluate, fid_name
        from edm.metrics.sources import FolderSource

        source = FolderSource(images, max_size=num, seed=seed)
        if source.size < num:
            raise dnnlib.UserError(f"--images={images} holds {source.size} images, fewer than --num={num}; lower --num")
        options = {"reference": ref, "detector": detector, "data": data, "batch": batch, "progress": True}
        report(evaluate(source, [fid_name(num)], device=device, **options), json_file)


@main.command()
@click.option("--data", help="Real images: folder, zip, .npz with arr_0, or name", type=str, required=True)
@click.option("--dest", help="Reference statistics to write: new .npz", type=str, required=True)
@shared("detector", "batch", "device")
def ref(data, dest, detector, batch, device):
    """Makes reference statistics of a data set."""
    if not dest.endswith(".npz"):
        raise dnnlib.UserError(f"--dest={dest} must end in .npz")
    dnnlib.check_new_file(dest, "--dest")
    with running(device) as device:
        from edm.metrics.data_reference import make_reference
        from edm.metrics.detector import DEFAULT_DETECTOR, load_detector
        from edm.metrics.sources import open_data
        from torch_utils import distributed

        detector = load_detector(detector or DEFAULT_DETECTOR, device)
        made = make_reference(open_data(data), dest, detector, batch, progress=True)
        distributed.print0(f"{dest}: {made.feature_dim} features of {made.n} images, detector {detector.name}")


@main.command("eval", checks=EVAL_CHECKS)
@click.option("--network", help="Network: .pkl, .safetensors, URL or name", type=str, required=True)
@click.option(
    "--metrics", help="Names like fid50k,is50k,kid50k,pr50k3,clip1k", type=str, default="fid50k", show_default=True
)
@click.option("--clip", help="CLIP for clip1k: folder or name on the Hugging Face Hub", type=str)
@click.option("--table", help="Write how well the images of each prompt match it: new .csv or .jsonl", type=str)
@click.option("--trials", help="Repetitions, each with new seeds", type=POSITIVE, default=1)
@click.option("--seeds", help="First seed", type=WHOLE, default=0, show_default=True)
@shared("ref", "data", "detector", "batch", "json", "device")
def evaluate_network(
    network, metrics, clip, table, trials, seeds, ref, data, detector, batch, json_file, device, classes, **sampling
):
    """Metrics of a network's images, made and scored in one pass without files in between.

    The images are those of `python -m edm.generate` with the same seeds and options; --data serves kid and pr. CLIP
    scores say how well the images of a text-to-image network match their --prompts. For prompts that captions.json
    next to them describes, such as "a red apple on a blue ground, left", ground1k says whether they have the colour,
    and name1k how often --clip finds the picture among all. If the number of images isn't a multiple of the number of
    prompts, the prompts are shuffled.
    """
    with running(device, json_file) as device:
        from edm import measured_fid, zoo
        from edm.metrics import text_alignment
        from edm.metrics.clip import ClipEncoder
        from edm.metrics.evaluate import Evaluator, captions_for, parse_metric
        from edm.metrics.records import summarise
        from edm.metrics.sources import NetworkSource
        from torch_utils import distributed

        names = [name for name in metrics.split(",") if name]
        for option, value, kinds in (("--clip", clip, ("clip", "name")), ("--table", table, ("clip",))):
            if value is not None and all(parse_metric(name).kind not in kinds for name in names):
                raise dnnlib.UserError(f"{option}: --metrics={metrics} has no CLIP score; add one, such as clip1k")
        text_alignment.check_table(table)
        encoder = ClipEncoder(clip, device) if clip is not None else None
        options = {"reference": ref, "detector": detector, "data": data, "batch": batch, "progress": True}
        options["captions"] = captions_for(names, sampling["prompts"])
        net = zoo.load_denoiser(network, own_classes(classes))
        evaluator = Evaluator(names, device=device, encoder=encoder, **options)
        given = {name: value for name, value in sampling.items() if value is not None}
        made_by: dict[str, Any] = {"name": Path(network).name, "sha256": zoo.network_hash(net)}
        num = max(metric.num for metric in evaluator.metrics)
        given, prompts = generate.prompted(net, given, device, num)
        net, sampling, guidance = generate.guided(net, generate.sampler_options(net, given), own_classes(classes))
        net = net.to(device)
        made_by |= sampling
        records = [evaluator(NetworkSource(net, seed=seeds + trial * num, **made_by)) for trial in range(trials)]
        plain = sampling == measured_fid.SAMPLING and not guidance and not prompts
        if plain and (trials, seeds) == (1, 0) and distributed.rank() == 0:
            measured_fid.keep_all(measured_fid.identity(net, made_by["sha256"]), evaluator, records[0])
        alignments = text_alignment.alignments_of(evaluator.metrics)
        rows = text_alignment.table(alignments) if alignments else []
        report(
            [{**record, **guidance, **prompts} for record in summarise(records)],
            json_file,
            text_alignment.describe_table(rows) if rows else None,
        )
        if rows and table is not None:
            text_alignment.write_table(rows, table)


evaluate_network.params += [option for option in generate.main.params if option.name not in NOT_SAMPLING]


@contextlib.contextmanager
def running(device, json_file=None):
    """Joins torchrun's processes, gives the device, and leaves them again."""
    from edm.metrics.records import check_appendable
    from torch_utils import distributed

    try:
        check_appendable(json_file)
        yield distributed.init(device)
    finally:
        distributed.shutdown()


def report(records, json_file, text=None):
    """Process 0 prints a readable line per record and `text`, then the records as JSON unless a file takes them."""
    from edm.metrics.records import append_records, describe
    from torch_utils import distributed

    if distributed.rank() != 0:
        return
    for record in records:
        print(describe(record))
    if text is not None:
        print(text)
    if json_file is not None:
        append_records(records, json_file)
    else:
        print("\n".join(json.dumps(record) for record in records))


if __name__ == "__main__":
    main()
