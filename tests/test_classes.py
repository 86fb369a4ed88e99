"""A class that the generator loses: seen in the divergence by class, which needs no data, and told."""

import pytest
import torch
from tiny import BATCH, CPU, equal, on_two_processes, save, tiny_distillation

from sid.config import DistillationConfig
from sid.distillation import Distillation
from sid.health import DIVERGENCE, MIN_PER_CLASS, worst_class
from torch_utils.training_stats import Collector

CLASSES = 4


def test_moments_by_group_are_those_of_its_values():
    torch.manual_seed(0)
    collector = Collector()
    values, groups = torch.randn(2, 10), torch.randint(3, [2, 10])
    for some, group in zip(values, groups):
        collector.report("x", some, groups=torch.nn.functional.one_hot(group, 5).float())
        collector.report("y", some)
    moments = collector.collect_groups()
    assert moments.keys() == {"x"}
    assert moments["x"].shape == (5, 3)
    for i in range(5):
        own = values[groups == i].double()
        expected = torch.tensor([len(own), own.sum(), own.square().sum()], dtype=torch.float64)
        assert torch.allclose(moments["x"][i], expected)
    assert not collector.collect_groups()
    assert collector.collect()["x"]["mean"] == pytest.approx(float(values.mean()))


class Blobs(torch.nn.Module):
    """The optimal denoiser of pixels N(mean of the class, 1/4)."""

    def __init__(self):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = 4, 1, CLASSES
        self.sigma_min, self.sigma_max = 0.0, float("inf")
        self.means = torch.nn.Parameter(torch.arange(CLASSES) / CLASSES)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        mean, variance = (class_labels @ self.means).reshape(-1, 1, 1, 1), 0.25
        return mean + variance / (variance + sigma.reshape(-1, 1, 1, 1) ** 2) * (x - mean)


@pytest.mark.parametrize("mode", [{}, {"chunk": 64}, {"share_noise": True}], ids=str)
def test_the_class_that_is_off_is_named(mode):
    options = {"batch": 512, "batch_gpu": 256, "augment": 0, "lr": 1e-9, "glr": 1e-9, "sigma_schedule": "lognormal"}
    distillation = Distillation(Blobs(), DistillationConfig(**options, **mode), CPU)
    off = torch.full([CLASSES], 0.1)
    off[2] = 0.5
    for net in (distillation.state.generator, distillation.state.fake_score):  # psi has followed theta
        net.means.data += off
    distillation.iteration()
    found = worst_class(distillation.collector.collect_groups())
    assert found["Health/worst_class"]["mean"] == 2
    assert 3 < found["Health/worst_class_divergence"]["mean"] < 30  # (0.5 / 0.1)^2 but for the weights


def test_too_few_images_say_nothing():
    moments = torch.ones(CLASSES, 3)
    moments[:, 0] = torch.tensor([MIN_PER_CLASS, MIN_PER_CLASS - 1, MIN_PER_CLASS - 1, 0])
    assert not worst_class({DIVERGENCE: moments})
    moments[1, 0] = MIN_PER_CLASS
    moments[0, 1] = 2.0
    assert worst_class({DIVERGENCE: moments})["Health/worst_class_divergence"]["mean"] == 2.0
    moments[1, 1] = torch.nan
    assert not worst_class({DIVERGENCE: moments})
    assert not worst_class({})  # a teacher without classes


def collected(iterations, resume=None):
    distillation = tiny_distillation(resume=resume)
    if resume is not None:
        distillation.collector.load_state_dict(distillation.state.statistics, CPU)
    for _ in range(iterations):
        distillation.iteration()
    return distillation


def test_a_resumed_run_goes_on_counting(tmp_path):
    whole = collected(4).collector.collect_groups()
    assert float(whole[DIVERGENCE][:, 0].sum()) == 4 * BATCH
    resumed = collected(2, resume=save(collected(2), tmp_path))
    assert equal(resumed.collector.collect_groups(), whole)


def groups_of_three():
    return collected(3).collector.collect_groups()


def test_two_processes_count_what_one_does(tmp_path):
    first, second = on_two_processes(groups_of_three, tmp_path)
    assert equal(first, second)
    alone = groups_of_three()[DIVERGENCE]
    assert torch.equal(first[DIVERGENCE][:, 0], alone[:, 0])
    assert torch.allclose(first[DIVERGENCE], alone, rtol=1e-2)
