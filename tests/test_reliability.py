"""Runs that are stopped, killed, cut short by their disk or held up by a process: nothing is lost, all is told."""

import contextlib
import errno
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import PIL.Image
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from crash import kill
from test_distillation import NoReport, equal, tiny_distillation, weights

import sid_train
from dnnlib import UserError, remove_unfinished
from edm import run_folder, train
from edm.run_folder import check_setting
from sid.distillation import Distillation
from sid.training_loop import training_loop
from torch_utils import checkpoint, distributed, interruption, training_stats, watchdog
from torch_utils.interruption import EXIT_CODE, Interruption
from training.training_loop import Training

CPU = torch.device("cpu")
BATCH = 2
# 9 iterations, a tick is three.
SCHEDULE = {"batch": BATCH, "batch_gpu": 1, "total_kimg": 0.018, "kimg_per_tick": 0.006, "snapshot_ticks": 2}


def signalled(monkeypatch, cls, iterations, number=signal.SIGUSR1):
    """Sends this process a signal amid some iterations, counted from now over all runs."""
    original, count = cls.iteration, iter(range(1, 1000))

    def iteration(self, *args):
        if next(count) in iterations:
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(cls, "iteration", iteration)


def records(path):
    return [kill.without_clock(json.loads(line)) for line in path.read_text().splitlines()]


# --- stopped anywhere, continued


def test_a_run_stopped_anywhere_is_bit_equal(tmp_path, monkeypatch, capsys):
    """Stopped after the 1st, 2nd, 3rd, … iteration, within ticks, at ticks and at snapshots."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    unbroken = tiny_distillation(**SCHEDULE)
    training_loop(unbroken, whole, NoReport())
    signalled(monkeypatch, Distillation, set(range(1, 9)), signal.SIGTERM)
    for stop in range(1, 9):
        part = tiny_distillation(resume=checkpoint.newest_good_state(parts), **SCHEDULE)
        with pytest.raises(SystemExit) as stopped:
            training_loop(part, parts, NoReport())
        assert stopped.value.code == EXIT_CODE
        assert part.state.nimg == stop * BATCH
        assert len(checkpoint.states(parts)) == min(stop, 2)  # --keep=2
        assert f"--resume={parts}" in capsys.readouterr().out
    last = tiny_distillation(resume=checkpoint.newest_good_state(parts), **SCHEDULE)
    training_loop(last, parts, NoReport())
    assert equal(weights(last), weights(unbroken))
    assert not kill.differences(kill.outcome(parts), kill.outcome(whole))
    assert [record["Progress/tick"] for record in records(parts / "stats.jsonl")] == [1, 2, 3]


def test_later_records_and_states_are_dropped(tmp_path, capsys):
    """A run that goes on from an earlier state than its last leaves what an unbroken one leaves."""
    for nimg in (8, 16, 24):
        checkpoint.save_state(checkpoint.state_path(tmp_path, nimg, 8), state(nimg, nimg))
    lines = [{"Progress/kimg": k / 1000, "timestamp": 0} for k in (8, 16, 24)]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"Progress/ki')
    (tmp_path / "metric-fid2.jsonl").write_text('{"kimg": 0.0}\n{"kimg": 0.016}\n{"kimg": 0.024}\n')
    training_stats.drop_later_records(tmp_path, 16)
    checkpoint.set_aside_later(tmp_path / "training-state-000000.016.pt")
    assert [record["Progress/kimg"] for record in records(tmp_path / "stats.jsonl")] == [0.008, 0.016]
    assert [record["kimg"] for record in records(tmp_path / "metric-fid2.jsonl")] == [0, 0.016]
    kept = ["training-state-000000.016.pt", "training-state-000000.008.pt"]
    assert [path.name for path in checkpoint.states(tmp_path)] == kept
    assert "renamed to training-state-000000.024.pt.unused" in capsys.readouterr().out


def test_a_stopped_teacher_training_is_bit_equal(tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(7):
        PIL.Image.new("L", (8, 8), color=30 * i).save(images / f"{i}.png")
    options = [f"--data={images}", "--cbase=8", "--cres=1", "--blocks=1", "--attn=1", "--batch=4", "--batch-gpu=2"]
    options += ["--nosubdir", "--duration=0.000036", "--tick=0.012", "--workers=1", "--lr-rampup=0", "--device=cpu"]

    def run(name, *more):
        return CliRunner().invoke(train.main, [*options, f"--outdir={tmp_path / name}", *more])

    assert run("whole").exit_code == 0
    signalled(monkeypatch, Training, {2, 5, 8})
    for _ in range(3):
        stopped = run("parts")
        assert stopped.exit_code == EXIT_CODE, stopped.output
        assert "SIGUSR1" in stopped.output
    finished = run("parts")
    assert finished.exit_code == 0, finished.output
    whole, parts = (kill.outcome(tmp_path / name) for name in ("whole", "parts"))
    assert not kill.differences(parts, whole)
    assert [record["Progress/kimg"] for record in parts["stats.jsonl"]] == [0.012, 0.024, 0.036]
    assert run("parts").exit_code == 0  # the command of a finished run has nothing left to do
    assert not kill.differences(kill.outcome(tmp_path / "parts"), whole)


def test_signals(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with Interruption(CPU) as watch:
        watch.check()
        assert not watch.stop
        for _ in range(2):  # the terminal's own and the one that torchrun passes on
            os.kill(os.getpid(), signal.SIGINT)
        watch.check()
        assert watch.stop
        monkeypatch.setattr(interruption, "SAME_SIGNAL_SEC", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_saves_by_the_clock(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    watch = Interruption(CPU, save_minutes=10)
    for seconds, due in {200: False, 699: False, 701: True, 1300: False, 1302: True}.items():
        clock.append(float(seconds))
        watch.check()
        assert watch.save == due
        if due:
            watch.saved()


def test_the_command_that_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sid_train.py", "--lr=1", "--resume", "old", "--resume=auto", "--desc=a b"])
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    assert interruption.continue_command("run") == "python sid_train.py --lr=1 '--desc=a b' --resume=run"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert interruption.continue_command("run").startswith("torchrun --nproc_per_node=2 sid_train.py")


# --- names


def test_no_two_states_share_a_name():
    for batch in (1, 7, 8, 256, 999, 1000, 8192):
        images = range(0, 40 * max(batch, 300), batch)
        names = [checkpoint.kimg_name(nimg, batch) for nimg in images]
        assert len(set(names)) == len(names)
        whole = [n for n in names if "." not in n]
        kimg = sorted({nimg // 1000 for nimg in images})
        assert whole == [f"{k:06d}" for k in kimg]  # EDM's names, each once
    assert checkpoint.kimg_name(10_240, 256) == "000010"
    assert checkpoint.kimg_name(10_496, 256) == "000010.496"


def test_states_sort_by_images(tmp_path):
    images = [*range(0, 3000, 250), 999_000, 1_000_000_000]
    paths = [checkpoint.state_path(tmp_path, nimg, 250) for nimg in images]
    for path in paths:
        path.touch()
    assert checkpoint.states(tmp_path) == paths[::-1]


# --- states never half-exist


def state(value, nimg):
    tensors = {"weights": torch.full([500], float(value)), "half": torch.ones(3, dtype=torch.bfloat16)}
    counters = {"nimg": nimg, "tick": 0, "elapsed_sec": 0.5}
    return {**counters, "net": tensors, "optimizer": [{"betas": (0.0, 0.9), "step": torch.tensor(value)}, None]}


def test_every_damaged_byte_is_found(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save_state(path, state(1.5, 8))
    content, good = path.read_bytes(), checkpoint.checksum(state(1.5, 8))
    assert checkpoint.checksum(checkpoint.load_state(path)) == good
    rng, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        found = good  # else it hit padding
        with contextlib.suppress(UserError):
            refused += 1
            found = checkpoint.checksum(checkpoint.load_state(path))
            refused -= 1
        assert found == good
    assert refused > 50
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="try an earlier one"):
            checkpoint.load_state(path)
    with pytest.raises(TypeError, match="plain values"):
        checkpoint.save_state(path, {"nimg": 1, "path": tmp_path})


class PowerCut(BaseException):
    pass


@contextlib.contextmanager
def broken_disk(fault):
    """The disk as `fault` says while open, for files that are written atomically."""
    with pytest.MonkeyPatch.context() as patch:
        if fault == "no room":
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
        elif fault == "full":  # writing fails halfway
            patch.setattr(os, "fdopen", lambda fd, mode: Faulty(fd, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        elif fault == "short":  # half of it is lost, and nobody says so
            patch.setattr(os, "fdopen", lambda fd, mode: Faulty(fd, None))
        elif fault == "broken":
            patch.setattr(os, "fsync", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
        else:  # the power goes after the write, before the rename: nothing is cleaned up
            patch.setattr(os, "replace", raising(PowerCut()))
            patch.setattr("pathlib.Path.unlink", lambda path, missing_ok=False: None)
        yield


class Faulty(io.FileIO):
    def __init__(self, fd, error):
        super().__init__(fd, "wb")
        self._left, self._error = 2000, error

    def write(self, data):
        part = bytes(data)[: max(self._left, 0)]
        self._left -= len(data)
        if self._left < 0 and self._error:
            raise self._error
        super().write(part)
        return len(data)


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


FAULTS = {"no room": "GB are free", "full": "No space left", "broken": "Input/output error", "short": "", "power": ""}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=FAULTS)
def test_no_fault_of_the_disk_loses_a_state(tmp_path, capsys, fault, message):
    folder = checkpoint.StateFolder(tmp_path, keep=2)
    good = [folder.save(state(k, 8 * k), batch=8) for k in (1, 2)]
    capsys.readouterr()
    with broken_disk(fault):
        if fault == "power":
            with pytest.raises(PowerCut):
                folder.save(state(3, 24), batch=8)
        else:
            saved = folder.save(state(3, 24), batch=8)
            assert (saved is not None) == (fault == "short")
    if message:
        line = capsys.readouterr().out
        assert message in line
        assert "saving training-state-000000.024.pt failed" in line
        assert line.count("\n") == 1
    found = checkpoint.newest_good_state(tmp_path)
    assert found == good[1]
    assert checkpoint.checksum(checkpoint.load_state(found)) == checkpoint.checksum(state(2, 16))
    assert ("training-state-000000.024.pt" in capsys.readouterr().out) == (fault == "short")
    assert bool(list(tmp_path.glob(".*.part"))) == (fault == "power")
    remove_unfinished(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert folder.save(state(3, 24), batch=8) == checkpoint.states(tmp_path)[0]  # the disk is mended


def test_a_full_disk_stops_nothing_but_the_saves(tmp_path, capsys):
    """A limit of 4 kB a file, by the system itself: states and snapshots fail, the run reaches its end."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        distillation = tiny_distillation(**SCHEDULE)
        training_loop(distillation, tmp_path, NoReport())
        records_so_far = (tmp_path / "stats.jsonl").read_bytes()
        training_stats.append_line(tmp_path / "stats.jsonl", "x" * 4096)  # half of it would fit
        assert (tmp_path / "stats.jsonl").read_bytes() == records_so_far
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert distillation.state.nimg == 18
    assert {path.name for path in tmp_path.iterdir()} == {"stats.jsonl"}
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert len(warnings) == 5  # two states, two snapshots, a record
    assert all("File too large" in line for line in warnings[:4])


def test_old_states_go_and_nothing_else(tmp_path):
    others = ["training-state-mine.pt", "network-snapshot-000000.safetensors", "training-state-000000.pt.unused"]
    for name in others:
        (tmp_path / name).touch()
    folder = checkpoint.StateFolder(tmp_path, keep=3)
    paths = [folder.save(state(k, 8 * k), batch=8) for k in range(6)]
    assert checkpoint.states(tmp_path) == paths[:2:-1]
    assert all((tmp_path / name).exists() for name in others)
    checkpoint.StateFolder(tmp_path, keep=0).save(state(9, 72), batch=8)
    assert len(checkpoint.states(tmp_path)) == 4


# --- the command line


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return [*kill.prepare(folder), "--batch=4", "--batch-gpu=2", "--tick=0.008", "--device=cpu"]


def distil(options, *more):
    return CliRunner().invoke(sid_train.main, [*options, *more])


def test_the_same_command_continues(tmp_path, options, monkeypatch):
    run = [*options, "--metrics=none", f"--outdir={tmp_path}", "--desc=mine", "--resume=auto"]
    assert distil(run, "--duration=0.000008").exit_code == 0  # there was nothing to continue
    longer = distil(run, "--duration=0.000016", "--batch-gpu=1", "--keep=5")
    assert longer.exit_code == 0, longer.output
    assert "--batch-gpu=1 instead of 2: as good, but no longer bit-equal" in longer.output
    folder = tmp_path / "00000-mine"
    assert [record["Progress/kimg"] for record in records(folder / "stats.jsonl")] == [0.008, 0.016]
    refused = distil(run, "--duration=0.000024", "--glr=2e-5")
    assert refused.exit_code == 2
    assert "--glr=2e-05: the run in" in refused.output
    assert "has --glr=1e-05" in refused.output
    changed = distil(run, "--duration=0.000024", "--glr=2e-5", "--override")
    assert changed.exit_code == 0, changed.output
    assert "--glr=2e-05 from here on, instead of --glr=1e-05" in changed.output
    assert [path.name for path in tmp_path.iterdir()] == ["00000-mine"]
    assert distil(run[:-1], "--duration=0.000004").exit_code == 0  # not asked to continue: a new folder
    assert (tmp_path / "00001-mine").is_dir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = distil(run[:-1], "--duration=0.000008")
    assert "Resumed at 0.0 kimg" in again.output
    assert not (tmp_path / "00002-mine").exists()


def test_a_damaged_state_is_told_and_the_one_before_taken(tmp_path, options):
    run = [*options, "--metrics=none", f"--outdir={tmp_path}", "--nosubdir", "--dump=1"]
    assert distil(run, "--duration=0.000016").exit_code == 0
    newest, before = checkpoint.states(tmp_path)
    whole = checkpoint.load_state(newest)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed = distil(run, "--duration=0.000016")
    assert resumed.exit_code == 0, resumed.output
    assert f"{newest}: damaged, its checksum is another" in resumed.output
    assert "Resumed at 0.0 kimg" in resumed.output
    assert before in checkpoint.states(tmp_path)
    again = checkpoint.load_state(newest)
    assert checkpoint.checksum(again["generator"]) == checkpoint.checksum(whole["generator"])


def test_a_decay_fixes_the_duration(tmp_path):
    was = checkpoint.setting({"total_kimg": 10.0, "lr_decay": "cosine"}, CPU)
    now = checkpoint.setting({"total_kimg": 20.0, "lr_decay": "cosine"}, CPU)
    with pytest.raises(UserError, match=r"--duration=0.02: .* --duration=0.01"):
        check_setting(tmp_path, was, now, set(), set())
    for setting in (was, now):
        setting["options"]["lr_decay"] = "none"
    check_setting(tmp_path, was, now, set(), set())


def test_two_runs_never_share_a_folder(tmp_path):
    code = "import sys; from edm import run_folder\nwith run_folder.create(sys.argv[1], '', True, {}, None): pass"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with run_folder.create(str(tmp_path), "", True, {}, None):
        second = subprocess.run(command, cwd=kill.ROOT, capture_output=True, text=True)
    assert "another run is at work there" in second.stderr
    with run_folder.create(str(tmp_path), "", True, {}, None) as again:  # the first has ended
        assert again == tmp_path


# --- several processes


def _hanging(rank, port, folder):
    """Two processes: first their weights differ, then process 1 stays away from the message that process 0 waits in."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    watchdog.PERIOD_SEC = 0.2
    with open(f"{folder}/{rank}.txt", "w") as output, contextlib.redirect_stderr(output):
        dist.init_process_group("gloo")
        net = torch.nn.Linear(2, 2)
        for parameter in net.parameters():
            parameter.data.fill_(0.5)
        watchdog.check_equal_weights({"net": net}, 8000)
        if rank == 1:
            net.bias.data[1] = torch.nextafter(net.bias.data[1], torch.tensor(1.0))
        try:
            watchdog.check_equal_weights({"net": net}, 8000)
        except watchdog.RanksDisagreeError as error:
            print(error.message, file=sys.stderr, flush=True)
        with watchdog.watching(timeout_sec=1.5):
            for _ in range(5):
                distributed.barrier()
                time.sleep(0.5)  # longer together than the timeout
            while rank == 1:
                time.sleep(0.1)
            distributed.barrier()


def test_hanging_and_disagreeing_processes_are_named(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.spawn(_hanging, args=[port, str(tmp_path)], nprocs=2, join=False)
    for process in context.processes:
        process.join(60)
    assert {process.exitcode for process in context.processes} <= {watchdog.HANG_EXIT_CODE, -signal.SIGTERM}
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    for text in told:
        assert "net: the weights on process 1 are not those on process 0 at 8.0 kimg" in text
    assert "no progress for 1.5 seconds: process 1 keeps the others waiting" in told[0]


@pytest.mark.parametrize(("processes", "hows"), [(1, ["kill", "save"]), (2, ["term", "rank"])], ids=["one", "two"])
def test_killed_runs_are_bit_equal(tmp_path, processes, hows):
    """tests/crash/kill.py in small: the command line, run and killed for real, alone and under torchrun."""
    ended, different = kill.crash(tmp_path, hows, iterations=32, processes=processes, seed=1)
    assert ended == 2
    assert not different


# --- memory


def test_nothing_is_left_behind(tmp_path):
    """The number of live tensors is the same at each tick; tests/crash/memory.py measures the process itself."""
    counts = []

    class Counter(NoReport):
        def snapshot(self, ema, nimg):
            gc.collect()
            counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    training_loop(tiny_distillation(**{**SCHEDULE, "total_kimg": 0.04, "snapshot_ticks": 1}), tmp_path, Counter())
    assert len(counts) == 7
    assert len(set(counts[1:-1])) == 1
