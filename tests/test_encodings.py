"""Text in other encodings: locales, file names, and files written by editors on Windows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edm.metrics.data_reference import content_hash
from sid.sweep.plan import load_plan

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("settings", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}])
def test_a_locale_without_unicode_is_named(tmp_path, settings):
    """The path exists but the locale can't encode it, which is what the message names."""
    if settings and sys.platform == "darwin":
        pytest.skip("file names are UTF-8 in every locale here")
    (tmp_path / "bün").mkdir()
    command = [sys.executable, "-m", "edm.dataset_tool", f"--source={tmp_path}/bün", f"--dest={tmp_path}/x.zip"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **settings}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert ("PYTHONUTF8=1" if settings else "holds no images") in done.stderr
    assert f"--source={tmp_path}/bün" in done.stderr


def test_characters_that_the_terminal_lacks_are_printed_as_escapes():
    program = "import click, dnnlib\n@click.command(cls=dnnlib.Command)\ndef main(): print('\\u00fc \\udcff')\nmain()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "\\xfc \\udcff\n")


def test_images_whose_names_are_not_utf8_have_a_hash(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    plain = content_hash(tmp_path)
    try:
        os.link(tmp_path / "0.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    first = content_hash(tmp_path)
    os.rename(os.fsencode(tmp_path) + b"/caf\xe9.png", os.fsencode(tmp_path) + b"/caf\xe8.png")
    assert len({plain, first, content_hash(tmp_path)}) == 3


def test_a_sweep_file_with_a_byte_order_mark(tmp_path):
    text = '[common]\nedm_model = "teacher.pkl"\nmetrics = "fid5k"\ndata_stat = "x.npz"\n[settings.a]\nlr = 1e-5\n'
    for mark in ("", "\ufeff"):
        (tmp_path / "s.toml").write_text(mark + text, encoding="utf-8")
        assert load_plan(str(tmp_path / "s.toml")).settings == ["a"]
