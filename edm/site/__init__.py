"""A web page that makes a generator's images in the browser: static files, for any web server.

The browser runs the network's ONNX file with onnxruntime-web. The page is the same for every network; what differs
stands in `site.json`, whose texts the page shows as text and nothing else.
"""

import base64
import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import UserError, open_plain, user_path
from dnnlib.errors import printable
from edm import hub, latents, network_files, onnx_file, zoo
from edm.text_encoders import prompts_for, read_prompts
from torch_utils.untrusted.bounds import read_json
from training.conditions import learnt_classes
from training.steps import Steps

STATIC = Path(__file__).parent / "static"
PAGE_FILES = ("index.html", "base.css", "site.css", "page.js", "worker.js", "noise.js")
MODEL_FILE, PROMPTS_FILE, DESCRIPTION_FILE, RUNTIME_FOLDER = "network.onnx", "prompts.bin", "site.json", "runtime"
RUNTIME_VERSION, RUNTIME_LICENCE = "1.30.0", "onnxruntime-LICENSE.txt"
RUNTIME_ADDRESS = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/"
RUNTIME = {  # what each file of onnxruntime-web is to the page: its name, and its hash in RUNTIME_VERSION
    "module": ("ort.wasm.min.mjs", "sha384-SfFfy/pvthiOsgaw3KX0bV5TfQ6Iq+oY9KutMe4SxIuHH4cl+DCSD4rTsYOoG1tJ"),
    "loader": ("ort-wasm-simd-threaded.mjs", "sha384-XcXA/MtAf0WpB8e023xQH9CM7RIjiugakT7x99DIwpFf7k56BIFFcAPerIF7FDad"),
    "wasm": ("ort-wasm-simd-threaded.wasm", "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM"),
}
MAX_RUNTIME_BYTES, MAX_PACKAGE_BYTES, MAX_NAMES_BYTES = 256 << 20, 1 << 20, 16 << 20
MAX_PROMPTS, MAX_PROMPT_BYTES = 1000, 100_000_000  # that a list shows; that a page loads at once
ADVICE = f"npm pack onnxruntime-web@{RUNTIME_VERSION} downloads it"


def write(
    net: Any,
    source: str,
    destination: str,
    runtime: str | None = None,
    class_names: str | None = None,
    half: bool = False,
    prompts: str | None = None,
) -> str:
    """Writes the site of a generator into a new folder, which appears whole or not at all.

    source: where the network came from, whose last name is the page's title. runtime: the folder of the npm package
    onnxruntime-web, which the site then holds; None: the page loads RUNTIME_VERSION from RUNTIME_ADDRESS.
    class_names: a text file with the name of each class in its line. half: as `onnx_file.halve`, for encoded prompts,
    too. prompts: a file as `edm.text_encoders.read_prompts` takes, with those that the page offers.
    Returns a line that says how to see the page, and where its runtime comes from.
    Errors: UserError when the network doesn't make pictures by itself, or a file can't be read or written.
    """
    path, description = user_path(destination), describe(net, source)
    texts = _texts(net, prompts, half)
    if class_names is not None:
        description["class_names"] = _class_names(class_names, net.label_dim)
    files = {} if runtime is None else _runtime_files(runtime)
    version = RUNTIME_VERSION if runtime is None else _runtime_version(runtime)
    description["runtime"] = _runtime_record(files, version)
    encoded = _encoded(net, texts, half) if texts else b""
    if texts:
        own = {"dim": net.prompt_dim, "bits": 16 if half else 32, "bytes": len(encoded)}
        description["prompts"] = {"texts": [printable(text) for text in texts], **own}
    try:
        with network_files.new_folder(path) as folder:
            zoo.save_network(net, folder / MODEL_FILE, **net.metadata)
            if half:
                onnx_file.halve(folder / MODEL_FILE)
            if texts:
                (folder / PROMPTS_FILE).write_bytes(encoded)
            description["model_bytes"] = (folder / MODEL_FILE).stat().st_size
            copies = [STATIC / name for name in PAGE_FILES]
            if files:
                (folder / RUNTIME_FOLDER).mkdir()
                copies += [STATIC / RUNTIME_LICENCE, *files.values()]
            for file in copies:
                place = folder if file.name in PAGE_FILES else folder / RUNTIME_FOLDER
                shutil.copyfile(file, place / file.name)
            text = json.dumps(description, allow_nan=False)
            (folder / DESCRIPTION_FILE).write_text(text + "\n", encoding="ascii")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: choose another place") from None
    line = f"to see the page: python -m http.server --directory {shlex.quote(str(path))}"
    if texts:
        line += f"; its {len(texts)} prompts take {len(encoded) / 1e6:.3g} MB"
    if files:
        return f"{line}; it holds onnxruntime-web {version} and needs no other server"
    return f"{line}; it loads onnxruntime-web {version} from cdn.jsdelivr.net, unless --runtime=FOLDER is given"


def describe(net: Any, source: str) -> dict[str, Any]:
    """What the page has to know about a generator, as plain values.

    shape: of the noise, [C, H, W]. resolution: of the pictures, which a VAE may have decoded. noise_steps: how many
    further noises the network takes for an image. classes: numbers of those that it has learnt.
    Errors: UserError when it isn't a generator of pictures.
    """
    steps = Steps.of(net)
    if steps is None:
        raise UserError(
            f"--to=site: {source} records no init_sigma, so it is no generator, and sampling a diffusion model takes"
            " many evaluations an image: distil it first"
        )
    channels, resolution = latents.image_shape(net)
    if channels not in (1, 3):
        raise UserError(f"--to=site: the network makes {channels} channels, and a picture has 1 or 3")
    return {
        "title": hub.title(source),
        "shape": [net.img_channels, net.img_resolution, net.img_resolution],
        "resolution": resolution,
        "steps": len(steps),
        "noise_steps": len(steps) - 1 if steps.noise == "fresh" else 0,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "label_dim": net.label_dim,
        "classes": learnt_classes(net) or list(range(net.label_dim)),
        "licence": hub.public(net.metadata.get("licence")),
    }


def _class_names(source: str, count: int) -> list[str]:
    """The names of `count` classes, one in each line of a file. Errors: UserError naming --class-names."""
    if not count:
        raise UserError(f"--class-names={source}: this network has no classes; leave the option out")
    try:
        with open_plain(user_path(source), MAX_NAMES_BYTES) as file:
            names = [line.strip() for line in file.read().decode("utf-8-sig").strip().splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"--class-names={source}: is no text in UTF-8; save it as such") from None
    except OSError as error:
        raise UserError(f"--class-names={source}: can't be read ({error.strerror})") from None
    if len(names) != count:
        raise UserError(f"--class-names={source}: has {len(names)} lines, and the network {count} classes; one each")
    return [printable(name) for name in names]


def _texts(net: Any, source: str | None, half: bool) -> list[str]:
    """The prompts of a file, for a network of prompts; otherwise none. Errors: UserError naming --prompts."""
    width = getattr(net, "prompt_dim", 0)
    if not width:
        if source is not None:
            raise UserError("--prompts: this network makes no images of prompts; leave the option out")
        return []
    if source is None:
        raise UserError("--to=site: this network makes images of prompts: give --prompts=FILE, one per line")
    texts, size = read_prompts(source), width * (2 if half else 4)
    most = min(MAX_PROMPTS, MAX_PROMPT_BYTES // size)
    if len(texts) > most:
        raise UserError(
            f"--prompts={source}: has {len(texts)} prompts, of {size / 1e6:.2g} MB each when encoded; a page takes at"
            f" most {MAX_PROMPTS} and {MAX_PROMPT_BYTES / 1e6:.0f} MB: keep {most} of them"
            + ("" if half or most == MAX_PROMPTS else ", or twice as many with --half")
        )
    return texts


def _encoded(net: Any, texts: list[str], half: bool) -> bytes:
    """The conditions of prompts, [P, prompt_dim] numbers of 32 bits or, with `half`, of 16, the lowest byte first.

    Errors: UserError when the text encoders aren't available, or a number is too large for 16 bits.
    """
    rows = prompts_for(net, texts).all().numpy()
    if half and np.abs(rows).max() > onnx_file.LARGEST_HALF:
        raise UserError(f"--half: an encoded prompt holds a number beyond {onnx_file.LARGEST_HALF:g}; leave it out")
    return rows.astype("<f2" if half else "<f4").tobytes()


def _runtime_files(folder: str) -> dict[str, Path]:
    """{what it is to the page: file} of onnxruntime-web. Errors: UserError naming --runtime."""
    place = user_path(folder)
    place = place / "dist" if (place / "dist").is_dir() else place
    found = {role: place / name for role, (name, _) in RUNTIME.items()}
    for file in found.values():
        if not file.is_file():
            raise UserError(f"--runtime={folder}: has no {file.name}: name the package's folder; {ADVICE}")
    return found


def _runtime_version(folder: str) -> str:
    """The version in the package's folder, or an empty text where only its files are."""
    path = user_path(folder)
    for place in (path, path.parent):
        try:
            package = read_json(place / "package.json", MAX_PACKAGE_BYTES, 10_000)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if isinstance(package, dict) and package.get("name") == "onnxruntime-web":
            return printable(str(package.get("version", "")))
    return ""


def _runtime_record(files: Mapping[str, Path], version: str) -> dict[str, Any]:
    """{"version", "files": {what it is to the page: {"url", "integrity"}}}: where the page finds the runtime."""
    if not files:
        places = {role: (RUNTIME_ADDRESS + name, integrity) for role, (name, integrity) in RUNTIME.items()}
    else:
        places = {role: (f"{RUNTIME_FOLDER}/{file.name}", _integrity(file)) for role, file in files.items()}
    return {"version": version, "files": {k: {"url": url, "integrity": value} for k, (url, value) in places.items()}}


def _integrity(path: Path) -> str:
    """A file's hash as browsers check it. Errors: UserError naming --runtime."""
    try:
        with open_plain(path, MAX_RUNTIME_BYTES) as file:
            return "sha384-" + base64.b64encode(hashlib.sha384(file.read()).digest()).decode()
    except OSError as error:
        raise UserError(f"--runtime: {path} can't be read ({error.strerror})") from None
