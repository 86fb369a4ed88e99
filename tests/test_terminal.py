"""Terminals, pipes and logs that disappear: long commands run to their end, short ones end quietly."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from dnnlib.terminal import stop_signals

LINES = 3000  # more than a pipe and Python's own buffers hold
LONG = f"""
import sys, tempfile
import click
from dnnlib import Logger, LongCommand

@click.command(cls=LongCommand)
@click.argument("folder")
def main(folder):
    with Logger(folder + "/log.txt"), open(folder + "/result", "w") as result:
        for i in range({LINES}):
            print("printed", i, "\\N{{GREEK SMALL LETTER SIGMA}}" * 10)
            print("warned", i, file=sys.stderr)
        result.write("whole")

main()
"""
SHORT = """
import click
from dnnlib import Command

@click.command(cls=Command)
def main():
    for i in range(30000):
        print("line", i)

main()
"""
FULL = pytest.param(">/dev/full", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only"))


def shell(tmp_path, script, arguments, **environment):
    """(exit code of the command, stdout, stderr) of a script and the redirections after it."""
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    line = f'"$PYTHON" script.py {arguments}'
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment}
    run = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "redirection",
    [
        "2>/dev/null | head -1",
        "2>&1 | head -1",
        "| true",
        "2> >(true) >/dev/null",
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        FULL,
        pytest.param("2>/dev/full >/dev/full", marks=FULL.marks),
    ],
)
def test_a_long_command_goes_on_without_its_output(tmp_path, redirection):
    code, _, errors = shell(tmp_path, LONG, f". {redirection}")
    assert code == 0, errors
    assert (tmp_path / "result").read_text() == "whole"  # and nothing that was printed
    log = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert len(log) == 2 * LINES
    assert log[-1] == f"warned {LINES - 1}"
    assert "Traceback" not in errors
    assert "Exception" not in errors


def test_letters_that_the_terminal_lacks_end_nothing(tmp_path):
    code, output, _ = shell(tmp_path, LONG, ".", PYTHONIOENCODING="ascii")
    assert code == 0
    assert output.startswith(f"printed 0 {chr(92)}u03c3")
    assert "σ" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_short_command_ends_quietly_with_its_reader(tmp_path):
    code, output, errors = shell(tmp_path, SHORT, "| head -1")
    assert (code, output, errors) == (1, "line 0\n", "")


@pytest.mark.parametrize("redirection", [FULL])
def test_a_short_command_says_that_its_output_is_lost(tmp_path, redirection):
    code, _, errors = shell(tmp_path, SHORT, redirection)
    assert code == 2
    assert errors == "Error: the output can't be written: No space left on device: make room, or name another file\n"


def test_a_short_command_without_streams(tmp_path):
    assert shell(tmp_path, SHORT, "<&- >&- 2>&-")[0] == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no terminals that hang up")
def test_nohup_is_obeyed():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


UNFINISHED = """
import contextlib, os, signal, sys, time
from pathlib import Path
import click
from dnnlib import LongCommand, write_atomically
@click.command(cls=LongCommand)
@click.argument("number", type=int)
def main(number):
    with write_atomically("result") as file, contextlib.suppress(Exception):
        file.write(b"half")
        assert list(Path().glob(".result.*.part"))
        os.kill(os.getpid(), number)
        time.sleep(60)
signal.signal(int(sys.argv[-1]), signal.SIG_DFL)  # the tests themselves may run under nohup
main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_unfinished_file(tmp_path, name):
    """The process still ends by the signal, which is what supervisors look at."""
    number = getattr(signal, name)
    code, output, errors = shell(tmp_path, UNFINISHED, int(number))
    assert (code, output) == (128 + number, ""), errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_warnings_are_one_line(tmp_path):
    script = SHORT.replace('print("line", i)', 'i or __import__("warnings").warn("first\\n  second")')
    assert shell(tmp_path, script, "")[2] == "Warning: first second\n"
