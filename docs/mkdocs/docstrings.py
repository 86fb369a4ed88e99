"""An extension of Griffe: docstrings in this project's style become Markdown.

Arguments stand in lines such as `name: text` or `name   text`, with further lines indented or not. They become a list,
and what follows `Errors:` becomes a paragraph.
"""

import re
from typing import Any

from griffe import Extension

ITEM = re.compile(r"(\w+(?:, \w+)*)(?::\s+|\s{2,})(\S.*)")


def to_markdown(docstring: str) -> str:
    lines: list[str] = []
    in_item = False
    for line in docstring.splitlines():
        item = ITEM.fullmatch(line)
        if item:
            is_argument = item[1] != "Errors"
            lines += [] if in_item and is_argument else [""]
            lines.append(f"{'- ' * is_argument}**{item[1]}**: {item[2]}")
        else:
            lines.append(f"  {line.strip()}" if in_item and line.strip() else line)
        in_item = bool(item) or (in_item and bool(line.strip()))
    return "\n".join(lines)


class Docstrings(Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
