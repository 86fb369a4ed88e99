"""Runs of SiDA: schedule, several processes, resuming, low-rank updates and the doctor's findings."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import slow_ones
from PIL import Image
from sida import GAN, images_of, make, network
from test_speed_modes import FromHost
from tiny import (
    BATCH,
    BATCH_GPU,
    CPU,
    NoReport,
    assert_same_training,
    equal,
    on_two_processes,
    save,
    smoothed,
    tiny_config,
    tiny_teacher,
    weights,
)

import sid_train
from dnnlib import UserError
from edm import zoo
from sid import adversarial, doctor, lora, memory
from sid.inputs import Inputs
from sid.prepare import prepare, resume_rules
from sid.training_loop import training_loop
from torch_utils import checkpoint, run_folder, seeding

# --- runs


def states_of(distillation, iterations):
    """Weights after each iteration."""
    found = []
    for _ in range(iterations):
        distillation.iteration()
        found.append(weights(distillation))
    return found


def changed(a, b, network):
    return any(not torch.equal(a[name], b[name]) for name in a if name.startswith(network))


@pytest.mark.parametrize("share_images", [False, True])
def test_schedule(data, share_images):
    """theta is frozen for two iterations and follows the discriminator from the fifth iteration on."""
    times = {"gan_freeze_kimg": 2 * BATCH / 1e3, "gan_start_kimg": 4 * BATCH / 1e3, "share_images": share_images}
    start = weights(make(data))
    ours, others = (states_of(make(data, **times, lsg_gan=scale), 5) for scale in (1.0, 100.0))
    assert [changed(state, start, "generator") for state in ours] == [False, False, True, True, True]
    assert [changed(state, start, "ema") for state in ours] == [False, False, True, True, True]
    assert all(changed(state, start, "fake_score") for state in ours)
    assert [changed(a, b, "generator") for a, b in zip(ours, others)] == [False, False, False, False, True]


def test_the_average_forgets_the_frozen_generator(data):
    """Its half-life grows with the images since theta's first step, so the average starts there, not at the teacher."""
    states = states_of(make(data, gan_freeze_kimg=3 * BATCH / 1e3, ema_rampup_ratio=1.0), 5)
    apart = [any(not torch.equal(s[f"ema.{n[10:]}"], s[n]) for n in s if n.startswith("generator.")) for s in states]
    assert apart == [False, False, False, False, True]


def test_recomputed_activations_change_nothing(data):
    a, b = (states_of(smoothed(make(data, checkpoint=flag)), 3)[-1] for flag in (False, True))
    assert_same_training(a, b, weights(make(data)))


def test_the_discriminator_learns(data):
    """Dark images from bright noise: right at chance before, nearly always after twenty updates."""
    distillation = make(data, gan_freeze_kimg=1, lr=6e-3, augment=0)
    distillation.iteration()
    before = distillation.collector.collect()
    for _ in range(20):
        distillation.iteration()
    distillation.collector.collect()
    for _ in range(3):
        distillation.iteration()
    after = distillation.collector.collect()
    name = "Health/discriminator_accuracy"
    assert after[name]["mean"] > 0.8 > before[name]["mean"]
    assert after["Health/logit_real"]["mean"] > 0 > after["Health/logit_fake"]["mean"]
    assert after["Loss/discriminator"]["mean"] < before["Loss/discriminator"]["mean"]


def run_iterations(data, rank):
    distillation = smoothed(make(data, lora_rank=rank, lsg_gan=1.0))
    return states_of(distillation, 4)[-1], distillation.collector.collect()


RANK = 2  # of low-rank updates


@pytest.mark.parametrize("rank", [None, RANK])
def test_two_processes_train_as_one_does(tmp_path, data, rank):
    first, second = on_two_processes(run_iterations, tmp_path, str(data), rank)
    alone, statistics = run_iterations(data, rank)
    assert equal(first[0], second[0])
    assert_same_training(first[0], alone, weights(make(data, lora_rank=rank)))
    assert {"Loss/discriminator", "Health/logit_real", "Health/logit_fake"} < first[1].keys() == statistics.keys()
    for name in ("Loss/discriminator", "Health/logit_real", "Health/discriminator_accuracy"):
        assert first[1][name]["num"] == statistics[name]["num"]
        assert first[1][name]["mean"] == pytest.approx(statistics[name]["mean"], rel=1e-3)


@pytest.mark.parametrize("rank", [None, RANK])
def test_a_resumed_run_is_bit_equal(tmp_path, data, rank):
    """From a state while theta is frozen, and from a later one."""
    whole, paths = make(data, lora_rank=rank), []
    for iterations in (1, 2):
        states_of(whole, iterations)
        paths.append(save(whole, tmp_path))
    expected = states_of(whole, 1)[-1]
    for path, left in zip(paths, (3, 1)):
        torch.manual_seed(1234)
        resumed = make(data, resume=path, lora_rank=rank)
        assert equal(states_of(resumed, left)[-1], expected)
    was = resumed.state.setting
    for changes, said in (
        ({"gan": False}, "no --gan"),
        ({"gan_start_kimg": 5.0}, "--gan-start=5"),
        ({"gan_freeze_kimg": 5.0}, "--gan-freeze=5"),
        ({"lsd": 2.0}, "--lsd=2"),
        ({"lsg_gan": 2.0}, "--lsg_gan=2"),
        ({"real_images": 13}, r"--data \(images\)=13"),
    ):
        now = checkpoint.setting({**resumed.config.options(), **changes}, CPU)
        with pytest.raises(UserError, match=f"^{said}: the run in "):
            run_folder.check_setting(path, was, now, resume_rules(resumed.config))


def test_memory_counts_the_real_images():
    teacher = tiny_teacher()
    plain, gan = (memory.estimate(teacher, tiny_config(precision="fp32", augment=0, gan=g), 8) for g in (False, True))
    assert gan.fake_score_activations == 2 * plain.fake_score_activations


def test_from_the_command_line(tmp_path, data):
    """From the teacher, then on from its generator; the same command again finds its run finished."""
    torch.manual_seed(0)
    zoo.save_network(tiny_teacher(), tmp_path / "teacher.safetensors")
    common = [f"--edm_model={tmp_path}/teacher.safetensors", f"--data={data}", "--gan", "--alpha=1", "--nosubdir"]
    common += ["--batch=4", "--batch-gpu=2", "--tick=0.004", "--duration=0.000016", "--device=cpu", "--lsg_gan=0.02"]
    common += ["--gan-freeze=0.004", "--gan-start=0.008", "--metrics=none"]

    def run(*options):
        result = CliRunner().invoke(sid_train.main, [*common, *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    run(f"--outdir={tmp_path}/first")
    lines = [json.loads(line) for line in (tmp_path / "first" / "stats.jsonl").read_text().splitlines()]
    assert ["Loss/generator" in line for line in lines] == [False, True, True, True]
    assert all({"Loss/discriminator", "Health/discriminator_accuracy"} < line.keys() for line in lines)
    assert json.loads((tmp_path / "first" / "training_options.json").read_text())["real_images"] == 12
    generator = tmp_path / "first" / "network-snapshot-000000.016.safetensors"
    saved = zoo.load_network(generator)
    assert (saved.metadata["gan"], saved.metadata["lsg_gan"], saved.metadata["alpha"]) == (True, 0.02, 1)
    run(f"--outdir={tmp_path}/first")
    assert "Resumed" in (tmp_path / "first" / "log.txt").read_text()
    run(f"--outdir={tmp_path}/second", f"--transfer={generator}", "--share-images=1")
    run(f"--outdir={tmp_path}/third", f"--transfer={generator}", f"--lora-rank={RANK}")
    saved = zoo.load_network(tmp_path / "third" / "network-snapshot-000000.016.safetensors")
    assert (saved.metadata["gan"], saved.metadata["lora_rank"]) == (True, RANK)
    assert list(saved.state_dict()) == list(tiny_teacher().state_dict())
    for option, said in (("--xflip=1", "--data (images)=24"), ("--batch-gpu=4", "--batch-gpu=4")):
        refused = CliRunner().invoke(sid_train.main, [*common, f"--outdir={tmp_path}/first", option])
        assert refused.exit_code == 2
        assert f"Error: {said}: the run in" in refused.output


def test_too_many_classes(tmp_path, data):
    zoo.save_network(network("SongUNet"), tmp_path / "teacher.safetensors")
    (tmp_path / "data").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "data" / "0.png")
    (tmp_path / "data" / "dataset.json").write_text('{"labels": [["0.png", 7]]}')
    options = [f"--edm_model={tmp_path}/teacher.safetensors", f"--data={tmp_path}/data", "--gan", "--device=cpu"]
    result = CliRunner().invoke(sid_train.main, [*options, f"--outdir={tmp_path}/runs", "--batch=2"])
    assert result.exit_code == 2
    assert "--data=" in result.output.splitlines()[-1]
    assert "classes go up to 7" in result.output
    assert not (tmp_path / "runs").exists()


def test_a_guided_run_has_finite_statistics(tmp_path, data):
    distillation = make(data, guidance="long-short=2")
    training_loop(distillation, tmp_path, NoReport())
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(np.isfinite(value) for line in lines for value in line.values())


# --- the doctor

SHORT = {
    "batch": 16,
    "batch_gpu": 16,
    "augment": 0,
    "lr": 1e-2,
    "glr": 1e-5,
    "alpha": 1.0,
    "gan_freeze_kimg": 0.256,
    "gan_start_kimg": 0.512,
    "kimg_per_tick": 0.032,
    "total_kimg": 0.768,
    "ema_halflife_kimg": 0.5,
}
RUNS = {
    "discriminator-wins": ({}, "--lsg_gan (0.01)"),
    "discriminator-blind": ({"lsd": 1e-3, "glr": 1e-3}, "raise --lsd (0.001)"),
    "gan-too-strong": ({"lsg_gan": 300.0, "lr": 3e-3, "glr": 1e-3}, "lower --lsg_gan (300)"),
    "psi-diverges": ({"lr": 1.0, "total_kimg": 0.256}, "lower --lr (1)"),
    "frozen": ({"total_kimg": 0.256}, "until 0.256 kimg"),
    "too-early": ({"total_kimg": 0.32}, "2 ticks since --gan-freeze are too few"),
}


@pytest.mark.parametrize("name", slow_ones(RUNS, "discriminator-wins", "gan-too-strong"))
def test_what_the_doctor_says(tmp_path, data, capsys, name):
    changes, said = RUNS[name]
    distillation = make(data, **{**SHORT, **changes})
    training_loop(distillation, tmp_path, NoReport())
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    (tmp_path / "training_options.json").write_text(json.dumps(distillation.config.options()))
    output = CliRunner().invoke(doctor.main, [str(tmp_path)], catch_exceptions=False).output
    lines = dict(line.split(": ", 1) for line in output.splitlines())
    assert said in lines[name]
    assert not warnings or any(said in warning for warning in warnings)
    assert bool(warnings) == (name not in ("frozen", "too-early"))


class RealsOnMeta:
    def draw(self, n):
        return torch.randn(n, 1, 8, 8, device="meta"), torch.zeros(n, 3, device="meta")


@pytest.mark.parametrize("mode", [{}, {"share_images": True, "precision": "fp16"}], ids=str)
def test_an_iteration_waits_for_no_device(mode, monkeypatch):
    """As in tests/test_speed_modes.py, for both losses of SiDA and their statistics."""
    monkeypatch.setattr(zoo, "network_hash", lambda net: "")
    times = {"gan_freeze_kimg": 0, "gan_start_kimg": 0}
    config, meta = tiny_config(gan=True, batch_gpu=BATCH, **times, **mode), torch.device("meta")
    monkeypatch.setattr("sid.prepare.RealImages", lambda *_: RealsOnMeta())
    distillation = prepare(Inputs(tiny_teacher().to(meta), dataset=[]), config, meta)
    with FromHost():
        distillation.iteration()
    assert distillation.state.nimg == BATCH


def test_the_generators_adversarial_loss_is_recorded(data):
    """Once theta has an adversarial loss: ln 2 at chance, and 10 at the limit of the logits, for any images."""
    for logit, expected in ((0.0, np.log(2)), (-50.0, 10.0)):
        distillation = make(data, gan_freeze_kimg=0)  # the adversarial part begins at the third iteration
        distillation.state.fake_score_updater.step = lambda factor: torch.zeros([])
        block = adversarial.last_encoder_block(distillation.state.fake_score)
        block.register_forward_hook(lambda module, args, features, value=logit: torch.full_like(features, value))
        found = []
        for _ in range(3):
            distillation.iteration()
            found.append(distillation.collector.collect().get("Loss/adversarial"))
        assert found[:2] == [None, None]
        assert found[2]["mean"] == pytest.approx(expected, rel=1e-4)


# --- with low-rank updates

ALL = 10**6  # a rank at which no matrix is worth factoring


def test_a_large_enough_rank_is_ordinary_training(data):
    full, low = (states_of(make(data, lora_rank=rank), 4) for rank in (None, ALL))
    assert all(equal(a, b) for a, b in zip(full, low))  # theta frozen, without the adversarial part, with it


def factored(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, lora.LowRank)}


@pytest.mark.parametrize("trained", ["fake_score", "generator"])
def test_gradients_are_those_of_all_weights_seen_through_the_factors(data, trained):
    """dL/dB = s G A^T and dL/dA = s B^T G, G that of the merged networks, both losses of SiDA in full."""
    options = {"lsd": 20.0, "lsg_gan": 500.0, "gan_freeze_kimg": 0, "gan_start_kimg": 0}
    low, full = (make(data, lora_rank=rank, **options) for rank in (RANK, None))
    torch.manual_seed(3)
    for name in ("fake_score", "generator"):
        net = getattr(low.state, name)
        for update in factored(net).values():
            update.b.data += 0.1 * torch.randn_like(update.b)
        getattr(full.state, name).load_state_dict(lora.merge(net).state_dict())
    for distillation in (low, full):
        seeding.seed_at(9)
        labels = distillation.draw_conditions(BATCH_GPU)
        images = distillation.generate(labels)
        getattr(distillation, f"_backward_{trained}")(images, labels)
    net, whole = getattr(low.state, trained), dict(getattr(full.state, trained).named_parameters())
    own, updates = dict(net.named_parameters()), factored(net)
    assert len(updates) > 5
    pairs = []
    for name, update in updates.items():
        g, a, b = whole.pop(name.removesuffix(lora.SUFFIX)).grad.flatten(1), update.a.detach(), update.b.detach()
        pairs += [(update.b.grad, update.scale * g @ a.T), (update.a.grad, update.scale * b.T @ g)]
    pairs += [(own[name].grad, p.grad) for name, p in whole.items() if p.requires_grad]
    assert all(torch.linalg.norm(x - y) <= 1e-3 * torch.linalg.norm(y) + 1e-4 for x, y in pairs)
    assert all(torch.linalg.norm(y) > 1e-2 for _, y in pairs)


def test_training_moves_the_factors_only(data):
    """theta's factors move once it isn't frozen. The teacher's weights, which all networks share, stay as they are."""
    teacher = tiny_teacher()
    before = zoo.network_hash(teacher)
    low = prepare(Inputs(teacher, dataset=images_of(data)), tiny_config(**GAN, lora_rank=RANK), CPU)
    start, states = weights(low), states_of(low, 3)
    assert zoo.network_hash(teacher) == before
    addresses = {parameter.data_ptr() for parameter in teacher.parameters()}
    for net in low.state.networks.values():
        assert {update.base.data_ptr() for update in factored(net).values()} <= addresses
    moved = [{name for name in start if not torch.equal(start[name], state[name])} for state in states]
    assert {name.split(".")[0] for name in moved[0]} == {"fake_score"}
    assert {name.split(".", 1)[1] for name in start.keys() - moved[2]} == {"model.map_augment.weight"}
