"""The notebook is clean, and its cells run, at tiny length."""

import json
import sys
import types
from pathlib import Path

import PIL.Image
import pytest

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
