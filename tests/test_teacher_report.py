"""What edm.train shows: percent and time left, pictures, metrics, the next command; and its defaults for short runs."""

import html
import json
import re
import shlex

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import sid_train
from dnnlib import format_count
from edm import train, zoo
from edm.metrics.detector import save_detector
from edm.metrics.small_classifier import SmallClassifier
from edm.snapshot_metrics import read_metrics
from sid.report import __main__ as report

TINY = ["--cbase=4", "--cres=1", "--blocks=1", "--attn=none", "--dropout=0", "--batch=8", "--workers=0", "--device=cpu"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with 24 images of 8x8 pixels and a detector for them, from which programs start."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(24):
        PIL.Image.fromarray(rng.integers(0, 256, [8, 8, 3], dtype=np.uint8)).save(tmp_path / f"images/{i:02d}.png")
    torch.manual_seed(0)
    kwargs = {"img_resolution": 8, "img_channels": 3, "num_classes": 2, "width": 4}
    save_detector(SmallClassifier(**kwargs), tmp_path / "detector.safetensors", kwargs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def run(command, *options):
    result = CliRunner().invoke(command, options)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_training_speaks(work):
    options = ["--data=images", "--outdir=runs", "--duration=0.000064", "--augment=0", *TINY]
    said = run(train.main, *options, "--detector=detector.safetensors", "--metrics=fid8,kid8")
    (folder,) = (work / "runs").iterdir()
    ticks = re.findall(r"kimg +(\d+)% .* img/s +(\S+) left  loss \S+  FID \S+\n?  kid8 \S+$", said, re.MULTILINE)
    assert ticks[-1] == ("100", "0s")
    assert [int(percent) for percent, _ in ticks] == sorted(int(percent) for percent, _ in ticks)
    with PIL.Image.open(folder / "fakes_000000.064.png") as picture:
        assert picture.size == (512, 512)
    for metric in ("fid8", "kid8"):
        records = [json.loads(line) for line in (folder / f"metric-{metric}.jsonl").read_text().splitlines()]
        assert records[-1]["kimg"] == 0.064
        assert len({record["kimg"] for record in records}) == len(records) > 1
    page, following = said.strip().splitlines()[-2:]
    command = shlex.split(following.removeprefix("Next: "))
    run(sid_train.main, *command[1:], "--device=cpu", "--dry-run")
    assert page == f"Page: sid-report {folder.relative_to(work)}"


def test_a_trainings_page_follows_from_its_record(work):
    options = ["--data=images", "--outdir=runs", "--duration=0.000064", "--augment=0", "--lr-decay=linear", *TINY]
    run(train.main, *options)
    (folder,) = (work / "runs").iterdir()
    ticks = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    for tick in ticks:
        assert tick["Rate/lr"] == pytest.approx(1e-3 * (1 - tick["Progress/kimg"] / 0.064), abs=1e-12)
    with PIL.Image.open(folder / "reals.png") as picture:  # all 24 images, enlarged
        first = np.asarray(picture.convert("RGB"))[::8, ::8][:8, :8]
        assert picture.size == (512, 192)
    with PIL.Image.open(work / "images/00.png") as image:
        assert np.array_equal(first, np.asarray(image))
    assert run(report.main, str(folder)) == f"Page:      {folder}/index.html\n"
    text = (folder / "index.html").read_text()
    found = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', text))
    parameters = sum(p.numel() for p in zoo.load_network(folder).parameters())
    assert found["Network"].endswith(f", {format_count(parameters)} parameters")
    assert found["Data"] == "images, 24 images, 3 x 8 x 8, without classes"
    assert found["Passes"] == "2.67 of 2.67"
    assert found["--lr-decay"] == "linear"
    (command,) = re.findall(r"<code>(python -m edm.train .*)</code>", text)
    said = run(train.main, *shlex.split(html.unescape(command))[3:])
    assert "Resumed at 0.064 kimg" in said
    assert "0.128/0.128 kimg 100%" in said


DAMAGE = b'null\n{}\n[]\n"x"\n{"kimg": 0.032}\n{"kimg": "x", "value": 1}\n' + b"[" * 100_000 + b'\n\xff\0\n{"kimg": 0.0'


def test_a_resumed_training_goes_on_over_damaged_metrics(work):
    options = ["--data=images", "--outdir=run", "--nosubdir", "--augment=0", "--snap=1000", *TINY]
    options += ["--detector=detector.safetensors", "--metrics=fid8"]
    run(train.main, *options, "--duration=0.000032")
    path = work / "run/metric-fid8.jsonl"
    (measured,) = path.read_text().splitlines()
    path.write_bytes(b"null\n{}\n" + measured.encode() + b"\n" + DAMAGE)
    said = run(train.main, *options, "--duration=0.000064")  # publishes the state's snapshot again, then its own
    assert "Warning" not in said
    records = read_metrics(work / "run", "fid8")
    assert records[0] == json.loads(measured)
    assert [record["kimg"] for record in records] == [0.032, 0.064]


def test_a_dry_run_shows_the_training_as_it_begins(work):
    options = ["--data=images", "--outdir=run", "--nosubdir", "--duration=0.000064", "--augment=0", *TINY]
    shown = run(train.main, *options, "-n").splitlines()
    assert not (work / "run").exists()
    assert shown.pop() == "Dry run     nothing was started; --dry-run=json shows all options"
    names = ["Network", "Data", "Device", "Batch", "Rate", "Length", "Run folder"]
    assert [line.split("  ")[0] for line in shown if line[0] != " "] == names
    assert run(train.main, *options).splitlines()[: len(shown)] == shown


@pytest.mark.parametrize(
    ("duration", "given", "expected"),
    [
        (200, [], (10_000, 50, 50)),  # as published
        (0.2, [], (10, 5, 10)),
        (0.2, ["--lr-rampup=7", "--tick=20", "--snap=3"], (7, 20, 3)),
    ],
)
def test_defaults_fit_the_duration(work, duration, given, expected):
    said = run(train.main, "--data=images", "--outdir=x", f"--duration={duration}", "--dry-run=json", *TINY, *given)
    options = json.loads(said)
    names = ("lr_rampup_kimg", "kimg_per_tick", "snapshot_ticks")
    assert tuple(options[name] for name in names) == pytest.approx(expected)
