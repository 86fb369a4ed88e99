"""Text in other encodings: locales, file names, and files written by editors on Windows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from edm import dataset_tool
from edm.metrics.data_reference import content_hash
from sid.sweep.plan import load_plan

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 in every locale here")
def test_a_locale_without_unicode_is_named(tmp_path):
    """The path exists but the locale can't encode it, which is what the message names."""
    (tmp_path / "bün").mkdir()
    options = [f"--source={tmp_path}/bün", f"--dest={tmp_path}/x.zip"]
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "edm.dataset_tool", *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env={**os.environ, **settings}, cwd=ROOT)
    elsewhere = CliRunner().invoke(dataset_tool.main, options)
    for code, message, said in (
        (done.returncode, done.stderr, "PYTHONUTF8=1"),
        (elsewhere.exit_code, elsewhere.output, "holds no images"),
    ):
        assert code == 2
        assert message.count("\n") == 1
        assert said in message
        assert options[0] in message


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
