"""SiDA's discriminator and losses against formulas in float64, and the real images that it draws."""

import numpy as np
import pytest
import torch
from parity import INDEX, arrays, assert_close, seed_weights
from sida import GAN, images_of, make, network, reals_of
from tiny import CPU, Spy, equal, tiny_config, tiny_teacher
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from dnnlib import UserError
from sid import adversarial
from sid.adversarial import RealImages, SiDALoss, logits_of
from sid.config import Guidance
from sid.inputs import Inputs
from sid.loss import SiDLoss
from sid.prepare import prepare
from sid.state import GAN_LIMIT
from torch_utils import seeding
from torch_utils.updates import GRADIENT_LIMIT, Updater
from training.augment import EDM_MULTIPLIERS, AugmentPipe
from training.dataset import ImageFolderDataset
from training.networks import EDMPrecond

KINDS = [
    ("SongUNet", {}),
    ("SongUNet", {"encoder_type": "residual", "embedding_type": "fourier"}),
    ("SongUNet", {"encoder_type": "skip"}),
    ("DhariwalUNet", {}),
]


# --- the discriminator


@pytest.mark.parametrize(("model_type", "changes"), KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_logits_come_with_the_plain_call(model_type, changes, recompute):
    net = network(model_type, **changes).train()
    if recompute:
        for module in net.model.enc.values():
            module.checkpoint = True
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 1, 1) + 0.1, torch.eye(3)[:2]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(1)
    plain = net(x, sigma, labels)
    torch.manual_seed(1)
    with logits_of(net) as logits:
        denoised = net(x, sigma, labels)
    assert torch.equal(denoised, plain)
    assert [lg.shape for lg in logits] == [(2, 4, 4)]
    net(x, sigma, labels)
    assert len(logits) == 1  # nobody listens any more
    assert equal(net.state_dict(), before)
    logits[0].sum().backward()
    touched = {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None}
    assert "enc" in touched
    assert "dec" not in touched


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_logits_are_channel_means_of_the_last_block(model_type):
    net = network(model_type).eval()
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 1, 1) + 0.1, torch.eye(3)[:2]
    with logits_of(net) as logits:
        net(x, sigma, labels)
    _, _, c_in, c_noise = net.coefficients(sigma)
    features, emb = c_in * x, net.model._embed(c_noise.flatten(), labels, None)
    for name, module in net.model.enc.items():
        features = module(features) if name.endswith("_conv") else module(features, emb)
    assert features.shape == (2, 16, 4, 4)
    torch.testing.assert_close(logits[0], features.mean(1))


def test_a_network_without_an_encoder_is_refused(data):
    with pytest.raises(UserError, match="--gan: Spy has no encoder"):
        prepare(Inputs(Spy(), dataset=images_of(data, 0)), tiny_config(**GAN, augment=0), CPU)
    with pytest.raises(UserError, match="--data"):
        prepare(Inputs(tiny_teacher()), tiny_config(**GAN), CPU)


# --- the losses


def test_the_functions_are_cross_entropies():
    torch.manual_seed(0)
    real, fake = 20 * torch.randn(2, 5, 4, 4, dtype=torch.float64)
    ones = torch.ones_like(real)
    expected = (bce(real, ones) + bce(fake, 0 * ones)) / 2
    torch.testing.assert_close(adversarial.discriminator_loss(real, fake), expected)
    torch.testing.assert_close(adversarial.adversarial_loss(fake), bce(fake.clamp(-10, 10), ones))
    right = [((r > 0).sum() + (f < 0).sum()) / 32 for r, f in zip(real, fake)]
    torch.testing.assert_close(adversarial.accuracy(real, fake), torch.stack(right))


class Toy(torch.nn.Module):
    """A denoiser in float64 with an encoder of one layer."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.enc = torch.nn.ModuleDict({"only": torch.nn.Conv2d(1, 4, 3, padding=1)})
        self.out = torch.nn.Conv2d(4, 1, 3, padding=1)
        self.double()

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return x / (1 + sigma**2) + self.out(torch.tanh(self.model.enc["only"](x / (1 + sigma))))

    def logits(self, x, sigma):
        return self.model.enc["only"](x / (1 + sigma)).sum(1) / 4


class TwoReals:
    def draw(self, n):
        return torch.linspace(-1, 1, n * 64, dtype=torch.float64).reshape(n, 1, 8, 8), None


def toys():
    torch.manual_seed(0)
    return Toy(), Toy(), 3 * torch.randn(2, 1, 8, 8, dtype=torch.float64)


def test_the_fake_scores_loss_and_gradient_in_float64():
    _, psi, x_g = toys()
    lsd, n = 0.3, len(x_g)
    torch.manual_seed(5)
    loss = SiDALoss(TwoReals(), lsd=lsd, fake_sigma_schedule="lognormal")
    found = torch.autograd.grad(loss.fake_score_loss(psi, x_g).sum(), [*psi.parameters()])
    torch.manual_seed(5)
    sigma = (torch.randn(n, 1, 1, 1) * 1.2 - 1.2).exp()
    noise = torch.randn_like(x_g) * sigma
    real, ones = TwoReals().draw(n)[0], torch.ones(n, 8, 8, dtype=torch.float64)
    told = bce(psi.logits(real + noise, sigma), ones) + bce(psi.logits(x_g + noise, sigma), 0 * ones)  # of the batch
    expected = 0
    for i in range(n):  # image by image
        level, image = sigma[i : i + 1], x_g[i : i + 1]
        weight = (level.item() ** 2 + 0.25) / (0.5 * level.item()) ** 2
        expected = expected + weight * (((psi(image + noise[i], level) - image) ** 2).sum() + lsd * told / 2)
    for a, b in zip(found, torch.autograd.grad(expected, [*psi.parameters()])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_adversarial", [True, False])
def test_the_generators_loss_and_gradient_in_float64(is_adversarial):
    """1/2 SiD + 1/2 lsg_gan C BCE / omega per image, C its pixels, BCE one number for all images."""
    phi, psi, x_g = toys()
    loss = SiDALoss(TwoReals(), lsg_gan=0.7, alpha=1.0)
    images = [x_g.clone().requires_grad_() for _ in range(2)]
    sigma, n = loss.draw_noise(x_g)
    value = loss.generator_loss(phi, psi, images[0], None, (sigma, n), adversarial=is_adversarial)
    x_t = images[1] + sigma * n
    f_phi, f_psi = phi(x_t, sigma), psi(x_t, sigma)
    entropy = bce(psi.logits(x_t, sigma).clamp(-10, 10), torch.ones(2, 8, 8, dtype=torch.float64))
    expected = 0
    for i in range(2):
        omega = (images[1][i] - f_phi[i]).abs().mean().item()
        sid = ((f_phi - f_psi) * (f_psi - images[1]))[i].sum() / omega  # alpha = 1
        expected = expected + sid / 2 + is_adversarial * 0.7 * 64 * entropy / omega / 2
    torch.testing.assert_close(value.sum(), expected)
    a, b = (torch.autograd.grad(v, x)[0] for v, x in zip((value.sum(), expected), images))
    torch.testing.assert_close(a, b)


class Given:
    def __init__(self, images, labels):
        self.given = images, labels

    def draw(self, n):
        return self.given


@pytest.mark.parametrize("name", ["sida-song.npz", "sida-adm.npz"])
def test_both_losses_and_gradients_against_the_published_code(name):
    entry, numbers = INDEX[name], arrays(name)
    phi, psi = (
        seed_weights(EDMPrecond(**entry["init_kwargs"]), entry[f"{net}_weights_seed"])
        for net in ("teacher", "fake_score")
    )
    fake, labels, seeds, n = numbers["fake"], numbers["labels"], entry["seeds"], len(numbers["fake"])
    loss = SiDALoss(Given(numbers["real"], labels), lsd=1.0, lsg_gan=0.01 / 100, alpha=1.0)
    psi.requires_grad_(True)
    torch.manual_seed(seeds["fake_score_step"])
    value = loss.fake_score_loss(psi, fake, labels)
    pixels = fake[0].numel()
    assert_close(value, numbers["fake_score_loss"] + numbers["discriminator_loss"] / pixels)
    (value.sum() / n).backward()
    norms = torch.stack([torch.zeros([]) if p.grad is None else p.grad.norm() for p in psi.parameters()])
    assert_close(norms, numbers["fake_score_grad_norms"].nan_to_num())

    psi.requires_grad_(False)
    images = fake.clone().requires_grad_()
    torch.manual_seed(seeds["generator_step"])
    value = loss.generator_loss(phi, psi, images, labels)
    torch.manual_seed(seeds["generator_step"])
    assert_close(loss.generator_loss(phi, psi, fake, labels, adversarial=False) / 0.5, numbers["generator_sid_loss"])
    total = 100 * value.sum() / n
    assert_close(total, numbers["generator_total"])
    assert_close(torch.autograd.grad(total, images)[0], numbers["generator_grad_images"])


def test_each_loss_has_a_scale_of_its_own(data):
    """ls and lsg multiply everything; lsd and lsg_gan are to scale their own parts alone."""
    config = tiny_config(gan=True, ls=2.0, lsd=3.0, lsg=50.0, lsg_gan=0.1)
    loss = adversarial.make_loss(config, tiny_teacher(), reals_of(data))
    assert (config.ls * loss.lsd, config.lsg * loss.lsg_gan) == (3.0, pytest.approx(0.1))


def test_without_their_new_parts_the_losses_are_sids(data):
    plain, sida = SiDLoss(), SiDALoss(reals_of(data), lsd=0)
    phi, psi, labels = tiny_teacher().eval(), tiny_teacher().train(), torch.eye(3)[:2]
    x_g, pipe = torch.randn(2, 1, 8, 8), AugmentPipe(p=0.5, **EDM_MULTIPLIERS)
    found = []
    for loss in (plain, sida):
        torch.manual_seed(7)
        found.append(loss.fake_score_loss(psi.train(), x_g, labels, pipe))
        torch.manual_seed(8)
        stage = {} if loss is plain else {"adversarial": False}
        found.append(loss.generator_loss(phi, psi.eval(), x_g, labels, **stage))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1] / 2, found[3])


def test_guidance_leaves_the_logits_to_the_call_with_labels(data):
    psi, labels, x_g = tiny_teacher().eval(), torch.eye(3)[:2], torch.randn(2, 1, 8, 8)
    seen = []
    for kappa in (1.0, 3.0):
        loss = SiDALoss(reals_of(data), guidance=Guidance(fake_score_step=kappa))
        torch.manual_seed(7)
        loss.fake_score_loss(psi, x_g, labels, report=lambda name, values: seen.append(values))
    assert len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:]))


def test_gradients_are_clipped_by_value(data):
    weight = torch.nn.Parameter(torch.zeros(3))
    updater = Updater("network", [weight], torch.optim.SGD([weight], lr=1.0), limit=GAN_LIMIT)
    weight.grad = torch.tensor([0.25, -7.0, 3.0])
    updater.step()
    assert weight.tolist() == [-0.25, 1.0, -1.0]
    updaters = [(d.state.fake_score_updater, d.state.generator_updater) for d in (make(data), make(data, gan=False))]
    assert [[u.limit for u in pair] for pair in updaters] == [[1.0, 1e5], [GRADIENT_LIMIT, GRADIENT_LIMIT]]


# --- real images


def test_real_images_are_drawn_by_seed_with_their_labels(data):
    dataset = ImageFolderDataset(data, use_labels=True)
    reals = RealImages(dataset, 5, CPU)  # the networks have two classes more
    seeding.seed_at(5, 1, 16)
    images, labels = reals.draw(200)
    assert images.shape == (200, 1, 8, 8)
    assert labels.shape == (200, 5)
    known = {torch.as_tensor(dataset[i][0] / np.float32(127.5) - 1).numpy().tobytes(): i for i in range(12)}
    indices = [known[image.numpy().tobytes()] for image in images]
    assert set(indices) == set(range(12))
    assert labels.argmax(1).tolist() == [i % 3 for i in indices]
    seeding.seed_at(5, 1, 16)
    assert torch.equal(reals.draw(200)[0], images)
    assert reals_of(data, 0).draw(2)[1] is None
