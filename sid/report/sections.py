"""The sections that the pages of all runs have: head, pictures over time, curves, environment."""

import re
import time
from collections.abc import Mapping, Sequence

from dnnlib import format_number, format_time
from dnnlib.errors import printable
from torch_utils.records import is_figure

from .. import __version__
from .commands import typed_text
from .curves import Chart
from .embedded import Embedded, Frame
from .markup import escaped, section, table
from .run_record import RunRecord


def header(record: RunRecord, heading: str, about: str, latest: Sequence[str]) -> str:
    """The head of a page. about: a line below the heading. latest: what was measured last, in words."""
    total = record.total_kimg
    progress, left = f"{format_number(record.kimg)} kimg", []
    bar = ""
    if total is not None:
        progress += f" of {format_number(total)} ({min(record.kimg / total, 1):.0%})"
        bar = f'<progress max="1" value="{min(record.kimg / total, 1):.4f}" aria-label="How far the run is"></progress>'
        rate = record.ticks[-1].get("Timing/img_per_sec") if record.ticks else None
        if record.state == "running" and rate:
            left = [f"{rate:.3g} img/s, about {format_time(1000 * (total - record.kimg) / rate)} left"]
    if is_figure(taken := record.ticks[-1].get("Timing/total_sec") if record.ticks else None):
        progress += f" in {format_time(taken)}"
    measured = "".join(f" · {escaped(text)}" for text in (*left, *latest))
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return (
        f'<header><p class="path">{escaped(record.run_dir)}</p>'
        f"<h1>{escaped(heading)}</h1>"
        f"<p>{escaped(about)}</p>"
        f'<p class="state"><strong class="badge {record.state}">{record.state}</strong> {escaped(progress)}'
        f'{measured}</p>{bar}<p class="quiet">Written <time datetime="{written}">{written}</time>'
        f" by version {escaped(__version__)}</p></header>"
    )


def contents(body: str) -> str:
    """Links to the sections of a page."""
    found = re.findall(r'<h2 id="([\w-]+)">([^<]+)</h2>', body)
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in found)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def image(picture: Embedded, alt: str) -> str:
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="{picture.uri}" {size} alt="{escaped(alt)}" decoding="async">'


def pictures(
    frames: Sequence[Frame],
    measured: Mapping[str, Mapping[float, float]],
    network: str,
    beside: str = "",
    below: str = "",
) -> str:
    """What a network draws from equal seeds, one picture at a time.

    measured: {name: {kimg: value}}, for the captions. network: what draws, in words. beside, below: figures as HTML.
    """
    figures = "".join(
        f'<figure class="frame" data-label="{escaped(_frame_label(frame, measured))}">'
        f"{image(frame.picture, f'Images of {network} after {frame.kimg:g} kimg, of equal seeds')}"
        f"<figcaption>{escaped(_frame_label(frame, measured))}</figcaption></figure>"
        for frame in frames
    )
    content = f'<div class="pair"><div id="frames">{figures}</div>{beside}</div>' if frames or beside else ""
    return section("pictures", "Pictures over time", content + (below and f'<div class="pair">{below}</div>'))


def _frame_label(frame: Frame, measured: Mapping[str, Mapping[float, float]]) -> str:
    """A picture's kimg and what was measured there. Its name may lack the images beyond a whole kimg."""
    texts = ["before the first update" if frame.kimg == 0 else f"{frame.kimg:g} kimg"]
    for name, values in measured.items():
        near = [kimg for kimg in values if frame.kimg <= kimg < frame.kimg + (1 if frame.kimg % 1 == 0 else 1e-3)]
        if near:
            texts.append(f"{name} {values[min(near)]:.3g}")
    return ", ".join(texts)


def curves(shown: Sequence[Chart], counted: str) -> str:
    """The places of the charts. counted: the images of which a kimg is a thousand."""
    figures = "".join(
        f'<figure class="chart"><figcaption><h3>{escaped(chart.title)}</h3><p>{escaped(chart.note)}</p></figcaption>'
        f'<div class="plot" id="chart-{escaped(chart.name)}" tabindex="0" role="group"'
        f' aria-label="{escaped(_chart_label(chart))}"></div></figure>'
        for chart in shown
    )
    hint = (
        f'<p class="quiet">Over kimg, thousands of {counted}. Point at a curve, or move along it with the arrow'
        " keys, to read its values; drag to zoom in, double-click to zoom out.</p>"
    )
    return section("curves", "Curves", figures and f'{hint}<div class="charts">{figures}</div>')


def _chart_label(chart: Chart) -> str:
    """What a chart shows, in words."""
    texts = []
    for label, column in chart.series.items():
        known = [value for value in column if value is not None]
        texts.append(f"{label} last {known[-1]:.4g}, lowest {min(known):.4g}, highest {max(known):.4g}")
    if chart.goal:
        texts.append(f"{chart.goal[0]} {chart.goal[1]:.4g}")
    return f"{chart.title}, {chart.kimg[0]:g} to {chart.kimg[-1]:g} kimg: {'; '.join(texts)}"


def options(rows: Sequence[tuple[str, ...]], usual: str | None) -> str:
    """Options that differ from the defaults, or from `usual`, a recipe or preset: those first.

    rows: (option, its value, the default, and with `usual` its value).
    """
    headings, note = ["Option", "this run", "default"], ""
    if usual is not None:
        own = [row for row in rows if row[1] != row[3]]
        rows = [*own, *(row for row in rows if row[1] == row[3])]
        headings.append(usual)
        first = f"The first {len(own)} differ" if len(own) > 1 else "The first one differs" if own else "None differs"
        rest = "; the others are its own, which differ from the defaults" if len(own) < len(rows) else ""
        note = f'<p class="quiet">{first} from {escaped(usual)}{rest}.</p>'
    return section("options", "Options that differ", note + table(headings, rows, "Options") if rows else "")


def environment(record: RunRecord) -> str:
    """Versions, device and machine, as the run recorded them."""
    found = record.options.get("environment")
    rows = [] if not isinstance(found, dict) else [(printable(name), typed_text(v)) for name, v in found.items()]
    return section("environment", "Environment", table(("What", "which"), rows, "Environment"))
