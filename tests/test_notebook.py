"""The notebook is clean, installs what it needs wherever it is opened, and its cells run, at tiny length."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from urllib.parse import quote

import PIL.Image
import pytest
from browser import served

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_a_clean_notebook():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.fixture
def installs(monkeypatch):
    """Runs the first cell where the package is missing, and returns what it installs."""
    commands = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))

    def run():
        (source,) = ("".join(cell["source"]) for cell in cells() if cell["id"] == "install")
        exec(source, {})
        ((*pip, what),) = commands
        assert pip == [sys.executable, "-m", "pip", "install", "--quiet"]
        return what

    return run


def test_in_a_clone_it_installs_the_clone(installs, monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    assert (Path(installs()).resolve() / "pyproject.toml").samefile(NOTEBOOK.parents[1] / "pyproject.toml")


@pytest.mark.parametrize("safe", ["", "/"])
def test_on_colab_it_installs_the_repository_it_was_opened_from(tmp_path, installs, monkeypatch, safe):
    address = "https://github.com/owner/a.name/blob/v1/examples/quickstart.ipynb"
    (tmp_path / "api").mkdir()
    sessions = [{"name": "quickstart.ipynb", "path": f"fileId={quote(address, safe=safe)}"}]
    (tmp_path / "api" / "sessions").write_text(json.dumps(sessions))
    monkeypatch.chdir(tmp_path)
    with served(tmp_path) as server:
        host, port = server.removeprefix("http://").rstrip("/").split(":")
        monkeypatch.setenv("COLAB_JUPYTER_IP", host)
        monkeypatch.setenv("KMP_TARGET_PORT", port)
        assert installs() == "git+https://github.com/owner/a.name@v1"


def test_elsewhere_it_asks_for_the_repository(tmp_path, installs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLAB_JUPYTER_IP", raising=False)
    with pytest.raises(SystemExit, match=r"^Set REPOSITORY to the repository's address"):
        installs()


@pytest.mark.slow
def test_its_cells_run(tmp_path, monkeypatch, capfd):
    shown = []
    display = types.SimpleNamespace(Image=lambda filename: filename, display=lambda *images: shown.extend(images))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in cells():
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            if cell["id"] == "distil":
                assert "KIMG = 2.5 " in source
                assert '"fid5k"' in source
                source = source.replace("KIMG = 2.5 ", "KIMG = 0.16 ").replace('"fid5k"', '"fid200"')
            exec(compile(source, cell["id"], "exec"), names)
    assert [Path(name).name for name in shown] == ["comparison.png", "samples.png", "sneakers.png"]
    assert all(PIL.Image.open(name).width > 100 for name in shown)
    measured = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith('{"metric"')]
    assert [record["network"] for record in measured] == [names["first"].name, names["last"].name]
    assert names["first"].name < names["last"].name == "network-snapshot-000000.160.safetensors"  # the longest
