"""--init_sigma=auto: the energy distance, the measured start, and the distance from the teacher in records."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import CPU, tiny_config, tiny_teacher

import sid
from dnnlib import UserError
from edm import zoo
from edm.metrics.energy import energy_distance
from sid import doctor, start
from sid.calibration import choose_tmax
from sid.inputs import Inputs
from sid.monitor.closeness import FEATURES_WHITE, judge_distance
from sid.monitor.records import DISTANCES_FILE
from sid.plan import measure_teacher
from sid.report.progress import Report
from sid.start import choose_start, measure_starts
from sid.teacher_distance import TeacherDistance
from sid.teacher_samples import NUM_IMAGES
from torch_utils import checkpoint
from training.denoiser import only_sigma
from training.steps import ONE_STEP

PIXELS = 64


class TwoImages(torch.nn.Module):
    """The exact denoiser of a data set of two images, all pixels at +0.8 or at -0.8."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 8, 1, 0, 0.01, 80.0

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(0.8))

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        mean = x.mean(dim=[1, 2, 3], keepdim=True)
        return self.value * torch.tanh(self.value * PIXELS * mean / sigma**2) * torch.ones_like(x)


def test_the_energy_distance_is_the_sum_over_pairs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, [5, 1, 4, 4], dtype=torch.uint8, generator=generator)
    y = torch.randint(100, 256, [7, 1, 4, 4], dtype=torch.uint8, generator=generator)
    a, b = (part.numpy().reshape(len(part), -1) / 127.5 - 1 for part in (x, y))
    pairs = lambda p, q: [np.linalg.norm(u - v) for u in p for v in q]  # noqa: E731
    within = [sum(pairs(p, p)) / (len(p) * (len(p) - 1)) for p in (a, b)]
    expected = (2 * np.mean(pairs(a, b)) - sum(within)) / within[1]
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-5)


def test_the_energy_distance_sees_what_changes():
    generator = torch.Generator().manual_seed(0)
    x, same = (torch.randint(256, [200, 3, 8, 8], dtype=torch.uint8, generator=generator) for _ in range(2))
    assert abs(energy_distance(same, x)) < 0.01
    assert energy_distance(same // 2, x) > 0.1
    assert energy_distance(same[:2].repeat(100, 1, 1, 1), x) > 0.1


def test_the_start_is_the_usual_level_unless_another_is_clearly_closer(monkeypatch):
    teacher = TwoImages()
    distance = TeacherDistance(teacher, finds_moments=True)
    samples = distance.samples
    assert samples.shape == (NUM_IMAGES, 1, 8, 8)
    assert set(samples.flatten(1).float().mean(dim=1).round().tolist()) == {25.0, 230.0}  # the two images themselves
    measured = measure_starts(teacher, distance)
    assert measured[1.0] < 0.02  # tanh saturates: both images, equally often
    assert measured[40.0] > 0.5  # gray images
    assert list(measured.values())[1:] == sorted(list(measured.values())[1:])
    record = choose_start(teacher, distance)[1]
    assert record == {f"{level:g}": round(distance, 4) for level, distance in measured.items()}
    white, moments = (None, 3.0), (distance.moments, 1.4)  # how many times as far as the best the usual level may be
    for (kind, limit), share in itertools.product((white, moments), (0.99, 1.01)):
        given = dict.fromkeys(measured, 0.5) | {2.5: 0.1 * limit * share, 10.0: 0.1}
        monkeypatch.setattr(start, "measure_starts", lambda *_, given=given: given)
        assert choose_start(teacher, distance, kind)[0] == (10.0 if share > 1 else 2.5)
    monkeypatch.undo()
    teacher.sigma_min, teacher.sigma_max = 3.0, 12.0
    assert list(measure_starts(teacher, distance)) == [4.0, 6.0, 10.0]


def test_a_teacher_of_one_noise_level_starts_there_and_has_no_samples():
    teacher = TwoImages()
    assert only_sigma(teacher) is None
    teacher.metadata = {"sigma": 5.0}
    assert only_sigma(teacher) == 5
    assert choose_start(teacher, None) == (5.0, {})
    config = tiny_config(total_kimg=100)  # long enough for a distance
    assert measure_teacher(Inputs(teacher), config, False, CPU, True) is None
    with pytest.raises(UserError, match=r"^--trials: the teacher knows one noise level only"):
        measure_teacher(Inputs(teacher), config, True, CPU, True)


@pytest.mark.parametrize(("scale", "offset"), [(0.0, 0.5), (1.0, 3.0)])  # one colour, and all of them white
def test_a_teacher_of_one_image_is_refused(scale, offset):
    class Flat(TwoImages):
        def forward(self, x, sigma, class_labels=None, augment_labels=None):
            return scale * super().forward(x, sigma) + offset

    config = tiny_config(augment=0, init_sigma=None)
    with pytest.raises(UserError, match=r"^--edm_model: all 256 samples of the teacher are one and the same image"):
        measure_teacher(Inputs(Flat()), config, True, CPU, True)
    assert measure_teacher(Inputs(TwoImages()), config, True, CPU, True) is not None


def test_a_generator_that_stands_still_is_measured_at_every_snapshot(tmp_path):
    teacher = TwoImages()
    teacher.metadata = ONE_STEP.record()
    report = Report(tmp_path, distance=TeacherDistance(teacher))
    for nimg in (0, 8, 8, 16):  # once more where a run goes on
        report.snapshot(teacher, nimg)
    records = [json.loads(line) for line in (tmp_path / DISTANCES_FILE).read_text().splitlines()]
    assert [record["kimg"] for record in records] == [0, 0.008, 0.016]


def test_the_distance_covers_the_whole_and_the_detail():
    """For an exact denoiser, its own samples are at distance 0, blank ones far in pixels, noisy ones far in detail."""
    distance = TeacherDistance(TwoImages())

    class Changed(torch.nn.Module):
        img_resolution, img_channels, label_dim = 8, 1, 0

        def __init__(self, contrast, noise):
            super().__init__()
            self.contrast, self.noise = torch.nn.Parameter(torch.tensor(contrast)), noise

        def forward(self, x, sigma, class_labels=None, augment_labels=None):
            whole = torch.sign(x[:, :, :1, :1]) * 0.803 * torch.ones_like(x)  # the same 8-bit values as the samples'
            return self.contrast * whole + self.noise * torch.sign(x)

    def of(contrast, noise):
        return distance(Changed(contrast, noise), sampler="one-step", init_sigma=1.0)

    same, gray, noisy = of(1.0, 0), of(0.1, 0), of(1.0, 0.15)
    assert abs(same.value) < 0.02
    assert same.value == same.pixels + same.detail
    assert gray.pixels > 0.5
    assert noisy.pixels < 0.05
    assert noisy.detail > 0.3


def test_a_run_with_a_measured_start_and_measured_noise_levels(tmp_path, monkeypatch):
    teacher, out = tiny_teacher(label_dim=0, augment_dim=0), tmp_path / "run"
    config = tiny_config(augment=0, init_sigma=None, tmax=None)
    net = sid.distil(teacher, config, out, device="cpu").net
    options = json.loads((out / "training_options.json").read_text())
    level = options["init_sigma"]
    assert options["starts"][f"{level:g}"] <= 3 * min(options["starts"].values())
    assert net.metadata["init_sigma"] == level
    measured = TeacherDistance(teacher.eval(), calibrates=True).calibration
    assert (options["tmax"], options["calibration"]) == choose_tmax(measured)
    assert options["tmax"] < 800  # the network is random
    state = checkpoint.load_state(checkpoint.states(out)[-1])
    assert (state["options"]["init_sigma"], state["options"]["tmax"]) == (level, options["tmax"])
    lines = (out / "teacher-distance.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["kimg"] == 0
    longer = tiny_config(augment=0, init_sigma=None, tmax=None, total_kimg=2 * config.total_kimg)
    monkeypatch.setattr("sid.teacher_distance.calibrate", None)  # it isn't measured again
    again = sid.distil(teacher, longer, out, device="cpu").net  # goes on with the same start and levels
    assert again.metadata["init_sigma"] == level
    assert checkpoint.load_state(checkpoint.states(out)[-1])["options"]["tmax"] == options["tmax"]
    resumed = json.loads((out / "training_options.json").read_text())
    for name in ("starts", "calibration"):
        assert resumed[name] == options[name]
    assert (out / "teacher-distance.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert zoo.network_hash(again) != zoo.network_hash(net)
    (out / "teacher-distance.jsonl").write_text('{"kimg": 0, "value": 0.2}\n{"kimg": 1, "value": 0.9}\n')
    result = CliRunner().invoke(doctor.main, [str(out)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("away-from-teacher: ")
    assert "healthy" not in result.output


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([0.3], None),
        ([0.3, 0.2, 0.05], None),
        ([0.3, 0.05, 0.07], None),
        ([0.3, 0.2, 0.15], "far-from-teacher"),
        ([0.3, 0.1, 0.2], "away-from-teacher"),
        ([0.1, 0.5], "away-from-teacher"),
        # runs of docs/ablations.md: icons and crops with the demo's options, icons and crops with --recipe=auto's
        ([0.204, 0.143, 0.122, 0.075, 0.21], "away-from-teacher"),
        ([0.257, 0.049, 0.197], "away-from-teacher"),
        ([0.204, 0.07, 0.048], None),
        ([0.257, 0.142, 0.055, 0.024], None),
        # from noise with the moments of images: crops, which end well, early and later; what such a run mustn't do
        ([0.0220, 0.0517], "far-from-teacher"),
        ([0.0220, 0.0517, 0.0441, 0.0255], None),
        ([0.0101, 0.0402], "far-from-teacher"),
        ([0.0101, 0.15], "away-from-teacher"),
    ],
)
def test_losing_the_teacher_is_found(values, found):
    finding = judge_distance([{"kimg": float(i), "value": value} for i, value in enumerate(values)])
    assert (finding and finding.name) == found


@pytest.mark.parametrize(
    ("features", "found"),
    [
        (4.03, "far-from-teacher"),  # emoji after 2 kimg, FID 7.6 times the teacher's
        (1.72, None),  # the same after 18 kimg, 1.5 times
        (math.nan, None),
        ("4", None),  # by another program
    ],
)
def test_features_tell_what_the_distance_no_longer_sees(features, found):
    finding = judge_distance([{"kimg": 0.0, "value": 0.378}, {"kimg": 2.0, "value": 0.023, "features": features}])
    assert (finding and finding.name) == found
    assert finding is None or "4.03 in its features" in finding.text


@pytest.mark.parametrize(
    ("start", "white", "last", "found"),
    [
        # EDM2's network from noise with the moments of images: 10.5 at the start, and 82.4 from plain noise. A
        # generator of its ended with 3.02 and 1.2 times the teacher's FID.
        (10.5, 82.41, 3.02, None),
        (10.5, None, 3.02, "far-from-teacher"),
        (82.41, None, 3.02, None),
        (10.5, 82.41, 6.7, "far-from-teacher"),
        # letters in two steps: 3.8 times the teacher's FID at 3 kimg, 2.0 at the end
        (2.34, None, 2.17, "far-from-teacher"),
        (2.34, None, 1.10, None),
        # the text demo, which starts at 8 times the FID that it ends with
        (2.04, 20.0, 2.0, "far-from-teacher"),
        (2.04, 20.0, 0.85, None),
        (1.2, None, 1.25, None),
        ("10", [82.41], 3.02, "far-from-teacher"),
        (math.nan, math.nan, 2.0, None),
    ],
)
def test_features_are_judged_by_those_of_plain_noise_and_of_the_start(start, white, last, found):
    records = [{"kimg": 0.0, "value": 0.02, "features": start}, {"kimg": 2.0, "value": 0.002, "features": last}]
    records[0] |= {} if white is None else {FEATURES_WHITE: white}
    finding = judge_distance(records)
    assert (finding and finding.name) == found
