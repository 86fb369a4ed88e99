"""python -m edm.zoo inspect: what a network is, and whether its declaration is right."""

import itertools

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_teacher

from edm import zoo
from edm.inspection import alternatives, denoising_errors, facts, mean, misfit
from edm.zoo.__main__ import main as zoo_command
from training.parameterisations import DiscreteTimes, FlowTimes, WrappedDenoiser, ddpm_sigmas

IMAGES = torch.cat([torch.eye(6), torch.eye(6).flip(1), torch.eye(6).cumsum(1), torch.eye(6).cumsum(0)]).reshape(
    -1, 1, 6, 6
)
STD = 0.1  # around each of the images


class ExactNet(torch.nn.Module):
    """What a perfectly trained network answers for images near given ones [M, C, H, W]."""

    def __init__(self, prediction, times, change=lambda t: t, images=2 * IMAGES - 1):
        super().__init__()
        self.prediction, self.times, self.change = prediction, times, change
        self.images = torch.nn.Parameter(images)

    def forward(self, x_s, t):
        a, b = self.times.scales(self.times.sigma(self.change(t)).reshape(-1, 1, 1, 1))
        variance = a**2 * STD**2 + b**2
        offsets = x_s[:, None] - a[:, None] * self.images[None]  # [N, M, C, H, W]
        shares = (-offsets.square().sum(dim=[2, 3, 4]) / (2 * variance.reshape(-1, 1))).softmax(dim=1)
        z = (shares[..., None, None, None] * offsets).sum(dim=1) / variance
        image = (shares @ self.images.flatten(1)).reshape(x_s.shape) + a * STD**2 * z
        noise = (x_s - a * image) / b
        sign = -1 if self.times.is_reversed else 1
        answers = {"epsilon": noise, "x0": image, "v": a * noise - b * image, "flow": sign * (noise - image)}
        return answers[self.prediction]


def discrete():
    return DiscreteTimes(ddpm_sigmas()).float()


def declared(net, prediction, times):
    return WrappedDenoiser(net, prediction, times, 6, 1)


KINDS = [("epsilon", discrete()), ("v", discrete()), ("x0", discrete()), ("flow", FlowTimes())]
KINDS += [("flow", FlowTimes(1.0, is_reversed=True))]


@pytest.mark.parametrize(("prediction", "times"), KINDS)
def test_a_rightly_declared_teacher_fits(prediction, times):
    net = declared(ExactNet(prediction, times), prediction, times)
    assert misfit(net) is None
    assert mean(denoising_errors(net)) < 0.7


WRONG = [(is_, as_) for is_, as_ in itertools.permutations(("epsilon", "v", "x0"), 2)]


@pytest.mark.parametrize(("actual", "claimed"), WRONG)
def test_a_wrongly_declared_prediction_is_named(actual, claimed):
    text = misfit(declared(ExactNet(actual, discrete()), claimed, discrete()))
    assert text.startswith(f"its answers don't fit {claimed}")
    assert text.endswith(f"they fit {actual}")


@pytest.mark.parametrize(
    ("prediction", "change", "name"),
    [
        ("epsilon", lambda t: 999 - t, "time running the other way"),
        ("epsilon", lambda t: t * 1000, "times divided by 1000"),
        ("epsilon", lambda t: t / 1000, "times multiplied by 1000"),
        ("v", lambda t: 999 - t, "time running the other way"),
    ],
)
def test_wrongly_declared_times_are_named(prediction, change, name):
    text = misfit(declared(ExactNet(prediction, discrete(), change), prediction, discrete()))
    assert text.endswith(f"they fit {prediction} with {name}")


def test_a_flow_whose_time_runs_the_other_way_is_named():
    net = ExactNet("flow", FlowTimes(1.0, is_reversed=True))
    assert "they fit reversed flow with time running the other way" in misfit(declared(net, "flow", FlowTimes(1.0)))
    net = ExactNet("flow", FlowTimes(1.0))
    assert "they fit flow with times divided by 1000" in misfit(declared(net, "flow", FlowTimes(1000.0)))


def test_a_network_that_fits_nothing_is_reported():
    net = declared(torch.nn.Conv2d(1, 1, 1), "epsilon", discrete())
    net.answer = lambda x_s, t, condition: torch.zeros_like(x_s) + 0.5
    text = misfit(net)
    assert "nor another prediction" in text
    assert len(alternatives(net)) == 11


def test_the_command(tmp_path):
    """It points out a network with random weights; a generator isn't tested."""
    net = tiny_teacher()
    zoo.save_network(net, tmp_path / "net.safetensors", licence="MIT")
    done = CliRunner().invoke(zoo_command, ["inspect", str(tmp_path / "net.safetensors")])
    assert done.exit_code == 2
    assert "licence       MIT" in done.output
    zoo.save_network(net, tmp_path / "generator.safetensors", kind="sid-generator", init_sigma=2.5)
    done = CliRunner().invoke(zoo_command, ["inspect", str(tmp_path / "generator.safetensors")])
    assert done.exit_code == 0
    for line in ("class         EDMPrecond", "starts at     2.5", "images        1 x 8 x 8", "classes       3"):
        assert line in done.output
    assert facts(net)["noise levels"] == "0 to inf"
