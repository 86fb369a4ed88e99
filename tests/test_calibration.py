"""--tmax=auto: noise levels end where noise hides the images, or the teacher's answers aren't those of a denoiser."""

import math

import click
import pytest
import torch

from sid.calibration import (
    HIDING,
    LOWEST,
    MOST_EXCESS,
    Calibration,
    Excess,
    calibrate,
    choose_tmax,
    largest_deviation,
    levels_to_measure,
    measure_excess,
)
from sid.options import parse
from sid.report.opening import levels_text
from sid.schedules import TMAX, Karras

VARIANCE, NUM = 0.3, 256


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


def measured(net, levels=(1.0, 2.0, 5.0), images=None):
    return measure_excess(net, data() if images is None else images, range(NUM), levels)


def test_the_exact_denoiser_has_no_excess():
    for level, found in measured(Gaussian()).items():
        assert abs(found.share) < max(3 * found.error, 0.01), level


def test_an_error_that_the_image_does_not_tell_is_the_excess():
    torch.manual_seed(0)
    for found in measured(Gaussian(noise=lambda sigma: 0.3)).values():
        assert found.share == pytest.approx(0.3**2 / VARIANCE, abs=0.02)


def test_answers_that_are_stretched_have_the_excess_of_their_closed_form():
    for level, found in measured(Gaussian(stretch=lambda sigma: 1.5)).items():
        exact = VARIANCE / (VARIANCE + level**2)
        assert found.share == pytest.approx(1.5 * 0.5 * exact, abs=0.02)  # E|sD|^2 - E<sD, x> = s (s - 1) Var(D)


def test_the_error_is_that_of_the_mean_over_images():
    shares = [measured(Gaussian(), [2.0], data().roll(k, 0))[2.0].share for k in range(12)]
    assert measured(Gaussian(), [2.0])[2.0].error == pytest.approx(torch.tensor(shares).std().item(), rel=0.6)


@pytest.mark.parametrize("pixels", [4, 64, 4096])
def test_no_deviation_is_the_largest_by_chance(pixels):
    """Of 256 images in 4096 equal directions, the largest deviation is 5 by chance."""
    images = torch.randn([NUM, 1, 1, pixels], generator=torch.Generator().manual_seed(pixels))
    assert largest_deviation(images) == pytest.approx(1, abs=0.2)


def test_the_direction_in_which_images_differ_most_is_found():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn([48, 48], generator=generator)).Q
    deviations = torch.cat([torch.tensor([7.0, 3.0]), torch.full([46], 0.5)])
    images = 100 + torch.randn([NUM, 48], generator=generator) * deviations @ axes
    assert largest_deviation(images) == pytest.approx(7, rel=0.15)
    assert largest_deviation(torch.ones([NUM, 48])) == 0


def test_levels_end_where_noise_hides_the_images():
    brightness = 3 * torch.randn([NUM, 1, 1, 1], generator=torch.Generator().manual_seed(1))
    found = calibrate(Gaussian(), data() + brightness, range(NUM))
    assert found.hiding == pytest.approx(HIDING * 8 * 3, rel=0.15)  # 8: of 64 equal pixels
    assert calibrate(Gaussian(), data() + 100 * brightness, range(NUM)).hiding == Karras().sigma_max
    assert calibrate(Gaussian(), data() / 100, range(NUM)).hiding == LOWEST * 0.5


def excess(*shares, error=0.001):
    return Calibration(50.0, {2.0**i: Excess(share, error) for i, share in enumerate(shares)})


def test_levels_end_where_answers_vary_by_more_than_they_know():
    most = MOST_EXCESS
    assert excess(0.0, most / 2, most, most).highest_level() == 50
    assert 2 < excess(0.0, 0.0, 3 * most, 9 * most).highest_level() < 4
    assert excess(0, 0, 9 * most, 9).highest_level() < excess(0, 0, 3 * most, 9).highest_level()
    assert excess(3 * most, 3 * most).highest_level() == 1  # nowhere: the lowest
    assert excess(0.0, math.nan).highest_level() == 1
    assert excess(0.0, 2 * most, error=most).highest_level() == 50  # may be chance


def test_tmax_is_the_time_of_the_highest_level():
    for found in (excess(0.0), excess(0.0, 0.0, 1.0)):
        tmax = choose_tmax(found)[0]
        assert Karras(tmax).highest == pytest.approx(found.highest_level(), rel=0.02)
        assert Karras(tmax).draw(1000).max() <= Karras(tmax).highest
    assert choose_tmax(found)[1] == {"hiding": 50.0, "excess": {"1": 0.0, "2": 0.0, "4": 1.0}}
    assert choose_tmax(excess())[0] > TMAX
    assert choose_tmax(None) == (TMAX, None)
    assert Karras().time(Karras().sigma(torch.tensor(0.37)).item()) == pytest.approx(0.37, abs=1e-5)


def test_the_start_of_a_run_says_what_ended_the_levels():
    nearly = Calibration(41.287, {38.4: Excess(0.099, 0.0), 41.287: Excess(0.102, 0.0)})
    for found, reason in ((excess(0.0), "noise hides the images"), (nearly, "the teacher's answers vary more")):
        assert f": above, {reason}" in (levels_text(*choose_tmax(found)) or "")
    assert levels_text(*choose_tmax(None)) is None


def test_levels_are_those_that_the_teacher_has():
    teacher = Gaussian()
    levels = levels_to_measure(teacher, 30.0)
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (1.0, 30.0)
    teacher.sigma_max = 3.0
    assert levels_to_measure(teacher, 30.0)[-1] == 3.0
    teacher.sigma_max = 0.5
    assert levels_to_measure(teacher, 30.0) == [0.5]


def test_the_command_line_takes_a_number_or_auto():
    assert parse(["--tmax=auto"])[0].tmax is None
    assert parse(["--tmax=600"])[0].sigma_schedule == Karras(600.0)
    with pytest.raises(click.BadParameter, match="not a valid number or auto"):
        parse(["--tmax=high"])
