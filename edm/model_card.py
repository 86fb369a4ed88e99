"""The model card of a network, README.md in its repository: what its metadata and its run's records say."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dnnlib.errors import printable
from torch_utils.records import is_figure
from training.steps import Steps

from . import hub
from .inspection import facts
from .metrics.detector import DEFAULT_DETECTOR

LIBRARY = "sid-distillation"
INSTALL = f"pip install '.[hub]'  # in a copy of {LIBRARY}, which is on no package index"
LICENCES = (  # that the Hub knows by these names
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "cc0-1.0", "unlicense"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    *("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"),
)
METHODS = {
    "sid-generator": ["2404.04057"],
    "sida-generator": ["2404.04057", "2410.14919"],
}  # by kind, where the file names no papers
DESIGN = {"EDMPrecond": "2206.00364", "Precond": "2312.02696"}  # by class of network
PAPERS = {  # arXiv number: authors, title, year
    "2404.04057": (
        "Zhou, Mingyuan and Zheng, Huangjie and Wang, Zhendong and Yin, Mingzhang and Huang, Hai",
        "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for One-Step"
        " Generation",
        2024,
    ),
    "2410.14919": (
        "Zhou, Mingyuan and Zheng, Huangjie and Gu, Yi and Wang, Zhendong and Huang, Hai",
        "Adversarial Score Identity Distillation: Rapidly Surpassing the Teacher in One Step",
        2024,
    ),
    "2406.01561": (
        "Zhou, Mingyuan and Wang, Zhendong and Zheng, Huangjie and Huang, Hai",
        "Long and Short Guidance in Score identity Distillation for One-Step Text-to-Image Generation",
        2024,
    ),
    "2505.12674": (
        "Zhou, Mingyuan and Gu, Yi and Wang, Zhendong",
        "Few-Step Diffusion via Score identity Distillation",
        2025,
    ),
    "2305.18455": (
        "Luo, Weijian and others",
        "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
        2023,
    ),
    "2311.18828": ("Yin, Tianwei and others", "One-step Diffusion with Distribution Matching Distillation", 2023),
    "2410.16794": (
        "Luo, Weijian and others",
        "One-Step Diffusion Distillation through Score Implicit Matching",
        2024,
    ),
    "2406.02507": ("Karras, Tero and others", "Guiding a Diffusion Model with a Bad Version of Itself", 2024),
    "2106.09685": ("Hu, Edward J. and others", "LoRA: Low-Rank Adaptation of Large Language Models", 2021),
    "2206.00364": (
        "Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli",
        "Elucidating the Design Space of Diffusion-Based Generative Models",
        2022,
    ),
    "2312.02696": (
        "Karras, Tero and others",
        "Analyzing and Improving the Training Dynamics of Diffusion Models",
        2023,
    ),
}


@dataclass(frozen=True)
class Card:
    """What a model card says.

    name         of the repository, owner/name
    net          the network, with its metadata
    weights      sha256 of the network's weights
    metrics      records of the metrics that were measured on these weights (`edm.metrics.evaluate`)
    run_options  what the run that made the network recorded of its options, plain values by name
    picture      (file in the repository, caption); None without one
    pipeline     the call of the diffusers library's pipeline, for a repository in that library's layout
    files        {file or folder in the repository: what it is}
    """

    name: str
    net: Any
    weights: str
    metrics: Sequence[Mapping[str, Any]] = ()
    run_options: Mapping[str, Any] = field(default_factory=dict)
    picture: tuple[str, str] | None = None
    pipeline: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """The network's metadata, as they may be published."""
        return hub.public(getattr(self.net, "metadata", {}))

    @property
    def licence(self) -> str | None:
        """The licence that the metadata name; None if they name none."""
        found = self.metadata.get("licence")
        return None if found is None else str(found)

    @property
    def steps(self) -> Steps | None:
        """The generator's steps; None for a diffusion model."""
        return Steps.of(self.net)

    def text(self) -> str:
        """The card: YAML between lines of ---, then Markdown."""
        parts = [
            _front_matter(self),
            f"# {self.name.partition('/')[2]}",
            "" if self.picture is None else f"![{_inline(self.picture[1])}]({self.picture[0]})",
            _summary(self),
            "## Use",
            _use(self),
            "## What it is",
            _table(("", ""), _facts(self)),
            "## Quality",
            _quality(self),
            *_options(self),
            "## Limits",
            "\n".join(f"- {line}" for line in _limits(self)),
            "## Licence",
            _licence(self),
            "## Citation",
            _citations(self),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def licence_name(licence: str | None) -> str | None:
    """The Hub's name for a licence; None if it has none."""
    words = str(licence).lower().removeprefix("from ").removesuffix(" weights")
    name = re.sub(r"[\s_]+", "-", words.strip())
    return name if name in LICENCES else None


def forbids_commerce(licence: str | None) -> bool:
    """Whether the licence's name says that commercial use isn't allowed."""
    return re.search(r"\bnc\b|non-?commercial|research[- ]only", str(licence).lower()) is not None


# --- front matter


def _front_matter(card: Card) -> str:
    known = licence_name(card.licence)
    values: dict[str, Any] = {"license": known or "other"}
    if known is None and card.licence is not None:
        values["license_name"] = re.sub(r"[^\w.+-]+", "-", card.licence.lower()).strip("-")[:80]
    values["library_name"] = LIBRARY if card.pipeline is None else "diffusers"
    has_prompts = bool(getattr(card.net, "prompt_dim", 0))
    values["pipeline_tag"] = "text-to-image" if has_prompts else "unconditional-image-generation"
    tags = ["diffusion", "image-generation", *(["class-conditional"] if card.net.label_dim else [])]
    if card.steps is not None:
        tags += ["distillation", "score-identity-distillation", "one-step" if len(card.steps) == 1 else "few-step"]
    values["tags"] = tags
    teacher = card.metadata.get("teacher")
    if isinstance(teacher, str) and hub.is_name(teacher):
        values["base_model"] = teacher
    lines = []
    for name, value in values.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {_yaml(item)}" for item in value)]
        else:
            lines.append(f"{name}: {_yaml(value)}")
    return "\n".join(["---", *lines, "---"])


def _yaml(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z][\w+./-]*", text) and text.lower() not in ("yes", "no", "on", "off", "true", "false")
    return text if plain else json.dumps(text)


# --- Markdown


def _inline(value: Any) -> str:
    """Text that Markdown and HTML leave as it is, in one line."""
    text = printable(" ".join(str(value).split()))[:300]
    return re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *([_inline(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _images(net: Any) -> str:
    size = net.img_resolution
    made = "latents" if "vae" in getattr(net, "metadata", {}) else "images"
    classes = f" of {net.label_dim} classes" if net.label_dim else ""
    return f"{net.img_channels} x {size} x {size} {made}{' of prompts' if getattr(net, 'prompt_dim', 0) else classes}"


def _evaluations(steps: Steps) -> str:
    return "one network evaluation" if len(steps) == 1 else f"{len(steps)} network evaluations"


def _summary(card: Card) -> str:
    metadata, images = card.metadata, _images(card.net)
    if card.steps is None:
        return f"A diffusion model that makes {images}."
    teacher = metadata.get("teacher")
    of = "a diffusion model" if teacher is None else f"the diffusion model {_inline(teacher)}"
    kimg = metadata.get("kimg")
    length = f" The training took {kimg * 1000:,.0f} generated images." if is_figure(kimg) else ""
    return (
        f"A generator that makes {images}, each in {_evaluations(card.steps)}. It was distilled from {of} by Score"
        f" identity Distillation ([arXiv:2404.04057](https://arxiv.org/abs/2404.04057)).{length}"
    )


def _use(card: Card) -> str:
    if card.pipeline is not None:
        call = card.pipeline.partition(": ")[2]
        first = f'pipeline = DiffusionPipeline.from_pretrained("{card.name}")'
        return _code("from diffusers import DiffusionPipeline", "", first, f"images = {call}.images")
    own, has_prompts = _own_class(card.net), bool(getattr(card.net, "prompt_dim", 0))
    prompt, option = ' --prompt="..."' * has_prompts, f" --classes=module:{own}" if own else ""
    command = f"python -m edm.generate --network={card.name} --outdir=out --seeds=0-63{prompt}{option}"
    parts = [f"    {INSTALL}", f"    {command}"]
    if not has_prompts:  # a call from Python needs them encoded first
        parts[1:1] = [_python(card, f", classes={{{json.dumps(own)}: {own}}}" if own else ""), "or on the command line"]
    return "\n\n".join(parts)


def _python(card: Card, classes: str) -> str:
    """How to make images in Python. classes: a further argument for loading, or nothing."""
    net = card.net
    shape = f"  # uint8 [16, {net.img_channels}, {net.img_resolution}, {net.img_resolution}]"
    about = "" if "vae" in card.metadata else shape
    about = f"  # a class from 0 to {net.label_dim - 1}; None: drawn for each" if net.label_dim else about
    chosen = ", class_idx=0" if net.label_dim else ""
    saved = 'save_grid(images, "grid.png")'
    if card.steps is not None:
        load = f'generator = OneStepGenerator.from_pretrained("{card.name}"{classes})'
        sample = f"images = generator(16, seed=0{chosen}){about}"
        return _code("from edm.images import save_grid", "from sid import OneStepGenerator", "", load, sample, saved)
    imports = ("from edm import zoo", "from edm.images import save_grid", "from edm.sampler import generate_all")
    load = f'net = zoo.load_network("{card.name}"{classes})'
    return _code(*imports, "", load, f"images = generate_all(net, range(16){chosen}){about}", saved)


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _own_class(net: Any) -> str | None:
    """The name of the network's class if it isn't one of this project's."""
    return None if type(net).__module__.partition(".")[0] in ("edm", "training") else type(net).__name__


def _facts(card: Card) -> list[tuple[str, Any]]:
    metadata = card.metadata
    rows = [(name, text) for name, text in facts(card.net).items() if name not in ("licence", "VAE", "prompts")]
    for name, key in {"VAE": "vae", "text encoders": "text"}.items():
        if isinstance(metadata.get(key), dict):
            rows.append((name, metadata[key].get("source")))
    told = {
        "teacher": metadata.get("teacher"),
        "teacher's weights, sha256": metadata.get("teacher_sha256"),
        "training data": metadata.get("data"),
        "images seen": f"{metadata['kimg']:g} thousand" if is_figure(metadata.get("kimg")) else None,
        "seed": metadata.get("seed"),
        f"version of {LIBRARY}": metadata.get("version"),
        "weights, sha256": card.weights,
    }
    rows += [(name, text) for name, text in told.items() if text is not None]
    return [*rows, *card.files.items()]


def _quality(card: Card) -> str:
    if not card.metrics:
        return "No metric was recorded for these weights."
    rows = []
    for record in card.metrics:
        values = record.get("values")
        values = {n: v for n, v in values.items() if is_figure(v)} if isinstance(values, dict) else {}
        values = values if len(values) > 1 else {"": record["value"]}
        text = ", ".join(f"{name} {value:.4g}".strip() for name, value in values.items())
        seeds, reference = record.get("seeds"), record.get("reference") or record.get("real_source")
        seeds = "{}-{}".format(*seeds) if isinstance(seeds, list) and len(seeds) == 2 else None
        cells = [record["metric"], text, record.get("evaluations"), record.get("num_images"), seeds]
        cells += [record.get("detector"), reference]
        rows.append(["not recorded" if cell is None else hub.public(cell) for cell in cells])
    headings = ("Metric", "Value", "Evaluations per image", "Images", "Seeds", "Detector", "Real images")
    return _table(headings, rows)


def _options(card: Card) -> list[str]:
    changed, run = card.metadata.get("options"), hub.public(dict(card.run_options))
    parts = []
    if isinstance(changed, dict):
        text = _table(("Option", "Value"), list(changed.items())) if changed else "None."
        parts += ["## Options that differ from the defaults", text]
    plain = {n: v for n, v in run.items() if isinstance(v, bool | int | float | str)}
    if plain:
        table = _table(("Option", "Value"), list(plain.items()))
        heading = [] if parts else ["## Options"]
        parts += [*heading, f"<details><summary>All options of the run</summary>\n\n{table}\n\n</details>"]
    return parts


def _limits(card: Card) -> list[str]:
    lines = ["What its training data lacked or overstated, its images lack or overstate."]
    if card.steps is not None:
        lines[0] = "It inherits the faults and biases of its teacher, and those of the teacher's training data."
        lines.append(
            "It isn't a denoiser any more; it answers at the noise levels where its steps start, and only there."
        )
    fids = [record for record in card.metrics if str(record["metric"]).startswith("fid")]
    if not fids:
        lines.append("Its FID wasn't recorded.")
    elif any(record.get("detector") != DEFAULT_DETECTOR for record in fids):
        lines.append("Its FID was measured by a detector of its own, so published values can't be compared with it.")
    elif any((record.get("num_images") or 0) < 50_000 for record in fids):
        lines.append("Its FID was measured on fewer than 50,000 images, which biases it upwards.")
    return lines


def _licence(card: Card) -> str:
    if card.licence is None:
        return (
            "**To be filled in:** the licence isn't recorded. A distilled network's weights are derived from its"
            " teacher's, whose licence may forbid sharing them; put the right one here and at `license:` above."
        )
    text = f"{_inline(card.licence.removeprefix('from ').removesuffix(' weights'))}."
    if card.steps is not None:
        text += (
            " These weights are derived from their teacher's, so the terms of the teacher's licence hold for them, too."
        )
    if forbids_commerce(card.licence):
        text += " **The licence forbids commercial use** of these weights and of what is made from them."
    return text


def _citations(card: Card) -> str:
    named = card.metadata.get("papers")
    found = METHODS.get(str(card.metadata.get("kind")), METHODS["sid-generator"] if card.steps else [])
    found = [*found, *(named if isinstance(named, list) else []), DESIGN.get(type(card.net).__name__)]
    entries = []
    for number in dict.fromkeys(paper for paper in found if isinstance(paper, str) and paper in PAPERS):
        authors, title, year = PAPERS[number]
        key = f"{authors.partition(',')[0].lower()}{year}_{number.replace('.', '_')}"
        lines = (f"  title={{{title}}},", f"  author={{{authors}}},", f"  year={{{year}}},", f"  eprint={{{number}}},")
        entries.append("\n".join([f"@misc{{{key},", *lines, "  archivePrefix={arXiv}", "}"]))
    return "```bibtex\n" + "\n".join(entries) + "\n```" if entries else "No papers are recorded for it."
