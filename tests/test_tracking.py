"""--log: TensorBoard, read by its own reader, and Weights & Biases, offline and as a stand-in."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import types

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from tiny import equal, tiny_config, tiny_teacher

import sid
import sid_train
from dnnlib import UserError
from edm import train, zoo
from sid.report import progress
from torch_utils import trackers
from torch_utils.tracking import Tracking
from torch_utils.training_stats import drop_later_records

BATCH = 8
OPTIONS = {"lr": 0.001, "objective": "sid", "metrics": ["fid8"], "gan": False, "data": None}


def write_lines(path, *records):
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def picture(shade):
    return PIL.Image.new("RGB", (16, 8), (shade, 0, 255 - shade))


def write_options(folder):
    (folder / "training_options.json").write_text(json.dumps(OPTIONS))


def record(folder, nimg, loss, fid=None):
    """Writes what a run would after so many images; with a FID, also the rest of a snapshot's record."""
    kimg = nimg / 1000
    figures = {"Loss/generator": loss, "Health/odd": None, "timestamp": nimg + 0.5}
    write_lines(folder / "stats.jsonl", {"Progress/tick": 1, "Progress/kimg": kimg, **figures})
    if fid is not None:
        picture(nimg % 256).save(folder / f"fakes_{nimg // 1000:06d}.png")
        write_lines(folder / "metric-fid8.jsonl", {"kimg": kimg, "value": fid, "values": {"fid": fid}, "num_images": 8})
        parts = {"precision": 0.5, "recall": fid / 100, "recall_std": 0.1}
        write_lines(folder / "metric-pr8k3.jsonl", {"kimg": kimg, "value": 0.5, "values": parts})
        write_lines(folder / "teacher-distance.jsonl", {"kimg": kimg, "value": 0.3, "pixels": 0.1, "detail": 0.2})


# --- TensorBoard


def events(folder):
    """What TensorBoard shows of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance=dict.fromkeys(SHOWN, 0))
    return found.Reload()


SHOWN = ("scalars", "images", "tensors")


def curve(found, name):
    return [(event.step, pytest.approx(event.value)) for event in found.Scalars(name)]


def test_tensorboard_reads_curves_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    write_options(tmp_path)
    picture(7).save(tmp_path / "fakes_init.png")
    with progress.track(tmp_path, ["tensorboard"], 0, BATCH) as tracking:
        record(tmp_path, 1000, 0.5)
        tracking.update()
        with open(tmp_path / "stats.jsonl", "a") as file:
            file.write('{"Progress/kimg": 1.5, "Loss/gen')  # a record that is still being written
        tracking.update()
        with open(tmp_path / "stats.jsonl", "a") as file:
            file.write('erator": 0.4}\nnull\n{"kimg": "x"}\n{"Progress/kimg": 1.6, "Loss/generator": NaN}\n')
        picture(9).save(tmp_path / "teacher.png")
        record(tmp_path, 2000, 0.25, fid=12.0)
        tracking.update()
    found = events(tmp_path)
    assert curve(found, "Loss/generator") == [(1000, 0.5), (1500, 0.4), (2000, 0.25)]
    assert found.Scalars("Loss/generator")[-1].wall_time == 2000.5
    assert curve(found, "Metrics/fid8") == [(2000, 12)]
    assert curve(found, "Metrics/pr8k3_recall") == [(2000, 0.12)]
    assert curve(found, "Distance/teacher") == [(2000, 0.3)]
    assert curve(found, "Distance/detail") == [(2000, 0.2)]
    names = {"Loss/generator", "Metrics/fid8", "Metrics/pr8k3_precision", "Metrics/pr8k3_recall"}
    assert set(found.Tags()["scalars"]) == names | {"Distance/teacher", "Distance/pixels", "Distance/detail"}
    assert set(found.Tags()["images"]) == {"Pictures/generated", "Pictures/teacher"}
    shown = {event.step: event.encoded_image_string for event in found.Images("Pictures/generated")}
    assert sorted(shown) == [0, 2000]
    with PIL.Image.open(io.BytesIO(shown[2000])) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(2000 % 256)))
    (text,) = found.Tensors("options/text_summary")
    assert '"objective": "sid"' in text.tensor_proto.string_val[0].decode()


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    """After a kill, the run repeats what came after its last state, with other figures here to tell them apart."""
    pytest.importorskip("tensorboard")
    write_options(tmp_path)
    killed = progress.track(tmp_path, ["tensorboard"], 0, BATCH)
    for nimg in (1000, 2000, 3000):
        record(tmp_path, nimg, 0.5, fid=nimg)
        killed.update()
    drop_later_records(tmp_path, 2000)
    with progress.track(tmp_path, ["tensorboard"], 2000, BATCH) as tracking:
        tracking.update()
        record(tmp_path, 3000, 0.125, fid=30.0)
        record(tmp_path, 4000, 0.125)
        tracking.update()
    found = events(tmp_path)
    assert curve(found, "Loss/generator") == [(1000, 0.5), (2000, 0.5), (3000, 0.125), (4000, 0.125)]
    assert curve(found, "Metrics/fid8") == [(1000, 1000), (2000, 2000), (3000, 30)]
    assert [event.step for event in found.Images("Pictures/generated")] == [1000, 2000, 3000]
    killed._trackers["tensorboard"].close(True)


def test_tensorboard_shows_a_run_from_its_beginning_when_asked_for_later(tmp_path):
    pytest.importorskip("tensorboard")
    write_options(tmp_path)
    record(tmp_path, 1000, 0.5, fid=3.0)
    record(tmp_path, 2000, 0.25)
    with progress.track(tmp_path, ["tensorboard"], 2000, BATCH):
        pass
    found = events(tmp_path)
    assert curve(found, "Loss/generator") == [(1000, 0.5), (2000, 0.25)]
    assert curve(found, "Metrics/fid8") == [(1000, 3)]


# --- Weights & Biases


class StandIn(types.ModuleType):
    """As much of the wandb package as is used, which remembers what it was given."""

    def __init__(self, mode="offline"):
        super().__init__("wandb")
        self.mode, self.begun, self.logged, self.finished = mode, [], [], []

    def setup(self, settings):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

    def login(self, prompt, verify):
        assert not prompt
        return False

    def init(self, **arguments):
        self.begun.append(arguments)
        return types.SimpleNamespace(
            offline=True,
            define_metric=lambda *args, **options: None,
            log=lambda values, step, commit: self.logged.append((step, values)),
            finish=lambda exit_code: self.finished.append(exit_code),
        )

    Settings = dict
    Image = staticmethod(np.asarray)


@pytest.fixture
def wandb(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_a_distillation_is_shown_and_stays_the_same(tmp_path, wandb):
    """Interrupted and resumed; its weights are those of a run without --log."""
    plain = sid.distil(tiny_teacher(), tiny_config(total_kimg=0.032), tmp_path / "plain", device="cpu")
    sid.distil(tiny_teacher(), tiny_config(total_kimg=0.016), tmp_path / "run", device="cpu", log="wandb")
    shown = sid.distil(tiny_teacher(), tiny_config(total_kimg=0.032), tmp_path / "run", device="cpu", log="wandb")
    assert equal(plain.net.state_dict(), shown.net.state_dict())
    lines = [json.loads(line) for line in (tmp_path / "run/stats.jsonl").read_text().splitlines()]
    assert [step for step, _ in wandb.logged] == [0, 8, 16, 24, 32]
    for (step, values), line in zip(wandb.logged[1:], lines, strict=True):
        assert values["kimg"] == step / 1000 == line["Progress/kimg"]
        assert values["Loss/fake_score"] == line["Loss/fake_score"]
        assert values["Timing/img_per_sec"] == line["Timing/img_per_sec"]
    for step, name in ((0, "fakes_init.png"), (16, "fakes_000000.016.png"), (32, "fakes_000000.032.png")):
        with PIL.Image.open(tmp_path / "run" / name) as image:
            shown_there = dict(wandb.logged)[step]["Pictures/generated"]
            np.testing.assert_array_equal(shown_there, np.asarray(image.convert("RGB")))
    first, second = wandb.begun
    assert first["id"] == second["id"]
    assert (first["name"], first["project"], first["config"]["alpha"]) == ("run", "sid", 1.2)
    assert wandb.finished == [0, 0]


def test_a_teacher_s_training_is_shown(tmp_path, wandb, data):
    options = [f"--data={data}", f"--outdir={tmp_path / 'run'}", "--nosubdir", "--duration=0.000016", "--augment=0"]
    options += ["--cbase=4", "--cres=1", "--blocks=1", "--attn=none", "--batch=8", "--workers=0", "--device=cpu"]
    result = CliRunner().invoke(train.main, [*options, "--log=wandb"])
    assert result.exit_code == 0, result.output
    assert [step for step, _ in wandb.logged] == [8, 16]
    assert {"Loss/loss", "Gradient/norm", "Pictures/generated"} <= wandb.logged[-1][1].keys()
    assert json.loads((tmp_path / "run/training_options.json").read_text())["log"] == "wandb"


READER = """
import pathlib, sys
from wandb.proto import wandb_internal_pb2
for path in sorted(pathlib.Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    data, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(data):  # LevelDB's log format
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            record, message = wandb_internal_pb2.Record.FromString(message), b""
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "kimg" in values:
                print(record.run.run_id, record.history.step.num, values["kimg"], values.get("Loss/generator"))
"""
OFFLINE = """
import pathlib, sys
from sid.report import progress
folder, nimg = pathlib.Path(sys.argv[1]), int(sys.argv[2])
with progress.track(folder, ["wandb"], nimg, 8):
    pass
"""


def test_wandb_stores_a_resumed_run_offline(tmp_path):
    """W&B itself, in processes of its own, as it leaves a service behind in this one."""
    found = importlib.util.find_spec("wandb")
    if found is None or not found.origin:
        pytest.skip("without wandb")
    write_options(tmp_path)
    environment = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}

    def python(code, *arguments):
        command = [sys.executable, "-c", code, str(tmp_path), *arguments]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
        assert "Warning" not in run.stdout
        return run.stdout

    record(tmp_path, 1000, 0.5, fid=3.0)
    record(tmp_path, 2000, 0.25)
    assert "wandb sync" in python(OFFLINE, "0")
    record(tmp_path, 3000, 0.125, fid=2.0)
    assert "already has this run up to 2 kimg" in python(OFFLINE, "1000")
    steps = [line.split()[-3:] for line in python(READER).splitlines()]
    assert steps == [["1000", "1", "0.5"], ["2000", "2", "0.25"], ["3000", "3", "0.125"]]
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 1  # one id
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/Pictures/*.png"))) == 2


# --- faults


@pytest.mark.parametrize("fault", ["open", "show", "close"])
def test_a_fault_of_a_tracker_costs_the_tracker_only(tmp_path, wandb, monkeypatch, capsys, fault):
    class Faulty:
        first_nimg = 0

        def __init__(self, *_):
            self._may_fail("open")

        def _may_fail(self, where):
            if where == fault:
                raise RuntimeError(f"no\nnetwork to {where}")

        def show(self, moment):
            self._may_fail("show")

        def close(self, failed):
            self._may_fail("close")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Faulty)
    write_options(tmp_path)
    with Tracking(tmp_path, ["tensorboard", "wandb"], 0, BATCH) as tracking:
        for nimg in (1000, 2000):
            record(tmp_path, nimg, 0.5)
            tracking.update()
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert f"no\\nnetwork to {fault}" in warning
    assert [step for step, _ in wandb.logged] == [1000, 2000]


def test_a_damaged_folder_costs_the_trackers_only(tmp_path, wandb, capsys):
    write_options(tmp_path)
    (tmp_path / "stats.jsonl").mkdir()
    with Tracking(tmp_path, ["wandb"], 0, BATCH) as tracking:
        tracking.update()
    assert "Warning: --log=wandb failed" in capsys.readouterr().out


def test_a_damaged_picture_is_left_out(tmp_path, wandb):
    write_options(tmp_path)
    record(tmp_path, 1000, 0.5)
    (tmp_path / "fakes_000001.png").write_bytes(b"no picture")
    with Tracking(tmp_path, ["wandb"], 0, BATCH):
        pass
    assert wandb.logged == [(1000, {"kimg": 1.0, "Loss/generator": 0.5})]


def test_a_failed_run_is_marked_as_such(tmp_path, wandb):
    write_options(tmp_path)
    with pytest.raises(ZeroDivisionError), Tracking(tmp_path, ["wandb"], 0, BATCH):
        raise ZeroDivisionError
    assert wandb.finished == [1]


def test_what_cannot_be_used_is_refused_before_the_run(tmp_path, monkeypatch, data):
    zoo.save_network(tiny_teacher(), tmp_path / "teacher.safetensors")
    begin = {sid_train.main: f"--edm_model={tmp_path / 'teacher.safetensors'}", train.main: f"--data={data}"}
    for command, what in begin.items():
        options = [what, f"--outdir={tmp_path / 'run'}", "--device=cpu", "--dry-run", "--log=tensorboard,visdom"]
        result = CliRunner().invoke(command, options)
        assert result.exit_code != 0
        assert "--log=tensorboard,visdom: there is no visdom" in result.output
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"^--log=tensorboard: .* isn't installed .*pip install '\.\[tensorboard\]'"):
        trackers.check_trackers("tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # a folder of that name, such as wandb makes
    with pytest.raises(UserError, match=r"wandb isn't installed"):
        trackers.check_trackers("wandb")
    monkeypatch.setitem(sys.modules, "wandb", StandIn("online"))
    with pytest.raises(UserError, match=r"^--log=wandb: .*WANDB_API_KEY.*WANDB_MODE=offline"):
        trackers.check_trackers("wandb")
    assert trackers.check_trackers(None) == []
