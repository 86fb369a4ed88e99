"""The Fréchet distance in a teacher's own features: which blocks are read, its unit, and what it notices."""

import pytest
import torch
from tiny import tiny_teacher

from sid.teacher_distance import TeacherDistance
from sid.teacher_features import MAX_FEATURES, BlockFeatures, FeatureDistance
from sid.teacher_samples import NUM_IMAGES
from training.dit import DiTDenoiser


def gaussian(number, size, seed, mean=0.0, scale=1.0):
    return mean + scale * torch.randn(number, size, generator=torch.Generator().manual_seed(seed))


def call(net, number=2):
    x = torch.randn(number, net.img_channels, net.img_resolution, net.img_resolution)
    return lambda: net(x, torch.ones(number), torch.zeros(number, net.label_dim) if net.label_dim else None)


@pytest.mark.parametrize("size", [20, 3 * MAX_FEATURES])
@pytest.mark.parametrize("number", [128, 512])
def test_other_samples_are_one_away_however_many_there_are(size, number):
    distance = FeatureDistance(gaussian(number, size, 0, mean=3.0))
    assert distance(gaussian(number, size, 1, mean=3.0)) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("change", [{"mean": 0.5}, {"scale": 0.7}])
def test_a_change_of_mean_or_spread_is_noticed_in_any_unit(change):
    samples = gaussian(256, 20, 0)
    units = torch.logspace(-0.9, 0.9, 20)
    far = FeatureDistance(samples)(gaussian(256, 20, 1, **change))
    assert far > 2
    assert FeatureDistance(samples * units)(gaussian(256, 20, 1, **change) * units) == pytest.approx(far, rel=1e-3)


def test_a_feature_that_never_varies_does_not_drown_the_others():
    samples, others = gaussian(256, 20, 0), gaussian(256, 20, 1)
    samples[:, 3], others[:, 3] = 0.0, 1e-3
    assert FeatureDistance(samples)(others) == pytest.approx(1, abs=0.3)


def test_a_block_of_every_resolution_is_read_and_no_hook_stays():
    net = tiny_teacher()
    blocks = BlockFeatures(net, call(net))
    modules = dict(net.named_modules())
    assert blocks.names
    assert all(any(modules[name].children()) for name in blocks.names)
    features = blocks.read(net, call(net, number=5))
    assert len(features) == 5
    assert features.shape[1] > 2 * len(blocks.names)
    assert not any(module._forward_hooks for module in net.modules())


def test_maps_and_tokens_become_means_and_deviations():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Identity()

        def forward(self, x):
            return self.inner(x)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.tokens = Block(), Block()

        def forward(self, x):
            return self.tokens(self.maps(x).flatten(2).transpose(1, 2)[:, :3])  # of another number of positions

    net, x = Net(), torch.randn(4, 5, 2, 2)
    blocks = BlockFeatures(net, lambda: net(x))
    assert blocks.names == {"maps", "tokens"}
    tokens = x.flatten(2)[..., :3]
    expected = [part for y in (x.flatten(2), tokens) for part in (y.mean(2), y.std(2, correction=0))]
    torch.testing.assert_close(blocks.read(net, lambda: net(x)), torch.cat(expected, 1))


def test_a_transformer_has_features():
    net = DiTDenoiser("sit", 4, 3, 2, width=16, depth=3, num_heads=2)
    blocks = BlockFeatures(net, call(net))
    assert any(name.startswith("net.blocks.1") for name in blocks.names)
    assert len(blocks.read(net, call(net, number=5))) == 5


def test_a_network_without_blocks_has_none():
    class Plain(torch.nn.Module):
        img_resolution, img_channels, label_dim = 8, 1, 0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones([]))

        def forward(self, x, sigma, class_labels=None, augment_labels=None):
            return self.weight * x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    with pytest.raises(LookupError):
        BlockFeatures(Plain(), call(Plain()))
    assert TeacherDistance(Plain())(Plain(), sampler="one-step").features is None


def test_a_network_that_answers_the_same_to_everything_has_none():
    teacher = tiny_teacher()
    for parameter in teacher.parameters():
        parameter.data.zero_()  # its answers are those of its skip connection alone
    with pytest.raises(LookupError):
        FeatureDistance(torch.full([256, 20], 0.3) * (1 + 1e-7 * gaussian(256, 20, 0)))
    assert TeacherDistance(teacher)(teacher, sampler="one-step").features is None


def test_the_distance_of_a_teachers_other_samples_is_about_one():
    teacher = tiny_teacher()
    distance = TeacherDistance(teacher)
    own = distance(teacher, sampler="heun", num_steps=10)
    one_step = distance(teacher, sampler="one-step", init_sigma=40.0)
    assert len(distance.samples) == NUM_IMAGES
    assert own.features == pytest.approx(1, abs=0.3)
    assert one_step.features > 2
    assert not any(module._forward_hooks for module in teacher.modules())
