"""HTML of self-contained pages: what comes from elsewhere is escaped, and only this package's own scripts run.

A page's Content-Security-Policy admits no scripts and styles but those of this package, by their hashes.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dnnlib.errors import CONTROL

STATIC = Path(__file__).parent / "static"
BASE_STYLE = resources.files("edm") / "site/static/base.css"  # by its path, because importing edm.site loads torch
MAX_ROWS = 60  # of any table


def document(
    title: str, body: str, data: Any, scripts: Sequence[str] = ("curves.js", "page.js"), connect: str = "'none'"
) -> str:
    """A whole page. body: HTML. data: plain values for the scripts. connect: what the page may load, for its policy."""
    licence = f"/*\n{_static('uPlot-LICENSE.txt')}*/\n"
    code = [licence + _static("uPlot.iife.min.js"), *(_static(name) for name in scripts)]
    styles = [_static("uPlot.min.css"), BASE_STYLE.read_text(encoding="utf-8"), _static("page.css")]
    policy = (
        f"default-src 'none'; img-src 'self' data:; connect-src {connect}; base-uri 'none'; form-action 'none';"
        f" style-src {_hashes(styles)}; script-src {_hashes(code)}"
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{escaped(title)}</title>",
            *(f"<style>{style}</style>" for style in styles),
            f"</head><body><main>{body}</main>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            *(f"<script>{script}</script>" for script in code),
            "</body></html>\n",
        ]
    )


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _hashes(texts: Iterable[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _json(data: Any) -> str:
    """JSON that may stand in a script element: it holds no <, so that no text in it ends the element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def escaped(value: object) -> str:
    """Any text for HTML, as an element's content or a quoted attribute's."""
    return html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def section(name: str, title: str, content: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{content}</section>' if content else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], name: str) -> str:
    """A table that scrolls inside its own box; nothing without rows. name: what it shows, for screen readers."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escaped(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows[:MAX_ROWS]
    )
    more = f"<p>{len(rows) - MAX_ROWS} more rows are left out.</p>" if len(rows) > MAX_ROWS else ""
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(name)}">{whole}</div>{more}'


def code(text: str, name: str) -> str:
    return f'<pre class="scroll" tabindex="0" aria-label="{escaped(name)}"><code>{html.escape(text)}</code></pre>'
