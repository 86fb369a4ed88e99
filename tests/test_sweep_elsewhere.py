"""Sweeps that count what other sweeps finished (--records)."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_sweep import AFTER, pretend, write

from sid.sweep import __main__ as sweep
from sid.sweep import elsewhere, results
from sid.sweep.plan import load_plan


@pytest.fixture
def results_elsewhere(tmp_path):
    """The file AFTER, and a folder with results of it: seed 0 finished, of seed 1 one finished, another begun."""
    path, folder = write(tmp_path, AFTER), tmp_path / "elsewhere"
    plan = load_plan(path)
    for run, kimg in zip(plan.runs, (8, 8, 8, 8, 4)):
        pretend(run, folder / run.name, [(0, 300), (2, 60), (kimg, 50 - run.seed)])
        if run.source:
            options = folder / run.name / "training_options.json"
            options.write_text(json.dumps({**json.loads(options.read_text()), "transfer": f"out/{run.source}/n"}))
    results.write_results(plan, folder)
    return path, folder


def test_what_finished_elsewhere_is_not_run_again(tmp_path, results_elsewhere):
    path, folder = results_elsewhere
    out = tmp_path / "out"
    arguments = [path, f"--outdir={out}", f"--records={folder}"]
    first, *told = CliRunner().invoke(sweep.main, [*arguments, "-n"]).output.splitlines()
    assert first == f"finished, by {folder}: 4 of 6 runs"
    assert [line.split("--outdir=")[1].split()[0] for line in told] == [
        str(out / n) for n in ("two-seed1", "after-seed1")
    ]
    assert not out.exists()
    report = CliRunner().invoke(sweep.main, [*arguments, "--report"])
    assert report.exit_code == 0
    assert (out / "sweep.jsonl").read_text() == (folder / "sweep.jsonl").read_text()  # what was broken off, too
    two = load_plan(path).runs[4]
    pretend(two, out / two.name, [(0, 300), (8, 7)])
    assert CliRunner().invoke(sweep.main, [*arguments, "--report"]).exit_code == 0
    lines = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [r["kimg"] for r in lines if (r["setting"], r["seed"]) == ("two", 1)] == [0, 8]  # made here since


def test_a_report_on_some_settings(tmp_path, results_elsewhere):
    path, folder = results_elsewhere
    arguments = [path, f"--outdir={tmp_path / 'out'}", f"--records={folder}", "--report", "--only=one,after"]
    report = CliRunner().invoke(sweep.main, [*arguments, "--seeds=1"])
    rows = [line.split(" | ")[0] for line in report.output.splitlines() if line.startswith("| ")]
    assert rows == ["| setting", "| ---", "| one", "| after", "| setting", "| ---", "| one"]  # after has no FID yet


def finished_in(path, folder):
    found = elsewhere.runs_elsewhere(load_plan(path), folder)
    return {name for name, run in found.items() if elsewhere.is_finished(run)}


def test_a_run_that_another_starts_from_is_made_here(tmp_path, results_elsewhere):
    """Its network isn't in the results."""
    path, folder = results_elsewhere
    lines = (folder / "sweep.jsonl").read_text().splitlines()
    (folder / "sweep.jsonl").write_text("".join(f"{line}\n" for line in lines if '"after"' not in line))
    runs = load_plan(path).runs
    kept = sweep.without(runs, finished_in(path, folder), tmp_path / "out")
    assert [run.name for run in kept] == ["two-seed0", "after-seed0", "two-seed1", "after-seed1"]
    (tmp_path / "out" / "one-seed0").mkdir(parents=True)  # begun here
    kept = sweep.without(runs, finished_in(path, folder), tmp_path / "out")
    assert kept[0].name == "one-seed0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"glr": 1.0}}, "setting one has glr = 1.0 there, here 1e-05: give the setting another name"),
        ({"options": {"batch": 128}}, "setting one has batch = 128 there, here 256: give the setting another name"),
        ({"options": {"no-such": 1}}, "options that sid_train.py no longer accepts: no-such: not an option"),
        ({"common": None}, "sweep.jsonl: not the results of a sweep"),
        ({"seed": "0"}, "sweep.jsonl: not the results of a sweep; leave it out"),
        ({"metrics": [50]}, "sweep.jsonl: not the results of a sweep"),
        ({"metrics": {"fid8": {"fid": "50"}}}, "sweep.jsonl: not the results of a sweep"),
        (7, "sweep.jsonl: not the results of a sweep"),
        (None, "no results (*.jsonl) of a sweep; name the --outdir of one"),
    ],
)
def test_results_that_do_not_fit_are_refused(tmp_path, results_elsewhere, change, said):
    path, folder = results_elsewhere
    file = folder / "sweep.jsonl"
    first, *rest = file.read_text().splitlines()
    if change is None:
        file.unlink()
    else:
        first = {**json.loads(first), **change} if isinstance(change, dict) else change
        file.write_text("\n".join([json.dumps(first), *rest, ""]))
    result = CliRunner().invoke(sweep.main, [path, f"--outdir={tmp_path / 'out'}", f"--records={folder}"])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert said in result.output
    assert not (tmp_path / "out").exists()


def test_results_by_another_file_with_other_common_options_are_refused(tmp_path, results_elsewhere):
    """Even though the setting is the same."""
    path, folder = results_elsewhere
    text = Path(path).read_text().replace('"t.pkl"', '"other.pkl"')
    other = write(tmp_path, text, "other.toml")
    result = CliRunner().invoke(sweep.main, [other, f"--outdir={tmp_path / 'out'}", f"--records={folder}", "-n"])
    assert result.exit_code == 2
    assert 'setting one has edm_model = "t.pkl" there, here "other.pkl"' in result.output
