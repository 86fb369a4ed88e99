"""Guidance against its formula, and the labels that are dropped: by guidance alone, by seed and image alone."""

import json

import pytest
import torch
from tiny import (
    CPU,
    NoReport,
    Spy,
    equal,
    save,
    tiny_config,
    tiny_distillation,
    tiny_teacher,
    weights,
)

from dnnlib import UserError
from edm import run_folder, zoo
from sid.config import FREE_ON_RESUME, LABEL_DROPOUT, ROUNDING, Guidance, parse_guidance
from sid.distillation import Distillation
from sid.guidance import drop_labels, guided
from sid.loss import SiDLoss, omega
from sid.training_loop import training_loop
from torch_utils import checkpoint
from training.networks import EDMPrecond

KAPPA = 2.5


def inputs(label_dim=3):
    torch.manual_seed(1)
    x, sigma = torch.randn(4, 1, 8, 8), torch.rand(4, 1, 1, 1) + 0.1
    return x, sigma, torch.eye(label_dim)[torch.tensor([0, 2, 1, 0])]


def forgetful_teacher(label_dropout=0.5):
    """One whose class drops labels in train mode, as `edm.train --label-dropout` makes it."""
    kwargs = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0}
    net = EDMPrecond(8, 1, 3, model_type="SongUNet", label_dropout=label_dropout, **kwargs)
    net.load_state_dict(tiny_teacher(augment_dim=0).state_dict())
    return net


def test_the_formula_and_its_gradients():
    net, (x, sigma, labels) = tiny_teacher().eval(), inputs()
    assert guided(net, 1) is net
    x.requires_grad_()
    augment = torch.randn(4, 9)
    value = guided(net, KAPPA)(x, sigma, labels, augment_labels=augment)
    plain, zero = (net(x, sigma, lab, augment_labels=augment) for lab in (labels, torch.zeros(4, 3)))
    torch.testing.assert_close(value, (1 - KAPPA) * zero + KAPPA * plain)
    assert (value - plain).abs().max() > 1e-3  # the labels matter to this network
    wanted = [x, *(p for p in net.parameters())]
    found = torch.autograd.grad(value.square().sum(), wanted)
    by_zero, by_plain = (torch.autograd.grad(out, wanted, 2 * value.detach()) for out in (zero, plain))
    for f, a, b in zip(found, by_zero, by_plain):
        torch.testing.assert_close(f, (1 - KAPPA) * a + KAPPA * b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "kappas"),
    [
        (None, (1, 1, 1, 0)),
        ("long=4", (1, 1, 4, 0)),
        ("short=0.5", (0.5, 1, 1, 0)),
        ("long-short=1.5", (1.5, 1.5, 1.5, LABEL_DROPOUT)),
    ],
)
def test_which_network_is_guided_when(text, kappas):
    """Each loss against the formula with the guided predictions written out; gradients of x_g through both."""
    assert parse_guidance(text) == Guidance(*kappas)
    guidance = Guidance(*kappas[:3])
    phi, psi = tiny_teacher().eval(), tiny_teacher().eval()
    for parameter in psi.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x_g, _, labels = inputs()

    def f(net, kappa, x, sigma):
        zero = net(x, sigma, torch.zeros(4, 3))
        return zero + kappa * (net(x, sigma, labels) - zero)

    loss = SiDLoss(guidance=guidance)
    torch.manual_seed(3)
    found = loss.fake_score_loss(psi, x_g, labels)
    torch.manual_seed(3)
    sigma = loss.denoising.draw_sigma(x_g)
    noisy = x_g + sigma * torch.randn_like(x_g)
    torch.testing.assert_close(found, loss.denoising.weight(sigma) * (f(psi, kappas[0], noisy, sigma) - x_g) ** 2)

    images = [x_g.clone().requires_grad_() for _ in range(2)]
    sigma, n = loss.draw_noise(x_g)
    value = loss.generator_loss(phi, psi, images[0], labels, (sigma, n))
    x_t = images[1] + sigma * n
    f_phi, f_psi = f(phi, kappas[2], x_t, sigma), f(psi, kappas[1], x_t, sigma)
    expected = (f_phi - f_psi) * ((f_phi - images[1]) - 1.2 * (f_phi - f_psi)) / omega(images[1], f_phi)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    a, b = (torch.autograd.grad(v.sum(), x)[0] for v, x in zip((value, expected), images))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def run(**changes):
    distillation = tiny_distillation(**changes)
    for _ in range(3):
        distillation.iteration()
    return distillation


def test_a_weight_of_one_changes_no_bit_and_another_does(monkeypatch):
    plain = weights(run())
    monkeypatch.setattr("sid.adversarial.parse_guidance", lambda text: Guidance())
    assert equal(weights(run(guidance="long-short=2")), plain)
    monkeypatch.undo()
    for text in ("long=2", "short=0.5", "long-short=2"):
        other = weights(run(guidance=text))
        assert not equal(other, plain)
        assert all(value.isfinite().all() for value in other.values())


def test_the_share_of_dropped_labels():
    labels = torch.eye(3)[torch.randint(3, [20_000])]
    torch.manual_seed(0)
    dropped = drop_labels(labels, LABEL_DROPOUT)
    gone = dropped.sum(1) == 0
    assert torch.equal(dropped[~gone], labels[~gone])
    assert abs(gone.float().mean() - LABEL_DROPOUT) < 4 * (LABEL_DROPOUT * (1 - LABEL_DROPOUT) / 20_000) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(drop_labels(labels, LABEL_DROPOUT), dropped)
    state = torch.get_rng_state()
    assert drop_labels(labels, 0) is labels
    assert torch.equal(torch.get_rng_state(), state)  # without dropping no draw


def labels_given(distillation):
    """The labels that psi is asked with, conditional calls of its own phase first, those of theta's loss behind."""
    seen, net = [], distillation.state.fake_score
    hook = net.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[2])))
    distillation.iteration()
    hook.remove()
    return [[lab for training, lab in seen if training is phase] for phase in (True, False)]


def test_labels_are_dropped_in_the_fake_scores_phase_only(monkeypatch):
    monkeypatch.setattr("sid.config.LABEL_DROPOUT", 0.5)  # the batches are small
    own, generators = labels_given(tiny_distillation(guidance="long-short=2"))
    assert len(own) == len(generators) == 2 * 4  # two calls a round
    assert 0 < sum((lab.sum(1) == 0).sum() for lab in own[::2]) < 8
    assert all(torch.equal(lab.sum(1), torch.ones(2)) for lab in generators[::2])
    assert all(not lab.any() for lab in [*own[1::2], *generators[1::2]])
    again = labels_given(tiny_distillation(guidance="long-short=2"))[0]
    assert all(torch.equal(a, b) for a, b in zip(own, again))


# --- a teacher that drops labels in train mode


def test_the_teachers_own_label_dropout_stays_with_the_teacher(tmp_path):
    """Bit-equal to a distillation of the same weights in a network without; nor do snapshots have it."""
    plain, forgetful = (Distillation(forgetful_teacher(p), tiny_config(augment=0), CPU) for p in (0, 0.5))
    for distillation in (plain, forgetful):
        training_loop(distillation, tmp_path, NoReport())
    assert equal(weights(plain), weights(forgetful))
    for net in forgetful.state.networks.values():
        assert net.model.label_dropout == 0
    assert forgetful.teacher.model.label_dropout == 0.5
    saved = zoo.load_network(tmp_path / "network-snapshot-000000.040.safetensors")
    assert saved.init_kwargs["label_dropout"] == 0


@pytest.mark.parametrize(("label_dropout", "warned"), [(0, True), (0.1, False)])
def test_a_teacher_that_never_lost_its_labels_is_pointed_out(capsys, label_dropout, warned):
    Distillation(forgetful_teacher(label_dropout), tiny_config(augment=0, guidance="long=2"), CPU)
    assert ("--label-dropout" in capsys.readouterr().out) is warned


def test_foreign_denoisers_are_guided_too():
    distillation = Distillation(Spy(4), tiny_config(augment=None, guidance="long-short=3"), CPU)
    before = weights(distillation)
    distillation.iteration()
    assert not equal(weights(distillation), before)
    with pytest.raises(UserError, match=r"--guidance=long=2: the teacher has no classes"):
        Distillation(Spy(0), tiny_config(augment=None, guidance="long=2"), CPU)


# --- a resumed run


def test_a_resumed_run_is_bit_equal_and_keeps_its_guidance(tmp_path):
    whole, stopped = (tiny_distillation(guidance="long-short=2") for _ in range(2))
    for _ in range(4):
        whole.iteration()
    for _ in range(2):
        stopped.iteration()
    path = save(stopped, tmp_path)
    resumed = tiny_distillation(guidance="long-short=2", resume=path)
    for _ in range(2):
        resumed.iteration()
    assert equal(weights(resumed), weights(whole))

    other = tiny_distillation(guidance="long=2", resume=path)
    now = checkpoint.setting(vars(other.config), CPU)
    with pytest.raises(UserError, match=r"--guidance=long=2: the run in .* has --guidance=long-short=2"):
        run_folder.check_setting(path, other.state.setting, now, FREE_ON_RESUME, ROUNDING)


def test_snapshots_say_how_they_were_guided(tmp_path):
    training_loop(tiny_distillation(guidance="short=0.5"), tmp_path, NoReport())
    saved = zoo.load_network(tmp_path / "network-snapshot-000000.040.safetensors")
    assert saved.metadata["guidance"] == "short=0.5"
    line = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[-1])
    assert line["Health/divergence"] > 0
