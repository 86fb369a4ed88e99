"""Guidance against its formula; labels are dropped by guidance alone, and depend on seed and image alone."""

import json

import pytest
import torch
from tiny import (
    BATCH,
    BATCH_GPU,
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
from edm import zoo
from sid.config import DistillationConfig
from sid.guidance import LABEL_DROPOUT, Guidance, parse_guidance
from sid.inputs import Inputs, guided_teacher
from sid.loss import SiDLoss, omega
from sid.prepare import prepare, resume_rules
from sid.training_loop import training_loop
from torch_utils import checkpoint, run_folder
from training.conditions import Classes
from training.guidance import class_guided
from training.networks import EDMPrecond

KAPPA = 2.5
CLASSES = Classes(3)


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
    assert class_guided(net, 1, CLASSES) is net
    x.requires_grad_()
    augment = torch.randn(4, 9)
    value = class_guided(net, KAPPA, CLASSES)(x, sigma, labels, augment_labels=augment)
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
        ("long=4", (1, 1, 4, 0)),
        ("short=0.5", (0.5, 1, 1, LABEL_DROPOUT)),
        ("long-short=1.5", (1.5, 1.5, 1.5, LABEL_DROPOUT)),
    ],
)
def test_which_network_is_guided_when(text, kappas):
    """Each loss against the formula with the guided predictions written out; gradients of x_g through both."""
    guidance = parse_guidance(text)
    assert guidance == Guidance(*kappas[:3]) == parse_guidance(str(guidance))
    assert guidance.label_dropout == kappas[3]
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


def test_a_weight_of_one_changes_no_bit_and_another_does():
    plain = weights(run())
    assert equal(weights(run(guidance=Guidance())), plain)
    for text in ("long=2", "short=0.5", "long-short=2"):
        other = weights(run(guidance=text))
        assert not equal(other, plain)
        assert all(value.isfinite().all() for value in other.values())


def test_the_share_of_dropped_labels():
    labels = torch.eye(3)[torch.randint(3, [20_000])]
    torch.manual_seed(0)
    dropped = CLASSES.drop(labels, LABEL_DROPOUT)
    gone = dropped.sum(1) == 0
    assert torch.equal(dropped[~gone], labels[~gone])
    assert abs(gone.float().mean() - LABEL_DROPOUT) < 4 * (LABEL_DROPOUT * (1 - LABEL_DROPOUT) / 20_000) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(CLASSES.drop(labels, LABEL_DROPOUT), dropped)
    state = torch.get_rng_state()
    assert CLASSES.drop(labels, 0) is labels
    assert torch.equal(torch.get_rng_state(), state)  # without dropping no draw


def labels_given(distillation):
    """The labels of the calls in one iteration, by network and phase: {(network, theta's phase?): [labels]}."""
    seen, state = {}, distillation.state
    hooks = []
    for name in ("generator", "fake_score"):

        def listen(module, args, name=name):
            seen.setdefault((name, state.generator.training), []).append(args[2])

        hooks.append(getattr(state, name).register_forward_pre_hook(listen))
    distillation.iteration()
    for hook in hooks:
        hook.remove()
    return seen


def dropped(labels):
    return torch.cat(labels).sum(1) == 0


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("guidance", ["short=0.5", "long-short=2"])
def test_labels_are_dropped_in_the_fake_scores_phase_only(monkeypatch, guidance, where):
    """Dropped before generating, as published, a label is missing for theta too; dropped after, for psi alone."""
    monkeypatch.setattr("sid.guidance.LABEL_DROPOUT", 0.5)  # the batches are small
    seen = labels_given(tiny_distillation(guidance=guidance, drop_labels=where))
    own, fakes = seen["fake_score", False], seen["generator", False]
    assert len(own) == 2 * len(fakes) == 2 * BATCH // BATCH_GPU  # guided, psi is asked twice a round
    assert 0 < dropped(own[::2]).sum() < BATCH
    assert dropped(own[1::2]).all()
    assert torch.equal(dropped(fakes), dropped(own[::2]) if where == "before" else torch.zeros(BATCH, dtype=bool))
    generators = seen["fake_score", True]
    assert not dropped(generators[:: 2 if guidance.startswith("long") else 1]).any()
    assert not dropped(seen["generator", True]).any()
    again = labels_given(tiny_distillation(guidance=guidance, drop_labels=where))
    assert all(torch.equal(a, b) for a, b in zip(own, again["fake_score", False]))


def test_labels_are_dropped_as_often_as_published():
    """With probability 0.1 wherever kappa1 or kappa2 isn't 1 (SiD-LSG, arXiv:2406.01561); long guides phi alone."""
    found = {text: parse_guidance(text).label_dropout for text in ("short=0.5", "long-short=1.5", "long=1.5")}
    assert found == {"short=0.5": 0.1, "long-short=1.5": 0.1, "long=1.5": 0}


@pytest.mark.parametrize("changes", [{}, {"guidance": "long=2"}])
def test_without_a_guided_fake_score_no_label_is_dropped(changes):
    seen = labels_given(tiny_distillation(**changes))
    assert not dropped([label for key in seen if key[0] == "generator" for label in seen[key]]).any()


def test_shared_images_keep_the_labels_of_the_generators_loss():
    with pytest.raises(UserError, match=r"--share-images: --guidance=long-short=2 drops .* --drop-labels=after"):
        DistillationConfig(guidance="long-short=2", share_images=True)
    tiny_distillation(guidance="long-short=2", share_images=True, drop_labels="after").iteration()


# --- a teacher that drops labels in train mode


def test_the_teachers_own_label_dropout_stays_with_the_teacher(tmp_path):
    """Bit-equal to distilling the same weights in a network without label dropout; snapshots have none either."""
    plain, forgetful = (prepare(Inputs(forgetful_teacher(p)), tiny_config(augment=0), CPU) for p in (0, 0.5))
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
    prepare(Inputs(forgetful_teacher(label_dropout)), tiny_config(augment=0, guidance="long=2"), CPU)
    assert ("--label-dropout" in capsys.readouterr().out) is warned


def test_foreign_denoisers_are_guided_too():
    distillation = prepare(Inputs(Spy(4)), tiny_config(augment=None, guidance="long-short=3"), CPU)
    before = weights(distillation)
    distillation.iteration()
    assert not equal(weights(distillation), before)
    with pytest.raises(UserError, match=r"--guidance=long=2: the teacher has neither classes"):
        prepare(Inputs(Spy(0)), tiny_config(augment=None, guidance="long=2"), CPU)


# --- a resumed run


def test_a_resumed_run_is_bit_equal_and_keeps_its_guidance(tmp_path):
    whole = tiny_distillation(guidance="long-short=2")
    for _ in range(2):
        whole.iteration()
    path = save(whole, tmp_path)
    for _ in range(2):
        whole.iteration()
    resumed = tiny_distillation(guidance="long-short=2", resume=path)
    for _ in range(2):
        resumed.iteration()
    assert equal(weights(resumed), weights(whole))

    other = tiny_distillation(guidance="long=2", resume=path)
    now = checkpoint.setting(other.config.options(), CPU)
    with pytest.raises(UserError, match=r"--guidance=long=2: the run in .* has --guidance=long-short=2"):
        run_folder.check_setting(path, other.state.setting, now, resume_rules(other.config))


def test_snapshots_say_how_they_were_guided(tmp_path):
    training_loop(tiny_distillation(guidance="short=0.5"), tmp_path, NoReport())
    saved = zoo.load_network(tmp_path / "network-snapshot-000000.040.safetensors")
    assert saved.metadata["guidance"] == "short=0.5"
    line = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[-1])
    assert line["Health/divergence"] > 0


def test_the_bank_is_the_guided_teachers():
    """What the generator is measured against: the teacher with kappa4, whatever the fake score has."""
    net, (x, sigma, labels) = tiny_teacher().eval(), inputs()
    guided = guided_teacher(net, None, parse_guidance("kappa=1:0.5:2.5"))
    assert torch.equal(guided(x, sigma, labels), class_guided(net, KAPPA, CLASSES)(x, sigma, labels))
    assert guided_teacher(net, None, parse_guidance("short=0.5")) is guided_teacher(net, None, None) is net


@pytest.mark.parametrize(
    ("text", "kappas"),
    [
        ("zero", (0, 0, 1)),
        ("anti=-1.5", (-1.5, -1.5, 1)),
        ("kappa=0.5:1:4.5", (0.5, 1, 4.5)),
        ("long-short=2", (2, 2, 2)),
        ("short=0", (0, 1, 1)),
    ],
)
def test_guidance_by_places(text, kappas):
    guidance = parse_guidance(text)
    assert (guidance.fake_score_step, guidance.fake_score, guidance.teacher) == kappas
    assert str(guidance) == text
    assert parse_guidance(str(guidance)) == guidance


@pytest.mark.parametrize("text", ["zero=1", "anti=1", "anti", "kappa=1:2", "kappa=1:2:inf", "zero,long=2", "kappa=2"])
def test_guidance_that_makes_no_sense(text):
    with pytest.raises(UserError, match=f"--guidance={text}"):
        parse_guidance(text)


def test_zero_guidance_asks_psi_without_its_condition():
    """One call, with null conditions; no image loses a condition that psi isn't shown anyway."""
    seen = []

    def net(x, sigma, condition):
        seen.append(condition)
        return x

    guided = class_guided(net, 0, Classes(3))
    guided(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 1, 1), torch.eye(3)[:2])
    assert len(seen) == 1
    assert not seen[0].any()
    assert parse_guidance("zero").label_dropout == 0 < parse_guidance("anti=-1").label_dropout
