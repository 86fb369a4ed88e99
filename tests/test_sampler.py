"""Samplers against the reference numbers and against the exact solution for Gaussian data."""

import numpy as np
import parity
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_teacher

from dnnlib import UserError
from edm import generate, sampler, seeds, zoo
from sid import OneStepGenerator
from training.conditions import Classes
from training.decoder import PixelDecoder

SAMPLES = parity.arrays("samplers.npz")
NETWORKS = sorted({key.split("/")[0] for key in SAMPLES})
RUNS = {
    "heun_steps5": lambda *a: sampler.heun_sampler(*a, num_steps=5),
    "heun_steps5_churn40_seed11": lambda *a: sampler.heun_sampler(
        *a, num_steps=5, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003
    ),
    "one_step_sigma2.5": lambda *a: sampler.one_step_sampler(*a, init_sigma=2.5),
}
for _run in ("euler_vp_vp_vp", "heun_ve_ve_none", "heun_iddpm_linear_none", "heun_edm_vp_vp"):
    RUNS[f"ablation_{_run}_steps5"] = lambda *a, run=_run: sampler.ablation_sampler(
        *a, num_steps=5, **dict(zip(("solver", "discretization", "schedule", "scaling"), run.split("_")))
    )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("run", sorted(RUNS))
def test_reference_samples(name, run):
    net = parity.seeded_network(name)
    torch.manual_seed(11)
    images = RUNS[run](net, SAMPLES[f"{name}/latents"], SAMPLES.get(f"{name}/class_labels"))
    parity.assert_close(images, SAMPLES[f"{name}/{run}"])


class GaussianDenoiser(torch.nn.Module):
    """The optimal denoiser of N(0, s^2): D = s^2 / (s^2 + sigma^2) x."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 4, 1, 0, 0.0, float("inf")
    s = 0.7

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return self.s**2 / (self.s**2 + sigma.reshape(-1, 1, 1, 1) ** 2) * x

    def round_sigma(self, sigma):
        return sigma


def test_heun_converges_to_the_exact_flow_at_second_order():
    """For Gaussian data the probability flow is x(sigma) = x(sigma_max) sqrt((s^2+sigma^2)/(s^2+sigma_max^2))."""
    net, latents = GaussianDenoiser(), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    exact = latents * 80 * net.s / (net.s**2 + 80**2) ** 0.5
    error = [(sampler.heun_sampler(net, latents, num_steps=n) - exact).abs().max() for n in (32, 64, 128)]
    assert 3 < error[0] / error[1] < 5
    assert 3 < error[1] / error[2] < 5


def test_an_image_depends_on_its_seed_alone():
    net = parity.seeded_network("edm-adm-cond")
    for options in ({"steps": 3, "S_churn": 10.0}, {"steps": 1}):
        one = torch.cat(list(sampler.generate_images(net, [5, 6, 7], batch=3, **options)))
        two = torch.cat(list(sampler.generate_images(net, [7, 5, 6], batch=1, **options)))
        difference = one.int() - two[[1, 2, 0]].int()  # convolutions of another batch size round differently
        assert difference.abs().max() <= 1
        assert (difference == 0).float().mean() > 0.99


def test_the_way_from_one_seed_to_another():
    """Steps with fresh noise: the ends are the seeds' own images, and between them noise has its usual length."""
    net = tiny_teacher(3).eval()
    net.metadata = {"init_sigma": 2.5, "step_levels": [2.5, 0.8]}
    places = seeds.strips([3, 8, 5], 5)
    assert [(place.start, place.end) for place in places] == [(3, 8)] * 5 + [(8, 5)] * 5
    assert [place.share for place in places] == [0, 0.25, 0.5, 0.75, 1] * 2
    strips = sampler.generate_all(net, places, batch=3)  # a batch has images of both strips
    ends = sampler.generate_all(net, [3, 8, 8, 5])
    assert (strips[[0, 4, 5, 9]].int() - ends.int()).abs().max() <= 1
    assert len({image.numpy().tobytes() for image in strips}) == 9  # 8 ends one strip and begins the other

    draws = seeds.draws_of(places[:5], torch.device("cpu"))
    noise = draws.randn([1, 64, 64]).flatten(1)
    assert noise.norm(dim=1) == pytest.approx(64, rel=0.05)  # on the straight line, the middle's would be 45
    angles = (noise * noise[0]).sum(dim=1).div(noise.norm(dim=1) * noise[0].norm()).clamp(-1, 1).acos()
    assert angles / angles[-1] == pytest.approx(torch.linspace(0, 1, 5), abs=0.02)
    first, last = (net_classes([seed]) for seed in (3, 8))
    assert not torch.equal(first, last)
    draws = seeds.draws_of(places[:5], torch.device("cpu"))
    draws.randn([1, 8, 8])
    mixed = draws.condition(Classes(3))
    torch.testing.assert_close(mixed, torch.lerp(first, last, torch.linspace(0, 1, 5)[:, None]))


def net_classes(chosen):
    """One-hot classes of the images of these seeds, which are drawn after the noise."""
    draws = seeds.SeededDraws(chosen, torch.device("cpu"))
    draws.randn([1, 8, 8])
    return Classes(3).one_hot(draws.randint(3))


def test_equal_noise_stays_what_it_is():
    same = torch.randn(3, 1, 8, 8)
    assert torch.equal(seeds.on_arc(same, same, torch.tensor([0.0, 0.3, 1.0])), same)


def test_strips_by_the_command(tmp_path):
    path = tmp_path / "net.safetensors"
    zoo.save_network(tiny_teacher(3), path, kind="sid-generator", init_sigma=2.5)

    def run(*options):
        done = CliRunner().invoke(generate.main, [f"--network={path}", "--device=cpu", *options])
        return done.exit_code, done.output.splitlines()[-1]

    grid, folder = tmp_path / "strips.png", tmp_path / "out"
    code, told = run("--interpolate=4", "--seeds=5,2,9", f"--grid={grid}", f"--outdir={folder}")
    assert (code, told) == (0, f"8 images: {folder}, {grid}")
    with PIL.Image.open(grid) as picture:
        zoom = picture.width // (4 * 8)
        assert picture.size == (4 * 8 * zoom, 2 * 8 * zoom)
        shown = torch.from_numpy(np.array(picture.reduce(zoom))).int()
    ends = sampler.generate_all(OneStepGenerator.from_pretrained(path, "cpu").net, [5, 2, 2, 9])[:, 0].int()
    for place, image in zip(((0, 0), (0, 3), (1, 0), (1, 3)), ends):
        row, column = (8 * number for number in place)
        assert (shown[row : row + 8, column : column + 8] - image).abs().max() <= 1
    assert [file.name for file in sorted(folder.rglob("*.png"))] == [f"img{i:08d}.png" for i in range(8)]

    wrong = f"--grid={tmp_path}/wrong.png"
    assert "give at least two, such as --seeds=0,1" in run("--interpolate=4", "--seeds=5", wrong)[1]
    assert "--interpolate: prompts can't be mixed" in run("--interpolate=4", "--prompts=x", wrong)[1]
    assert "--grid shows at most 10000 images, not 12600" in run("--interpolate=200", wrong)[1]
    assert run("--interpolate=1", wrong)[0] == 2
    assert sorted(place.name for place in tmp_path.iterdir()) == ["net.safetensors", "out", "strips.png"]


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 6, 2**64])
def test_seeds_that_would_repeat_an_image_are_refused(seed):
    net = parity.seeded_network("edm-ddpmpp-gray")
    with pytest.raises(UserError, match="seeds go from 0 to 4294967295"):
        list(sampler.generate_images(net, [0, seed], steps=1))


def test_one_step_is_chosen_by_metadata():
    net = parity.seeded_network("edm-ddpmpp-gray")
    assert sampler.default_sampler(net) == "heun"
    net.metadata = {"init_sigma": 1.5}
    assert sampler.default_sampler(net) == "one-step"
    latents = seeds.SeededDraws([3], torch.device("cpu")).randn([1, 16, 16])
    torch.testing.assert_close(sampler.sample(net, [3]), net(1.5 * latents, torch.tensor([1.5])))


def test_classes():
    net = parity.seeded_network("edm-adm-cond")
    by_class = [next(sampler.generate_images(net, [0], class_idx=c, steps=1)) for c in (0, 1)]
    assert not torch.equal(*by_class)
    with pytest.raises(UserError, match="--class=10"):
        next(sampler.generate_images(net, [0], class_idx=10))
    with pytest.raises(UserError, match="--class"):
        next(sampler.generate_images(parity.seeded_network("edm-ddpmpp-gray"), [0], class_idx=0))


def test_images_are_rounded_and_clipped():
    assert PixelDecoder.to_images(torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])).tolist() == [
        0,
        0,
        128,
        255,
        255,
        255,
    ]


@pytest.mark.parametrize("discretization", ["vp", "ve", "iddpm", "edm"])
def test_one_step_of_every_discretization_is_finite(discretization):
    images = sampler.ablation_sampler(
        GaussianDenoiser(), torch.ones(2, 1, 4, 4), num_steps=1, discretization=discretization
    )
    assert images.isfinite().all()
