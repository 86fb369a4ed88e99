"""Denoisers around noise, velocity and image predictions, against closed forms for Gaussian data."""

import math

import pytest
import torch
from tiny import CPU, smoothed

from dnnlib import UserError
from sid.config import DistillationConfig
from sid.inputs import Inputs, check_noise_levels
from sid.loss import SiDLoss
from sid.prepare import prepare
from sid.schedules import Times, parse_schedule
from training.denoiser import known_sigma, noise_range
from training.parameterisations import PREDICTIONS, DiscreteTimes, FlowTimes, WrappedDenoiser, ddpm_sigmas

MEAN, STD = 0.3, 0.6  # of the Gaussian images
SHAPE = (1, 4, 4)
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class ExactNet(torch.nn.Module):
    """What a perfectly trained network answers when images are N(mean, STD^2): one line per prediction."""

    def __init__(self, prediction, times, mean=MEAN):
        super().__init__()
        self.prediction, self.times = prediction, times
        self.mean = torch.nn.Parameter(torch.full(SHAPE, float(mean)))

    def forward(self, x_s, t):
        a, b = self.times.scales(self.times.sigma(t.to(x_s.dtype)).reshape(-1, 1, 1, 1))
        z = (x_s - a * self.mean) / (a**2 * STD**2 + b**2)
        noise, image = b * z, self.mean + a * STD**2 * z
        sign = -1 if self.times.is_reversed else 1
        answers = {"epsilon": noise, "x0": image, "v": a * noise - b * image, "flow": sign * (noise - image)}
        return answers[self.prediction]


class ExactDenoiser(torch.nn.Module):
    """The same in EDM's variables."""

    img_resolution, img_channels, label_dim = 4, 1, 0

    def __init__(self, sigma_min=0.0, sigma_max=math.inf, mean=MEAN):
        super().__init__()
        self.net = torch.nn.Module()
        self.net.mean = torch.nn.Parameter(torch.full(SHAPE, float(mean)))
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        sigma = sigma.to(x)
        return (self.net.mean * sigma**2 + STD**2 * x) / (STD**2 + sigma**2)


def wrapped(prediction, times, mean=MEAN):
    return WrappedDenoiser(ExactNet(prediction, times, mean), prediction, times, 4, 1)


KINDS = [
    *((kind, DiscreteTimes(ddpm_sigmas(schedule))) for schedule in SCHEDULES for kind in ("epsilon", "v", "x0")),
    *((kind, DiscreteTimes(ddpm_sigmas(zero_snr=True))) for kind in ("epsilon", "v", "x0")),
    ("flow", FlowTimes()),
    ("x0", FlowTimes()),
    ("epsilon", FlowTimes(scale=1.0)),
    ("flow", FlowTimes(scale=1.0, is_reversed=True)),
]


@pytest.mark.parametrize(("prediction", "times"), KINDS)
def test_the_denoiser_is_the_conditional_mean(prediction, times):
    net = wrapped(prediction, times).double()
    low, high = noise_range(net)
    sigma = torch.logspace(math.log10(low), math.log10(high), 201, dtype=torch.float64).clamp(low, high)
    sigma = sigma.reshape(-1, 1, 1, 1)
    x = MEAN + (STD**2 + sigma**2).sqrt() * torch.randn(201, *SHAPE, dtype=torch.float64)
    exact = ExactDenoiser().double()(x, sigma)
    torch.testing.assert_close(net(x, sigma), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("prediction", "times"),
    [("v", DiscreteTimes(ddpm_sigmas(zero_snr=True))), ("flow", FlowTimes()), ("flow", FlowTimes(1.0, True))],
)
def test_pure_noise_is_answered_in_scaled_space(prediction, times):
    """At infinite sigma the conditional mean is the mean of the images, whatever the noise."""
    net = wrapped(prediction, times).double()
    x_s = torch.randn(3, *SHAPE, dtype=torch.float64)
    sigma = torch.full([3, 1, 1, 1], math.inf, dtype=torch.float64)
    a, b = times.scales(sigma)
    assert (a == 0).all()
    assert (b == 1).all()
    torch.testing.assert_close(net.scaled(x_s, sigma), torch.full_like(x_s, MEAN), rtol=0, atol=1e-7)


def test_zero_terminal_snr_is_left_out_of_the_range():
    sigmas = ddpm_sigmas(zero_snr=True)
    times = DiscreteTimes(sigmas)
    assert sigmas[-1] == math.inf
    assert times.sigma_max == sigmas[-2]
    assert times.time(torch.tensor([math.inf])).item() == 999
    assert times.time(sigmas[-2:-1]).item() == 998


@pytest.mark.parametrize(
    ("schedule", "betas", "levels"),
    [  # the noise levels at t = 0, 20, 979, 999 and the time of 2.5
        ("scaled_linear", (0.00085, 0.012), (0.029, 0.138, 12.97, 14.61, 625)),
        ("linear", (1e-4, 0.02), (0.010, 0.079, 128.9, 157.4, 440)),
        ("squaredcos_cap_v2", (1e-4, 0.02), (0.006, 0.044, 32.1, 20291, 755)),
    ],
)
def test_noise_levels_of_published_schedules(schedule, betas, levels):
    sigmas = ddpm_sigmas(schedule, 1000, *betas)
    for t, level in zip((0, 20, 979, 999), levels):
        assert sigmas[t].item() == pytest.approx(level, rel=5e-3, abs=6e-4)
    assert DiscreteTimes(sigmas).time(torch.tensor([2.5])).item() == pytest.approx(levels[-1], abs=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_and_times_are_inverse(schedule, dtype):
    times = DiscreteTimes(ddpm_sigmas(schedule)).to(dtype)
    t = torch.arange(1000, dtype=dtype)
    torch.testing.assert_close(times.time(times.sigma(t)), t, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-4)
    between = t[:-1] + 0.3
    torch.testing.assert_close(times.time(times.sigma(between)), between, rtol=0, atol=5e-2)


def test_the_nearest_times_are_whole_numbers():
    """As an embedding table of times needs them; the noise levels are rounded with them."""
    times = DiscreteTimes(ddpm_sigmas(), nearest=True).float()
    sigma = torch.tensor([1e-9, 0.02, 2.5, 2.51, 1e9]).reshape(-1, 1, 1, 1)
    t = times.time(sigma.flatten())
    assert t.dtype == torch.int64
    assert t[[0, -1]].tolist() == [0, 999]
    nearest = (times.levels.log()[None] - sigma.flatten()[:, None].log()).abs().argmin(dim=1)
    assert torch.equal(t, nearest)
    assert torch.equal(times.round_sigma(sigma).flatten(), times.levels[t])
    net = wrapped("epsilon", times)
    assert torch.equal(known_sigma(net, sigma).flatten(), times.levels[t])


def test_what_does_not_fit_together_is_refused():
    for prediction, times in (("v", FlowTimes()), ("flow", DiscreteTimes(ddpm_sigmas())), ("noise", FlowTimes())):
        with pytest.raises(ValueError, match=prediction):
            WrappedDenoiser(torch.nn.Identity(), prediction, times, 4, 1)
    with pytest.raises(ValueError, match="rise"):
        DiscreteTimes(torch.tensor([0.1, 0.3, 0.2]))


def dressed(mean=MEAN):
    """The same denoiser five times: as EDM's and as a network of each prediction."""
    discrete = DiscreteTimes(torch.logspace(-3, 2, 1000, dtype=torch.float64))
    flow = FlowTimes(t_max=100 / 101)
    nets = {kind: wrapped(kind, discrete, mean) for kind in ("epsilon", "v", "x0")}
    nets |= {"flow": wrapped("flow", flow, mean), "reversed": wrapped("flow", FlowTimes(1.0, True), mean)}
    return {"edm": ExactDenoiser(0.001, 100.0, mean), **nets}


def test_losses_and_gradients_do_not_depend_on_the_parameterisation():
    """Both losses, the gradient on generated images, and the fake score's gradient on its weights."""
    results = {}
    phis, psis = dressed(), dressed(mean=-0.1)
    x = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for kind, phi in phis.items():
        phi, psi, x_g = phi.double(), psis[kind].double(), x.clone().requires_grad_(True)
        torch.manual_seed(2)
        loss = SiDLoss().generator_loss(phi, psi, x_g)
        loss.sum().backward()
        psi.zero_grad()
        fake_score_loss = SiDLoss().fake_score_loss(psi, x_g)
        fake_score_loss.sum().backward()
        results[kind] = [loss.detach(), x_g.grad, fake_score_loss.detach(), psi.net.mean.grad]
    assert results["edm"][1].abs().max() > 0.01
    for kind, values in results.items():
        for value, expected in zip(values, results["edm"]):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=kind)


def test_distillation_does_not_depend_on_the_parameterisation():
    """The same teacher ends in the same generator and fake score after ten iterations."""
    config = {"batch": 16, "batch_gpu": 16, "lr": 1e-3, "glr": 2e-3, "total_kimg": 0.16, "augment": 0, "alpha": 1.0}
    trained = {}
    for kind, teacher in dressed().items():
        distillation = smoothed(prepare(Inputs(teacher.float()), DistillationConfig(**config), CPU))
        for _ in range(10):
            distillation.iteration()
        trained[kind] = [net.net.mean.detach() for net in distillation.state.networks.values()]
    for kind, means in trained.items():
        for mean, expected in zip(means, trained["edm"]):
            moved = (expected - MEAN).abs().max()
            assert moved > 1e-4
            assert (mean - expected).abs().max() <= 1e-3 * moved, kind


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_fake_scores_weight_makes_its_loss_the_networks_own(prediction):
    """The published training losses: the squared error of the network's answer, at any noise level."""
    times = FlowTimes() if prediction == "flow" else DiscreteTimes(ddpm_sigmas())
    net = WrappedDenoiser(lambda x_s, t: (x_s * 1.1 + t[:, None, None, None] / 1000).sin(), prediction, times, 4, 1)
    sigma = torch.tensor([0.05, 0.5, 2.5, 20.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    x0, n = torch.randn(2, 4, 1, 4, 4, dtype=torch.float64)
    a, b = times.scales(sigma)
    x_s = a * x0 + b * n
    wanted = {"epsilon": n, "v": a * n - b * x0, "flow": n - x0, "x0": x0}[prediction]
    expected = (net.net(x_s, times.time(sigma.flatten())) - wanted).square()
    loss = SiDLoss(fake_score_weight=net.loss_weight)
    found = loss.denoising.weighted(net, (net(x0 + sigma * n, sigma) - x0).square(), sigma)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("times", [DiscreteTimes(ddpm_sigmas()), FlowTimes(), FlowTimes(1.0, is_reversed=True)])
def test_noise_levels_at_uniform_times(times):
    """Every whole time, or time of a flow, is as likely: draws, quantiles and density agree with the times."""
    net = WrappedDenoiser(lambda x, t: x, "flow" if times.is_flow else "epsilon", times, 4, 1)
    low, high = (20, 980) if not times.is_flow or times.scale > 1 else (0.02, 0.98)
    schedule = parse_schedule(f"times={low},{high}", "--sigma-schedule").of(net)
    torch.manual_seed(0)
    drawn = schedule.draw(20_000)
    t = times.time(drawn.flatten().double())
    assert drawn.shape == (20_000, 1, 1, 1)
    assert drawn.dtype == torch.float32
    if times.is_flow:
        assert low <= t.min()
        assert t.max() <= high
    else:
        assert (t - t.round()).abs().max() < 1e-2
        assert (t.round().min(), t.round().max()) == (20, 979)
    shares = (t.sort().values - low) / (high - low)
    assert (shares - torch.linspace(0, 1, len(t))).abs().max() < 2.2 / len(t) ** 0.5  # Kolmogorov-Smirnov, p = 1e-4
    levels = schedule.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    below = torch.stack([(drawn.flatten() <= level).double().mean() for level in levels])
    assert (below - torch.tensor([0.1, 0.5, 0.9])).abs().max() < 0.012
    edges = torch.linspace(-9, 9, 40_001, dtype=torch.float64)
    density = schedule.density(edges.exp())
    assert abs(torch.trapezoid(density, edges).item() - 1) < 2e-3
    inside = density[(edges > levels[0].log()) & (edges < levels[2].log())].sum() * (edges[1] - edges[0])
    assert abs(inside.item() - 0.8) < 2e-3
    assert str(schedule) == f"times={low},{high}"
    assert schedule == Times(low, high)


@pytest.mark.parametrize("schedule", ["single=500", "lognormal=6,0.1", "single=0.001", "lognormal=-9,1"])
@pytest.mark.parametrize("option", ["sigma_schedule", "fake_sigma_schedule"])
def test_noise_levels_that_a_teacher_does_not_have(option, schedule):
    """Limiting all of them to the teacher's range would train at its end alone."""
    teacher = wrapped("epsilon", DiscreteTimes(ddpm_sigmas()))
    name = f"--{option.replace('_', '-')}={schedule.split(',')[0]}"
    with pytest.raises(UserError, match=rf"{name}.*0\.0100\d* to 157"):
        check_noise_levels(teacher, DistillationConfig(**{option: schedule}))
    check_noise_levels(teacher, DistillationConfig(**{option: "lognormal=0,2"}))


def test_times_that_a_teacher_does_not_have():
    net = WrappedDenoiser(lambda x, t: x, "epsilon", DiscreteTimes(ddpm_sigmas()), 4, 1)
    with pytest.raises(UserError, match="go from 0 to 1000"):
        Times(20, 1200).of(net)
    with pytest.raises(UserError, match="no times of its own"):
        Times(20, 980).of(ExactDenoiser())
    for text in ("times=980,20", "times=20", "times=-1,5"):
        with pytest.raises(UserError, match=text):
            parse_schedule(text, "--sigma-schedule")
