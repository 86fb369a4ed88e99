"""Progress bars: on a terminal only, lines above them whole, nothing of them in pipes and logs."""

import os
import re
import select
import struct
import sys
import threading

import forked
import numpy as np
import PIL.Image
import pytest
from conftest import ROOT
from tiny import tiny_teacher

from dnnlib import Logger
from dnnlib.terminal import WholeLines, without_escapes
from edm import zoo

pty = pytest.importorskip("pty")  # not on Windows
fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")

COLUMNS = 80
TIMEOUT_SEC = 120
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "TERM": "xterm", "PYTHONUTF8": "1"}
BAR = """
import sys, time, warnings
from dnnlib import Logger
from dnnlib.progress import ProgressBar

with Logger(sys.argv[1]):
    with ProgressBar(4, mininterval=0, among_lines=True) as bar:
        for i in range(4):
            print("line", i)
            print("half", end=" ")
            bar.update()
            print("\\x1b[31mwhole\\x1b[0m", file=sys.stdout)
            warnings.warn(f"warned {i}")
    print("over")
"""


def in_terminal(command, cwd, interrupt_at=None, size=(24, COLUMNS), **environment):
    """(exit code, all that arrives) of a Python command in a pseudo-terminal.

    interrupt_at: pattern of bytes; when they appear, Ctrl-C is typed. size: rows and columns.
    """
    own, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = forked.Script(command[1:], os.ttyname(theirs), cwd, {**ENVIRONMENT, **environment})
    arrived, clock = b"", threading.Timer(TIMEOUT_SEC, process.kill)
    clock.start()
    while process.is_alive() or select.select([own], [], [], 0)[0]:
        if select.select([own], [], [], 0.05)[0]:
            arrived += os.read(own, 4096)
        if interrupt_at is not None and re.search(interrupt_at, arrived):
            os.write(own, b"\x03")
            interrupt_at = None
    code = process.wait()
    clock.cancel()
    os.close(own)
    os.close(theirs)
    return code, arrived.decode()


def on_screen(text):
    """The lines that stand on a terminal's screen in the end: each as overwritten by carriage returns."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_lines_are_whole_and_the_bar_is_gone_in_the_end(tmp_path):
    (tmp_path / "script.py").write_text(BAR)
    code, text = in_terminal([sys.executable, "script.py", "log.txt"], tmp_path)
    assert code == 0
    assert "100%|" in text
    screen = [without_escapes(line) for line in on_screen(text)]
    assert [line for line in screen if line.startswith("line")] == [f"line {i}" for i in range(4)]
    assert screen.count("half whole") == 4
    assert sum("warned" in line for line in screen) >= 4
    assert screen[-2:] == ["over", ""]
    assert not any("|" in line for line in screen)
    assert "\x1b" not in text.replace("\x1b[31m", "").replace("\x1b[0m", "")  # no codes but the script's own
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert not re.search("[\r\x1b|█]", log)
    assert log.splitlines()[:2] == ["line 0", "half whole"]
    assert log.splitlines()[-1] == "over"


@pytest.mark.parametrize(("size", "width"), [((24, 200), 199), ((24, 40), 39), ((0, 0), 79), ((24, 0), 79)])
def test_the_bar_fits_the_terminal(tmp_path, size, width):
    (tmp_path / "script.py").write_text(BAR)
    _, text = in_terminal([sys.executable, "script.py", "log.txt"], tmp_path, size=size)
    assert {len(bar) for bar in re.findall(r"\r([^\r\n]*%\|[^\r\n]*)", text)} == {width}


@pytest.mark.parametrize(("redirection", "environment"), [("", {"TERM": "dumb"}), ("2>err", {}), ("| cat", {})])
def test_no_bar_where_it_would_be_in_the_way(tmp_path, redirection, environment):
    (tmp_path / "script.py").write_text(BAR)
    shell = f"import os; os.execlp('sh', 'sh', '-c', '\"$0\" script.py log.txt {redirection}', {sys.executable!r})"
    _, text = in_terminal([sys.executable, "-c", shell], tmp_path, **environment)
    errors = (tmp_path / "err").read_text() if "err" in redirection else ""
    assert "line 3" in text
    assert "%|" not in text + errors


def test_whole_lines():
    lines = WholeLines()
    assert [lines.add(text) for text in ("a", "b\nc", "", "\n")] == ["", "ab\n", "", "c\n"]
    assert lines.add("\r 10%|#\r 20%|##\r        \r") == ""
    assert lines.rest == ""
    assert lines.add("tick 1\r") == ""
    assert lines.add("\nnext\r\n") == "tick 1\nnext\n"
    assert lines.add("unfinished") == ""
    assert lines.rest == "unfinished"


@pytest.mark.parametrize("text", ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07red", "\x1b[2K\x1b[1;5Hred", "\x1b[?25lred"])
def test_escape_codes_stay_out_of_logs(text, tmp_path, capsys):
    assert without_escapes(text) == "red"
    with Logger(tmp_path / "log.txt"):
        print(text)
        print("end", end="")
    assert (tmp_path / "log.txt").read_text() == "red\nend"
    assert capsys.readouterr().out == f"{text}\nend"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny teacher and images."""
    folder = tmp_path_factory.mktemp("work")
    zoo.save_network(tiny_teacher(), folder / "teacher.safetensors")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        PIL.Image.fromarray(rng.integers(0, 256, [8, 8], dtype=np.uint8)).save(folder / f"images/{i:02}.png")
    return folder


def distil(outdir, *options):
    arguments = ["--edm_model=teacher.safetensors", f"--outdir={outdir}", "--nosubdir", "--metrics=none", "--batch=8"]
    arguments += ["--device=cpu", "--batch-gpu=4", "--duration=4e-5", "--tick=0.016", "--snap=2", *options]
    return [sys.executable, str(ROOT / "sid_train.py"), *arguments]


def train(outdir):
    arguments = ["--data=images", f"--outdir={outdir}", "--nosubdir", "--cbase=4", "--cres=1", "--blocks=1"]
    arguments += [
        "--attn=none",
        "--augment=0",
        "--batch=8",
        "--workers=0",
        "--device=cpu",
        "--duration=4e-5",
        "--tick=0.016",
    ]
    return [sys.executable, "-m", "edm.train", *arguments]


TICKS = [r"0\.016/0\.040 kimg  40%", r"0\.032/0\.040 kimg  80%", r"0\.040/0\.040 kimg 100%"]
FIELDS = r" +\d[\d.]* img/s +\d+\w( \d\d\w)? left"


@pytest.mark.parametrize(("command", "more"), [(distil, ""), (train, r"  loss \d[\d.]+")])
def test_a_run_on_a_terminal(work, command, more):
    code, text = in_terminal(command("terminal"), work, NO_COLOR="1")
    assert code == 0, text
    assert "\x1b" not in text
    assert "%|" in text
    screen, log = on_screen(text), (work / "terminal/log.txt").read_text(encoding="utf-8")
    assert not any("%|" in line for line in screen)
    ticks = [line for line in screen if re.fullmatch(r"0\.\d+/0\.040 kimg .*", line)]
    assert [bool(re.fullmatch(tick + FIELDS + more, line)) for tick, line in zip(TICKS, ticks)] == [True] * 3
    assert len(ticks) == 3
    assert [line for line in screen if line] == log.splitlines()  # in the log, as on the screen
    assert "none (data-free)" in log or command is train
    assert re.search(r"^Run folder +terminal$", log, re.MULTILINE)
    (work / "terminal").rename(work / f"over-{command.__name__}")


@pytest.mark.parametrize("command", [distil, train])
def test_a_run_without_a_terminal(work, command):
    text = forked.run(command("pipe")[1:], work)
    assert not re.search("[\r\x1b]", text)
    assert "%|" not in text
    assert all(len(line) <= COLUMNS for line in text.splitlines() if "kimg" in line)
    assert (work / "pipe/log.txt").read_text(encoding="utf-8") == text
    (work / "pipe").rename(work / f"piped-{command.__name__}")


def test_an_interrupted_run_leaves_whole_lines(work):
    command = distil("stopped", "--duration=0.1", "--tick=1")
    code, text = in_terminal(command, work, interrupt_at=rb"[1-9]\d*/100000 img")
    assert code == 75
    screen = on_screen(text)
    (told,) = [i for i, line in enumerate(screen) if line == "SIGINT: saving after this iteration"]
    assert screen[told + 1].startswith("Stopped by SIGINT; state saved as stopped")
    assert screen[told + 2].startswith("python ")
    assert screen[-1] == ""
    assert "%|" not in "".join(screen[told:])
    assert "%|" not in (work / "stopped/log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "edm.generate", "--network=teacher.safetensors", "--outdir=OUT", "--seeds=0-7", "--batch=2"],
        ["-m", "edm.dataset_tool", "--source=images", "--dest=OUT.zip"],
    ],
)
def test_other_commands(work, arguments, tmp_path):
    command = [sys.executable, *(argument.replace("OUT", str(tmp_path / "out")) for argument in arguments)]
    code, text = in_terminal(command, work)
    assert code == 0, text
    assert "%|" in text
    assert "\x1b" not in text
    assert not any("%|" in line for line in on_screen(text))
    command = [argument.replace(str(tmp_path / "out"), str(tmp_path / "piped")) for argument in command]
    assert not re.search("[\r\x1b]", forked.run(command[1:], work))
