"""Runs that are stopped, killed, out of disk space or stuck lose nothing and say what happened."""

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time

import forked
import PIL.Image
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from crash import kill
from tiny import NoReport, equal, on_two_processes, save, start_two, tiny_distillation, weights

import sid_train
from dnnlib import UserError
from edm import train
from sid.distillation import Distillation
from sid.training_loop import training_loop
from torch_utils import checkpoint, distributed, interruption, run_folder, training_stats, watchdog
from torch_utils.interruption import EXIT_CODE, Interruption
from torch_utils.run_folder import check_setting
from training.training_loop import Training, TrainingConfig

CPU = torch.device("cpu")
BATCH = 2
# 9 iterations, a tick is three.
SCHEDULE = {"batch": BATCH, "batch_gpu": 1, "total_kimg": 0.018, "kimg_per_tick": 0.006, "snapshot_ticks": 2}


def signalled(monkeypatch, cls, iterations, number=signal.SIGUSR1):
    """Sends this process a signal during certain iterations, counted over all runs from now on."""
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


def test_a_stopped_teacher_training_is_bit_equal(tmp_path, monkeypatch, request):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(7):
        PIL.Image.new("L", (8, 8), color=30 * i).save(images / f"{i}.png")
    options = [f"--data={images}", "--cbase=8", "--cres=1", "--blocks=1", "--attn=none", "--batch=4", "--batch-gpu=2"]
    options += ["--nosubdir", "--duration=0.000036", "--tick=0.012", "--workers=1", "--lr-rampup=0", "--device=cpu"]

    def run(name, *more):
        return CliRunner().invoke(train.main, [*options, f"--outdir={tmp_path / name}", *more])

    was = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, was))
    assert run("whole").exit_code == 0
    for iteration, name in ((2, "SIGUSR1"), (5, "SIGHUP"), (8, "SIGTERM")):
        signalled(monkeypatch, Training, {iteration}, getattr(signal, name))
    for name in ("SIGUSR1", "SIGHUP", "SIGTERM"):
        stopped = run("parts")
        assert stopped.exit_code == EXIT_CODE, stopped.output
        assert f"Stopped by {name}" in stopped.output
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


# --- the disk is full


def test_a_full_disk_stops_nothing_but_the_saves(tmp_path, capsys):
    """The system limits files to 4 kB: states and snapshots fail, and the run reaches its end."""
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
    reads, load = [], checkpoint.load_state
    monkeypatch.setattr(checkpoint, "load_state", lambda path: reads.append(path) or load(path))
    longer = distil(run, "--duration=0.000016", "--batch-gpu=1", "--keep=5")
    assert longer.exit_code == 0, longer.output
    assert len(reads) == 1  # states are large
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
    other_moments = distil(run, "--duration=0.000032", "--glr=2e-5", "--g_beta1=0.5", "--override")
    assert other_moments.exit_code == 2
    assert "Adam's beta1 was 0 before or is now" in other_moments.output
    assert [path.name for path in tmp_path.iterdir()] == ["00000-mine"]
    assert distil(run[:-1], "--duration=0.000004").exit_code == 0  # not asked to continue: a new folder
    assert (tmp_path / "00001-mine").is_dir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = distil(run[:-1], "--duration=0.000008")
    assert "Resumed at 0.004 kimg" in again.output
    assert not (tmp_path / "00002-mine").exists()


@pytest.mark.parametrize("command", ["sid_train", "edm.train"])
def test_a_run_whose_last_snapshot_is_missing_has_failed(tmp_path, options, command):
    """Something else has its name; once that is gone, the same command writes the snapshot."""
    run, last = tmp_path / "run", "network-snapshot-000000.016.safetensors"
    if command == "sid_train":
        main, words = sid_train.main, [*options, "--metrics=none"]
    else:
        (tmp_path / "images").mkdir()
        PIL.Image.new("L", (8, 8)).save(tmp_path / "images" / "0.png")
        main, words = train.main, [f"--data={tmp_path}/images", "--cbase=8", "--cres=1", "--blocks=1", "--attn=none"]
        words += ["--augment=0", "--workers=0", "--batch=4", "--tick=0.008", "--device=cpu"]

    def call(duration):
        return CliRunner().invoke(main, [*words, f"--outdir={run}", "--nosubdir", duration])

    assert call("--duration=0.000008").exit_code == 0
    (run / last).mkdir()
    failed = call("--duration=0.000016")
    assert failed.exit_code == 2, failed.output
    assert f"{run / last}: couldn't be saved" in failed.output
    assert f"--resume={run}" in failed.output
    (run / last).rmdir()
    assert call("--duration=0.000016").exit_code == 0
    assert (run / last).is_file()


def test_a_state_lacks_an_option_that_came_later(tmp_path, options):
    """A state from before an option existed: its run had the default."""
    run = [*options, "--metrics=none", f"--outdir={tmp_path}", "--nosubdir"]
    assert distil(run, "--duration=0.000008").exit_code == 0
    state = checkpoint.load_state(checkpoint.states(tmp_path)[0])
    del state["options"]["huber"]
    state["options"]["weighting"] = None  # as versions had it that didn't say which one was chosen
    checkpoint.save_state(checkpoint.states(tmp_path)[0], state)
    refused = distil(run, "--duration=0.000016", "--huber=0.1")
    assert refused.exit_code == 2
    assert "--huber=0.1: the run in" in refused.output
    assert "has no --huber" in refused.output
    refused = distil(run, "--duration=0.000016", "--weighting=none")
    assert refused.exit_code == 2
    assert "has --weighting=omega" in refused.output
    resumed = distil(run, "--duration=0.000016", "--weighting=omega")
    assert resumed.exit_code == 0, resumed.output
    assert "no longer bit-equal" not in resumed.output
    assert "from here on" not in resumed.output


def test_a_damaged_state_is_reported_and_the_one_before_taken(tmp_path, options):
    run = [*options, "--metrics=none", f"--outdir={tmp_path}", "--nosubdir", "--dump=1"]
    assert distil(run, "--duration=0.000016").exit_code == 0
    newest, before = checkpoint.states(tmp_path)
    whole = checkpoint.load_state(newest)
    content = bytearray(newest.read_bytes())
    weight = max(whole["generator"].values(), key=torch.numel).numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 1  # other bytes may be padding
    newest.write_bytes(content)
    resumed = distil(run, "--duration=0.000016")
    assert resumed.exit_code == 0, resumed.output
    assert f"{newest}: damaged, its contents don't have their checksum" in resumed.output
    assert "Resumed at 0.008 kimg" in resumed.output
    assert before in checkpoint.states(tmp_path)
    again = checkpoint.load_state(newest)
    assert checkpoint.checksum(again["generator"]) == checkpoint.checksum(whole["generator"])


def test_a_decay_fixes_the_duration(tmp_path):
    was = checkpoint.setting({"total_kimg": 10.0, "lr_decay": "cosine"}, CPU)
    now = checkpoint.setting({"total_kimg": 20.0, "lr_decay": "cosine"}, CPU)
    with pytest.raises(UserError, match=r"--duration=0.02: .* --duration=0.01"):
        check_setting(tmp_path, was, now, train.resume_rules(TrainingConfig(lr_decay="cosine")))
    for setting in (was, now):
        setting["options"]["lr_decay"] = "none"
    check_setting(tmp_path, was, now, train.resume_rules(TrainingConfig()))


def test_two_runs_never_share_a_folder(tmp_path):
    run, script, log = tmp_path / "run", tmp_path / "script.py", tmp_path / "log.txt"
    script.write_text(
        "import sys; from torch_utils import run_folder\nwith run_folder.create(sys.argv[1], '', True, {}, None): pass"
    )
    with run_folder.create(str(run), "", True, {}, None):
        assert forked.Script([script, run], log).wait() == 1
    assert "another run is at work there" in log.read_text()
    assert forked.Script([script, run], log).wait() == 0  # the first has ended


# --- several processes


def _hanging(rank, port, folder, phase):
    """Two processes: first their weights differ, then process 1 stays away from the message that process 0 waits in.

    phase: when that is: 'training', 'preparing' for it, or before process 1 is 'watched' at all.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    watchdog.PERIOD_SEC, watchdog.START_SPARE_SEC = 0.2, 1.0
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
        if (rank, phase) == (1, "watched"):
            time.sleep(600)
        with watchdog.watching(timeout_sec=1.5) as training:
            if phase == "preparing":
                time.sleep(4)  # longer than the timeout, but nobody waits
            else:
                training.set()
            for _ in range(5):
                distributed.barrier()
                time.sleep(0.5)  # longer together than the timeout
            while rank == 1:
                time.sleep(0.1)
            distributed.barrier()


def test_hanging_and_disagreeing_processes_are_named(tmp_path):
    """All three phases at the same time, since they mostly wait."""
    started = {}
    for phase in ("training", "preparing", "watched"):
        (tmp_path / phase).mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started[phase] = start_two(_hanging, port, str(tmp_path / phase), phase, join=False).processes
    for processes in started.values():
        for process in processes:
            process.join(60)
            processes[1].terminate()  # as torchrun does then
    for phase, processes in started.items():
        codes = {process.exitcode for process in processes}
        assert codes <= {watchdog.HANG_EXIT_CODE, -signal.SIGTERM}, phase
        told = [(tmp_path / phase / f"{rank}.txt").read_text() for rank in range(2)]
        for text in told:
            assert "net: the weights on process 1 are not those on process 0 at 8 kimg" in text, phase
        assert "no progress for 1.5 seconds: process 1 keeps the others waiting" in told[0], phase


def _elsewhere(folder):
    """What two processes say when the second has another disk."""
    if distributed.rank() == 1:
        load = checkpoint.load_state
        checkpoint.load_state = lambda path: load(path.parent / "elsewhere" / path.name)
    try:
        run_folder.find_run(folder, "unused", "x", nosubdir=False)
    except UserError as error:
        return error.message
    return "resumed"


def test_a_state_that_another_node_does_not_see(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    save(tiny_distillation(), run)
    said = on_two_processes(_elsewhere, tmp_path, str(run))
    assert said[0] == said[1]
    assert "process 1 on" in said[0]
    assert "shared file system" in said[0]
    (tmp_path / "store").unlink(missing_ok=True)
    shutil.copytree(run, run / "elsewhere")
    assert on_two_processes(_elsewhere, tmp_path, str(run)) == ["resumed", "resumed"]  # a copy of it will do


@pytest.mark.parametrize(
    ("processes", "hows"),
    [(1, ["save", "hup"]), pytest.param(2, ["term", "rank"], marks=pytest.mark.slow)],
    ids=["one", "two"],
)
def test_killed_runs_are_bit_equal(tmp_path, processes, hows):
    """tests/crash/kill.py in small, with forked processes, since new ones take seconds each to load torch."""
    ended, different = kill.crash(tmp_path, hows, 8 * len(hows), processes, 1, within_sec=0.2, launch=forked.launch)
    assert ended == len(hows)
    assert not different


# --- memory


def test_nothing_is_left_behind(tmp_path):
    """The number of live tensors is the same at each tick; tests/crash/memory.py measures the process itself."""
    counts = []

    class Counter(NoReport):
        def snapshot(self, ema, nimg):
            gc.collect()
            counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    gc.collect()
    gc.freeze()  # whatever is there already is neither visited nor counted
    try:
        training_loop(tiny_distillation(**{**SCHEDULE, "total_kimg": 0.04, "snapshot_ticks": 1}), tmp_path, Counter())
    finally:
        gc.unfreeze()
    assert len(counts) == 7
    assert len(set(counts[1:-1])) == 1
