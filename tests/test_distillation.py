"""The distillation against plain formulas, and against itself on two processes and after a resume."""

import json
import math

import pytest
import torch
from tiny import (
    BATCH,
    BATCH_GPU,
    CPU,
    SMOOTH_EPS,
    NoReport,
    Spy,
    assert_same_training,
    equal,
    on_two_processes,
    smoothed,
    tiny_config,
    tiny_distillation,
    tiny_teacher,
    weights,
)

from edm import zoo
from sid import OneStepGenerator, __version__
from sid.bench.published_step import PublishedStep, plain_network
from sid.distillation import FAKE_SCORE_PHASE, GENERATOR_PHASE
from sid.inputs import Inputs
from sid.prepare import prepare
from sid.training_loop import skipped_updates, training_loop
from torch_utils import checkpoint
from torch_utils.updates import MAX_SKIPPED_UPDATES, DivergenceError, ema_beta, lr_factor
from training.networks import EDMPrecond

# --- one process against two, a resumed run against an uninterrupted one


SHARED_NOISE = {"share_noise": True, "augment": None}


def run_iterations(mode):
    distillation = smoothed(tiny_distillation(**mode))
    for _ in range(3):
        distillation.iteration()
    return weights(distillation), distillation.collector.collect()


@pytest.mark.parametrize("mode", [{}, SHARED_NOISE], ids=["plain", "shared noise"])
def test_two_processes_train_as_one_does(tmp_path, mode):
    first, second = on_two_processes(run_iterations, tmp_path, mode)
    alone, statistics = run_iterations(mode)
    start = weights(tiny_distillation())
    assert equal(first[0], second[0])
    assert_same_training(first[0], alone, start)
    assert first[1] == second[1]
    for name, record in statistics.items():
        assert first[1][name]["num"] == record["num"] * (2 if name.startswith("Gradient") else 1)
        assert first[1][name]["mean"] == pytest.approx(record["mean"], rel=1e-4)


DECAYED = {"lr_decay": "cosine", "lr_rampup_kimg": 0.02}


@pytest.mark.parametrize("schedule", [{}, DECAYED, SHARED_NOISE], ids=["constant", "decayed", "shared noise"])
def test_a_resumed_run_is_bit_equal(tmp_path, schedule):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    uninterrupted = tiny_distillation(**schedule)
    training_loop(uninterrupted, whole, NoReport())

    stopped = tiny_distillation(**schedule)
    for _ in range(2):
        stopped.iteration()
    for parameter in stopped.state.fake_score.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    stopped.state.fake_score_updater.step()
    stopped.state.tick = 2
    checkpoint.save_state(parts / "training-state-000000.pt", stopped.state.contents(stopped.config, {}))
    torch.manual_seed(1234)  # a new process has other random numbers
    resumed = tiny_distillation(resume=parts / "training-state-000000.pt", **schedule)
    assert (resumed.state.nimg, resumed.state.tick, resumed.state.fake_score_updater.skipped) == (2 * BATCH, 2, 1)
    training_loop(resumed, parts, NoReport())

    assert equal(weights(resumed), weights(uninterrupted))
    lines, tail = (
        [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()] for folder in (whole, parts)
    )
    assert [line["Progress/tick"] for line in tail] == [3, 4, 5]
    for line, again in zip(lines[2:], tail):
        shown = [name for name in line if name.startswith(("Progress", "Loss", "Gradient"))]
        assert {"Loss/generator", "Loss/fake_score"} <= set(shown)
        assert [line[name] for name in shown] == [again[name] for name in shown]


# --- one step


def attending_teacher(**changes):
    """A denoiser with attention, resampling, classes, augmentation labels and dropout."""
    torch.manual_seed(0)
    kwargs = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1}
    kwargs |= {"attn_resolutions": [4], "augment_dim": 9, "dropout": 0.2}
    net = EDMPrecond(8, 1, 3, **{**kwargs, **changes})
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


def dropout(x, p=0.5, training=True):
    """Dropout whose mask doesn't depend, as PyTorch's does, on the layout of x in memory."""
    return x * (torch.rand(x.shape) >= p) / (1 - p) if training else x


def test_an_iteration_is_the_algorithm(monkeypatch):
    """Against the formulas written out, with dropout, augmentation, classes, accumulation and the moving average."""
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    teacher = attending_teacher()
    settings = {"g_beta1": 0.5, "ls": 2.0, "lsg": 50.0, "tmax": 700, "alpha": 1.1}
    config = tiny_config(**settings, ema_halflife_kimg=1, ema_rampup_ratio=2.0)
    real, reference = prepare(Inputs(teacher), config, CPU), PublishedStep(teacher, config, CPU)
    for updater in (real.state.generator_updater, real.state.fake_score_updater):
        assert updater.optimizer.defaults["eps"] == 1e-8  # as published
    smoothed(real)
    for optimizer in reference._optimizers.values():
        optimizer.param_groups[0]["eps"] = SMOOTH_EPS
    for _ in range(3):
        real.iteration()
        reference.iteration()
    assert real.state.nimg == reference.nimg == 3 * BATCH
    for name in ("generator", "fake_score", "ema"):
        found, expected = getattr(real.state, name).state_dict(), getattr(reference, name).state_dict()
        assert_same_training(found, expected, teacher.state_dict())


def test_the_reference_has_plain_networks_and_updates(monkeypatch):
    """Explicit attention, convolutions for resampling, and no fused update, in networks of the same function."""

    def refuse(*args, **kwargs):
        raise AssertionError("fused")

    net = attending_teacher(model_type="DhariwalUNet", model_channels=128).eval()  # two heads
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 5.0]), torch.eye(3)[:2]
    torch.testing.assert_close(plain_network(net)(x, sigma, labels), net(x, sigma, labels), rtol=1e-4, atol=1e-5)
    step = PublishedStep(attending_teacher(), tiny_config(batch=2), CPU)
    for name in ("scaled_dot_product_attention", "interpolate", "avg_pool2d"):
        monkeypatch.setattr(torch.nn.functional, name, refuse)
    step.iteration()
    for optimizer in step._optimizers.values():
        assert not any(group["foreach"] or group["fused"] for group in optimizer.param_groups)


def test_modes_and_gradients_of_each_phase():
    teacher = Spy()
    distillation = tiny_distillation(teacher, augment=0)
    state, updates = distillation.state, []
    for updater in (state.fake_score_updater, state.generator_updater):

        def step(*args, name=updater.name, original=updater.step):
            nets = {"generator": state.generator, "fake score": state.fake_score, "phi": teacher, "ema": state.ema}
            updates.append((name, [n for n, net in nets.items() if any(p.grad is not None for p in net.parameters())]))
            return original(*args)

        updater.step = step
    Spy.calls.clear()
    distillation.iteration()
    names = {id(state.generator): "theta", id(state.fake_score): "psi", id(teacher): "phi", id(state.ema): "ema"}
    rounds = BATCH // BATCH_GPU
    psi_phase = [("theta", False, False, True), ("psi", True, True, True)]
    theta_phase = [("theta", True, True, True), ("phi", False, True, False), ("psi", False, True, False)]
    assert [(names[id(net)], *rest) for net, *rest in Spy.calls] == psi_phase * rounds + theta_phase * rounds
    assert updates == [("fake score", ["fake score"]), ("generator", ["generator"])]
    assert all(p.requires_grad for net in (state.generator, state.fake_score) for p in net.parameters())
    for net in (teacher, state.ema):
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())


def test_unused_augmentation_weights_stay_as_they_are():
    with_pipe, without = tiny_distillation(augment=0.5), tiny_distillation(augment=0)
    for distillation in (with_pipe, without):
        distillation.iteration()
    before = tiny_teacher().model.map_augment.weight
    for distillation, trained in ((with_pipe, True), (without, False)):
        state = distillation.state
        assert torch.equal(state.generator.model.map_augment.weight, before)
        assert torch.equal(state.fake_score.model.map_augment.weight, before) != trained


def test_class_labels_are_uniform_and_one_hot():
    distillation = tiny_distillation(batch=6000, batch_gpu=3000)
    seen = [labels for phase in (FAKE_SCORE_PHASE, GENERATOR_PHASE) for labels in distillation._rounds(phase)]
    assert len(seen) == 4
    assert len({labels.sum(0)[0].item() for labels in seen}) > 1
    labels = torch.cat(seen)
    assert labels.dtype == torch.float32
    assert labels.shape == (12000, 3)
    assert torch.equal(labels.sum(1), torch.ones(12000))
    assert torch.equal(labels.max(1).values, torch.ones(12000))
    counts = labels.sum(0)
    assert ((counts - 4000) ** 2 / 4000).sum() < 13.8  # chi-square, 2 degrees of freedom, p = .001


def test_average_and_schedules():
    assert ema_beta(256, 0, 5e5, 0.05) == 0
    assert ema_beta(256, 100_000, 5e5, 0.05) == pytest.approx(0.5 ** (256 / 5000))
    assert ema_beta(256, 10**9, 5e5, 0.05) == pytest.approx(0.5 ** (256 / 5e5))
    assert ema_beta(256, 0, 5e5, None) == pytest.approx(0.5 ** (256 / 5e5))
    assert ema_beta(256, 10**9, 0, 0.05) == 0
    assert [lr_factor(n, 1000) for n in (0, 500, 1000)] == [1, 1, 1]
    assert [lr_factor(n, 1000, 200) for n in (0, 50, 200, 900)] == [0, 0.25, 1, 1]
    assert [lr_factor(n, 1000, 0, "linear") for n in (0, 250, 1000, 1200)] == [1, 0.75, 0, 0]
    assert lr_factor(250, 1000, 500, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)) / 2)


# --- health


@pytest.mark.parametrize(
    ("method", "hit", "bad"),
    [("generator_loss", "generator", math.nan), ("fake_score_loss", "fake_score", math.inf)],
    ids=["generator", "fake score"],
)
def test_a_non_finite_loss_never_reaches_the_weights(method, hit, bad):
    distillation = tiny_distillation(batch=2)
    distillation.iteration()
    before, state, original = weights(distillation), distillation.state, getattr(distillation.loss, method)
    setattr(distillation.loss, method, lambda *args, **kwargs: original(*args, **kwargs) * bad)
    distillation.iteration()
    after = weights(distillation)
    other = {"generator": "fake_score", "fake_score": "generator"}[hit]
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(hit))
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith(other))
    assert all(value.isfinite().all() for value in after.values())
    assert skipped_updates(state) == {f"Health/{hit}_skipped": {"mean": 1}}
    assert all(math.isfinite(record["mean"]) for record in distillation.collector.collect().values())

    for _ in range(MAX_SKIPPED_UPDATES - 2):
        distillation.iteration()
    setattr(distillation.loss, method, original)
    distillation.iteration()  # one good update and the count in a row starts anew
    setattr(distillation.loss, method, lambda *args, **kwargs: original(*args, **kwargs) * bad)
    for _ in range(MAX_SKIPPED_UPDATES - 1):
        distillation.iteration()
    with pytest.raises(DivergenceError) as error:
        distillation.iteration()
    assert hit.replace("_", " ") in error.value.message
    assert "kimg" in error.value.message
    assert error.value.exit_code == 3
    assert skipped_updates(state)[f"Health/{hit}_skipped"]["mean"] == 2 * MAX_SKIPPED_UPDATES - 1
    assert all(value.isfinite().all() for value in weights(distillation).values())


# --- a plug-in


@pytest.mark.parametrize("label_dim", [0, 4])
def test_a_foreign_denoiser_distils_unchanged(tmp_path, label_dim):
    torch.manual_seed(0)
    distillation = prepare(Inputs(Spy(label_dim)), tiny_config(augment=None), CPU)
    before = weights(distillation)
    ema = training_loop(distillation, tmp_path, NoReport())
    after = weights(distillation)
    for name in before:
        assert after[name].isfinite().all()
        assert not torch.equal(before[name], after[name]), name
    path = tmp_path / "network-snapshot-000000.040.safetensors"
    generator = zoo.load_network(path, classes={"Spy": lambda: Spy(label_dim)})
    assert zoo.network_hash(generator) == zoo.network_hash(ema)
    torch.manual_seed(0)
    teacher_sha256 = zoo.network_hash(Spy(label_dim))
    own = {"kind": "sid-generator", "init_sigma": 2.5, "alpha": 1.2, "tmax": 800, "kimg": 0.04, "seed": 5}
    options = {"total_kimg": 0.04, "batch": 8, "lr": 1e-3, "glr": 2e-3, "weighting": "omega", "augment": 0.0}
    assert generator.metadata == {
        **own,
        "version": __version__,
        "teacher_sha256": teacher_sha256,
        "papers": ["2404.04057"],
        "options": {**options, "precision": "fp32"},
    }
    images = OneStepGenerator(generator)(3, class_idx=2 if label_dim else None)
    assert images.shape == (3, 3, 8, 8)
    again = prepare(Inputs(Spy(label_dim)), tiny_config(augment=None), CPU)
    with pytest.raises(Exception, match="another teacher"):
        again.state.load(tmp_path / "training-state-000000.040.pt")
