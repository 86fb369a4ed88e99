"""Ends tiny distillations at random moments, lets the same command go on, and compares with an unbroken run.

python tests/crash/kill.py --kills=30                            # SIGKILL, a third of them inside a save
python tests/crash/kill.py --kills=10 --how=term --processes=2   # SIGTERM to torchrun; hup: SIGHUP
python tests/crash/kill.py --kills=3 --how=rank --processes=2    # SIGKILL to one process; torchrun --max-restarts
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CLOCK = ("Timing/", "Resources/", "timestamp", "elapsed_sec")  # what no two runs have in common
BATCH = 4
WAIT_SEC = 300


def prepare(folder: Path) -> list[str]:
    """Makes a tiny teacher, a detector and a reference; returns the options that use them."""
    from edm import zoo
    from edm.metrics.detector import save_detector
    from edm.metrics.small_classifier import SmallClassifier
    from training.networks import EDMPrecond

    torch.manual_seed(0)
    network = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.2}
    teacher = EDMPrecond(8, 1, 3, model_type="SongUNet", augment_dim=9, **network)
    zoo.save_network(teacher, folder / "teacher.safetensors")
    detector = {"img_resolution": 8, "img_channels": 1, "num_classes": 3, "width": 4}
    save_detector(SmallClassifier(**detector), folder / "detector.safetensors", detector)
    np.savez(folder / "reference.npz", mu=np.zeros(128), sigma=np.eye(128))
    files = [f"--edm_model={folder}/teacher.safetensors", f"--data_stat={folder}/reference.npz"]
    return [*files, f"--detector={folder}/detector.safetensors", "--metrics=fid8", "--metrics-batch=8"]


def command(options: list[str], run_dir: Path, iterations: int) -> list[str]:
    """A distillation that saves at nearly every iteration."""
    numbers = [f"--batch={BATCH}", "--batch-gpu=2", f"--tick={5 * BATCH / 1000}", "--snap=4", "--lr=1e-3", "--glr=1e-3"]
    length = f"--duration={iterations * BATCH / 1e6:.9f}"
    place = [f"--outdir={run_dir}", "--nosubdir", "--device=cpu", "--save-every=0.0001"]
    return [str(ROOT / "sid_train.py"), *options, *numbers, length, *place]


def launch(arguments: list[str], log: Path, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
    """Starts a script with its arguments, with torchrun if there are several processes."""
    start = [sys.executable]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
        start += [*torchrun, "--monitor-interval=0.1", f"--nproc_per_node={processes}"]
    with open(log, "a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*start, *arguments], stdout=output, stderr=output, env=environment)


def wait_for(condition, process: subprocess.Popen, every_sec: float = 0.01) -> bool:
    """Waits until `condition()`; False if the process ends first."""
    end = time.monotonic() + WAIT_SEC
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            process.kill()
            raise TimeoutError(f"nothing happened in {WAIT_SEC} seconds")
        time.sleep(every_sec)
    return True


def states(run_dir: Path) -> set[tuple[str, int]]:
    found = set()
    for path in run_dir.glob("training-state-*.pt"):
        with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def end_at_random(
    process: subprocess.Popen, run_dir: Path, rng: random.Random, how: str, within_sec: float = 1.5
) -> bool:
    """Ends a process (or its torchrun) at most `within_sec` after it has saved a state; False if it was done before.

    how: 'kill', 'term' and 'hup' are signals, 'save' is a kill inside a save, 'rank' kills one process of torchrun's.
    """
    before = states(run_dir)
    if not wait_for(lambda: states(run_dir) - before, process):
        return False
    time.sleep(rng.random() * within_sec)
    if how == "save" and not wait_for(lambda: any(run_dir.glob(".training-state-*.part")), process, every_sec=0.0005):
        return False
    if process.poll() is not None:
        return False
    if how == "rank":
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if any("sid_train" in arg for arg in child.cmdline())]
        rng.choice(workers or children).kill()  # forked ones have no command line of their own
    else:
        process.send_signal({"term": signal.SIGTERM, "hup": signal.SIGHUP}.get(how, signal.SIGKILL))
        process.wait()
    return True


def without_clock(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.startswith(CLOCK)}


def outcome(run_dir: Path) -> dict:
    """All that a run leaves but for clocks: pictures and networks as bytes, records, the last state's tensors."""
    found = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.suffix in (".png", ".safetensors")}
    for path in run_dir.glob("*.jsonl"):
        found[path.name] = [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
    last = max(run_dir.glob("training-state-*.pt"))
    found["last state"] = flat(without_clock(torch.load(last, weights_only=True)))
    return found


def flat(value, name="") -> dict:
    """{name: bytes or plain value} of nested dicts and lists; the checksum covers a clock too, so it is left out."""
    if isinstance(value, torch.Tensor):
        return {name: value.numpy().tobytes()}
    if not isinstance(value, dict | list | tuple):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, item in items if key != "sha256" for k, v in flat(item, f"{name}.{key}").items()}


def differences(found: dict, expected: dict) -> list[str]:
    """Names of what is missing, additional or different."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def crash(
    folder: Path,
    hows: list[str],
    iterations: int,
    processes: int,
    seed: int,
    within_sec: float = 1.5,
    launch: Callable = launch,
) -> tuple[int, list[str]]:
    """(how often the run was ended, what differs from the unbroken one in the end).

    hows: see `end_at_random`. launch: starts the processes.
    """
    options, rng = prepare(folder), random.Random(seed)
    whole, broken, log = folder / "whole", folder / "broken", folder / "log.txt"
    arguments, restarts = command(options, broken, iterations), 3 if "rank" in hows else 0
    reference = launch(command(options, whole, iterations), log, processes)
    assert reference.wait() == 0, log.read_text()
    ended = 0
    process = launch(arguments, log, processes, restarts)
    for how in hows:
        if not end_at_random(process, broken, rng, how, within_sec):
            break
        ended += 1
        if how != "rank":  # torchrun restarts by itself
            process = launch(arguments, log, processes, restarts)
    assert process.wait() == 0, log.read_text()
    return ended, differences(outcome(broken), outcome(whole))


@click.command()
@click.option("--kills", default=30, show_default=True)
@click.option("--iterations", help="Length of the run [default: 20 per kill]", type=int)
@click.option("--how", type=click.Choice(["kill", "term", "hup", "rank"]), default="kill", show_default=True)
@click.option("--processes", default=1, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, iterations: int | None, how: str, processes: int, seed: int) -> None:
    """End a tiny run at random moments, continue it, compare its result with an unbroken run's."""
    start = time.monotonic()
    hows = (["kill", "kill", "save"] * kills if how == "kill" else [how] * kills)[:kills]
    with tempfile.TemporaryDirectory() as folder:
        ended, different = crash(Path(folder), hows, iterations or 20 * kills, processes, seed)
    print(f"{ended} times ended by {how}, {time.monotonic() - start:.0f} seconds; ", end="")
    print(f"DIFFERENT: {', '.join(different)}" if different else "bit-equal to the unbroken run")
    raise SystemExit(bool(different) or ended < kills)


if __name__ == "__main__":
    main()
