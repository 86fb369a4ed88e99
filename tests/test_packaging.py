"""The wheel: its contents, and its commands far from a checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import forked
import pytest

import sid
from dnnlib import Command

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["dnnlib", "torch_utils", "training", "edm", "sid"]
FILES = ["pyproject.toml", "README.md", "LICENSE", "NOTICE", "sid_train.py", "fid.py"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what `pip install` puts into site-packages, with none of the checkout's files in reach."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in [*PACKAGES, "assets"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(site)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    wheel.unlink()
    shutil.rmtree(source)
    return site


def run(installed, folder, *command):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def test_it_holds_every_module_and_the_demo(installed):
    modules = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    modules |= {Path("sid_train.py"), Path("fid.py")}
    for folder in (ROOT / "sid" / "report" / "static", ROOT / "edm" / "site" / "static"):
        modules |= {path.relative_to(ROOT) for path in folder.iterdir()}
    assert {path for path in modules if not (installed / path).is_file()} == set()
    for name in ("teacher.safetensors", "reference.npz", "detector.safetensors"):
        path = Path("assets", "fashion-mnist-16", name)
        assert (installed / "sid" / path).read_bytes() == (ROOT / path).read_bytes()


def test_the_version_is_written_once(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.version == sid.__version__


def test_the_citation_names_this_version():
    assert f"version: {sid.__version__}" in (ROOT / "CITATION.cff").read_text().splitlines()


def test_every_command_is_a_command_of_this_project(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    scripts = {entry.name: entry.load() for entry in distribution.entry_points.select(group="console_scripts")}
    assert {"sid-train", "sid-fid", "sid-doctor", "sid-report", "sid-sweep", "sid-bench", "edm-zoo"} <= scripts.keys()
    assert all(isinstance(command, Command) for command in scripts.values())  # one line per error


def test_the_demo_trains_in_an_empty_folder(installed, tmp_path):
    """By the command that a sweep would run; then the report summarises it."""
    settings = '[common]\nrecipe = "demo"\nduration = 3e-5\nmetrics = "fid100"\n[settings.plain]\n'
    (tmp_path / "one.toml").write_text(settings)
    shown = run(installed, tmp_path, "-m", "sid.sweep", "one.toml", "-n")
    assert shown.returncode == 0, shown.stderr
    _, found, options = shown.stdout.partition(" -m sid_train ")
    assert found
    printed = forked.run(["-m", "sid_train", *options.split()], tmp_path, modules=installed)
    assert str(installed / "sid" / "assets") in printed
    (folder,) = [option.removeprefix("--outdir=") for option in options.split() if option.startswith("--outdir=")]
    assert "generator after" in forked.run(["-m", "sid.report", folder], tmp_path, modules=installed)
    assert (tmp_path / folder / "comparison.png").is_file()
    page = (tmp_path / folder / "index.html").read_text()
    assert "made by sid.report" in page  # the comparison
    assert "uPlot=function" in page
