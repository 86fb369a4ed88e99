"""How the captions of a data set are built, for metrics that look for one part of a caption in its image.

A file captions.json next to the file of prompts describes them:

    {
      "template": "{name} on {ground} ground, {place}",
      "names": ["a red apple", "an octopus"],
      "grounds": {"a blue": [50, 90, 200], "an orange": [240, 150, 40]}
    }
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dnnlib
from torch_utils.untrusted.bounds import read_json

CAPTIONS_FILE = "captions.json"
MAX_BYTES, MAX_VALUES = 1 << 20, 10_000
SLOT = re.compile(r"\{([a-z]+)\}")


@dataclass(frozen=True)
class CaptionTemplate:
    """A template of captions, and what may stand in its slots.

    template: a caption with slots, such as "{name} on {ground} ground, {place}"; between two of them stands some text
    names:    the texts for the slot {name}; captions may have others
    grounds:  the texts for the slot {ground}, and the colours that they mean: red, green and blue from 0 to 255
    Errors: ValueError when they aren't such values.
    """

    template: str
    names: Sequence[str] = ()
    grounds: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.names, str):
            raise ValueError("names are several texts")
        literals, slots = self._split()
        if not slots or len(set(slots)) < len(slots) or not all(literals[1:-1]):
            raise ValueError("the template needs slots in braces, each once, and text between them")
        if len(set(self.names)) < len(self.names) or not all(type(name) is str and name for name in self.names):
            raise ValueError("names are different texts")
        for colour in self.grounds.values():
            if len(colour) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in colour):
                raise ValueError("the colour of a ground is red, green and blue, whole numbers from 0 to 255")
        for slot, values in (("name", self.names), ("ground", self.grounds)):
            if values and slot not in slots:
                raise ValueError(f"it lists {slot}s, and the template has no {{{slot}}}")

    def caption(self, parts: Mapping[str, str]) -> str:
        """The caption with these texts in the slots."""
        return SLOT.sub(lambda slot: parts[slot[1]], self.template)

    def parts(self, caption: str) -> dict[str, str]:
        """{slot: its text} of a caption; of several ways to read it, that with the longest first text.

        Errors: UserError when it isn't built like the template.
        """
        (start, *between, end), slots = self._split()
        rest, found = caption[: len(caption) - len(end)], {}
        for slot, literal in zip(slots[:0:-1], reversed(between)):
            rest, _, found[slot] = rest.rpartition(literal)
        found[slots[0]] = rest.removeprefix(start)
        if not all(found.values()) or self.caption(found) != caption:
            raise dnnlib.UserError(
                f"--metrics: {caption[:80]!r} isn't like {self.template[:80]!r}, the template in {CAPTIONS_FILE}"
            )
        return found

    def record(self) -> dict[str, Any]:
        """What the file says, as plain values."""
        grounds = {ground: list(colour) for ground, colour in self.grounds.items()}
        return {"template": self.template, "names": list(self.names), "grounds": grounds}

    def _split(self) -> tuple[list[str], list[str]]:
        """(the texts around the slots, one more than there are slots; the slots) of the template."""
        pieces = SLOT.split(self.template)
        return pieces[::2], pieces[1::2]


def template_beside(prompts: str | Path) -> CaptionTemplate:
    """How the prompts of a file are built, by captions.json next to it. Errors: as for `read_template`."""
    return read_template(dnnlib.user_path(str(prompts)).with_name(CAPTIONS_FILE))


def read_template(path: Path) -> CaptionTemplate:
    """What a captions.json says. Errors: UserError when it is missing or damaged."""
    if not path.is_file():
        raise dnnlib.UserError(
            f"--metrics: {path} is missing, which describes how the prompts are built (docs/teachers.md); write it, or"
            " leave out the metrics of names and grounds"
        )
    try:
        return CaptionTemplate(**read_json(path, MAX_BYTES, MAX_VALUES))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise dnnlib.UserError(f"{path}: doesn't describe how prompts are built ({reason}): docs/teachers.md") from None
