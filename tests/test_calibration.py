"""--tmax=auto: the noise levels up to which a teacher's answers are those of a denoiser."""

import math

import click
import pytest
import torch

from sid.calibration import (
    HIGHEST,
    MOST_EXCESS,
    Answers,
    choose_tmax,
    highest_level,
    levels_to_measure,
    measure_answers,
)
from sid.options import parse
from sid.schedules import TMAX, Karras

VARIANCE, PIXELS, NUM = 0.3, 64, 256


class Gaussian(torch.nn.Module):
    """The exact denoiser of independent pixels of one variance, and networks that differ from it.

    noise: standard deviation of an error that the image doesn't tell. stretch: by what its answers are multiplied.
    """

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 8, 1, 0, 0.01, 80.0

    def __init__(self, noise=lambda sigma: 0.0, stretch=lambda sigma: 1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones([]))
        self.noise, self.stretch = noise, stretch

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        exact = VARIANCE / (VARIANCE + sigma**2) * x * self.scale
        level = sigma.flatten()[0].item()
        return self.stretch(level) * exact + self.noise(level) * torch.randn(x.shape)


def data() -> torch.Tensor:
    return VARIANCE**0.5 * torch.randn([NUM, 1, 8, 8], generator=torch.Generator().manual_seed(5))


LEVELS = [1.0, 2.0, 5.0]


def measured(net, levels=LEVELS, images=None):
    return measure_answers(net, data() if images is None else images, range(NUM), levels)


def test_the_exact_denoiser_varies_by_what_it_knows():
    for level, found in measured(Gaussian()).items():
        assert found.known == pytest.approx(VARIANCE / (VARIANCE + level**2), abs=0.01)
        assert abs(found.excess) < max(3 * found.error, 0.01), level


def test_an_error_that_the_image_does_not_tell_is_the_excess():
    torch.manual_seed(0)
    for level, found in measured(Gaussian(noise=lambda sigma: 0.3)).items():
        assert found.excess == pytest.approx(0.3**2 / VARIANCE, abs=0.02)
        assert found.known == pytest.approx(VARIANCE / (VARIANCE + level**2), abs=0.02)


def test_answers_that_are_stretched_have_the_excess_of_their_closed_form():
    for level, found in measured(Gaussian(stretch=lambda sigma: 1.5)).items():
        exact = VARIANCE / (VARIANCE + level**2)
        assert found.known == pytest.approx(1.5 * exact, abs=0.02)
        assert found.excess == pytest.approx(1.5 * 0.5 * exact, abs=0.02)  # E|sD|^2 - E<sD, x> = s (s - 1) Var(D)


def test_the_error_is_that_of_the_mean_over_images():
    shares = [measured(Gaussian(), [2.0], data().roll(k, 0))[2.0].excess for k in range(12)]
    assert measured(Gaussian(), [2.0])[2.0].error == pytest.approx(torch.tensor(shares).std().item(), rel=0.6)


def answers(excess, known, error=0.001, last=HIGHEST):
    """At levels of 1, 2, 4 and so on; the last one is at `last`."""
    levels = [*(2.0**i for i in range(len(excess) - 1)), last]
    return {level: Answers(k, share, error) for level, share, k in zip(levels, excess, known)}


def test_levels_end_where_answers_vary_by_more_than_they_know():
    most, known = MOST_EXCESS, (1.1,) * 4  # never little
    assert highest_level(answers((0.0, most / 2, most, most), known)) == math.inf
    assert 2 < highest_level(answers((0.0, 0.0, 3 * most, 9 * most), known)) < 4
    assert highest_level(answers((0, 0, 9 * most, 9), known)) < highest_level(answers((0, 0, 3 * most, 9), known))
    assert highest_level(answers((3 * most, 3 * most), known)) == 1  # nowhere: the lowest
    assert highest_level(answers((0.0, math.nan), known)) == 1
    assert highest_level(answers((0.0, 2 * most), known, error=most)) == math.inf  # may be chance


def test_levels_end_where_answers_tell_little():
    none = (0.0,) * 4
    assert highest_level({}) == math.inf
    assert 2 < highest_level(answers(none, (0.9, 0.6, 0.05, 0.0))) < 4
    assert 2 < highest_level(answers(none, (0.95, 0.8, 0.52, 0.5))) < 4  # the class is known to the end
    assert 4 < highest_level(answers(none, (0.9, 0.8, 0.7, 0.0))) < HIGHEST
    assert highest_level(answers(none, (1.2, 1.2, 1.1, 1.1))) == math.inf  # a guided network's
    assert 2 < highest_level(answers(none, (0.9, 0.6, 0.05, 0.95))) < 4  # an erring one's
    assert highest_level(answers(none, (0.9, 0.6, 0.05, 0.0), last=15.0)) == math.inf  # nobody knows what is left there


def test_tmax_is_the_time_of_the_highest_level():
    assert choose_tmax({})[0] == TMAX
    for known in ((0.9, 0.8, 0.05, 0.0), (0.9, 0.9, 0.9, 0.0)):
        found = answers((0.0,) * 4, known)
        tmax, record = choose_tmax(found)
        assert Karras(tmax).highest == pytest.approx(highest_level(found), rel=0.02)
        assert record["4"] == {"known": known[2], "excess": 0.0}
        assert Karras(tmax).draw(1000).max() <= Karras(tmax).highest
    assert tmax > TMAX
    assert Karras().time(Karras().sigma(torch.tensor(0.37)).item()) == pytest.approx(0.37, abs=1e-5)


def test_levels_are_those_that_the_teacher_has():
    teacher = Gaussian()
    levels = levels_to_measure(teacher)
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (1.0, HIGHEST)
    teacher.sigma_max = 3.0
    assert levels_to_measure(teacher)[-1] == 3.0
    teacher.sigma_max = 0.5
    assert levels_to_measure(teacher) == [0.5]


def test_the_command_line_takes_a_number_or_auto():
    assert parse(["--tmax=auto"])[0].tmax is None
    assert parse(["--tmax=600"])[0].sigma_schedule == Karras(600.0)
    with pytest.raises(click.BadParameter, match="not a valid number or auto"):
        parse(["--tmax=high"])
