"""Damaged records, and paths that aren't run folders: the doctor and the report say so in one line, at once."""

import json
import os
import time

import pytest
from click.testing import CliRunner
from tiny import tiny_teacher

from edm import zoo
from edm.snapshot_metrics import read_metrics
from sid import doctor
from sid.config import DistillationConfig
from sid.monitor import records
from sid.report import __main__ as report
from sid.report import pictures
from torch_utils import run_folder

HUGE = "1" + "0" * 4000
STATS = [{"Progress/kimg": k, "Progress/tick": k, "Health/divergence": 1.0 / k} for k in range(1, 15)]
METRIC = [{"kimg": k, "value": 9.0 - k, "values": {"fid": 9.0 - k}, "detector_sha256": "d"} for k in (0, 1)]


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    zoo.save_network(tiny_teacher(), path)
    return path


@pytest.fixture
def run(tmp_path, teacher, monkeypatch):
    """A sound run folder; pictures take no time."""
    monkeypatch.setattr(pictures, "compare", lambda _teacher, _generator, path, *_: path.write_bytes(b"picture"))
    folder = tmp_path / "run"
    folder.mkdir()
    options = {**DistillationConfig().options(), "edm_model": str(teacher), "transfer": None}
    (folder / "training_options.json").write_text(json.dumps(options))
    (folder / "stats.jsonl").write_text(lines(STATS))
    (folder / "metric-fid8.jsonl").write_text(lines(METRIC))
    zoo.save_network(tiny_teacher(), folder / "network-snapshot-000001.safetensors", init_sigma=2.5)
    return folder


def said(command, folder):
    """The one line that refuses `folder`."""
    start = time.monotonic()
    result = CliRunner().invoke(command, [str(folder)])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.output.count("\n") == 1
    assert result.output.startswith("Error: ")
    assert str(folder) in result.output
    assert time.monotonic() - start < 10
    return result.output


def changed(name, value):
    return lambda text: json.dumps({**json.loads(text), name: value})


def without(name):
    return lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != name})


OF_OPTIONS = {
    "null": "null",
    "a list": "[1, 2]",
    "a text": '"x"',
    "empty": "",
    "half": '{"objective": "sid", ',
    "deep": "[" * 100_000,
    "no text": b"\xff\xfe",
}
OF_NUMBERS = {
    "a text for a number": changed("glr", "x"),
    "nothing for a number": changed("glr", None),
    "a list for a number": changed("glr", [1]),
    "true for a number": changed("glr", True),
    "not a number": changed("glr", float("nan")),
    "infinity": changed("ema_halflife_kimg", float("inf")),
    "a huge number": changed("batch", int(HUGE)),
    "no batch": changed("batch", 0),
    "a number for a text": changed("objective", 3),
    "a text for yes or no": changed("gan", "no"),
    "a missing one": without("objective"),
}
OF_LINES = {
    "null": "null",
    "a text": '"x"',
    "a list": "[1]",
    "half": '{"Progress/kimg": 1',
    "a text for a number": '{"Progress/kimg": "1", "kimg": "1", "value": 1}',
    "not a number": '{"Progress/kimg": NaN, "kimg": NaN, "value": 1}',
    "negative": '{"Progress/kimg": -1, "kimg": -1, "value": 1}',
    "a huge number": f'{{"Progress/kimg": {HUGE}, "kimg": {HUGE}, "value": 1}}',
    "too many digits": f'{{"Progress/kimg": {HUGE * 2}, "kimg": {HUGE * 2}, "value": 1}}',
    "true": '{"Progress/kimg": true, "kimg": true, "value": true}',
    "missing": "{}",
    "deep": "[" * 100_000,
    "zeros": "\0\0\0",
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("command", "damage"), [*((doctor.main, damage) for damage in OF_OPTIONS), (report.main, "half")]
)
def test_damaged_options(run, command, damage):
    write(run / "training_options.json", OF_OPTIONS[damage])
    assert "training_options.json" in said(command, run)


@pytest.mark.parametrize("damage", OF_NUMBERS)
def test_damaged_numbers(run, damage):
    path = run / "training_options.json"
    path.write_text(OF_NUMBERS[damage](path.read_text()))
    assert "training_options.json: its " in said(doctor.main, run)


@pytest.mark.parametrize(
    ("command", "name", "damage"),
    [
        *((doctor.main, name, damage) for name in ("stats", "metric-fid8") for damage in OF_LINES),
        (report.main, "metric-fid8", "half"),
    ],
)
def test_damaged_lines(run, command, name, damage):
    path = run / f"{name}.jsonl"
    write(path, path.read_text() + OF_LINES[damage] + "\n")
    number = len(path.read_text().split("\n")) - 1
    assert f"{name}.jsonl: line {number} is damaged" in said(command, run)


@pytest.mark.parametrize("value", ['"x"', "null", "[1]", "NaN", "1e999", HUGE, "true"])
def test_damaged_figures(run, value):
    write(run / "stats.jsonl", lines(STATS) + f'{{"Progress/kimg": 15, "Health/divergence": {value}}}\n')
    assert "stats.jsonl: line 15: its Health/divergence is not a number" in said(doctor.main, run)


def test_figures_that_no_run_has(run):
    """No training leaves a zero there, and the doctor divides by it."""
    odd = [{**record, "Health/fake_score_ratio": float(record["Progress/kimg"] < 10)} for record in STATS]
    write(run / "stats.jsonl", lines({**record, "Health/divergence": 1.0} for record in odd))
    assert "no distillation has such figures" in said(doctor.main, run)


@pytest.mark.parametrize("command", [doctor.main, report.main], ids=["doctor", "report"])
def test_half_a_last_line_is_left_out(run, command):
    for name in ("stats.jsonl", "metric-fid8.jsonl"):
        write(run / name, (run / name).read_text() + '{"Progress/kimg": 15, "Hea')
    result = CliRunner().invoke(command, [str(run)])
    assert result.exit_code == 0, result.output
    assert "8" in result.output


def test_a_metric_that_is_not_a_number_is_no_best_one(run):
    write(
        run / "metric-fid8.jsonl",
        lines([{"kimg": 0, "value": float("nan")}, *METRIC, {"kimg": 2, "value": float("nan")}]),
    )
    result = CliRunner().invoke(doctor.main, [str(run)])
    assert "fid8: best 8 at 1 kimg, last nan at 2 kimg" in result.output


def test_a_run_goes_on_over_damaged_records(run):
    write(
        run / "metric-fid8.jsonl", b"null\n{}\n[]\n\xff\n" + lines(METRIC).encode() + b'{"kimg": 1, "value": "x"}\n{"ki'
    )
    assert read_metrics(run, "fid8") == METRIC


def test_a_run_goes_on_over_records_that_can_not_be_read(run):
    (run / "metric-fid8.jsonl").unlink()
    assert read_metrics(run, "fid8") == []
    (run / "metric-fid8.jsonl").mkdir()
    assert read_metrics(run, "fid8") == []


@pytest.mark.parametrize("command", [doctor.main, report.main], ids=["doctor", "report"])
def test_what_is_no_run_folder(run, tmp_path, command):
    (tmp_path / "empty").mkdir()
    assert "has no training_options.json" in said(command, tmp_path / "empty")
    assert "is not a folder" in said(command, run / "stats.jsonl")
    os.mkfifo(tmp_path / "pipe")
    assert "is not a folder" in said(command, tmp_path / "pipe")


def test_the_doctor_refuses_a_training(run):
    (run / "training_options.json").write_text(json.dumps({"network": {"class_name": "EDMPrecond"}, "batch": 4}))
    assert "is a run of edm.train" in said(doctor.main, run)


@pytest.mark.parametrize(
    ("command", "name", "kind"),
    [
        (doctor.main, "training_options.json", "pipe"),
        (doctor.main, "training_options.json", "link to a device"),
        (doctor.main, "training_options.json", "folder"),
        (doctor.main, "stats.jsonl", "pipe"),
        (doctor.main, "metric-fid8.jsonl", "pipe"),
        (report.main, "training_options.json", "pipe"),
        (report.main, "metric-fid8.jsonl", "pipe"),
    ],
)
def test_files_that_are_no_records(run, command, name, kind):
    (run / name).unlink()
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "folder":
        (run / name).mkdir()
    else:
        (run / name).symlink_to("/dev/zero")
    assert f"{name}: is not a plain file" in said(command, run)


@pytest.mark.parametrize("name", ["stats.jsonl", "log.txt", "training_options.json", "metric-fid8.jsonl"])
def test_no_run_begins_where_it_can_not_write(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with (
        pytest.raises(run_folder.UserError, match=f"{name}: is not a plain file"),
        run_folder.create(str(tmp_path), "", True, {}, None),
    ):
        pass


def test_no_run_begins_on_a_read_only_disk(tmp_path, monkeypatch):
    def refuse(folder):
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr(run_folder, "locked_folder", refuse)
    with (
        pytest.raises(run_folder.UserError, match=r"can't write to .*Read-only file system.*another folder"),
        run_folder.create(str(tmp_path), "", True, {}, None),
    ):
        pass


def test_a_picture_that_can_not_be_written_costs_no_table(run, monkeypatch):
    def refuse(_teacher, _generator, path, *_):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(pictures, "compare", refuse)
    result = CliRunner().invoke(report.main, [str(run)])
    assert result.exit_code == 0, result.output
    assert "generator after" in result.output
    assert "can't be written (Read-only file system)" in result.output


def test_the_name_of_the_options_file():
    assert records.OPTIONS_FILE == run_folder.OPTIONS_FILE
