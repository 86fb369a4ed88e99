"""The states of a run: names, damage, faults of the disk, and which states are kept."""

import contextlib
import errno
import io
import json
import os
import random
import shutil

import pytest
import torch

from dnnlib import UserError, kimg_name, remove_unfinished
from torch_utils import checkpoint, training_stats

# --- names


def test_no_two_states_share_a_name():
    for batch in (1, 7, 8, 256, 999, 1000, 8192):
        images = range(0, 40 * max(batch, 300), batch)
        names = [kimg_name(nimg, batch) for nimg in images]
        assert len(set(names)) == len(names)
        whole = [n for n in names if "." not in n]
        kimg = sorted({nimg // 1000 for nimg in images})
        assert whole == [f"{k:06d}" for k in kimg]  # EDM's names, each once
    assert kimg_name(10_240, 256) == "000010"
    assert kimg_name(10_496, 256) == "000010.496"


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
    assert found.path == good[1]
    assert checkpoint.checksum(found.take()) == checkpoint.checksum(state(2, 16))
    assert ("training-state-000000.024.pt" in capsys.readouterr().out) == (fault == "short")
    assert bool(list(tmp_path.glob(".*.part"))) == (fault == "power")
    remove_unfinished(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert folder.save(state(3, 24), batch=8) == checkpoint.states(tmp_path)[0]  # the disk is mended


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


# --- going back to an earlier one


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_later_records_and_states_are_dropped(tmp_path, capsys):
    """A run that goes on from an earlier state ends with the same files as an unbroken run."""
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
