"""What the doctor says of recorded runs, held against FID: it calls no run healthy where measurements say otherwise.

The rule, which was there before the records: a generator is good if its FID is at most twice its teacher's. The doctor
says `healthy` and `converged` only where something measured the images and nothing speaks against them, and `unknown`
where it can't know.

tests/data/doctor holds real runs, cut to what the doctor reads: eleven on two teachers (digits, FID 7.1; the demo's,
FID 9.5), and one of --recipe=auto on each of seven others (NAME-auto), with the distance in the teacher's features; on
two of them also from noise with the moments of images (NAME-moments).
"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sid import doctor
from sid.monitor.closeness import GOOD

RUNS = {path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("data/doctor/*.json")}
WELL = ("healthy", "converged")
PROBLEMS = ("far-from-teacher", "away-from-teacher")
MEASURED = {name for name, run in RUNS.items() if run["distance"]}


def is_good(name):
    run = RUNS[name]
    return run["fid"][-1][1] <= GOOD * run["teacher_fid"]


def said(folder, name, *kept):
    """The names of what the doctor finds where the run has recorded `kept`: distance, fid, teacher."""
    run = RUNS[name]
    ticks = [dict(zip(run["ticks"], values)) for values in zip(*run["ticks"].values())]
    sound = [{figure: value for figure, value in tick.items() if value is not None} for tick in ticks]
    files = {"stats.jsonl": sound}
    for what, file in (("distance", "teacher-distance.jsonl"), ("fid", f"{run['metric']}.jsonl")):
        if what in kept and run[what]:
            files[file] = [dict(zip(("kimg", "value", "features"), values)) for values in run[what]]
    for file, records in files.items():
        (folder / file).write_text("".join(json.dumps(record) + "\n" for record in records))
    known = {"teacher_fid": {"value": run["teacher_fid"], "evaluations": 35}} if "teacher" in kept else {}
    (folder / "training_options.json").write_text(json.dumps(run["options"] | known))
    result = CliRunner().invoke(doctor.main, [str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    return [line.partition(": ")[0] for line in lines if not line.startswith(("fid", "the run"))]


def test_there_are_runs_of_each_kind():
    assert {is_good(name) for name in RUNS if name.startswith("digits")} == {True, False}
    assert {is_good(name) for name in RUNS if name.startswith("fashion")} == {True, False}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_with_all_that_was_measured(tmp_path, name):
    found = said(tmp_path, name, "distance", "fid", "teacher")
    assert found[0] in (WELL if is_good(name) else PROBLEMS)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_with_fid_and_the_teachers_alone(tmp_path, name):
    found = said(tmp_path, name, "fid", "teacher")
    assert found[0] in (WELL if is_good(name) else PROBLEMS)


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_with_the_distance_alone(tmp_path, name):
    """It finds failures; whether a generator that is near is good, it can't tell, so nothing is said of that."""
    found = said(tmp_path, name, "distance")
    assert found[0] in (WELL if is_good(name) else PROBLEMS)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_with_an_fid_that_nothing_compares(tmp_path, name):
    """It shows when the generator gets worse; how good it is, it doesn't."""
    rises = RUNS[name]["fid"][-1][1] > RUNS[name]["fid"][0][1]
    found = said(tmp_path, name, "fid")
    assert not {*found} & {*WELL}
    assert not rises or found[0] == "away-from-teacher"


@pytest.mark.parametrize("name", sorted(RUNS))
def test_with_the_figures_of_the_loss_alone(tmp_path, name):
    found = said(tmp_path, name)
    assert not {*found} & {*WELL}
    assert not is_good(name) or found == ["unknown"]
