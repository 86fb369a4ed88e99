"""Networks of the user's own classes: --classes on the command lines, and `sid.distil`."""

import json
import sys
from pathlib import Path

import forked
import pytest
import torch
from click.testing import CliRunner
from tiny import Spy, equal, tiny_config, tiny_teacher

import sid
from dnnlib import UserError
from edm import zoo
from edm.own_classes import own_classes
from sid import doctor
from sid.report.__main__ import main as report
from torch_utils import checkpoint

ROOT = Path(__file__).resolve().parents[1]
NET = """
import torch

class Net(torch.nn.Module):
    img_resolution, img_channels, label_dim = 4, 1, 0
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return self.scale * x / (1 + sigma**2)

class NoSize(torch.nn.Module):
    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return x

class WrongSize(Net):
    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return x[:, :, 1:]

class NoSigma(Net):
    def forward(self, x):
        return x

def build():
    return Net()

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current directory, which is not on Python's path."""
    (tmp_path / "own_nets.py").write_text(NET)
    (tmp_path / "broken_nets.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield
    sys.modules.pop("own_nets", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("own_nets", "give module:Class"),
        ("absent_nets:Net", "absent_nets can't be imported"),
        ("broken_nets:Net", "broken_nets can't be imported .ZeroDivisionError"),
        ("own_nets:Absent", "own_nets.py. has no Absent"),
        ("own_nets:number", "is no class of networks"),
        ("own_nets:build", "give the class that it builds too"),
    ],
)
def test_what_names_no_network_is_refused(module, text, message):
    with pytest.raises(UserError, match=f"^--classes={text}: .*{message}"):
        own_classes(text)


@pytest.mark.parametrize("text", ["own_nets:Net", "Net=own_nets:build", "own_nets:NoSize, own_nets:Net"])
def test_a_network_of_an_own_class_is_read(module, text):
    classes = own_classes(text)
    zoo.save_network(classes["Net"](), "net.safetensors", kind="sid-generator", init_sigma=2.5)
    assert zoo.load_network("net.safetensors", classes).scale == 0.5
    assert sid.OneStepGenerator.from_pretrained("net.safetensors", "cpu", classes=classes)(2).shape == (2, 1, 4, 4)
    with pytest.raises(UserError, match=r"holds a 'Net'.*--classes=module:Class"):
        zoo.load_network("net.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoSize", "no whole number img_resolution"),
        ("WrongSize", "answers .* not images"),
        ("NoSigma", "can't be called"),
    ],
)
def test_what_is_no_denoiser_is_refused(module, name, message):
    classes = own_classes(f"own_nets:{name}")
    zoo.save_network(classes[name](), "net.safetensors")
    with pytest.raises(UserError, match=f"net.safetensors: {name} is not a denoiser.*{message}"):
        zoo.load_denoiser("net.safetensors", classes)
    with pytest.raises(UserError, match=f"teacher: {name} is not a denoiser.*{message}"):
        sid.distil(classes[name](), tiny_config(augment=0), "run")


def test_commands_distil_and_sample_an_own_class(module):
    zoo.save_network(own_classes("own_nets:Net")["Net"](), "net.safetensors")
    own = "--classes=own_nets:Net"
    options = ["--duration=0.00001", "--batch=8", "--batch-gpu=8", "--device=cpu", "--outdir=run", "--nosubdir"]
    train = [str(ROOT / "sid_train.py"), "--edm_model=net.safetensors", *options]
    for command in ([*train, own], ["-m", "edm.generate", "--network=run", own, "--grid=g.png", "--seeds=0-3"]):
        forked.run(command, Path.cwd())
    assert Path("g.png").is_file()


def test_distil_writes_a_run_folder_that_everything_reads(tmp_path):
    teacher, run_dir = tiny_teacher(), tmp_path / "run"
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    generator = sid.distil(teacher, tiny_config(total_kimg=0.016, snapshot_ticks=1), run_dir, device="cpu")
    assert equal(before, teacher.state_dict())
    assert teacher.training  # as it was
    assert equal(generator.net.state_dict(), zoo.load_network(run_dir).state_dict())
    assert equal(before, zoo.load_network(run_dir / "teacher.safetensors").state_dict())
    assert json.loads((run_dir / "training_options.json").read_text())["alpha"] == 1.2
    moved = run_dir.rename(tmp_path / "moved")
    for command in (doctor.main, report):
        assert CliRunner().invoke(command, [str(moved)], catch_exceptions=False).exit_code == 0


def test_distil_goes_on_where_it_stopped(tmp_path):
    """An interrupted run ends with the weights of an uninterrupted one."""
    whole = sid.distil(tiny_teacher(), tiny_config(total_kimg=0.032), tmp_path / "whole", device="cpu")
    sid.distil(tiny_teacher(), tiny_config(total_kimg=0.016), tmp_path / "parts", device="cpu")
    resumed = sid.distil(tiny_teacher(), tiny_config(total_kimg=0.032), tmp_path / "parts", device="cpu")
    assert equal(whole.net.state_dict(), resumed.net.state_dict())
    assert len(checkpoint.states(tmp_path / "parts")) == 2
    with pytest.raises(UserError, match="distils another teacher"):
        sid.distil(Spy(3), tiny_config(augment=0), tmp_path / "parts", device="cpu")


def test_start_must_fit_the_teacher(tmp_path):
    with pytest.raises(UserError, match=r"^start: its weights don't fit"):
        sid.distil(tiny_teacher(), tiny_config(), tmp_path / "run", start=torch.nn.Linear(2, 2), device="cpu")
    assert not (tmp_path / "run").exists()
