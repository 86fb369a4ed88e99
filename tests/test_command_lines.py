"""Every option of every command: each value works or is refused in one line.

The options are found by inspection, so new ones are covered at once; a new command needs an entry in COMMANDS.
"""

import functools
import json
import os
import re
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fid
import sid_train
from dnnlib import IntList, download
from edm import dataset_tool, generate, hub_folder, inspection, network_files, train, zoo
from edm.metrics import data_reference, evaluate, train_detector
from edm.metrics.detector import save_detector
from edm.metrics.small_classifier import SmallClassifier
from edm.small_teachers import __main__ as small_teachers
from edm.zoo.__main__ import main as zoo_command
from sid import doctor
from sid.bench import __main__ as bench
from sid.config import DistillationConfig
from sid.probe import gradients, noise, pull
from sid.report import __main__ as report
from sid.report import pictures, serve
from sid.sweep import __main__ as sweep
from training.networks import EDMPrecond

NETWORK = {"model_type": "SongUNet", "model_channels": 4, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
DETECTOR = {"img_resolution": 8, "img_channels": 1, "num_classes": 2, "width": 4}
MEASURED = ["--data={made}/images", "--detector={made}/detector.safetensors", "--device=cpu"]
TINY = ["--batch=2", "--batch-gpu=1", "--duration=1e-6", "--device=cpu"]
COMMANDS = {  # a command line of each that works; the work itself is left out
    "sid_train": (sid_train.main, ["--edm_model={made}/net.safetensors", "--data_stat={made}/ref.npz", *TINY]),
    "fid calc": (fid.main, ["calc", "--images={made}/images", "--ref={made}/ref.npz", "--num=4", *MEASURED[1:]]),
    "fid ref": (fid.main, ["ref", "--dest=new.npz", *MEASURED]),
    "fid eval": (fid.main, ["eval", "--network={made}/net.safetensors", "--metrics=fid4,kid4", *MEASURED]),
    "edm.train": (train.main, ["--outdir=runs", "--data={made}/images", "--cbase=4", "--cres=1", "--blocks=1", *TINY]),
    "edm.generate": (generate.main, ["--network={made}/net.safetensors", "--outdir=new", "--device=cpu"]),
    "edm.dataset_tool": (dataset_tool.main, ["--source={made}/images", "--dest=new"]),
    "edm.small_teachers": (small_teachers.main, ["--outdir=new", "--only=digits"]),
    "edm.zoo list": (zoo_command, ["list"]),
    "edm.zoo fetch": (zoo_command, ["fetch", "{made}/net.safetensors"]),
    "edm.zoo verify": (zoo_command, ["verify"]),
    "edm.zoo convert": (zoo_command, ["convert", "{made}/net.safetensors", "new.pkl"]),
    "edm.zoo push": (zoo_command, ["push", "--dry-run=new", "{made}/net.safetensors", "owner/name"]),
    "edm.zoo inspect": (zoo_command, ["inspect", "{made}/net.safetensors"]),
    "sid.report": (report.main, ["{made}/run"]),
    "sid.doctor": (doctor.main, ["{made}/run"]),
    "sid.probe.gradients": (gradients.main, ["{made}/run"]),
    "sid.probe.noise": (noise.main, ["{made}/run"]),
    "sid.probe.pull": (pull.main, ["{made}/run"]),
    "sid.bench": (bench.main, ["--recipe=micro", "--steps=1", "--rounds=1", "--device=cpu"]),
    "sid.sweep": (sweep.main, ["--outdir=new", "{made}/sweep.toml"]),
    "edm.metrics.train_detector": (
        train_detector.main,
        ["--data={made}/images", "--test={made}/images", "--dest=new.safetensors", "--batch=2", "--device=cpu"],
    ),
}
READ = {"edm_model", "data_stat", "transfer", "resume", "detector", "data", "images", "ref", "network", "source"}
READ |= {"test", "names", "run", "file", "clip"}  # what names something to read

NOWHERE = ["\0", "a\0b", "a\nb", "\x1b[2Jx", "\udcff", ""]  # no option takes such text
NO_NUMBER = [*NOWHERE, "abc", "nan", "1e400", "-inf", "9" * 5000, "-1e31", "1e31", "0x1", "1 2", "²"]
NO_CHOICE = [*NOWHERE, "abc", "nan", "7", "x" * 100_000, "é"]
SECRET = "s3cr3t"
ABSENT = ["missing", "missing/deeper", "x" * 300, "x" * 100_000, "~nobody/x", "ﬁle\u202e\u200b", "file:///missing"]
ABSENT += [
    "http://[",
    "http://host",
    "http://a.invalid/x.pkl",
    f"https://u:{SECRET}@127.0.0.1:9/x.pkl",
    "ftp://x/y.pkl",
]
ODD = [*ABSENT, "..", "-1", "nan", "{made}/file", "{made}/file/x", "{made}/images", "{made}/empty", "a/b", "é\u202e"]


ODD_NAMES = ["x" * 300, "~nobody/x", ABSENT[-2], "..", "-1", "nan", "{made}/file/x", "{made}/images", "é\u202e"]


def leaves(command, prefix=()):
    """(names of the groups and of the command, command) of a command, or of all in a group."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from leaves(inner, (*prefix, name))
    else:
        yield prefix, command


def parameters():
    """(command's name, parameter) of everything that COMMANDS lists."""
    found = {}
    for name, (main, options) in COMMANDS.items():
        by_words = dict(leaves(main))
        words = () if () in by_words else (options[0],)
        found |= {(name, parameter.name): parameter for parameter in by_words[words].params}
    return found


PARAMETERS = parameters()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    net = EDMPrecond(8, 1, **NETWORK)
    zoo.save_network(net, folder / "net.safetensors")
    for path in (folder / "images" / "a", folder / "images" / "b", folder / "empty", folder / "run"):
        path.mkdir(parents=True)
    names = ["a/0.png", "a/1.png", "b/2.png", "b/3.png"]
    for i, name in enumerate(names):
        Image.new("L", (8, 8), color=i).save(folder / "images" / name)
    labels = [[name, i % 2] for i, name in enumerate(names)]
    (folder / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))
    (folder / "file").write_bytes(b"a file")
    (folder / "sweep.toml").write_text("[settings.one]\n")
    save_detector(SmallClassifier(**DETECTOR), folder / "detector.safetensors", DETECTOR)
    record = {"detector_file": "detector.safetensors", "detector": "detector"}
    np.savez(folder / "ref.npz", mu=np.zeros(128), sigma=np.eye(128), record=json.dumps(record))
    zoo.save_network(net, folder / "run" / "network-snapshot-000001.safetensors", init_sigma=2.5)
    options = {**DistillationConfig().options(), "edm_model": f"{folder}/net.safetensors"}
    (folder / "run" / "training_options.json").write_text(json.dumps(options))
    (folder / "run" / "stats.jsonl").touch()
    record = {"kimg": 1, "value": 2.0, "detector_sha256": ""}
    (folder / "run" / "metric-fid4.jsonl").write_text(json.dumps(record) + "\n")
    return folder


@pytest.fixture
def invoke(made, tmp_path, monkeypatch):
    """invoke(command's name, *options) -> result of a command line in an empty folder; without the work itself."""

    def stop(*_args, **_kwargs):
        raise SystemExit(0)

    for work in ("sid.run.training_loop", "training.training_loop.training_loop", "edm.sampler.generate_images"):
        monkeypatch.setattr(work, stop)
    for module, work in (
        (inspection, "misfit"),
        (hub_folder, "_write_picture"),
        (data_reference, "measure"),
        (evaluate, "measure"),
        (pictures, "compare"),
        (serve, "serve"),
        (bench, "run"),
        (gradients, "compare"),
        (noise, "report"),
        (pull, "report"),
        (sweep, "run_all"),
    ):
        monkeypatch.setattr(module, work, stop)
    monkeypatch.setattr(train_detector, "_augment", stop)
    read, network = network_files.read, str(made / "net.safetensors")

    @functools.cache
    def read_once(path, mtime):
        return read(path, zoo.NETWORK_CLASSES)

    def reading(path, classes):  # what is read a hundred times is read once
        known = str(path) == network
        return read_once(path, os.stat(path).st_mtime_ns) if known else read(path, classes)

    monkeypatch.setattr(network_files, "read", reading)
    check, passed = train.check_sizes, set()

    def check_once(*sizes):
        if repr(sizes) not in passed:
            check(*sizes)
        passed.add(repr(sizes))

    monkeypatch.setattr(train, "check_sizes", check_once)
    monkeypatch.setattr(small_teachers, "check_sources", stop)
    monkeypatch.setattr(download, "RETRIES", 0)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DNNLIB_MIRROR", "")
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)

    before = contents(made)

    def call(name, *options):
        nonlocal before
        folder = tmp_path / f"cwd{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        options = [option.replace("{made}", str(made)) for option in options]
        result = CliRunner().invoke(COMMANDS[name][0], options)
        after = contents(made)
        if result.exit_code == 2:
            assert (after, contents(folder)) == (before, {}), options
        before = after
        os.environ["DNNLIB_MIRROR"] = ""  # --mirror sets it
        return result

    return call


def contents(folder):
    found = {}
    for entry in os.scandir(folder):
        status = entry.stat()
        found |= {entry.path: (status.st_size, status.st_mtime_ns), **(contents(entry.path) if entry.is_dir() else {})}
    return found


def assert_clean(result, refused, what):
    """Works, or is refused in one line; `refused`: the latter, or None if either will do."""
    assert result.exception is None or type(result.exception) is SystemExit, (what, result.exc_info)
    assert result.exit_code in ((0, 2) if refused is None else (2,) if refused else (0,)), (what, result.output[-300:])
    assert "Traceback" not in result.output
    assert result.exit_code == 0 or SECRET not in result.output
    if result.exit_code == 2:
        lines = result.output.splitlines()
        assert [line for line in lines if line.startswith("Error: ")] == lines[-1:], (what, lines[-5:])
        assert lines[-1].isprintable() or "\\" in repr(lines[-1])


def test_every_command_is_listed():
    mains = {main for main, _ in COMMANDS.values()}
    known = {(main, options[0]) if isinstance(main, click.Group) else (main,) for main, options in COMMANDS.values()}
    assert known == {(main, *words) for main in mains for words, _ in leaves(main)}
    root = Path(__file__).resolve().parents[1]
    sources = [
        *root.glob("*.py"),
        *(p for d in ("dnnlib", "torch_utils", "training", "edm", "sid") for p in (root / d).rglob("*.py")),
    ]
    names = {p: p.parent.name if p.name == "__main__.py" else p.stem for p in sources}
    with_command = {
        names[p] for p in sources if "@click.command(" in (text := p.read_text()) or "@click.group(" in text
    }
    assert with_command == {name.split()[0].split(".")[-1] for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_no_python_values(name):
    main, options = COMMANDS[name]
    command = [options[0]] if isinstance(main, click.Group) else []
    for arguments in ([*command, "--help"], ["--help"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0
        assert not re.search(r"\bNone\b|\bnan\b|<[\w.]+ object|<class|Sentinel|UNSET", result.output)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_lines_work(invoke, name):
    assert_clean(invoke(name, *COMMANDS[name][1]), False, name)


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_values(invoke, name):
    """Options of text get every value; of the numbers, choices and flags, which click checks, one of each type."""
    seen = set()
    for parameter in (found for (command, _), found in PARAMETERS.items() if command == name):
        kind = parameter.type
        reads = parameter.name in READ and name != "sid.bench"  # whose processes read, not the command itself
        tried = cases(parameter, reads)
        if not isinstance(kind, click.types.StringParamType | click.Path):
            mark = (type(kind), getattr(kind, "or_inf", False))
            tried = [case for case in tried if case[1]][-1:] if mark in seen else tried
            seen.add(mark)
        for value, refused in tried:
            what = f"{name}: {parameter.name} {value[:80]!r}"
            assert_clean(invoke(name, *given(name, parameter, value)), refused, what)


def given(name, parameter, value):
    """The options that give `value` to a parameter; an argument takes the place of the command line's own."""
    base = COMMANDS[name][1]
    if isinstance(parameter, click.Option):
        return [*base, f"{max(parameter.opts, key=len)}={value}"]
    own = [other for (command, _), other in PARAMETERS.items() if command == name and isinstance(other, click.Argument)]
    first = len(base) - sum(not option.startswith("-") for option in base) + len(name.split()) - 1
    place = first + own.index(parameter)
    return [*base[:place], *(["--"] if value.startswith("-") else []), value, *base[place + 1 :]]


def cases(parameter, reads):
    """(value, whether it must be refused; None: it may be legal) for a parameter, by its type; `reads`: a file."""
    kind = parameter.type
    if getattr(parameter, "is_flag", False):
        return [("x", True), ("", True)]
    if isinstance(kind, click.IntRange | click.FloatRange):
        legal = ["1e400", "9" * 5000] if getattr(kind, "or_inf", False) else []  # infinite as numbers
        wrong = [value for value in [*NO_NUMBER, *outside(kind)] if value not in legal]
        return [(value, True) for value in wrong] + [(value, None) for value in [*legal, "inf", "１"]]
    if not isinstance(kind, click.types.StringParamType | click.Path):
        is_list = isinstance(kind, IntList | generate.SeedRanges)
        return [(value, True) for value in NO_CHOICE if value != "7" or not is_list]
    if reads:
        return [(value, True) for value in [*NOWHERE, *ABSENT]] + [
            (value, None) for value in ODD if value not in ABSENT
        ]
    return [(value, True) for value in NOWHERE] + [(value, None) for value in ODD_NAMES]


def outside(kind):
    """Numbers just beyond a range's ends; `kind` names at least one."""
    step = 1 if isinstance(kind, click.IntRange) else 1e-9
    found = [] if kind.min is None else [kind.min if kind.min_open else kind.min - step]
    found += [10**30] if isinstance(kind, click.IntRange) else []
    found += [] if kind.max is None else [kind.max if kind.max_open else kind.max + max(step, kind.max * 1e-9)]
    return [str(number) for number in found]
