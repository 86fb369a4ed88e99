"""Every objective of the family against its closed form for Gaussians, and against its form in noise predictions.

Data N(M, S^2), a generator mu + theta z: every optimal denoiser is affine. A variable is written by its coefficients on
(1, z, n), which are orthonormal, so a product's expectation is the dot product of coefficients.
"""

import math

import numpy as np
import pytest
import torch

from dnnlib import UserError
from sid.config import DistillationConfig
from sid.loss import SiDLoss, omega
from sid.objectives import OBJECTIVES

M, S, SIGMA = 0.3, 1.3, 0.9
MU, THETA = -0.2, 0.8
SAMPLES = 200_000
A = S**2 / (S**2 + SIGMA**2)
B = THETA**2 / (THETA**2 + SIGMA**2)
OPTIMAL, LAGGING = (B, MU), (0.6, 0.1)  # gain and mean of psi
ALPHA = 0.7


def denoiser(gain, mean):
    return lambda x, sigma, labels=None: mean + gain * (x - mean)


def loss_of(objective, weighting="none", **options):
    return SiDLoss(ALPHA, objective=objective, weighting=weighting, sigma_schedule=f"single={SIGMA}", **options)


def measured(loss, psi):
    """Means of the loss and of its derivatives by theta and mu, each with its standard error."""
    torch.manual_seed(0)
    theta, mu = (torch.full([SAMPLES, 1, 1, 1], v, dtype=torch.float64, requires_grad=True) for v in (THETA, MU))
    x_g = mu + theta * torch.randn(SAMPLES, 1, 1, 1, dtype=torch.float64)
    value = loss.generator_loss(denoiser(A, M), denoiser(*psi), x_g)
    gradients = torch.autograd.grad(value.sum(), [theta, mu])
    return [(v.mean().item(), v.std().item() / SAMPLES**0.5) for v in (value.detach(), *gradients)]


def exact(objective, psi, theta=THETA, mu=MU, alpha=ALPHA):
    """The expectation and its derivatives by theta and mu, with psi fixed, from the forms in noise predictions."""
    theta, mu = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (theta, mu))
    zero, one = torch.zeros([], dtype=torch.float64), torch.tensor([1.0, 0, 0], dtype=torch.float64)
    n = torch.tensor([0.0, 0, 1], dtype=torch.float64)
    x_g = torch.stack([mu, theta, zero])
    x_t = x_g + SIGMA * n
    f_phi, f_psi = (mean * one + gain * (x_t - mean * one) for gain, mean in ((A, M), psi))
    e_phi, e_psi = (x_t - f_phi) / SIGMA, (x_t - f_psi) / SIGMA
    l1 = (e_phi - e_psi) @ (e_phi - e_psi)
    value = {
        "l1": lambda: l1,
        "l2": lambda: (e_phi - e_psi) @ (e_phi - n),
        "cross": lambda: (e_phi - n) @ (e_phi - n) + e_psi @ e_psi - n @ n,
        "full": lambda: e_phi @ e_phi - 2 * e_phi @ n + e_psi @ n,
        "diff-instruct": lambda: (f_psi - f_phi).detach() @ x_g / SIGMA**2,
    }[objective.replace("sid", "l2").removesuffix("-l1") if objective != "l1" else "l1"]()
    value = SIGMA**2 * (value - (alpha * l1 if objective == "sid" or objective.endswith("-l1") else 0))
    return [value.item(), *(g.item() for g in torch.autograd.grad(value, [theta, mu]))]


@pytest.mark.parametrize("psi", [OPTIMAL, LAGGING], ids=["optimal", "lagging"])
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "dmd"])
def test_value_and_gradient_have_their_closed_forms(objective, psi):
    """With psi at its optimum and away from it, the measured values are within four standard errors."""
    for (mean, error), expected in zip(measured(loss_of(objective), psi), exact(objective, psi)):
        assert abs(mean - expected) < 4 * error + 1e-6


def test_expectations_agree_at_the_optimal_fake_score():
    values = [exact(name, OPTIMAL)[0] for name in ("l1", "l2", "cross", "full")]
    assert values == pytest.approx([values[0]] * 4)
    assert exact("sid", OPTIMAL)[0] == pytest.approx((1 - ALPHA) * values[0])


def test_expectations_differ_by_known_terms_away_from_it():
    """With d = f_phi - f_psi*, e = f_psi - f_psi* and r = x_t - f_psi*, as docs/method.md lists them."""
    square = THETA**2 + SIGMA**2  # of x_t about its mean

    def product(f, g):  # of affine functions of x_t: (value at x_t's mean, slope)
        return f[0] * g[0] + f[1] * g[1] * square

    def at_mean(gain, mean):
        return np.array([mean + gain * (MU - mean), gain])

    d, e = at_mean(A, M) - at_mean(*OPTIMAL), at_mean(*LAGGING) - at_mean(*OPTIMAL)
    r = np.array([MU, 1]) - at_mean(*OPTIMAL)
    expected = {
        "l1": product(d - e, d - e),
        "l2": product(d, d) - product(d, e),
        "cross": product(d, d) - 2 * product(e, r) + product(e, e),
        "full": product(d, d) - product(e, r),
    }
    assert {name: exact(name, LAGGING)[0] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("theta", "mu"), [(0.8, -0.2), (1.3, 0.9), (2.5, 0.3)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_table_of_gradients(theta, mu, alpha):
    """The table of docs/method.md: gradients by theta and mu at the optimal fake score."""
    b = theta**2 / (theta**2 + SIGMA**2)
    p, q, delta = 1 - A, 1 - b, mu - M
    gap = q - p  # a - b: positive where the generator is narrower than the data
    table = {
        "l1": (2 * theta * gap**2, -2 * p * gap * delta),
        "l2": (-2 * theta * gap * p, p * (p - gap) * delta),
        "sid": (-2 * theta * gap * (p + alpha * gap), p * (p + (2 * alpha - 1) * gap) * delta),
        "cross": (2 * theta * (p**2 + q**2), 2 * p**2 * delta),
        "full": (2 * theta * p**2, 2 * p**2 * delta),
        "diff-instruct": (-theta * gap, p * delta),
    }
    width, mean = table["l1"]
    table |= {
        f"{name}-l1": (table[name][0] - alpha * width, table[name][1] - alpha * mean) for name in ("cross", "full")
    }
    for name, gradients in table.items():
        assert exact(name, (b, mu), theta, mu, alpha)[1:] == pytest.approx(gradients), name


@pytest.mark.parametrize("alpha", [4.0, 100.0])
def test_where_full_l1_stands_still(alpha):
    """The gap is (1-a)/sqrt(alpha) there: the generator is narrower than the data, and all widths lead there."""
    b = A - (1 - A) / math.sqrt(alpha)
    theta = SIGMA * math.sqrt(b / (1 - b))
    assert theta < S
    for factor, sign in ((0.99, -1), (1.0, 0), (1.01, 1)):
        narrower = (factor * theta) ** 2
        by_theta, by_mu = exact("full-l1", (narrower / (narrower + SIGMA**2), 0.9), factor * theta, 0.9, alpha)[1:]
        assert by_theta == pytest.approx(0, abs=1e-12) if sign == 0 else by_theta * sign > 0
        assert by_mu * (0.9 - M) > 0


@pytest.mark.parametrize(("theta", "mu"), [(0.8, -0.2), (2.5, 0.9)])
def test_half_the_divergences_own_gradient_at_alpha_one_half(theta, mu):
    """d/dtheta of E|f_phi - f_psi*(theta)|^2, psi* following theta, is twice that of the loss with psi* held fixed."""
    t, m = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (theta, mu))
    b = t**2 / (t**2 + SIGMA**2)
    fisher = (A - b) ** 2 * (t**2 + SIGMA**2) + (1 - A) ** 2 * (m - M) ** 2
    following = [g.item() / 2 for g in torch.autograd.grad(fisher, [t, m])]
    assert exact("sid", (b.item(), mu), theta, mu, alpha=0.5)[1:] == pytest.approx(following)


# --- any denoisers, not only affine ones


class Wavy(torch.nn.Module):
    """A denoiser with neither symmetry nor linearity, float64."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.mix = torch.nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)

    def forward(self, x, sigma, labels=None):
        return x / (1 + sigma**2) + torch.tanh(self.mix(x)) * sigma


@pytest.mark.parametrize(
    ("objective", "weighting"),
    [("dmd", "omega"), *((o, w) for o in OBJECTIVES if o != "dmd" for w in ("sigma", "none", "omega"))],
)
def test_equals_its_form_in_noise_predictions(objective, weighting):
    """Per pixel, value and gradient on x_g, at noise levels of the whole schedule."""
    phi, psi = Wavy(1), Wavy(2)
    torch.manual_seed(3)
    x_g = torch.randn(16, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(4)
    ours = SiDLoss(ALPHA, objective=objective, weighting=weighting).generator_loss(phi, psi, x_g)
    torch.manual_seed(4)
    t = 0.8 * torch.rand(16, 1, 1, 1)
    sigma = (80 ** (1 / 7) + (1 - t) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    n = torch.randn_like(x_g)
    x_t = x_g + sigma * n
    e_phi, e_psi = (x_t - phi(x_t, sigma)) / sigma, (x_t - psi(x_t, sigma)) / sigma
    direction = (e_phi - e_psi).detach() * x_g / sigma  # f_psi - f_phi = sigma (eps_phi - eps_psi)
    forms = {
        "sid": (e_phi - e_psi) * ((e_phi - n) - ALPHA * (e_phi - e_psi)),
        "l1": (e_phi - e_psi) ** 2,
        "l2": (e_phi - e_psi) * (e_phi - n),
        "cross": (e_phi - n) ** 2 + e_psi**2 - n**2,
        "full": e_phi**2 - 2 * e_phi * n + e_psi * n,
        "diff-instruct": direction,
        "dmd": direction,
    }
    base = objective if objective in forms else objective.removesuffix("-l1")
    form = forms[base] - (ALPHA * forms["l1"] if base != objective else 0)
    weight = {"sigma": 1, "none": sigma**2, "omega": None}[weighting]
    if weight is None:
        weight = sigma**2 / (sigma * (e_phi - n)).abs().mean([1, 2, 3], keepdim=True).detach()
    torch.testing.assert_close(ours, weight * form, rtol=1e-5, atol=1e-4)
    gradients = [torch.autograd.grad(v.sum(), x_g, retain_graph=True)[0] for v in (ours, weight * form)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_directions_of_diff_instruct_and_dmd():
    """dmd is diff-instruct over omega; sid and l2 without score gradients are dmd; from stopped gradients, no graph."""
    phi, psi = Wavy(1), Wavy(2)
    x_g = torch.randn(8, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    gradients, seen = {}, []

    def teacher(x, sigma, labels=None):
        seen.append(phi(x, sigma))
        return seen[-1]

    for name, options in {
        "diff-instruct": {},
        "dmd": {},
        "sid": {"score_gradient": False},
        "l2": {"score_gradient": False},
    }.items():
        torch.manual_seed(5)
        value = SiDLoss(objective=name, **options).generator_loss(teacher, psi, x_g)
        gradients[name] = torch.autograd.grad(value.sum(), x_g)[0]
        assert not seen[-1].requires_grad
    torch.testing.assert_close(gradients["dmd"], gradients["diff-instruct"] / omega(x_g, seen[0]))
    for name in ("sid", "l2"):
        torch.testing.assert_close(gradients[name], gradients["dmd"])


# --- the pseudo-Huber distance


def test_huber_is_score_implicit_matching():
    """At alpha = 1 and the optimal psi, theta's gradient is that of E d(f_phi - f_psi*(theta)) with x_t held fixed.

    d = c^2 (sqrt(1 + y^2/c^2) - 1), by quadrature over x_t; in one dimension f_psi* = mu + b(theta)(x_t - mu).
    """
    c = 0.2
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    theta, mu = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (THETA, MU))
    x_t = MU + math.sqrt(THETA**2 + SIGMA**2) * torch.as_tensor(nodes)
    b = theta**2 / (theta**2 + SIGMA**2)
    y = M + A * (x_t - M) - (mu + b * (x_t - mu))
    distance = c**2 * ((1 + y**2 / c**2).sqrt() - 1)
    mean = (torch.as_tensor(weights / weights.sum()) * distance).sum()
    expected = [g.item() for g in torch.autograd.grad(mean, [theta, mu])]
    loss = SiDLoss(1.0, weighting="none", huber=c, sigma_schedule=f"single={SIGMA}")
    for (value, error), gradient in zip(measured(loss, OPTIMAL)[1:], expected):
        assert abs(value - gradient) < 4 * error
        assert error < 0.05 * abs(gradient)


def test_a_wide_huber_is_the_squared_distance():
    phi, psi = Wavy(1), Wavy(2)
    x_g = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    values = []
    for huber in (None, 1e6, 1e-6):
        torch.manual_seed(6)
        values.append(SiDLoss(huber=huber).generator_loss(phi, psi, x_g))
    torch.testing.assert_close(values[1], values[0])
    torch.manual_seed(6)
    distances = SiDLoss(0.0, objective="l1", weighting="none").generator_loss(phi, psi, x_g)
    norm = distances.mean([1, 2, 3], keepdim=True).sqrt()
    torch.testing.assert_close(values[2] / 1e-6, values[0] / norm)  # c far below: each image by its direction alone


# --- noise levels


class Listener:
    def __init__(self):
        self.sigma = None

    def __call__(self, x, sigma, labels=None, augment_labels=None):
        self.sigma = sigma.flatten()
        return x


@pytest.mark.parametrize("schedule", ["karras", "lognormal", "lognormal=-0.4,1", "single=0.37"])
def test_schedules_of_both_losses(schedule):
    """Both networks see the schedule's levels, and `quantile` says which; Kolmogorov-Smirnov, p = 1e-4."""
    torch.manual_seed(0)
    images = torch.zeros(4000, 1, 1, 1)
    loss = SiDLoss(tmax=600, sigma_schedule=schedule, fake_sigma_schedule=schedule)
    heard = Listener(), Listener()
    loss.generator_loss(heard[0], heard[0], images)
    loss.fake_score_loss(heard[1], images)
    levels = loss.sigma_schedule.quantile((torch.arange(4000) + 0.5) / 4000)
    for listener in heard:
        ours = listener.sigma.sort().values
        if schedule.startswith("single"):
            assert torch.equal(ours, torch.full_like(ours, 0.37))
            assert torch.equal(levels, ours)
        else:
            assert (torch.searchsorted(levels, ours) / 4000 - torch.arange(4000) / 4000).abs().max() < 2.23 / 4000**0.5
    if schedule == "karras":
        assert heard[0].sigma.max() < 5.84  # sigma(.6)
    elif schedule.startswith("lognormal"):
        mean, std = (-0.4, 1.0) if "=" in schedule else (-1.2, 1.2)
        for listener in heard:
            assert listener.sigma.log().mean().item() == pytest.approx(mean, abs=5 * std / 4000**0.5)
            assert listener.sigma.log().std().item() == pytest.approx(std, rel=0.06)


SCHEDULES = [("karras", "lognormal"), ("lognormal", "karras"), ("karras", "karras"), ("lognormal=-0.4,1", "lognormal")]


@pytest.mark.parametrize(("own", "other"), SCHEDULES)
def test_shared_noise_levels_weigh_as_those_of_each_schedule(own, other):
    """The share of the weight at or below a level is that of the schedule's draws: its cumulative distribution."""
    torch.manual_seed(0)
    options = {"tmax": 600, "sigma_schedule": own, "fake_sigma_schedule": other}
    loss = SiDLoss(**options)
    sigma, noise, *weights = loss.draw_shared_noise(torch.zeros(200_000, 1, 1, 1))
    q = torch.arange(1, 20) / 20
    for weight, schedule in zip(weights, (own, other)):
        levels = SiDLoss(tmax=600, sigma_schedule=schedule).sigma_schedule.quantile(q)
        below = (weight * (sigma <= levels)).mean(dim=[0, 1, 2])
        assert (below - q).abs().max() < 0.006  # five standard errors
        assert weight.max() <= 2
    torch.testing.assert_close(sum(weights), torch.full_like(sigma, 2))
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_a_single_level_is_distilled_at_that_level():
    """The generator of a Gaussian learns its width from the denoiser of one noise level."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.05, betas=(0.0, 0.999))
    loss = SiDLoss(1.0, sigma_schedule=f"single={SIGMA}")
    torch.manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        v = theta.item() ** 2
        x_g = theta * torch.randn(512, 1, 1, 1, dtype=torch.float64)
        loss.generator_loss(denoiser(A, 0), denoiser(v / (v + SIGMA**2), 0), x_g).mean().backward()
        optimizer.step()
    assert theta.item() == pytest.approx(S, abs=0.15)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"objective": "l3"}, "--objective"),
        ({"weighting": "snr"}, "--weighting"),
        ({"objective": "dmd", "weighting": "none"}, "--weighting"),
        ({"objective": "full", "huber": 0.1}, "--huber"),
        ({"objective": "l1", "score_gradient": False}, "--score-gradient"),
        ({"sigma_schedule": "single=-1"}, "--sigma-schedule"),
        ({"fake_sigma_schedule": "single=nan"}, "--fake-sigma-schedule"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_options_that_do_not_fit_are_named(options, named):
    with pytest.raises(UserError, match=named):
        SiDLoss(**options)


def test_score_gradient_starts_when_it_should():
    images = [0, 15_999, 16_000]
    assert [DistillationConfig(score_gradient="from=16").score_gradient.passes(n) for n in images] == [
        False,
        False,
        True,
    ]
    assert DistillationConfig().score_gradient.passes(0)
    assert not DistillationConfig(score_gradient="off").score_gradient.passes(10**9)
