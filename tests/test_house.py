"""The house rules that a reader relies on: who imports whom, and what --help loads."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

NUMPY_2 = not numpy.__version__.startswith("1.")  # which loads numpy.random when it is asked for
ROOT = Path(__file__).resolve().parents[1]
FLOORS = ["dnnlib", "torch_utils", "training", "edm", "sid"]  # bottom up; the command lines of the root stand on top
TOP = len(FLOORS)
# Their source goes into snapshots.
EMBEDDED = [f"training/{name}.py" for name in ("networks", "networks_edm2", "unets", "layers", "loss", "augment")]
SOURCES = sorted([*ROOT.glob("*.py"), *(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))])
COMMAND_LINES = sorted(ROOT.glob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Absolute dotted names of all that a file imports, wherever in it: `from a import b` counts as a.b."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_files_import_from_their_own_floor_and_below():
    wrong = []
    for path in SOURCES:
        folder = path.relative_to(ROOT).parts[0]
        floor = FLOORS.index(folder) if folder in FLOORS else TOP
        forbidden = {*FLOORS[floor + 1 :], *(command_line.stem for command_line in COMMAND_LINES)}
        if folder == "dnnlib":
            forbidden |= {"torch", "torchvision", "safetensors", "scipy"}
        if floor < TOP:
            forbidden |= {"runpy"}  # a way around this rule
        wrong += [(name_of(path), name) for name in imports(path) if name.split(".")[0] in forbidden]
    assert len(SOURCES) > 50
    assert not wrong


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_modules_stand_alone(name):
    for imported in imports(ROOT / name):
        parts = imported.split(".")
        allowed = parts[0] in {"torch", "numpy", *sys.stdlib_module_names} or imported == "torch_utils.persistence"
        assert allowed or "/".join(parts[:2]) + ".py" in EMBEDDED, imported


COMMANDS = [
    ["sid_train.py"],
    ["fid.py"],
    *(
        ["-m", name]
        for name in (
            "edm.train",
            "edm.dataset_tool",
            "edm.small_teachers",
            "sid.report",
            "sid.doctor",
            "sid.bench",
            "sid.probe.gradients",
            "sid.probe.pull",
            "sid.sweep",
        )
    ),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_loads_nothing_heavy(command):
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("Usage:")
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "click" in loaded
    assert not loaded & ({"torch", "scipy"} | ({"numpy.random"} if NUMPY_2 else set()))
