"""The benchmark: its counts are closed forms, its report is complete; test_distillation.py tests its baseline."""

import json
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from edm import zoo
from sid.bench import measure, modes, profile, results, tasks, wrapper
from sid.bench.__main__ import main
from sid.bench.recipes import RECIPES, build_network
from sid.bench.worker import Worker, WorkerFailed
from sid.config import DistillationConfig
from sid.options import parse
from sid.probe.noise import signal_and_noise
from training.networks import EDMPrecond

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PUBLISHED = modes.parse_mode("published")


def job(what, **changes):
    common = {"recipe": "micro", "batch": 2, "batch_gpu": 1, "eval_batch": 3, "detector": None, "device": "cpu"}
    return {**common, "what": what, "mode": PUBLISHED, **changes}


# --- what is measured


class OneConvolution(torch.nn.Module):
    """A denoiser that is one 3x3 convolution."""

    def __init__(self):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = 8, 5, 0
        self.sigma_min, self.sigma_max = 0.0, float("inf")
        self.conv = torch.nn.Conv2d(5, 5, 3, padding=1)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return self.conv(x)


PASSES = [({}, 9), ({"share_images": True}, 8), ({"share_noise": True}, 7)]
PASSES += [({"share_noise": True, "score_gradient": "off"}, 5)]


@pytest.mark.parametrize(("settings", "passes"), PASSES)
def test_operations_of_a_step_in_closed_form(settings, passes):
    """theta makes images (twice, or once when shared), phi, psi and psi see them: 5 or 4 passes forward; backward
    psi's and theta's weights and, for theta, the inputs of phi and psi: 4."""
    config = DistillationConfig(augment=0.0, **settings)
    one_pass = 2 * 5 * 5 * 3 * 3 * 8 * 8
    assert measure.count_flops(OneConvolution(), config, CPU) == passes * one_pass


def test_attention_is_counted():
    config = DistillationConfig(augment=0.0)
    counts = []
    for attn_resolutions in ([], [8]):
        kwargs = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": attn_resolutions}
        counts.append(measure.count_flops(EDMPrecond(8, 1, model_type="SongUNet", **kwargs), config, CPU))
    blocks, channels, positions = 2, 8, 64  # of encoder and decoder
    forward = 2 * positions * channels * 4 * channels + 2 * 2 * positions * positions * channels
    weights, inputs = 2 * positions * channels * 4 * channels, forward + 2 * 2 * positions * positions * channels
    assert counts[1] - counts[0] == blocks * (5 * forward + 4 * inputs + 2 * weights)


def test_peak_memory_sees_what_was_held():
    meter = measure.MemoryMeter(CPU)
    meter.restart()
    held = torch.ones(1 << 28, dtype=torch.uint8)
    assert held.numel() / measure.GB == 0.25
    assert meter.peak() >= meter.baseline + 0.2


def test_one_step_by_phase_and_kind_of_operation():
    phases = profile.profile_step(tasks.make_task(job("step"), CPU), CPU)
    assert list(phases) == ["generate", "fake_score", "generator", "updates", "rest"]
    assert all(phases[name]["convolutions"] > 0 for name in ("generate", "fake_score", "generator"))
    assert "convolutions" not in phases["updates"]
    kinds = {"aten::convolution_backward": "convolutions", "aten::bmm": "attention", "aten::addmm": "dense layers"}
    kinds |= {"aten::silu_backward": "silu", "aten::native_group_norm": "group norm", "aten::add_": profile.REST}
    assert {name: profile.kind_of(name) for name in kinds} == kinds
    lines = results.profile_table("published", phases).splitlines()
    assert lines[0].startswith("published: one step")
    assert [line.split()[0] for line in lines].count("convolutions") == 1


@pytest.mark.parametrize(("recipe", "features"), [("micro", 128), ("demo", 128)])
def test_the_other_tasks_work(recipe, features):
    sampling = tasks.make_task(job("sampling", recipe=recipe), CPU)
    metrics = tasks.make_task(job("metrics", recipe=recipe), CPU)
    sampling()
    metrics()
    assert sampling.images == metrics.images == 3
    assert metrics.detector.features(metrics.batch).shape == (3, features)


# --- names


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "micro"])
def test_recipes_are_those_of_the_command_line(name):
    theirs, ours = parse([f"--recipe={name}"])[0], DistillationConfig(**RECIPES[name].config)
    compared = ["alpha", "batch", "batch_gpu", "lr", "glr", "g_beta1", "use_fp16", "dropout", "augment", "init_sigma"]
    compared += ["tmax", "ls", "lsg", "ema_halflife_kimg", "ema_rampup_ratio", "precision", "share_images"]
    assert [getattr(ours, field) for field in compared] == [getattr(theirs, field) for field in compared]


@pytest.mark.parametrize(
    ("name", "teacher"),
    [
        ("cifar10-uncond", "edm-cifar10-32x32-uncond-vp"),
        ("cifar10-cond", "edm-cifar10-32x32-cond-vp"),
        ("imagenet64-cond", "edm-imagenet-64x64-cond-adm"),
        ("ffhq64", "edm-ffhq-64x64-uncond-vp"),
        ("afhq64-v2", "edm-afhqv2-64x64-uncond-vp"),
    ],
)
def test_networks_have_the_published_shapes(name, teacher):
    published = json.loads((ROOT / "tests" / "data" / "published_networks.json").read_text())[teacher]
    with torch.device("meta"):
        net = EDMPrecond(**RECIPES[name].network)
    assert sum(p.numel() for p in net.parameters()) == published["parameters"]


def test_the_demo_is_the_embedded_teacher():
    ours = build_network(RECIPES["demo"])
    theirs = zoo.load_network(ROOT / "assets" / "fashion-mnist-16" / "teacher.safetensors")
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    kwargs = theirs.init_kwargs
    assert {name: kwargs[name] for name in RECIPES["demo"].network} == RECIPES["demo"].network


def test_modes_are_joined_from_names_and_settings():
    parsed = modes.parse_modes("published, bf16+compile+chunk=4,share,fp32+channels-last=0+batch_gpu=none+alpha=1")
    assert [mode.overrides for mode in parsed] == [
        {},
        {"precision": "bf16", "compile": True, "chunk": 4},
        {"share_images": True},
        {"precision": "fp32", "channels_last": False, "batch_gpu": None, "alpha": 1.0},
    ]
    assert [mode.published for mode in parsed] == [True, False, False, False]
    assert [mode.mathematics() for mode in parsed] == [{}, {}, {"share_images": True}, {"alpha": 1.0}]
    for overrides in modes.MODES.values():
        DistillationConfig(**overrides)


# --- the report


def turn(sec, peak):
    return {"steps": 2, "sec": sec, "phases_sec": {"generator": sec / 2, "rest": sec / 2}, "peak_GB": peak}


def test_ratios_are_paired_and_shares_are_of_the_own_precision():
    first = {"first_sec": 5.0, "baseline_GB": 0.5, "images": 8, "precision": "bf16"}
    ours, published = [turn(1.0, 2.0), turn(2.0, 2.0), turn(4.0, 3.0)], [turn(3.0, 1.0), turn(2.0, 1.0), turn(8.0, 1.0)]
    row = results.make_row(first, ours, published, flops_per_image=1e9, peaks={"fp32": 1e10, "bf16": 4e10})
    assert row["images_per_sec"] == {"median": 4.0, "min": 2.0, "max": 8.0, "rounds": [8.0, 4.0, 2.0]}
    assert row["ratio_to_published"] == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [3.0, 1.0, 2.0]}
    assert row["above_start_GB"]["rounds"] == [1.5, 1.5, 2.5]
    assert row["flops_per_sec"]["median"] == 4e9
    assert row["share_of_peak"]["median"] == pytest.approx(0.1)
    failed = {"what": "step", "mode": "other", "error": "out of memory"}
    heading, shown, other = results.table([{"what": "step", "mode": "bf16", **row}, failed]).splitlines()
    assert len(heading) == len(shown)
    assert shown.split()[:5] == ["bf16", "4", "±75%", "2", "±50%"]
    assert other.split(maxsplit=1) == ["other", "out of memory"]


def test_what_a_wrapper_costs():
    """Paired within rounds; each prediction is timed as often as asked."""
    net = build_network(RECIPES["micro"])
    seen = []
    net.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[0]))
    found = wrapper.measure_wrappers(net, 3, 2, 1.0, 4, CPU)
    assert list(found) == ["epsilon", "v", "flow", "x0"]
    assert [len(rounds) for rounds in found.values()] == [2] * 4
    assert all(alone > 0 and inside > 0 for rounds in found.values() for alone, inside in rounds)
    assert seen == [3] * (4 * 2 * 2 * (1 + 4))
    lines = results.wrapper_table({"flow": [(0.002, 0.003), (0.004, 0.0042), (0.001, 0.0012)]}).splitlines()
    assert lines[1].split() == ["flow", "2.000", "3.000", "20.0", "%", "±22.5"]


@pytest.fixture
def forks(monkeypatch):
    """Processes that are forked from one that has loaded torch, instead of new ones."""
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.mark.usefixtures("forks")
def test_modes_take_turns_in_processes_of_their_own(tmp_path):
    file = tmp_path / "bench.json"
    options = ["--recipe=micro", "--modes=published,fp32+chunk=1", "--rounds=2", "--steps=2", "--device=cpu"]
    run = CliRunner().invoke(main, [*options, "--batch=4", "--batch-gpu=2", f"--json={file}"], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    progress = re.findall(r"^round (\d) (\S+):", run.output, re.MULTILINE)
    assert progress == [(r, mode) for r in "12" for mode in ("published", "fp32+chunk=1")]
    report = json.loads(file.read_text())
    assert {"date", "machine", "versions", "options", "matmul_flops_per_sec", "rows"} <= report.keys()
    assert report["versions"]["torch"] == torch.__version__
    assert (report["batch"], report["batch_gpu"]) == (4, 2)
    assert [row["mode"] for row in report["rows"]] == ["published", "fp32+chunk=1"]
    for row in report["rows"]:
        assert row["steps"] == [2, 2]
        assert row["flops_per_image"] == report["rows"][0]["flops_per_image"] > 0
        assert list(row["phases_sec"]) == ["generate", "fake_score", "generator", "updates", "rest"]
        assert all(min(phase["rounds"]) > 0 for phase in row["phases_sec"].values())
        assert min(row["above_start_GB"]["rounds"]) > 0
        assert row["images_per_sec"]["rounds"] == [4 / sec for sec in row["sec"]["rounds"]]
    assert report["rows"][0]["ratio_to_published"]["rounds"] == [1.0, 1.0]
    assert len(report["rows"][1]["ratio_to_published"]["rounds"]) == 2
    run = CliRunner().invoke(main, ["--what=wrapper", "--recipe=micro", "--eval-batch=1", "--steps=1", "--device=cpu"])
    assert re.search(r"^epsilon +[\d.]+ +[\d.]+ +-?[\d.]+ % ±", run.output, re.MULTILINE), run.output


@pytest.mark.usefixtures("forks")
def test_what_a_mode_cannot_do_here_is_reported():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        Worker(job("step", mode=modes.parse_mode("fp16")))
    with pytest.raises(WorkerFailed, match="nothing"):
        Worker(job("step", recipe="nothing"))
    worker = Worker(job("step"))
    worker._process.kill()
    worker._process.join()
    with pytest.raises(WorkerFailed, match="ended with code -9"):  # between its turns
        worker.turn(0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modes=bf17"], "'bf17'"),
        (["--modes=fp32,fp32"], "twice"),
        (["--modes=published+compile"], "'published'"),
        (["--modes=fp32+chunk"], "chunk=4"),
        (["--modes=fp32+chunk=2.5"], "chunk=2.5"),
        (["--modes=fp32+compile=2"], "compile=2"),
        (["--modes=fp32+gan"], "real images"),
        (["--what=steps"], "--what=steps"),
        (["--json=nowhere/bench.json"], "--json"),
        (["--recipe=mnist"], "--recipe"),
        (["--seconds=inf"], "--seconds"),
    ],
)
def test_bad_options_are_one_line(options, message):
    run = CliRunner().invoke(main, options)
    assert run.exit_code == 2
    assert message in run.output.splitlines()[-1]


def test_an_existing_file_stays(tmp_path):
    file = tmp_path / "bench.json"
    file.write_text("mine")
    run = CliRunner().invoke(main, [f"--json={file}"])
    assert (run.exit_code, file.read_text()) == (2, "mine")
    assert str(file) in run.output.splitlines()[-1]


def test_signal_and_noise_are_unbiased():
    torch.manual_seed(0)
    signal, scale = torch.tensor([3.0, -4.0]).double(), torch.tensor([2.0, 0.5]).double()
    found = [signal_and_noise(signal + scale * torch.randn(4, 2).double()) for _ in range(4000)]
    mean = torch.tensor(found).mean(dim=0)
    torch.testing.assert_close(mean, torch.tensor([25.0, 4.25]), rtol=0.02, atol=0)
