"""The page of a training by edm.train: how far it is, pictures, curves, settings, and what to do with the result.

As on the page of a distillation, nothing in the run's folder can break it or put a script into it.
"""

import functools
import math
import re
import shlex
from pathlib import Path
from typing import Any

import click

from dnnlib import Command, format_count, format_figure, format_number
from dnnlib.errors import printable
from edm import next_steps
from edm.train_options import CHECKS, SECTIONS
from edm.train_presets import PRESETS
from torch_utils.records import is_figure

from . import sections
from .commands import PLACES, launcher, typed_text, without_resume
from .curves import charts
from .embedded import REALS_PICTURE, TRAINING_COLUMNS, PictureCache
from .markup import code, document, escaped, section, table
from .run_record import RunRecord

COMMON_NAMES = ("data", "dataset", "images", "pictures", "train")  # of data sets, which their folder's name tells apart


def training_page(record: RunRecord, pictures: PictureCache) -> str:
    """The HTML of a training's page."""
    shown = charts(record)
    parts = [
        _pictures(record, pictures),
        sections.curves(shown, "training images"),
        section("facts", "The training", table(("What", "which"), facts(record), "The training")),
        _options(record),
        sections.environment(record),
        _continuing(record),
        _using(record),
    ]
    heading = f"{data_name(record)}, training of a teacher"
    body = "\n".join(filter(None, parts))
    content = sections.header(record, heading, _about(record), _latest(record)) + sections.contents(body) + body
    return document(f"{data_name(record)}: {record.state}", content, {"charts": [chart.plain() for chart in shown]})


def data_name(record: RunRecord) -> str:
    """A short name of the run's data set."""
    source = record.options.get("data")
    if not isinstance(source, str) or not source:
        return "Unknown data"
    path = Path(source)
    name = f"{path.parent.name}/{path.name}" if path.stem in COMMON_NAMES and path.parent.name else path.name
    return printable(name or source)


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Rows (what, which) about the training; what the record lacks is left out."""
    options, network = record.options, _dict(record.options, "network")
    rows = {
        "Network": _network_text(record),
        "Layers": _layers_text(network),
        "Data": _joined(_text(options, "data"), _data_text(record)),
        "Passes": _passes_text(record),
        "Loss": _loss_text(options),
        "Optimizer": _optimizer_text(options),
        "Average": _average_text(options),
        "Batch": _batch_text(options),
        "Device": _text(_dict(options, "environment"), "device"),
        "Length": _length_text(record),
        "Start": _text(_dict(options, "options"), "transfer"),
    }
    return [(name, text) for name, text in rows.items() if text]


# --- texts of single facts, empty where the record is silent or damaged


def _dict(options: dict[str, Any], name: str) -> dict[str, Any]:
    found = options.get(name)
    return found if isinstance(found, dict) else {}


def _text(options: dict[str, Any], name: str, before: str = "", after: str = "") -> str:
    """A value between two words; empty if there is none."""
    value = options.get(name)
    return "" if value is None or value in ("", []) else f"{before}{typed_text(value)}{after}"


def _joined(*texts: str) -> str:
    return ", ".join(filter(None, texts))


def _network_text(record: RunRecord) -> str:
    network, count = _dict(record.options, "network"), record.options.get("parameters")
    size = f"{format_count(count)} parameters" if is_figure(count) else ""
    return _joined(_text(network, "class_name"), _text(network, "model_type"), size)


def _layers_text(network: dict[str, Any]) -> str:
    return _joined(
        _text(network, "model_channels", after=" channels") + _text(network, "channel_mult", " times "),
        _text(network, "num_blocks", "blocks "),
        _text(network, "attn_resolutions", "attention at "),
        _text(network, "dropout", "dropout "),
    )


def _data_text(record: RunRecord) -> str:
    network = _dict(record.options, "network")
    size = _text(network, "img_resolution")
    classes = network.get("label_dim")
    return _joined(
        _text(record.options, "images", after=" images"),
        size and f"{_text(network, 'img_channels', after=' x ')}{size} x {size}",
        f"{typed_text(classes)} classes" if classes else "without classes" if classes == 0 else "",
    )


def _passes_text(record: RunRecord) -> str:
    images = record.options.get("images")
    if not is_figure(images) or images < 1:
        return ""
    done = format_figure(1000 * record.kimg / images)
    return done if record.total_kimg is None else f"{done} of {format_figure(1000 * record.total_kimg / images)}"


def _loss_text(options: dict[str, Any]) -> str:
    loss = _dict(options, "loss")
    levels = _joined(_text(loss, "P_mean", "mean of ln sigma "), _text(loss, "P_std", "its deviation "))
    only = _text(options, "sigma", "at sigma ", " only")
    augment = _text(_dict(options, "options"), "augment", "augmentation with probability ")
    return _joined(_text(loss, "class_name"), only or levels, augment)


def _optimizer_text(options: dict[str, Any]) -> str:
    name = _text(options, "optimizer") or "Adam"
    parts = _text(options, "lr", "lr "), _text(options, "lr_rampup_kimg", "after a warm-up of ", " kimg")
    rate = " ".join(filter(None, parts))
    decay = _text(options, "lr_decay", "decay ") if options.get("lr_decay") != "none" else "no decay"
    return _joined(name, rate, decay, _text(options, "beta2", "beta2 ")) if rate else ""


def _average_text(options: dict[str, Any]) -> str:
    width = _text(options, "ema_std", "power function of width ")
    return width or _text(options, "ema_halflife_kimg", "half-life ", " kimg")


def _batch_text(options: dict[str, Any]) -> str:
    batch = _text(options, "batch", after=" images")
    processes = options.get("processes")
    return _joined(
        batch,
        _text(options, "batch_gpu", "", " at once"),
        f"{typed_text(processes)} processes" if is_figure(processes) and processes > 1 else "",
    )


def _length_text(record: RunRecord) -> str:
    total, batch = record.total_kimg, record.options.get("batch")
    if total is None:
        return ""
    updates = f" ({math.ceil(1000 * total / batch)} updates)" if is_figure(batch) and batch >= 1 else ""
    return f"{format_number(total)} kimg{updates}"


# --- the sections


def _about(record: RunRecord) -> str:
    return _joined(_network_text(record), _data_text(record), _text(record.options, "batch", after=" images a batch"))


def _latest(record: RunRecord) -> list[str]:
    """The last measurements, for the header."""
    loss = record.ticks[-1].get("Loss/loss") if record.ticks else None
    found = [] if loss is None else [f"loss {loss:.4g}"]
    return found if record.fid is None else [*found, f"{record.fid.name} {record.fid.last:.4g}"]


def _pictures(record: RunRecord, pictures: PictureCache) -> str:
    measured = {"loss": {t["Progress/kimg"]: t["Loss/loss"] for t in record.ticks if "Loss/loss" in t}}
    if (fid := record.fid) is not None:
        measured[fid.name] = {line["kimg"]: line["value"] for line in fid.records}
    reals, beside = pictures.picture(REALS_PICTURE, TRAINING_COLUMNS), ""
    if reals is not None:
        shown = sections.image(reals, "Images of the data set")
        beside = f"<figure>{shown}<figcaption>Images of the data set</figcaption></figure>"
    return sections.pictures(pictures.frames(TRAINING_COLUMNS), measured, "the network", beside)


def _options(record: RunRecord) -> str:
    preset = preset_of(record)
    return sections.options(changed_options(record), None if preset is None else f"--preset={preset}")


def preset_of(record: RunRecord) -> str | None:
    """The preset that the run was started with, if it is recorded and known."""
    preset = record.options.get("preset")
    return preset if isinstance(preset, str) and preset in PRESETS else None


@functools.lru_cache
def defaults(preset: str | None = None) -> dict[str, Any]:
    """The options of edm.train by name, without or with a preset."""
    arguments = ["--data=x", "--outdir=x", *([] if preset is None else [f"--preset={preset}"])]
    return Command(name="edm.train", sections=SECTIONS, checks=CHECKS).make_context("edm.train", arguments).params


def changed_options(record: RunRecord) -> list[tuple[str, ...]]:
    """Rows (option, its value, the default, the preset's value if the run has one) where the run's value differs."""
    usual, preset, recorded = defaults(), preset_of(record), _dict(record.options, "options")
    others = [usual] if preset is None else [usual, defaults(preset)]
    rows = []
    for option in (option for options in SECTIONS.values() for option in options):
        name = option.name
        if name not in usual or name not in recorded or name in (*PLACES, "data"):
            continue
        texts = [_option_text(option, value) for value in (recorded[name], *(other[name] for other in others))]
        if len(set(texts)) > 1:
            rows.append((option.opts[-1], *texts))
    return rows


def _option_text(option: click.Parameter, value: Any) -> str:
    """A value as the command line has it, or what stands for none by the option's help text."""
    described = re.search(r"\[default: (.*)\]", getattr(option, "help", None) or "")
    return described[1] if value is None and described else typed_text(value)


def _continuing(record: RunRecord) -> str:
    sentence, command = continuing(record)
    shown = "" if command is None else code(command, "Command that continues the training")
    return section("continue", "Continue the training", f"<p>{escaped(sentence)}</p>{shown}")


def continuing(record: RunRecord) -> tuple[str, str | None]:
    """(a sentence, a command if there is one) about how to go on with the training."""
    options, place = record.options, str(record.run_dir)
    arguments = options.get("arguments")
    if not (isinstance(arguments, list) and all(isinstance(argument, str) for argument in arguments)):
        return f"The command that started the run goes on with it, with --resume={shlex.quote(place)} added.", None
    command = [*launcher(options.get("processes"), "edm.train"), *without_resume(arguments), f"--resume={place}"]
    if record.state != "finished" or record.total_kimg is None:
        return "From the folder where the run was started:", shlex.join(command)
    longer = [f"--duration={format_number(2 * record.total_kimg / 1000)}"]
    longer += [] if options.get("lr_decay") in ("none", "sqrt") else ["--override"]  # other decays reach to the end
    return "The training has come to its end. To train for twice as long:", shlex.join([*command, *longer])


def _using(record: RunRecord) -> str:
    """The commands that distil the teacher, measure it and draw images."""
    options, place = _dict(record.options, "options"), record.run_dir
    known = {name: value for name, value in options.items() if isinstance(value, str)}
    content = f"<p>Distil it into a one-step generator:</p>{code(next_steps.distil(place, known), 'Distil')}"
    data = record.options.get("data")
    if isinstance(data, str) and record.options.get("sigma") is None:  # Heun's method needs all noise levels
        content += f"<p>Measure FID:</p>{code(next_steps.measure(place, known, data), 'Measure FID')}"
        content += f"<p>Make images:</p>{code(next_steps.generate(place), 'Make images')}"
    latest = "" if record.state == "finished" else "<p>These take the newest snapshot.</p>"
    return section("use", "Use the teacher", latest + content)
