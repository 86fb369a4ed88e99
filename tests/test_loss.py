"""Losses against the reference numbers, and SiD's identities against closed forms."""

import parity
import pytest
import torch

from sid import loss as sid
from sid import objectives
from sid.adversarial import make_loss
from sid.config import DistillationConfig
from sid.schedules import Karras
from torch_utils import precision
from training.augment import AugmentPipe
from training.denoiser import known_sigma
from training.loss import EDMLoss, VELoss, VPLoss

TEACHER = "edm-ddpmpp-uncond-augment"
CONDITIONAL = "edm-ddpmpp-cond-augment"
FAKE_SCORE_SEED = 200
LOSSES = parity.arrays("losses.npz")


@pytest.mark.parametrize(
    ("kind", "loss", "net"),
    [("edm", EDMLoss(), TEACHER), ("vp", VPLoss(), "vp-ddpmpp-uncond"), ("ve", VELoss(), "ve-ncsnpp-uncond")],
)
def test_teacher_losses(kind, loss, net):
    net = parity.seeded_network(net)
    torch.manual_seed(31)
    value = loss(net, LOSSES[f"{kind}_loss/images"])
    parity.assert_close(value, LOSSES[f"{kind}_loss/loss_seed31"])


@pytest.mark.parametrize(
    ("group", "name", "alpha", "tmax", "seed"),
    [("sid", TEACHER, a, 800, 41) for a in (0.0, 0.5, 1.0, 1.2)] + [("sid_cond", CONDITIONAL, 0.75, 600, 45)],
)
def test_generator_loss_and_gradient(group, name, alpha, tmax, seed):
    images = LOSSES["sid/images"].clone().requires_grad_()
    labels = LOSSES.get(f"{group}/class_labels")
    teacher, fake_score = parity.seeded_network(name), parity.seeded_network(name, FAKE_SCORE_SEED)
    torch.manual_seed(seed)
    value = sid.SiDLoss(alpha=alpha, tmax=tmax).generator_loss(teacher, fake_score, images, labels)
    key = f"{group}/generator_alpha{alpha}_tmax{tmax}_seed{seed}"
    parity.assert_close(value, LOSSES[f"{key}/loss"])
    (grad,) = torch.autograd.grad(value.sum(), images)
    parity.assert_close(grad, LOSSES[f"{key}/grad_images"])


def test_fake_score_loss_and_parameter_gradients():
    images = LOSSES["sid/images"].clone().requires_grad_()
    fake_score = parity.seeded_network(TEACHER, FAKE_SCORE_SEED).requires_grad_(True)
    torch.manual_seed(43)
    value = sid.SiDLoss().fake_score_loss(fake_score, images)
    parity.assert_close(value, LOSSES["sid/fake_score_seed43/loss"])
    value.sum().backward()
    assert images.grad is None
    expected = LOSSES["sid/fake_score_seed43/grad_norms"]
    parameters = list(fake_score.parameters())
    assert [p.grad is None for p in parameters] == expected.isnan().tolist()
    norms = torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None])
    parity.assert_close(norms, expected[~expected.isnan()])


def test_fake_score_loss_with_augmentation():
    pipe = AugmentPipe(**parity.INDEX["augment.npz"])
    fake_score = parity.seeded_network(TEACHER, FAKE_SCORE_SEED)
    torch.manual_seed(47)
    value = sid.SiDLoss().fake_score_loss(fake_score, LOSSES["sid/images"], augment_pipe=pipe)
    parity.assert_close(value, LOSSES["sid/fake_score_augmented_seed47/loss"])


# Gaussian data N(0, s^2) and a generator theta z: both optimal denoisers are linear, f(x) = v / (v + sigma^2) x.

S, THETA, SIGMA = 1.3, 0.8, 0.9


def _gaussian_terms(samples: int):
    torch.manual_seed(0)
    theta = torch.full([samples, 1, 1, 1], THETA, dtype=torch.float64, requires_grad=True)
    x_g = theta * torch.randn(samples, 1, 1, 1, dtype=torch.float64)
    noise = torch.randn_like(x_g)
    x_t = x_g + SIGMA * noise
    f_phi = S**2 / (S**2 + SIGMA**2) * x_t
    f_psi = THETA**2 / (THETA**2 + SIGMA**2) * x_t  # psi at its optimum, a constant for theta's gradient
    return theta, x_g, x_t, noise, f_phi, f_psi


def test_score_identities_hold_for_gaussians():
    """E[L1] = E[L2] = E[all converted] = E[cross converted] + const at the optimal fake score, .0985."""
    samples = 400_000
    _, x_g, x_t, noise, f_phi, f_psi = _gaussian_terms(samples)
    eps_phi, eps_psi = (x_t - f_phi) / SIGMA, (x_t - f_psi) / SIGMA
    l1 = (eps_phi - eps_psi) ** 2
    l2 = (eps_phi - eps_psi) * (eps_phi - noise)
    full = eps_phi**2 - 2 * eps_phi * noise + eps_psi * noise
    cross = (eps_phi - noise) ** 2 + eps_psi**2 - noise**2
    exact = (SIGMA / (S**2 + SIGMA**2) - SIGMA / (THETA**2 + SIGMA**2)) ** 2 * (THETA**2 + SIGMA**2)
    for term in (l1, l2, full, cross):
        error = term.std() / samples**0.5
        assert abs(term.mean() - exact) < 4 * error
    # x0 form, as the code has it: difference forms convert with 1/sigma^2.
    weight = sid.omega(x_g, f_phi)
    for alpha in (0.0, 0.5, 1.0, 1.2):
        ours = objectives.sid(x_g, x_t, f_phi, f_psi, alpha) / SIGMA**2
        torch.testing.assert_close(ours, l2 - alpha * l1)
        error = ours.std() / samples**0.5
        assert abs(ours.mean() - (1 - alpha) * exact) < 4 * error
    torch.testing.assert_close(sid.divergence(x_g, f_phi, f_psi), (SIGMA**2 * l1 / weight).flatten().detach())


def test_stopped_score_gradients_are_diff_instruct_for_every_alpha():
    torch.manual_seed(0)
    x_g, f_phi, f_psi = torch.randn(3, 4, 2, 8, 8)
    weight = sid.omega(x_g, f_phi)
    for alpha in (0.0, 1.0, 1.2):
        x = x_g.clone().requires_grad_()
        (grad,) = torch.autograd.grad((objectives.sid(x, None, f_phi, f_psi, alpha) / weight).sum(), x)
        torch.testing.assert_close(grad, (f_psi - f_phi) / weight)


def test_score_gradients_drive_the_generator_to_the_data():
    """Descending SiD's loss with psi kept at its optimum moves theta from .8 to the data's 1.3."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.05, betas=(0.0, 0.999))
    torch.manual_seed(0)
    for _ in range(200):
        optimizer.zero_grad()
        fixed = theta.item() ** 2

        def teacher(x, sigma, labels=None):
            return S**2 / (S**2 + sigma**2) * x

        def fake_score(x, sigma, labels=None, fixed=fixed):
            return fixed / (fixed + sigma**2) * x

        x_g = theta * torch.randn(512, 1, 1, 1, dtype=torch.float64)
        sid.SiDLoss(alpha=1.0, tmax=600).generator_loss(teacher, fake_score, x_g).mean().backward()
        optimizer.step()
    assert theta.item() == pytest.approx(S, abs=0.1)


def test_noise_schedule():
    t = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(Karras().sigma(t), torch.tensor([0.002, 80.0]))
    assert Karras().sigma(torch.tensor(0.5)).item() == pytest.approx(2.515, abs=2e-3)


def test_omega_is_clipped_and_has_no_gradient():
    x_g = torch.zeros(1, 1, 2, 2, requires_grad=True)
    weight = sid.omega(x_g, torch.zeros(1, 1, 2, 2))
    assert weight.item() == pytest.approx(sid.OMEGA_MIN)
    assert not weight.requires_grad


class Strict(torch.nn.Module):
    """A denoiser that refuses noise levels which it doesn't know; sigma_data as a teacher may have it."""

    sigma_min, sigma_max, sigma_data = 0.02, 100.0, 1.5

    def __init__(self, levels=None):
        super().__init__()
        self.levels, self.label_dim, self.seen = levels, 0, []

    def round_sigma(self, sigma):
        if self.levels is None:
            return sigma
        return self.levels[(sigma.reshape(-1, 1) - self.levels).abs().argmin(1)].reshape(sigma.shape)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        assert (sigma >= self.sigma_min).all()
        assert (sigma <= self.sigma_max).all()
        assert torch.equal(self.round_sigma(sigma), sigma)
        self.seen.append(sigma.flatten())
        return x / (1 + sigma**2)


@pytest.mark.parametrize("levels", [None, torch.logspace(-1.69, 2, 40)])
@pytest.mark.parametrize("compiled", [False, True])
def test_networks_are_asked_at_noise_levels_that_they_know(levels, compiled, monkeypatch):
    """In both losses, with separate and shared noise. Levels below the lowest become the lowest; none is dropped."""
    monkeypatch.setattr(torch, "compile", lambda net, **options: net)
    net = Strict(levels)
    call = precision.Compiled(net) if compiled else net
    images = torch.zeros(4000, 1, 1, 1)
    loss = sid.SiDLoss(sigma_schedule="karras", fake_sigma_schedule="lognormal=-6,3")
    torch.manual_seed(0)
    loss.generator_loss(call, call, images)
    loss.fake_score_loss(call, images)
    loss.shared_losses(call, call, images)
    assert len(net.seen) == 5
    below = (Karras().quantile(torch.arange(4000) / 4000) < 0.02).float().mean()
    assert below == pytest.approx(0.135, abs=0.005)  # of a Karras schedule's levels
    lowest = 0.02 if levels is None else levels[levels >= 0.02].min()
    if levels is None:
        assert (net.seen[0] == lowest).float().mean() == pytest.approx(below.item(), abs=0.02)


def test_noise_levels_of_a_discrete_teacher_are_its_own():
    """Every drawn level is one of improved DDPM's list, and none is 0."""
    net = parity.seeded_network("iddpm-adm-cond")
    sigma = torch.tensor([1e-9, 0.002, 0.3, 2.5, 79.0, 1e6]).reshape(-1, 1, 1, 1)
    found = known_sigma(net, sigma).flatten()
    assert set(found.tolist()) <= set(net.u[:-1].tolist())
    assert found[0] == net.u[net.M - 1]
    assert found[-1] == net.u[0]


def test_sigma_data_of_the_loss_is_the_teachers():
    teacher, config = Strict(), DistillationConfig()
    loss = make_loss(config, teacher, None)
    sigma = torch.tensor(0.7)
    torch.testing.assert_close(loss.denoising.weight(sigma), (sigma**2 + 1.5**2) / (sigma * 1.5) ** 2)
    assert make_loss(config, parity.seeded_network(TEACHER), None).denoising.sigma_data == 0.5
