"""Named ways to run the same training step. It doesn't import torch, for the command line's sake."""

import dataclasses
from typing import Any, get_args

from dnnlib import UserError
from sid.config import DistillationConfig

PUBLISHED = "published"  # sid/bench/published_step.py, what the others are compared with
FIELDS = {field.name: field.type for field in dataclasses.fields(DistillationConfig)}

# Settings of DistillationConfig by a short name. `--modes` joins these and any setting by +: bf16+compile+chunk=4.
MODES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "share": {"share_images": True},
}
# These change how a step is computed but not its operations; for other settings operations are counted again.
TECHNICAL = {"precision", "compile", "channels_last", "chunk", "checkpoint", "use_fp16", "batch", "batch_gpu"}


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to run the step. name: as the user wrote it. overrides: settings of DistillationConfig."""

    name: str
    overrides: dict[str, Any]

    @property
    def published(self) -> bool:
        return self.name == PUBLISHED

    def mathematics(self) -> dict[str, Any]:
        """The overrides that change the number of operations a step needs."""
        return {name: value for name, value in self.overrides.items() if name not in TECHNICAL}


def parse_modes(text: str) -> list[Mode]:
    """Modes from `published,fp32,bf16+compile+chunk=4`. Errors: UserError naming the part that isn't understood."""
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < len(names):
        raise UserError(f"--modes={text}: a mode is named twice; name each once")
    return [parse_mode(name) for name in names]


def parse_mode(name: str) -> Mode:
    """`published`, or names of MODES and settings of DistillationConfig joined by `+`."""
    overrides: dict[str, Any] = {}
    for part in [] if name == PUBLISHED else name.split("+"):
        overrides |= MODES[part] if part in MODES else _setting(name, part)
    return Mode(name, overrides)


def _setting(mode: str, part: str) -> dict[str, Any]:
    """{field: value} of `field=value`; a switch is on without a value."""
    field, _, text = part.partition("=")
    field = field.replace("-", "_")
    if field == "gan":
        raise UserError(f"--modes: {mode!r}: real images, which gan needs, aren't part of the benchmark; leave it out")
    if field not in FIELDS:
        known = ", ".join([PUBLISHED, *MODES])
        raise UserError(
            f"--modes: {part!r} in {mode!r} is neither a mode ({known}) nor a setting of DistillationConfig"
        )
    kinds = get_args(FIELDS[field]) or (FIELDS[field],)
    text = text or ("1" if bool in kinds else "")
    for kind in kinds:
        if kind is type(None) and text == "none":
            return {field: None}
        if kind is bool and text in ("0", "1"):
            return {field: text == "1"}
        if kind in (int, float, str) and text:
            try:
                return {field: kind(text)}
            except ValueError:
                continue
    raise UserError(f"--modes: {part!r} in {mode!r} is no value of {field}; write for instance chunk=4 or compile")
