"""The page of a run, `index.html` in its folder: one file that needs neither a network nor this library.

Nothing in the folder can break the page or put a script into it (`markup`).
"""

import math
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from dnnlib import UserError, write_atomically
from dnnlib.errors import printable
from edm.published import FILES
from torch_utils.records import is_figure, measured_value

from ..monitor.clusters import shares
from ..monitor.records import returns_text
from ..objectives import OBJECTIVES
from . import commands, sections
from .curves import charts
from .embedded import (
    CLUSTERS_PICTURE,
    COMPARISON_PICTURE,
    GRID_COLUMNS,
    NEAREST_PICTURE,
    PROMPTS_PICTURE,
    TEACHER_PICTURE,
    PictureCache,
)
from .markup import code, document, escaped, section, table
from .run_record import RunRecord, read_run
from .training_page import training_page

PAGE_FILE = "index.html"
GOOD = ("healthy", "converged")  # findings that name no problem; frozen, too-early and unknown name none either
NEUTRAL = ("frozen", "too-early", "unknown")


BANDS = [  # (picture, caption, alternative text)
    (
        NEAREST_PICTURE,
        "The last snapshot's images and the teacher's samples nearest to them",
        "Images of the generator, and below the teacher's sample that is nearest to each",
    ),
    (
        COMPARISON_PICTURE,
        "Teacher and generator, made by sid.report",
        "Bands of images of equal seeds: the teacher at many evaluations, at the generator's, and the generator",
    ),
]


class RunPage:
    """Keeps the page of a run up to date while open, and finishes it at the end, however the run ends.

    Process 0 writes it; others do nothing. A page that can't be written costs a warning and nothing else.
    """

    def __init__(self, run_dir: Path, is_writer: bool = True):
        self.run_dir, self._is_writer, self._pictures = run_dir, is_writer, PictureCache(run_dir)

    def __enter__(self) -> "RunPage":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.write(is_running=False)

    def write(self, is_running: bool = True) -> None:
        """Writes the page as of now."""
        if not self._is_writer:
            return
        try:
            write_page(self.run_dir, is_running, self._pictures)
        except Exception as error:  # of any kind: the run is worth more than its page
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            print(f"Warning: writing {PAGE_FILE} failed ({printable(reason)}); the run goes on", flush=True)


def write_page(run_dir: Path, is_running: bool | None = None, pictures: PictureCache | None = None) -> Path:
    """Writes the page into the run's folder and returns its path.

    is_running: as for `read_run`. pictures: what an earlier call has read. Errors: OSError when it can't be written.
    """
    path = run_dir / PAGE_FILE
    content = page(read_run(run_dir, is_running), pictures or PictureCache(run_dir))
    if path.is_dir():
        raise UserError(f"{path}: is a folder, so the page can't be written; remove it")
    with write_atomically(path) as file:
        file.write(content.encode("utf-8", "backslashreplace"))
    return path


def page(record: RunRecord, pictures: PictureCache) -> str:
    """The HTML of a run's page."""
    if record.is_training:
        return training_page(record, pictures)
    shown = charts(record)
    parts = [
        _findings(record),
        _trials(record),
        _pictures(record, pictures),
        sections.curves(shown, "generated images"),
        _clusters(record, pictures),
        _classes(record),
        _options(record),
        sections.environment(record),
        _continuing(record),
        _using(record),
    ]
    title = f"{teacher_name(record)}: {record.state}"
    body = "\n".join(filter(None, parts))
    return document(title, _header(record) + sections.contents(body) + body, {"charts": [c.plain() for c in shown]})


def teacher_name(record: RunRecord) -> str:
    """A short name of the run's teacher."""
    source = record.options.get("edm_model")
    if not isinstance(source, str) or not source:
        return "Unknown teacher"
    path = Path(source)
    if source not in FILES and path.stem.startswith(("network-snapshot", "teacher", "best")):
        return printable(path.parent.name or path.name)
    return printable(path.name)


# --- the sections


def _header(record: RunRecord) -> str:
    return sections.header(record, f"{teacher_name(record)}, distilled", _method(record.options), _latest(record))


def _latest(record: RunRecord) -> list[str]:
    """The last measurements, for the header."""
    found = []
    if record.distances:
        last = record.distances[-1]
        found.append(f"distance {last['value']:.3g}")
        if "features" in last:
            found.append(f"features {last['features']:.3g} (teacher 1)")
    if (fid := record.fid) is not None:
        beside = "" if fid.teacher is None else f" (teacher {fid.teacher:.4g})"
        found.append(f"{fid.name} {fid.last:.4g}{beside}")
    return found


def _method(options: dict[str, Any]) -> str:
    """The method in a few words; what a damaged record lacks is left out."""
    objective, steps = options.get("objective"), options.get("steps", 1)
    parts = [objective if isinstance(objective, str) and objective in OBJECTIVES else "unknown objective"]
    if is_figure(options.get("alpha")) and (objective == "sid" or str(objective).endswith("-l1")):
        parts.append(f"alpha {options['alpha']:g}")
    if options.get("guidance"):
        parts.append(f"guidance {commands.value_text('guidance', options['guidance'])}")
    count = f"{steps:g} steps" if is_figure(steps) and steps != 1 else "one step"
    parts.append(f"{count} from sigma {options['init_sigma']:g}" if is_figure(options.get("init_sigma")) else count)
    parts.append("with an adversarial loss from real images" if options.get("gan") is True else "without data")
    if is_figure(options.get("batch")):
        parts.append(f"{options['batch']:g} images a batch")
    return ", ".join(parts)


def _findings(record: RunRecord) -> str:
    items = []
    for finding in record.findings():
        kind = "good" if finding.name in GOOD else "neutral" if finding.name in NEUTRAL else "problem"
        text = finding.text[:1].upper() + finding.text[1:]
        items.append(f'<li class="{kind}"><strong>{escaped(finding.name)}</strong> {escaped(printable(text))}</li>')
    for name, text in (("returns", returns_text(record.returns)), ("FID", record.fid)):
        if text is not None:
            items.append(f'<li class="neutral"><strong>{name}</strong> {escaped(printable(str(text)))}</li>')
    return section("findings", "Findings", f'<ul class="findings">{"".join(items)}</ul>')


def _trials(record: RunRecord) -> str:
    if not record.trials:
        begun = (record.run_dir / "trials").is_dir() and not record.ticks
        content = "<p>Trials are under way; the curves begin after them.</p>" if begun else ""
        return section("trials", "Trials", content)
    rows = [
        (
            printable(name),
            *(commands.value_text(key, result.get(key)) for key in ("lr", "glr", "kimg")),
            _figure(result.get("distance")),
            _figure(result.get("features")) if "features" in result else "",
            "goes on" if result.get("best") is True else "",
        )
        for name, result in record.trials.items()
    ]
    headings = ("Trial", "--lr", "--glr", "kimg", "distance from the teacher", "features", "")
    return section("trials", "Trials", table(headings, rows, "Trials"))


def _figure(value: Any) -> str:
    return f"{value:.3g}" if is_figure(value) else "diverged" if value == math.inf else "?"


def _pictures(record: RunRecord, pictures: PictureCache) -> str:
    teacher = pictures.picture(TEACHER_PICTURE, GRID_COLUMNS)
    beside = ""
    if teacher is not None:
        image = sections.image(teacher, "Images of the teacher, of the same seeds as the generator's")
        beside = f"<figure>{image}<figcaption>Teacher, many evaluations per image, same seeds</figcaption></figure>"
    bands = "".join(
        f'<figure class="natural">{sections.image(picture, alt)}<figcaption>{caption}</figcaption></figure>'
        for name, caption, alt in BANDS
        if (picture := pictures.picture(name)) is not None
    )
    below = _prompts(record, pictures) + bands
    return sections.pictures(pictures.frames(), _by_kimg(record), "the generator", beside, below)


def _prompts(record: RunRecord, pictures: PictureCache) -> str:
    """The last snapshot's first images with their prompts."""
    picture = pictures.picture(PROMPTS_PICTURE)
    if picture is None or not record.prompts:
        return ""
    image = sections.image(
        picture, "Images of the prompts below, from left to right: the teacher's and the generator's"
    )
    items = "".join(f"<li>{escaped(printable(prompt))}</li>" for prompt in record.prompts)
    caption = f"The last snapshot's images of these prompts, from left to right<ol>{items}</ol>"
    return f'<figure class="natural">{image}<figcaption>{caption}</figcaption></figure>'


def _by_kimg(record: RunRecord) -> dict[str, dict[float, float]]:
    """{name: {kimg: value}} of what was measured of the snapshots."""
    found = {"distance": {line["kimg"]: line["value"] for line in record.distances}}
    if (fid := record.fid) is not None:
        found[fid.name] = {line["kimg"]: line["value"] for line in fid.records}
    return found


def _clusters(record: RunRecord, pictures: PictureCache) -> str:
    """How much of the last snapshot's images each kind of the teacher's images has, and what the worst look like."""
    found = shares(record.distances[-1].get("clusters")) if record.distances else []
    if not found:
        return ""
    rows = [(s.cluster, f"{s.teacher:.1%}", f"{s.generator:.1%}", "lost" if s.is_lost else "") for s in found]
    headings = ("Cluster", "of the teacher's images", "of the generator's", "")
    shown = table(headings, rows, "Kinds of images")
    note = (
        "Clusters of the teacher's samples that look alike, those that the generator lacks most surely first. Shares"
        " of so few images differ by chance; a cluster is lost when chance can't explain what is missing."
    )
    picture = pictures.picture(CLUSTERS_PICTURE)
    if picture is not None:
        image = sections.image(picture, "Images of the teacher and of the generator in three clusters")
        caption = "The first three: images of the teacher, and below them the generator's that come nearest"
        shown += f'<figure class="natural">{image}<figcaption>{caption}</figcaption></figure>'
    return section("clusters", "Kinds of images", f'<p class="quiet">{note}</p><div class="pair">{shown}</div>')


def _classes(record: RunRecord) -> str:
    """Which classes were the worst in the last third of the run, and how often."""
    late = [tick for tick in record.ticks if tick["Progress/kimg"] > record.kimg * 2 / 3]
    late = [tick for tick in late if "Health/worst_class" in tick]
    counts = Counter(tick["Health/worst_class"] for tick in late)
    rows = []
    for number, count in counts.most_common(10):
        ratios = [t.get("Health/worst_class_divergence", math.nan) for t in late if t["Health/worst_class"] == number]
        rows.append((f"{number:g}", f"{count} of {len(late)}", f"{max(ratios):.3g}"))
    headings = ("Class", "worst in how many measurements", "its divergence over the median class's, at most")
    return section("classes", "Worst classes", table(headings, rows, "Worst classes in the last third"))


def _options(record: RunRecord) -> str:
    recipe, rows = commands.recipe_of(record.options), commands.changed_options(record.options)
    return sections.options(rows, None if recipe is None else f"--recipe={recipe}")


def _continuing(record: RunRecord) -> str:
    sentence, command = commands.continuing(record)
    shown = "" if command is None else code(command, "Command that continues the run")
    return section("continue", "Continue the run", f"<p>{escaped(sentence)}</p>{shown}")


def _using(record: RunRecord) -> str:
    lines, command = commands.using(record.run_dir)
    content = f"<p>In Python:</p>{code(lines, 'Use in Python')}<p>On the command line:</p>{code(command, 'Command')}"
    best = ""
    if record.fid is not None and len(trained := [r for r in record.fid.records if r["kimg"] > 0]) > 1:
        lowest = min(trained, key=measured_value)
        best = f"<p>The folder stands for its best snapshot, of {lowest['kimg']:g} kimg.</p>"
    return section("use", "Use the generator", content + best)
