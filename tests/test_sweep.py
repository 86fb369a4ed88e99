"""Sweeps: what a file expands to, which runs are finished, and the numbers in the table."""

import io
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import PIL.Image
import pytest
from click.testing import CliRunner

from dnnlib import UserError
from sid.sweep import __main__ as sweep
from sid.sweep import folders, results, runner, table
from sid.sweep.folders import DIVERGED, REFUSED, STOPPED, status
from sid.sweep.plan import load_plan
from torch_utils import run_folder
from torch_utils.checkpoint import snapshot_path
from torch_utils.interruption import EXIT_CODE
from torch_utils.updates import DivergenceError

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = sorted(path for path in (ROOT / "docs" / "ablations").glob("*.toml") if path.name != "demo.toml")
COMMON = 'seeds = [0, 1]\n[common]\nedm_model = "t.pkl"\ndata_stat = "r.npz"\nmetrics = "fid8,is8"\nduration = 0.008\n'
TWO = f"{COMMON}lr-decay = 'cosine'\n[settings.one]\n[settings.two]\nglr = 1e-3\n"


def write(folder, text, name="sweep.toml"):
    (folder / name).write_text(text)
    return str(folder / name)


def pretend(run, folder, points, total_kimg=8.0, seconds_per_kimg=2.0):
    """A run folder as sid_train.py leaves it; points: (kimg, FID), of which those after 0 are a tick and a snapshot."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {**run.recorded, "metrics": run.recorded["metrics"].split(","), "total_kimg": total_kimg, "processes": 2}
    (folder / "training_options.json").write_text(json.dumps(options))
    rate = 1000 / seconds_per_kimg
    ticks = [{"Progress/kimg": kimg, "Timing/img_per_sec": rate, "Timing/sec_per_tick": 9.0} for kimg, _ in points]
    lines = {"stats.jsonl": [tick for tick in ticks if tick["Progress/kimg"]]}
    for metric in options["metrics"]:
        kind = metric.rstrip("0123456789")
        lines[f"metric-{metric}.jsonl"] = [{"kimg": k, "value": f, "values": {kind: f}} for k, f in points]
    for name, records in lines.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


# --- the file


def test_a_file_expands_to_runs(tmp_path):
    path = write(
        tmp_path,
        "title = 'T'\ninclude = 'base.toml'\n[common]\nlr = 2e-5\n[settings.base]\n[settings.grid]\n"
        "lr = 3e-5\nalpha = [0.5, 1.0]\nweighting = ['none', 'sigma']\ncompile = true\n",
    )
    write(tmp_path, COMMON, "base.toml")
    plan = load_plan(path)
    names = ["base", *(f"grid-alpha={a}-weighting={w}" for a in ("0.5", "1") for w in ("none", "sigma"))]
    assert (plan.title, plan.stem, plan.settings) == ("T", "sweep", names)
    assert [run.name for run in plan.runs] == [f"{name}-seed{seed}" for seed in (0, 1) for name in names]
    common = ("--edm_model=t.pkl", "--data_stat=r.npz", "--metrics=fid8,is8", "--duration=0.008")
    assert plan.runs[5].arguments == (*common, "--lr=2e-05", "--seed=1")
    last = plan.runs[-1]
    assert last.arguments == (*common, "--lr=3e-05", "--alpha=1.0", "--weighting=sigma", "--compile=true", "--seed=1")
    assert last.options == {"lr": 3e-5, "alpha": 1.0, "weighting": "sigma", "compile": True}
    found = {name: last.recorded[name] for name in ("total_kimg", "lr", "glr", "compile", "weighting", "seed")}
    assert found == {"total_kimg": 8, "lr": 3e-5, "glr": 1e-5, "compile": True, "weighting": "sigma", "seed": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("title = ", "TOML"),
        ("grid = 1\n[settings.a]", "grid: not one of"),
        ("seeds = [1, 1]\n[settings.a]", "seeds = [1, 1]"),
        ("title = 'nothing'", "[settings.NAME]"),
        ("[settings.'a/b']", "'a/b'"),
        ("[settings.a]\nalpha = []", "empty list"),
        ("[settings.a]\nalpha = [1.0, 1.0]", "a-alpha=1"),
        ("[settings.a]\nalhpa = 1", "setting a: alhpa: not an option"),
        ("[settings.a]\nalpha = 'x'", "'--alpha'"),
        ("[settings.a]\nobjective = 'l1'\nhuber = 0.1", "setting a: --huber=0.1"),
        ("[settings.a]\noutdir = 'x'", "outdir: the sweep sets it"),
        ("[settings.a]\nseed = 3", "seed: the sweep sets it"),
        ("[settings.a]\nmetrics = 'none'", "metrics = none"),
        ("[settings.a]\nmetrics = 'kid8,is8'", "metrics = kid8,is8: a sweep compares FID"),
        (
            "[settings.a]\n[settings.b]\ntransfer = '{c}'",
            "setting b: transfer = {c}: setting 'c' isn't in this file; name one",
        ),
        (
            "[settings.a]\ntransfer = '{b}'\n[settings.b]\ntransfer = '{a}'",
            "setting 'b' isn't above it; name one that stands above",
        ),
        ("[common]\ntransfer = '{a}'\n[settings.a]", "setting a: transfer = {a}: setting 'a' isn't above it; name one"),
        ("include = 'sweep.toml'\n[settings.a]", "an included file can't include another"),
        ("include = 'missing.toml'\n[settings.a]", "missing.toml: No such file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, expected):
    path = write(tmp_path, text)
    result = CliRunner().invoke(sweep.main, [path, f"--outdir={tmp_path / 'out'}"])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert result.output.startswith(f"Error: {tmp_path}")
    assert expected in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choice", "said"), [("--only=one,three", "'three' in FILE; it has one, two"), ("--seeds=0,2", "no seed 2")]
)
def test_what_the_file_lacks_cannot_be_chosen(tmp_path, choice, said):
    result = CliRunner().invoke(sweep.main, [write(tmp_path, TWO), f"--outdir={tmp_path / 'out'}", choice])
    assert result.exit_code == 2
    assert result.output.startswith(f"Error: {choice.split('=')[0]}")
    assert said in result.output
    assert not (tmp_path / "out").exists()


def test_the_questions_are_sound():
    known = {}
    for path in QUESTIONS:
        plan = load_plan(str(path))  # sid_train.py takes every run
        assert len(plan.runs) == 3 * len(plan.settings)
        baseline = plan.runs[0]
        assert bool(baseline.options) == (list(plan.teachers) != [""])
        names = {"second-teacher": "uncond", "other-images": "digits", "q9-teachers": "fashion-published"}
        assert baseline.setting == {**names, "several-steps": "digits-auto"}.get(path.stem, "sid")
        alpha, kimg = {"q9-teachers": (1.2, 35), "several-steps": (1.0, 20)}.get(path.stem, (1.2, 20))
        assert [baseline.recorded[name] for name in ("objective", "alpha", "total_kimg")] == ["sid", alpha, kimg]
        for run in plan.runs:
            assert known.setdefault(run.name, run.recorded) == run.recorded  # one name, one run, whichever file asks
    assert len(QUESTIONS) >= 10
    objectives = {run.recorded["objective"] for run in load_plan(str(ROOT / "docs/ablations/q1-objectives.toml")).runs}
    assert objectives == {"sid", "l1", "l2", "cross", "full"}


# --- what is finished, what goes on, what is refused


def test_status(tmp_path):
    run = load_plan(write(tmp_path, TWO)).runs[0]
    folder = tmp_path / run.name
    assert status(run, folder) == "new"
    pretend(run, folder, [(0, 300), (4, 90)])
    assert status(run, folder) == "begun"
    pretend(run, folder, [(0, 300), (4, 90), (8.004, 50)])
    assert status(run, folder) == "finished"
    metric = folder / "metric-is8.jsonl"
    metric.write_text("".join(metric.read_text().splitlines(keepends=True)[:-1]))  # killed before the last metric
    assert status(run, folder) == "begun"
    folders.write_failure(folder, 5, "a process hangs")
    assert status(run, folder) == "failed"
    folders.write_failure(folder, DIVERGED, "diverged")
    assert status(run, folder) == "diverged"
    (folder / "training_options.json").write_text("{")
    with pytest.raises(UserError, match=r"training_options\.json: .*remove the folder"):
        status(run, folder)


@pytest.mark.parametrize(
    ("option", "value", "refused"),
    [
        ("glr", 2e-5, True),
        ("total_kimg", 16.0, True),
        ("snapshot_ticks", 7, True),
        ("edm_model", "other.pkl", True),
        ("metrics", ["fid8"], True),
        ("seed", 3, True),
        ("keep_states", 9, False),
        ("outdir", "moved", False),
        ("real_images", 12, False),  # which a run with --gan counts itself
    ],
)
def test_a_folder_with_other_options_is_refused(tmp_path, option, value, refused):
    path = write(tmp_path, TWO)
    run = load_plan(path).runs[0]
    folder = tmp_path / "out" / run.name
    pretend(run, folder, [(8, 50)])
    file = folder / "training_options.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    if not refused:
        assert status(run, folder) == "finished"
        return
    for mode in ([], ["--report"], ["--only=two"]):
        result = CliRunner().invoke(sweep.main, [path, f"--outdir={tmp_path / 'out'}", *mode])
        assert result.exit_code == 2
        assert f"{folder} has {option} = " in result.output
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [run.name]


def test_a_run_from_before_an_option_came_is_known(tmp_path):
    one, two = load_plan(write(tmp_path, TWO)).runs[:2]
    for run in (one, two):
        pretend(run, tmp_path / run.name, [(8, 50)])
        file = tmp_path / run.name / "training_options.json"
        options = json.loads(file.read_text())
        del options["glr"]  # then what is the default now was the only way
        file.write_text(json.dumps(options))
    assert status(one, tmp_path / one.name) == "finished"
    with pytest.raises(UserError, match=r"glr = 1e-05, setting two asks for 0\.001"):
        status(two, tmp_path / two.name)


AFTER = f"{COMMON}[settings.one]\n[settings.two]\n[settings.after]\ntransfer = '{{two}}'\n"


def test_a_run_that_starts_from_anothers_generator(tmp_path):
    run = load_plan(write(tmp_path, AFTER)).runs[-1]
    source, folder = tmp_path / "two-seed1", tmp_path / "after-seed1"
    assert (run.name, run.source, run.recorded["transfer"]) == ("after-seed1", "two-seed1", "{two}")
    assert "--transfer={two}" in runner.command(run, folder, 1)
    two = load_plan(tmp_path / "sweep.toml").runs[-2]
    for points in (
        [(0, 300), (4, 90)],
        [(0, 300), (4, 90), (8.0, 50)],
        [(0, 300), (8.192, 50)],
        [(0, 300), (8.999, 50)],
    ):
        pretend(two, source, points)
        network = folders.last_snapshot(source)
        assert network == (None if points[-1][0] < 8 else snapshot_path(source, round(1000 * points[-1][0]), 256))
    assert [a for a in runner.command(run, folder, 1) if "transfer" in a] == [f"--transfer={network}"]

    pretend(run, folder, [(0, 300), (8, 50)])
    file = folder / "training_options.json"
    for found, refused in ((f"moved/{source.name}/{network.name}", False), ("out/one-seed1/n.safetensors", True)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "transfer": found}))
        if refused:
            with pytest.raises(UserError, match=r'has transfer = "out/one-.*asks for "{two}"'):
                status(run, folder)
        else:
            assert status(run, folder) == "finished"


def test_codes_and_names_are_those_of_the_training():
    assert (UserError.exit_code, DivergenceError.exit_code, EXIT_CODE) == (REFUSED, DIVERGED, STOPPED)
    assert folders.OPTIONS_FILE == run_folder.OPTIONS_FILE


# --- the table


def test_images_needed_for_a_fid():
    points = [(4.0, 100.0), (16.0, 25.0), (20.0, 30.0), (32.0, 10.0)]
    assert table.kimg_to_reach(points, 50.0) == pytest.approx(8)  # on the line fid = 400 / kimg
    assert table.kimg_to_reach(points, 25.0) == 16
    assert table.kimg_to_reach(points, 120.0) == 4
    assert table.kimg_to_reach(points, 15.0) == pytest.approx(20 * (32 / 20) ** 0.630930, rel=1e-5)  # log 2 / log 3
    assert table.kimg_to_reach(points, 9.0) is None


def test_table_against_hand_computed_numbers(tmp_path):
    path = write(tmp_path, f"title = 'Two'\n{TWO}[settings.three]\nglr = 2e-3\n")
    plan, out = load_plan(path), tmp_path / "out"
    values = {
        "one-seed0": [(0, 300), (2, 100), (8, 38)],
        "one-seed1": [(0, 300), (2, 60), (8, 42)],
        "two-seed0": [(0, 300), (2, 70), (8, 21)],
        "two-seed1": [(0, 300), (2, 90), (8, 19)],
        "three-seed0": [(0, 300), (2, 41)],
    }
    for run in plan.runs:
        if run.name in values:
            pretend(run, out / run.name, values[run.name], seconds_per_kimg=3.0 if run.setting == "two" else 2.0)
    folders.write_failure(out / "three-seed0", 3, "theta diverged")
    text = results.write_results(plan, out)
    # Means 80, 40 and 80, 20. 80 (kimg / 2) ** -1 is 40 at 4 kimg: half of the baseline's 8.
    assert text.splitlines()[2:] == [
        "| one | 2 | 40.00 ± 2.83 | 40.00 ± 2.83 | 8.0 | 1.00 | 1.00 |",
        "| two | 2 | 20.00 ± 1.41 | 20.00 ± 1.41 | 4.0 | 0.50 | 1.50 |",
        "| three | 0 of 2 |  |  |  |  | 1.00 |",
        "",
        "| setting | 2 kimg | 8 kimg | ends, by seed |",
        "| --- | --- | --- | --- |",
        "| one | 80.0 ± 28.3 | 40.0 ± 2.8 | 38.0, 42.0 |",
        "| two | 80.0 ± 14.1 | 20.0 ± 1.4 | 21.0, 19.0 |",
        "| three | 41.0 |  |  |",
        "",
        "Failed:",
        "",
        "- three: exit code 3: theta diverged",
    ]
    assert (out / "sweep.md").read_text() == f"# Two\n\n{text}"
    records = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert len(records) == 4 * 3 + 2 + 1
    assert [record["seconds"] for record in records[3:6]] == [0, 6, 24]
    assert "failure" in records[8]
    two = records[4]
    assert (two["setting"], two["options"], two["seed"], two["kimg"]) == ("two", {"glr": 1e-3}, 0, 2)
    assert two["metrics"] == {"fid8": {"fid": 70}, "is8": {"is": 70}}


def test_seconds_of_a_tick_that_was_interrupted():
    """Its record holds the seconds since the resume only, and its rate counts only the images since then."""
    stats = [
        {"Progress/kimg": 2.0, "Timing/img_per_sec": 100.0, "Timing/sec_per_tick": 20.0},
        {"Progress/kimg": 4.0, "Timing/img_per_sec": 50.0, "Timing/sec_per_tick": 1.0},
    ]
    assert folders.training_seconds(stats) == {0.0: 0.0, 2.0: 20.0, 4.0: 60.0}


def test_plots(tmp_path, monkeypatch):
    """A stand-in for matplotlib, which the tests don't need, shows what is drawn; without it only the table is made."""
    plan, out = load_plan(write(tmp_path, TWO)), tmp_path / "out"
    for run, fids in zip(plan.runs, [(100, 30), (70, 21), (60, 50), (90, 19)]):
        pretend(run, out / run.name, [(0, 300), *zip((2, 8), fids)])
    figures = []

    class Figure(MagicMock):
        def __init__(self, **_):
            super().__init__()
            figures.append(self)

        def _get_child_mock(self, **_):
            return MagicMock()

        def savefig(self, file, format):
            PIL.Image.new("RGB", (9, 5)).save(file, format=format)

    module = ModuleType("matplotlib.figure")
    module.Figure = Figure
    package = ModuleType("matplotlib")
    package.figure = module
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    results.write_results(plan, out)
    drawn = [figure.add_subplot.return_value for figure in figures]
    for axes, x in zip(drawn, ([2, 8], [4, 16])):  # kimg, then seconds
        lines = [(call.args, call.kwargs["label"]) for call in axes.plot.call_args_list]
        assert lines == [((x, [80, 40]), "one"), ((x, [80, 20]), "two")]
        assert axes.fill_between.call_args_list[0].args == (x, [60, 30], [100, 50])
    for name in ("sweep-kimg.png", "sweep-seconds.png"):
        assert PIL.Image.open(io.BytesIO((out / name).read_bytes())).size == (9, 5)
        (out / name).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(sweep.main, [str(tmp_path / "sweep.toml"), f"--outdir={out}", "--report"])
    assert result.exit_code == 0
    assert result.output.startswith("No plots: they need matplotlib; pip install '.[plots]'\n")
    assert {path.name for path in out.glob("sweep*")} == {"sweep.md", "sweep.jsonl"}


# --- several teachers

TEACHERS = (
    'seeds = [0, 1]\n[common]\nmetrics = "fid8"\nduration = 0.008\nlr = 3e-5\n'
    "[teachers.digits]\nedm_model = 'd.pkl'\ndata_stat = 'd.npz'\nlr = 2e-5\n[teachers.emoji]\nedm_model = 'e.pkl'\n"
    "[settings.sid]\n[settings.after]\ntransfer = '{sid}'\nlr = [1e-4, 2e-4]\n"
)


def test_every_setting_with_every_teacher(tmp_path):
    """A setting's options win over its teacher's, which win over the common ones; sources keep to the teacher."""
    plan = load_plan(write(tmp_path, TEACHERS))
    names = ["sid", "after-lr=0.0001", "after-lr=0.0002"]
    assert plan.teachers == {teacher: {name: f"{teacher}-{name}" for name in names} for teacher in ("digits", "emoji")}
    assert plan.settings == [f"{teacher}-{name}" for teacher in ("digits", "emoji") for name in names]
    found = [tuple(run.recorded[key] for key in ("edm_model", "data_stat", "lr", "transfer")) for run in plan.runs[:6]]
    assert found == [
        ("d.pkl", "d.npz", 2e-5, None),
        ("d.pkl", "d.npz", 1e-4, "{digits-sid}"),
        ("d.pkl", "d.npz", 2e-4, "{digits-sid}"),
        ("e.pkl", None, 3e-5, None),
        ("e.pkl", None, 1e-4, "{emoji-sid}"),
        ("e.pkl", None, 2e-4, "{emoji-sid}"),
    ]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("emoji", ["emoji-sid", "emoji-after-lr=0.0001", "emoji-after-lr=0.0002"]),
        ("sid", ["digits-sid", "emoji-sid"]),
        ("sid,after-lr=0.0001,digits", ["digits-sid", "digits-after-lr=0.0001"]),
        ("sid,emoji,digits-after-lr=0.0002", ["digits-after-lr=0.0002", "emoji-sid"]),
    ],
)
def test_settings_and_teachers_are_chosen_by_name(tmp_path, only, expected):
    """A setting's name means it with every teacher, together with teachers' names with these only."""
    plan = load_plan(write(tmp_path, TEACHERS))
    chosen = sweep.choose(plan, only, [1])
    assert [run.setting for run in chosen] == expected
    assert {run.seed for run in chosen} == {1}
    with pytest.raises(UserError, match="no setting 'emoji-si' in FILE"):
        sweep.choose(plan, "sid,emoji-si", None)


@pytest.mark.parametrize("teachers", ["teachers = 1\n", "teachers = {}\n", "teachers = {a = 1}\n"])
def test_teachers_are_tables(tmp_path, teachers):
    with pytest.raises(UserError, match=r"teachers(: write tables|\.a: not a table)"):
        load_plan(write(tmp_path, teachers + TWO))


def test_a_run_may_choose_its_settings(tmp_path):
    """Options that trials or a measured start decide may differ from the file; options that the file gives may not."""
    text = f"{COMMON}[settings.auto]\nrecipe = 'auto'\nglr = 3e-5\n"
    run = load_plan(write(tmp_path, text)).runs[0]
    pretend(run, tmp_path / run.name, [(4, 90)])
    path = tmp_path / run.name / "training_options.json"
    asked = json.loads(path.read_text())
    chosen = {"init_sigma": 6.0, "total_kimg": 7.2, "lr": 2e-4}
    path.write_text(json.dumps({**asked, **chosen}))
    assert status(run, tmp_path / run.name) == "begun"
    for name, value in (("glr", 1e-4), ("alpha", 1.2)):
        path.write_text(json.dumps({**asked, **chosen, name: value}))
        with pytest.raises(UserError, match=f"has {name} = "):
            status(run, tmp_path / run.name)


def test_dropped_trials_count(tmp_path):
    """A run of 8 kimg that spent 2 of them on a trial that it dropped, at 5 seconds each, ends after 8, not after 6."""
    text = f"{COMMON}[settings.plain]\n[settings.auto]\nrecipe = 'auto'\n".replace("[0, 1]", "[0]")
    plan = load_plan(write(tmp_path, text))
    plain, auto = (tmp_path / "out" / run.name for run in plan.runs)
    pretend(plan.runs[0], plain, [(4, 80), (8, 40)])
    pretend(plan.runs[1], auto, [(2, 80), (6, 20)], total_kimg=6.0)
    for name in ("best", "dropped"):
        pretend(plan.runs[1], auto / "trials" / name, [(2, 80)], seconds_per_kimg=5.0)
    outcome = {name: {"best": name == "best", "kimg": 2.0} for name in ("best", "dropped")}
    (auto / "trials" / "results.json").write_text(json.dumps(outcome))
    assert folders.dropped_trials(auto) == (2.0, 10.0)
    rows = results.write_results(plan, tmp_path / "out").splitlines()
    assert rows[3].startswith("| auto | 1 | 20.00 | 20.00 | 5.7 | 0.71 | 1.38 |")  # 22 / 8 seconds to 16 / 8
    assert "| auto | 80.0 | 20.0 | 20.0 |" in rows
    (auto / "trials" / "results.json").write_text("{")
    with pytest.raises(UserError, match="damaged; remove the folder"):
        results.write_results(plan, tmp_path / "out")


def test_tables_over_teachers(tmp_path):
    """The first table has the mean FID at the end of every run; the others compare the settings of one teacher."""
    plan = load_plan(write(tmp_path, TEACHERS))
    for run in plan.runs:
        fid = {"digits-sid": 20.0, "emoji-sid": 60.0, "emoji-after-lr=0.0001": 30.0}.get(run.setting)
        if fid is not None:
            pretend(run, tmp_path / "out" / run.name, [(4.0, 2 * fid), (8.0, fid + run.seed)])
    text = results.write_results(plan, tmp_path / "out")
    first, digits, emoji = text.split("\n## ")
    assert first.splitlines() == [
        "| fid8 at the end | digits | emoji |",
        "| --- | --- | --- |",
        "| sid | 20.50 ± 0.71 | 60.50 ± 0.71 |",
        "| after-lr=0.0001 |  | 30.50 ± 0.71 |",
        "| after-lr=0.0002 |  |  |",
    ]
    assert digits.startswith("digits\n")
    assert "emoji" not in digits
    assert "kimg to 60.50" in emoji
    assert (tmp_path / "out" / "sweep.md").read_text().endswith(text)
