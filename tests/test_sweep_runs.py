"""Sweeps at work: several with a stand-in for the training, and a real one."""

import json
import os
import signal
import subprocess
import sys

import forked
import pytest
from click.testing import CliRunner
from crash import kill
from test_sweep import AFTER, ROOT, TWO, write

from dnnlib import locked_folder
from sid.sweep import __main__ as sweep
from sid.sweep import runner
from sid.sweep.folders import STOPPED, status
from sid.sweep.plan import load_plan

# --- runs that fail, with a stand-in for the training


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """The plan of two runs and their folder; a stand-in for the training, which fails."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "if os.environ.get('RANK', '0') != '0':\n"
        "    time.sleep(600)\n"  # until torchrun ends it, so that one process alone counts its starts and prints
        "folder = next(a.removeprefix('--outdir=') for a in sys.argv if a.startswith('--outdir='))\n"
        "open(f'{folder}/starts', 'a').write('x')\n"
        "print('working', os.environ['OMP_NUM_THREADS'], flush=True)\n"
        "sys.exit(print('Error: theta diverged', file=sys.stderr) or 3 if 'one' in folder else 1)\n"
    )
    monkeypatch.setattr(runner, "PROGRAM", [str(program)])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return write(tmp_path, TWO.replace("[0, 1]", "[0]")), tmp_path / "out"


def test_a_failed_run_is_recorded_and_the_others_go_on(failing):
    path, out = failing
    for attempt in range(2):
        result = CliRunner().invoke(sweep.main, [path, f"--outdir={out}"])
        assert result.exit_code == 1, result.output
        lines = result.output.splitlines()
        if not attempt:
            assert lines[0] == f"[1/2] one-seed0: starts, see {out / 'one-seed0'}"
            assert lines[1] == "[1/2] one-seed0: diverged (exit code 3): theta diverged"
        else:
            assert lines[0] == "[1/2] one-seed0: diverged before"
        assert f"[2/2] two-seed0: {'goes on' if attempt else 'starts'}" in result.output
        assert "[2/2] two-seed0: failed (exit code 1): " in result.output
    assert (out / "one-seed0" / "starts").read_text() == "x"  # it would diverge again
    assert (out / "two-seed0" / "starts").read_text() == "xx"
    assert "working 1" in (out / "one-seed0" / "console.txt").read_text()
    first, second = (json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines())
    failure = {"exit_code": 3, "message": "theta diverged"}
    common = load_plan(path).runs[0].common
    assert first == {"setting": "one", "options": {}, "common": common, "seed": 0, "failure": failure}
    assert second["failure"]["exit_code"] == 1


def test_a_failed_run_of_two_processes_is_recorded(failing):
    path, out = failing
    result = CliRunner().invoke(sweep.main, [path, f"--outdir={out}", "--nproc=2", "--only=one"])
    assert result.exit_code == 1, result.output
    assert result.output.splitlines()[1] == "[1/1] one-seed0: diverged (exit code 3): theta diverged"
    assert (out / "one-seed0" / "starts").read_text() == "x"
    assert "working 1" in (out / "one-seed0" / "console.txt").read_text()
    record = json.loads((out / "sweep.jsonl").read_text())
    assert record["failure"] == {"exit_code": 3, "message": "theta diverged"}


def test_a_run_whose_source_failed_is_not_started(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("import sys\nsys.exit(3 if 'two' in str(sys.argv) else 1)\n")
    monkeypatch.setattr(runner, "PROGRAM", [str(program)])
    path, out = write(tmp_path, AFTER), tmp_path / "out"
    for options, place in (([], "[3/6] after-seed0"), (["--only=after"], "[1/2] after-seed0")):
        result = CliRunner().invoke(sweep.main, [path, f"--outdir={out}", *options])
        assert result.exit_code == 1
        assert f"{place}: not started: two-seed0, which it starts from, isn't finished\n" in result.output
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [
        f"{s}-seed{k}" for s in ("one", "two") for k in (0, 1)
    ]


@pytest.mark.parametrize(
    ("exit_code", "output", "expected"),
    [
        (0, "one\ntwo\n", (0, "two")),
        (-9, "", (-9, "")),
        (2, "Error: no --lr\nbye\n", (2, "no --lr")),
        (1, "[rank1]: torch.OutOfMemoryError: 1 GB\n", (1, "torch.OutOfMemoryError: 1 GB")),
        (1, "Error: x\nerrors.ChildFailedError: \n  exitcode  : 1 (pid: 3)\n  exitcode  : 5 (pid: 4) \n", (5, "x")),
        (0, "  exitcode  : 1 (pid: 3)\nError: told before a restart\n", (0, "told before a restart")),
    ],
)
def test_what_a_run_said_last(exit_code, output, expected):
    assert runner.outcome(exit_code, output) == expected


def test_two_sweeps_never_share_a_folder_at_a_time(tmp_path):
    path = write(tmp_path, TWO)
    with locked_folder(tmp_path):
        second = subprocess.run(
            [sys.executable, "-m", "sid.sweep", path, f"--outdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
        )
    assert second.returncode == 2
    assert "another run is at work there" in second.stderr
    assert not (tmp_path / "one-seed0").exists()


# --- for real

FORKING = """
import sys
import forked
from sid.sweep import __main__ as sweep
from sid.sweep import runner

runner.subprocess.Popen = forked.Child  # new processes take seconds each to load torch
sweep.main(sys.argv[1:])
"""


def test_a_sweep_that_is_stopped_goes_on(tmp_path):
    """Two settings and a SIGTERM in the second run. The same command finishes it and leaves the finished run untouched.

    The second starts from the first one's generator.
    """
    common = [option.removeprefix("--").split("=", 1) for option in kill.prepare(tmp_path)]
    text = "".join(f"{name} = '{value}'\n" for name, value in common)
    text += "batch = 8\nbatch-gpu = 4\ntick = 0.048\nsnap = 1\nlr = 1e-3\nduration = 0.000096\ndevice = 'cpu'\n"
    text += "save-every = 0.0001\n[settings.one]\n[settings.two]\nglr = 1e-3\ntransfer = '{one}'\n"
    path, out = write(tmp_path, f"seeds = [0]\n[common]\n{text}"), tmp_path / "out"
    (tmp_path / "forking.py").write_text(FORKING)
    command, log = [tmp_path / "forking.py", path, f"--outdir={out}"], tmp_path / "log.txt"
    process = forked.Script(command, log)
    assert kill.wait_for(lambda: (out / "two-seed0").is_dir() and kill.states(out / "two-seed0"), process)
    process.send_signal(signal.SIGTERM)
    code, output = process.wait(600), log.read_text()
    assert code == STOPPED, output
    assert "[1/2] one-seed0: finished\n" in output
    assert "[2/2] two-seed0: stopped\n" in output
    assert output.endswith(f"To continue:\npython -m sid.sweep {path} --outdir={out}\n")
    assert sorted(folder.name for folder in out.iterdir() if folder.is_dir()) == ["one-seed0", "two-seed0"]
    assert status(load_plan(path).runs[1], out / "two-seed0") == "begun"

    before = mtimes(out / "one-seed0")
    output = forked.run(command, tmp_path)
    assert "[1/2] one-seed0: finished before\n" in output
    assert "[2/2] two-seed0: goes on" in output
    assert mtimes(out / "one-seed0") == before
    assert "Resumed at" in (out / "two-seed0" / "console.txt").read_text()
    lines = (out / "sweep.jsonl").read_bytes()
    records = [json.loads(line) for line in lines.splitlines()]
    assert [(record["setting"], record["seed"], record["kimg"]) for record in records] == [
        (setting, 0, kimg) for setting in ("one", "two") for kimg in (0, 0.048, 0.096)
    ]
    assert all(record["seconds"] > 0 for record in records if record["kimg"])
    hashes = [record["network_sha256"] for record in records]
    assert len(set(hashes)) == 1 + 4  # the teacher's, and two of each run
    assert hashes[3] == hashes[2]  # where the second run starts, the first ended

    everything = mtimes(out)
    for name in ("sweep.jsonl", "sweep.md"):
        (out / name).unlink()
    again = CliRunner().invoke(sweep.main, [path, f"--outdir={out}", "--report"])
    assert again.exit_code == 0, again.output
    assert (out / "sweep.jsonl").read_bytes() == lines
    new = mtimes(out)
    assert {name for name in everything if new[name] != everything[name]} <= {"sweep.jsonl", "sweep.md", *PLOTS}
    dry = CliRunner().invoke(sweep.main, [path, f"--outdir={out}", "-n", "--only=two"])
    assert [line.split(":")[0] for line in dry.output.splitlines()] == ["finished"]


def test_a_choice_of_runs(tmp_path):
    path, out = write(tmp_path, TWO), tmp_path / "out"
    for choice, named in (
        ("--seeds=1", ["one-seed1", "two-seed1"]),
        ("--seeds=1,0 --only=two", ["two-seed0", "two-seed1"]),
    ):
        dry = CliRunner().invoke(sweep.main, [path, f"--outdir={out}", "-n", *choice.split()])
        assert [line.split(f"--outdir={out}/")[1].split()[0] for line in dry.output.splitlines()] == named


PLOTS = {"sweep-kimg.png", "sweep-seconds.png"}  # if matplotlib is there


def mtimes(folder):
    return {str(path.relative_to(folder)): os.stat(path).st_mtime_ns for path in folder.rglob("*") if path.is_file()}
