"""A network as a repository of the Hugging Face Hub: safetensors, config, model card, picture, and its other parts.

The repository's layout is this project's own (a folder of `edm.zoo.save_network`), or the diffusers library's.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, user_path
from dnnlib.download import is_url
from torch_utils.records import METRIC_FILE, is_figure, measured_value, sound_records
from torch_utils.untrusted.bounds import read_json
from training.denoiser import DenoiserModule
from training.steps import Steps

from . import diffusers_folder, diffusers_pipelines, hub, latents, model_card, network_files, text_encoders, zoo
from .images import save_grid
from .model_card import Card
from .published import find
from .sampler import generate_all
from .snapshot_metrics import EVALUATIONS, fid_record

CARD_FILE, PICTURE_FILE, ONNX_FILE, OPTIONS_FILE = "README.md", "images.png", "network.onnx", "training_options.json"
SNAPSHOT, PICTURE = "network-snapshot-", "fakes_"  # how a run names a snapshot and its picture
PICTURE_SEEDS, PICTURE_COLUMNS = 32, 8  # of a new picture
MANY_EVALUATIONS_SEEDS = 8  # of a diffusion model's, which takes longer
CONFIGURATIONS = (
    network_files.CONFIG_FILE,
    network_files.INDEX_FILE,
    "tokenizer_config.json",
    diffusers_folder.SCHEDULER_FILE,
)
MAX_OPTIONS_BYTES = 1 << 20


def write(
    source: str,
    name: str,
    folder: Path,
    classes: Mapping[str, Callable[..., Any]] | None = None,
    to: str | None = None,
    onnx: bool = False,
    licence: str | None = None,
) -> str:
    """Writes what is to be uploaded of a network into a new folder, which appears whole or not at all.

    source: a network or run folder, as `edm.zoo.load_network` takes it. name: of the repository, owner/name.
    classes: of one's own (`edm.zoo.load_network`). to: None for this project's layout, or 'diffusers'.
    onnx: whether an ONNX model joins it. licence: instead of the one in the metadata.
    Returns one line about the network. Prints a line for what its publisher should know.
    Errors: UserError when it can't be loaded or written.
    """
    source = zoo.network_file(source)
    net: Any = zoo.load_denoiser(source, classes)
    run_dir = None if find(source) or is_url(source) or not user_path(source).is_file() else user_path(source).parent
    weights = zoo.network_hash(net)
    metrics = _metrics(net, weights, run_dir)
    parts = {part: net.metadata[part] for part in ("vae", "text") if part in net.metadata}
    net.metadata = {**hub.public(net.metadata), **parts, **_added(net, metrics, run_dir)}
    if licence is not None:
        net.metadata["licence"] = licence
    for line in warnings(source, net.metadata.get("licence"), own_layout=to is None):
        print(line, file=sys.stderr, flush=True)
    try:
        with network_files.new_folder(folder) as new:
            files, pipeline = {}, None
            if to == "diffusers":
                pipeline = diffusers_pipelines.write(net, new)
                _make_public(new)
            else:
                files = _write_network(net, new)
            if onnx:
                decoder = latents.decoder_by(net.metadata, net)
                network_files.write(_bare(net), new / ONNX_FILE, hub.public(net.metadata), decoder)
                files[ONNX_FILE] = "the same network as an ONNX model"
            picture = _write_picture(net, user_path(source), run_dir, new)
            card = Card(name, net, weights, metrics, _run_options(run_dir), picture, pipeline, files)
            (new / CARD_FILE).write_text(card.text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}: choose another place") from None
    return f"{type(net).__name__}, sha256 of the weights {weights}"


def warnings(source: str, licence: str | None, own_layout: bool) -> Iterator[str]:
    """What a publisher of the network should know, in lines."""
    if licence is None:
        yield f"{source}: its licence isn't recorded; give --licence=NAME, or fill it in on the model card"
    elif model_card.forbids_commerce(licence):
        yield f"{source}: its licence ({licence}) forbids commercial use; the model card says so"
    if own_layout and Path(source).suffix in (".pkl", *network_files.FOREIGN_SUFFIXES):
        yield f"{source}: goes up as safetensors, since opening a pickle can run code"


def _bare(net: DenoiserModule) -> torch.nn.Module:
    """A copy without the attributes that no file holds."""
    copy = zoo.clone_network(net)
    for name in zoo.ATTACHED:
        vars(copy).pop(name, None)
    return copy


def _write_network(net: DenoiserModule, folder: Path) -> dict[str, str]:
    """Writes the network in this project's layout, with the VAE and text encoders that are on this machine only.

    Returns {name: what it is} of these.
    """
    metadata, files = hub.public(net.metadata), {}
    parts = folder.with_name("parts")  # the network's folder must be empty when it is written
    for part, check in {"vae": latents.checked_record, "text": text_encoders.checked_record}.items():
        if part not in net.metadata:
            continue
        record = check(net.metadata[part], "the network")
        if hub.is_name(record["source"]):
            metadata[part] = record
        elif part == "vae":
            _copy_vae(net, parts / latents.FOLDER)
            metadata[part] = {**record, "source": latents.FOLDER}
            files[f"{latents.FOLDER}/"] = "the VAE of its latents"
        else:
            sha256 = _copy_text_encoders(record, parts / text_encoders.FOLDER)
            metadata[part] = {**record, "source": text_encoders.FOLDER, "sha256": sha256}
            files[f"{text_encoders.FOLDER}/"] = "the text encoders of its prompts"
    zoo.save_network(net, folder, **metadata)
    for place in parts.iterdir() if files else ():
        place.rename(folder / place.name)
    return files


def _copy_vae(net: DenoiserModule, place: Path) -> None:
    """Copies a network's VAE. Errors: UserError when it isn't there, or isn't the one that it was trained with."""
    latents.decoder_of(net)
    weights = (f"{diffusers_folder.WEIGHTS_NAME}*.safetensors", f"{diffusers_folder.WEIGHTS_NAME}*.json")
    source = latents.vae_folder(user_path(net.metadata["vae"]["source"]))
    _copy(source, place, network_files.CONFIG_FILE, *weights)
    _make_public(place)


def _copy_text_encoders(record: dict[str, Any], place: Path) -> str:
    """Copies the text encoders of a record and returns their fingerprint. Errors: UserError when they aren't there."""
    pipeline = text_encoders.folder_of(record)
    _copy(pipeline, place, network_files.INDEX_FILE)
    encoders, patterns = text_encoders.supported_parts(pipeline)[1], [f"*{suffix}" for suffix in text_encoders.FILES]
    for part in encoders:
        _copy(pipeline / part, place / part, *patterns)
    _make_public(place)
    return text_encoders.fingerprint(place, encoders)


def _copy(source: Path, destination: Path, *patterns: str) -> None:
    destination.mkdir(parents=True)
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, destination / file.name)


def _make_public(folder: Path) -> None:
    """Replaces the paths that the libraries put into configurations: where a model had been loaded from."""
    for path in folder.rglob("*.json"):
        if path.name not in CONFIGURATIONS:
            continue
        config = diffusers_folder.read_config(path)
        changed = {name: hub.public(value) for name, value in config.items() if name.endswith("name_or_path")}
        if any(config[name] != value for name, value in changed.items()):
            path.write_text(json.dumps({**config, **changed}, indent=2) + "\n", encoding="utf-8")


def _write_picture(net: DenoiserModule, source: Path, run_dir: Path | None, folder: Path) -> tuple[str, str] | None:
    """The picture that the run made of the snapshot, or a new one; (file, caption). None for a network of prompts."""
    stem = source.stem if run_dir is not None else ""
    made = source.with_name(f"{PICTURE}{stem.removeprefix(SNAPSHOT)}.png")
    if stem.startswith(SNAPSHOT) and made.is_file():
        shutil.copyfile(made, folder / PICTURE_FILE)
        return PICTURE_FILE, "Its images, not selected"
    if getattr(net, "prompt_dim", 0):
        return None
    number = MANY_EVALUATIONS_SEEDS if Steps.of(net) is None else PICTURE_SEEDS
    save_grid(generate_all(net, range(number)), folder / PICTURE_FILE, PICTURE_COLUMNS)
    return PICTURE_FILE, f"Its images of the seeds 0 to {number - 1}, not selected"


def _metrics(net: DenoiserModule, weights: str, run_dir: Path | None) -> list[dict[str, Any]]:
    """The newest record of each metric of these weights: of the run, otherwise the FID in the metadata."""
    found, own = {}, Steps.of(net)
    for path in sorted(run_dir.glob("metric-*.jsonl")) if run_dir is not None else []:
        name = METRIC_FILE.fullmatch(path.name)
        if name is None:
            continue
        for record in sound_records(path, "kimg", "value"):
            if record.get("network_sha256") == weights:
                steps = record.get("steps")
                evaluations = 2 * steps - 1 if isinstance(steps, int) else len(own) if own else None
                measured = {"metric": name[1], "value": measured_value(record), "evaluations": evaluations}
                found[name[1]] = {**record, **measured}
    fid = net.metadata.get("fid")
    if not found and isinstance(fid, dict):
        for name, value in fid.items():
            if name.startswith(EVALUATIONS) and is_figure(value):
                found[name] = {"metric": "fid", **fid, "value": value, "evaluations": name.removeprefix(EVALUATIONS)}
    return list(found.values())


def _added(net: DenoiserModule, metrics: list[dict[str, Any]], run_dir: Path | None) -> dict[str, Any]:
    """The FID that the run recorded, for metadata that lack it."""
    name = next((record["metric"] for record in metrics if record["metric"].startswith("fid")), None)
    if run_dir is None or name is None or "fid" in net.metadata:
        return {}
    return hub.public({"fid": fid_record(net, run_dir, name)})


def _run_options(run_dir: Path | None) -> dict[str, Any]:
    """The options that a run recorded; empty if it recorded none."""
    try:
        options = read_json(run_dir / OPTIONS_FILE, MAX_OPTIONS_BYTES, 10_000) if run_dir is not None else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return options if isinstance(options, dict) else {}
