"""Generators of several steps: their noise levels, which step has the gradient, what they converge to, their files."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny import (
    CPU,
    assert_same_training,
    equal,
    on_two_processes,
    save,
    smoothed,
    tiny_config,
    tiny_distillation,
    tiny_teacher,
    weights,
)

from dnnlib import UserError
from edm import generate, onnx_file, zoo
from edm.sampler import generate_all
from edm.zoo.__main__ import main as zoo_command
from sid import OneStepGenerator, step_vectors
from sid.inputs import Inputs
from sid.prepare import prepare
from training.generator import Generator, spaced_levels
from training.parameterisations import DiscreteTimes, FlowTimes, WrappedDenoiser, ddpm_sigmas
from training.steps import STEPS_NOISES, Steps

DATA = Path(__file__).parent / "data"
FOUR = Steps((2.5, 0.8, 0.3, 0.1))
FLOW, DDPM = FlowTimes(t_min=1e-4), DiscreteTimes(ddpm_sigmas("scaled_linear", beta_start=0.00085, beta_end=0.012))


def dressed(times, prediction, answer=lambda x, t: torch.zeros_like(x)):
    return WrappedDenoiser(answer, prediction, times, 8, 1)


# --- the levels


def test_levels_of_a_denoiser_are_even_in_the_time_of_a_flow():
    net = tiny_teacher()
    levels = torch.tensor(spaced_levels(net, 2.5, 4)) / net.sigma_data
    times = levels / (1 + levels)
    torch.testing.assert_close(times, 5 / 6 * torch.tensor([1, 0.75, 0.5, 0.25]))
    assert spaced_levels(net, 2.5, 1) == (2.5,)


def test_levels_of_a_flow_are_even_in_its_own_time():
    levels = torch.tensor(spaced_levels(dressed(FLOW, "flow"), 4.0, 4))
    torch.testing.assert_close(levels / (1 + levels), torch.tensor([0.8, 0.6, 0.4, 0.2]))


@pytest.mark.parametrize("steps", range(1, 9))
def test_levels_of_a_diffusion_are_at_its_whole_times(steps):
    start = DDPM.levels[625].item()
    levels = spaced_levels(dressed(DDPM, "epsilon"), start, steps)
    expected = [DDPM.levels[625 * (steps - k) // steps].item() for k in range(steps)]
    assert levels == pytest.approx(expected, rel=1e-6)


def test_a_shift_raises_the_levels_after_the_first():
    net = dressed(FLOW, "flow")
    levels = torch.tensor(spaced_levels(net, 1.0, 2, shift=3.0))
    torch.testing.assert_close(levels / (1 + levels), torch.tensor([0.5, 0.5 * (3 * 0.5 / 2)]))


@pytest.mark.parametrize(
    "levels", [(), (1.0, 1.0), (1.0, 2.0), (1.0, 0.0), (float("inf"),), (1.0, float("nan")), tuple(range(9, 0, -1))]
)
def test_levels_fall_and_are_few(levels):
    with pytest.raises(ValueError, match="steps"):
        Steps(levels)


# --- the samples


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_published_sampler_of_text_to_image(steps, kind):
    """SiD-LSG's generator on a tiny UNet that is conditioned on text (float32, 1e-4 of the largest value)."""
    diffusers = pytest.importorskip("diffusers")
    arrays = np.load(DATA / "lsg-steps.npz")
    z, fresh, embeddings = (torch.tensor(arrays[name]) for name in ("z", "fresh", "embeddings"))
    unet = diffusers.UNet2DConditionModel(**json.loads((DATA / "lsg-unet.json").read_text())).eval()
    fill(unet, seed=700)

    def answer(x, t):
        return unet(x, t, encoder_hidden_states=embeddings[: len(x)]).sample

    net = WrappedDenoiser(answer, "epsilon" if kind == "epsilon" else "v", DDPM, 8, 4)
    levels = spaced_levels(net, DDPM.levels[625].item(), steps)
    draws = iter(fresh)
    with torch.no_grad():
        images = Generator(net, Steps(levels)).sample(z, randn_like=lambda _: next(draws))
    expected = torch.tensor(arrays[f"{kind}/generated_steps{steps}"])
    assert (images - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert len(list(draws)) == 3 - (steps - 1)


def fill(net, seed):
    """The reference's rule for weights."""
    rng = np.random.RandomState(seed)
    state = net.state_dict()
    for name in sorted(state):
        w = rng.standard_normal(tuple(state[name].shape)).astype(np.float32)
        if w.ndim > 1:
            w = w * 0.7 / np.sqrt(w.size / w.shape[0])
        else:
            w = 1 + 0.05 * w if "norm" in name and name.endswith("weight") else 0.05 * w
        state[name] = torch.tensor(w)
    net.load_state_dict(state)


def affine(x, sigma, condition=None):
    return 0.3 * x + sigma


@pytest.mark.parametrize("noise", STEPS_NOISES)
def test_each_step_sees_the_images_of_the_one_before(noise):
    z, drawn = torch.randn([3, 1, 4, 4]), torch.randn([3, 1, 4, 4])
    images = Generator(affine, Steps((2.0, 0.5), noise)).sample(z, randn_like=lambda _: drawn)
    first = 0.6 * z + 2
    added = {"fresh": drawn, "fixed": z, "ddim": (2 * z - first) / 2}[noise]
    torch.testing.assert_close(images, 0.3 * (first + 0.5 * added) + 0.5)


@pytest.mark.parametrize("step", range(4))
def test_only_the_chosen_step_has_a_gradient(step):
    scales = torch.ones(4, requires_grad=True)

    def net(x, sigma, condition=None):
        return scales[FOUR.levels.index(pytest.approx(sigma[0].item()))] * x

    z = torch.randn([2, 1, 4, 4])
    Generator(net, FOUR).sample(z, step=step).sum().backward()
    assert scales.grad is not None
    assert scales.grad.nonzero().flatten().tolist() == [step]


@pytest.mark.parametrize("noise", STEPS_NOISES)
def test_an_image_depends_on_its_seed_alone(noise):
    net = tiny_teacher(0).eval()
    net.metadata = Steps((2.5, 0.7, 0.2), noise).record()
    images = generate_all(net, range(5))
    assert images.equal(torch.cat([generate_all(net, range(3, 5)), generate_all(net, range(3))]).roll(3, dims=0))
    first = generate_all(net, range(5), sampler="one-step")
    assert not images.equal(first)
    assert generate_all(net, range(5), steps=3).equal(images)
    assert generate_all(net, range(5), steps=1).equal(first)


# --- training


def test_the_trained_step_is_uniform_and_a_function_of_the_images_seen():
    distillation = tiny_distillation(steps=4)
    steps = []
    for nimg in range(0, 8000, 8):
        distillation.state.nimg = nimg
        steps.append(distillation._step())
    counts = Counter(steps)
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(count - 250) < 60 for count in counts.values())  # 4.4 standard deviations
    independent = np.mean([a == b for a, b in itertools.pairwise(steps)])
    assert abs(independent - 0.25) < 0.06


def test_both_phases_train_the_same_step(monkeypatch):
    distillation = tiny_distillation(steps=3)
    seen = []
    sample = Generator.sample

    def spy(self, *arguments, **options):
        seen.append((distillation.state.nimg, options["step"]))
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Generator, "sample", spy)
    for _ in range(12):
        distillation.iteration()
    assert len(seen) == 12 * 2 * distillation.rounds
    by_iteration = {nimg: {step for other, step in seen if other == nimg} for nimg, _ in seen}
    assert {len(steps) for steps in by_iteration.values()} == {1}
    assert set.union(*by_iteration.values()) == {0, 1, 2}


def three_steps():
    """Weights after four iterations, and which step each of them trained."""
    distillation = smoothed(tiny_distillation(steps=3, augment=0))
    steps = []
    for _ in range(4):
        steps.append(distillation._step())
        distillation.iteration()
    return {**weights(distillation), "steps": torch.tensor(steps)}


def test_two_processes_train_the_same_steps_as_one(tmp_path):
    first, second = on_two_processes(three_steps, tmp_path)
    alone = three_steps()
    assert equal(first, second)
    assert len(alone["steps"].unique()) > 1
    assert torch.equal(first.pop("steps"), alone.pop("steps"))
    assert_same_training(first, alone, weights(tiny_distillation(steps=3, augment=0)))


def test_one_step_is_plain_sid_bit_by_bit(monkeypatch):
    found = tiny_distillation(steps=1, steps_noise="ddim", steps_shift=3.0)
    for _ in range(2):
        found.iteration()

    def plain(self, z, condition=None, randn_like=None, step=None):
        return self.net(2.5 * z, torch.full([len(z), 1, 1, 1], 2.5), condition)

    monkeypatch.setattr(Generator, "sample", plain)
    expected = tiny_distillation()
    for _ in range(2):
        expected.iteration()
    assert equal(weights(found), weights(expected))


@pytest.mark.parametrize("noise", STEPS_NOISES)
def test_resume_is_exact(tmp_path, noise):
    options = {"steps": 3, "steps_noise": noise, "share_noise": True, "augment": 0}
    straight = tiny_distillation(**options)
    for _ in range(3):
        straight.iteration()
    path = save(straight, tmp_path)
    resumed = tiny_distillation(resume=path, **options)
    for distillation in (straight, resumed):
        for _ in range(3):
            distillation.iteration()
    assert equal(weights(straight), weights(resumed))


class GaussianByLevel(torch.nn.Module):
    """The exact denoiser of pixels N(mean, std^2), whose mean and std are learnt at each noise level in `anchors`."""

    img_resolution, img_channels, label_dim = 4, 1, 0

    def __init__(self, anchors=(3.0, 0.5, 0.05), mean=0.3, std=0.5):
        super().__init__()
        self.anchors = tuple(anchors)
        self.mean = torch.nn.Parameter(torch.full([len(anchors)], mean))
        self.log_std = torch.nn.Parameter(torch.full([len(anchors)], std).log())

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        sigma = sigma.to(x).reshape(-1, 1, 1, 1)
        nearest = (sigma.log() - torch.tensor(self.anchors).log()).abs().argmin(dim=3).flatten()
        mean, variance = (v[nearest].reshape(-1, 1, 1, 1) for v in (self.mean, (2 * self.log_std).exp()))
        return (variance * x + sigma**2 * mean) / (variance + sigma**2)


@pytest.mark.parametrize(("noise", "steps"), [("fresh", 3), ("ddim", 2)])
def test_every_step_converges_to_gaussian_data(noise, steps):
    """Whatever noise there is between steps: each is trained for itself, on what it is given."""
    torch.manual_seed(0)
    config = tiny_config(
        batch=64, batch_gpu=64, steps=steps, steps_noise=noise, lr=0.05, glr=0.025, alpha=1.0, augment=0,
        total_kimg=26, lr_decay="linear", sigma_schedule="lognormal=-0.7,1", fake_sigma_schedule="lognormal=-0.7,1",
    )  # fmt: skip
    distillation = prepare(Inputs(GaussianByLevel()), config, CPU)
    for _ in range(400):
        distillation.iteration()
    generator = Generator(distillation.state.generator, distillation.state.steps)
    with torch.no_grad():
        for step in range(steps):
            images = generator.sample(torch.randn([4000, 1, 4, 4]), step=step)
            assert images.mean() == pytest.approx(0.3, abs=0.04)
            assert images.std() == pytest.approx(0.5, abs=0.04)


def test_each_step_is_drawn_to_the_data_and_not_their_mixture_alone():
    """A step that is too dark and one that is too bright make a mixture with the right mean."""
    torch.manual_seed(0)
    teacher, start = GaussianByLevel(), GaussianByLevel()
    start.mean.data = torch.tensor([0.0, 1.8, 0.3])
    config = tiny_config(
        batch=64, batch_gpu=64, steps=2, lr=0.02, glr=0.01, alpha=1.0, augment=0, total_kimg=26, lr_decay="linear",
        sigma_schedule="lognormal=-0.7,1", fake_sigma_schedule="lognormal=-0.7,1",
    )  # fmt: skip
    distillation = prepare(Inputs(teacher, start=start), config, CPU)
    generator = Generator(distillation.state.generator, distillation.state.steps)
    z = torch.randn([2000, 1, 4, 4])

    def means():
        with torch.no_grad():
            return [generator.sample(z, step=step).mean().item() for step in range(2)]

    before = means()
    assert before[0] < 0.1
    assert before[1] > 0.45
    for _ in range(400):
        distillation.iteration()
    assert means() == pytest.approx([0.3, 0.3], abs=0.1)  # with a fake score that is common to both, 0 and 0.6


def test_the_fake_score_has_vectors_for_each_step():
    net = tiny_teacher()
    x, sigma, labels = torch.randn([2, 1, 8, 8]), torch.ones([2, 1, 1, 1]), torch.eye(3)[[0, 1]]
    matrices = [p for p in net.parameters() if p.ndim > 1]
    expected = net.eval()(x, sigma, labels)
    served = step_vectors.split(net, 3)
    for step in range(3):
        served.step = step
        torch.testing.assert_close(net(x, sigma, labels), expected, rtol=0, atol=0)
    net(x, sigma, labels).sum().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None}
    names = dict(net.named_parameters())
    assert {name for name in names if "_of_step" in name and name in moved} == {
        name for name in names if name.endswith(".values.2")
    }
    assert {p.grad is None for p in matrices} == {False, True}  # augmentation labels weren't given


@pytest.mark.parametrize("mode", [{"lora_rank": 2}, {"precision": "bf16"}, {"checkpoint": True, "chunk": 2}])
def test_it_goes_with_what_saves_memory(mode):
    distillation = tiny_distillation(steps=2, optimizer="muon", augment=0, **mode)
    start = weights(distillation)
    for _ in range(4):
        distillation.iteration()
    found = weights(distillation)
    assert all(value.isfinite().all() for value in found.values())
    changed = {name for name, value in found.items() if not value.equal(start[name])}
    assert {name.rpartition(".")[2] for name in changed if "_of_step" in name} == {"0", "1"}


# --- files and commands


def few_step(folder, steps, label_dim=2):
    path = folder / "net.safetensors"
    zoo.save_network(tiny_teacher(label_dim), path, kind="sid-generator", **steps.record())
    return path


def test_steps_travel_with_the_weights(tmp_path):
    steps = Steps((2.5, 0.5), "ddim")
    path = few_step(tmp_path, steps)
    assert Steps.of(zoo.load_network(path)) == steps
    images = OneStepGenerator.from_pretrained(path, "cpu")(3, seed=4)
    done = CliRunner().invoke(generate.main, [f"--network={path}", f"--outdir={tmp_path}/out", "--seeds=4-6"])
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "out").rglob("*.png"))
    written = np.stack([np.asarray(Image.open(file)) for file in files])
    assert (written == images[:, 0].numpy()).all()
    done = CliRunner().invoke(zoo_command, ["inspect", str(path)])
    assert "starts at     2.5, 0.5" in done.output
    assert "step noise    ddim" in done.output


class Small(torch.nn.Module):
    """A denoiser of few operations, since PyTorch takes seconds to export the usual ones."""

    img_resolution, img_channels = 8, 1

    def __init__(self, label_dim):
        super().__init__()
        self.label_dim = label_dim
        self.conv, self.of_class = torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Linear(label_dim or 1, 1)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        shift = 0 if class_labels is None else self.of_class(class_labels)[:, :, None, None]
        return self.conv(x / (1 + sigma.reshape(-1, 1, 1, 1))) + shift


@pytest.mark.skipif(not onnx_file.can_trace(), reason="a PyTorch that can't write ONNX")
@pytest.mark.parametrize(("noise", "label_dim"), [("fresh", 2), ("ddim", 0)])
def test_an_onnx_file_takes_all_steps(tmp_path, noise, label_dim):
    torch.manual_seed(0)
    net = Small(label_dim).eval()
    net.metadata = Steps((2.5, 0.8, 0.2), noise).record()
    zoo.save_network(net, tmp_path / "net.onnx", **net.metadata)
    draws = [torch.Generator().manual_seed(7 + i) for i in range(5)]
    inputs = {"z": torch.stack([torch.randn([1, 8, 8], generator=g) for g in draws]).numpy()}
    if label_dim:
        inputs["class_labels"] = np.eye(label_dim, dtype=np.float32)[[1] * 5]
        for g in draws:
            torch.randint(label_dim, [1], generator=g)  # the class that an image draws of itself
    if noise == "fresh":
        fresh = [torch.stack([torch.randn([1, 8, 8], generator=g) for _ in range(2)]) for g in draws]
        inputs["noise"] = torch.stack(fresh).numpy()
    (images,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(["images"], inputs)
    expected = OneStepGenerator(net)(5, seed=7, class_idx=1 if label_dim else None).numpy()
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert len(np.unique(images)) > 20


@pytest.mark.parametrize(
    "metadata",
    [
        {"init_sigma": 2.5, "step_levels": [2.5, 3.0]},
        {"init_sigma": 2.5, "step_levels": "2.5"},
        {"init_sigma": 2.5, "step_levels": [2.5, -1]},
        {"init_sigma": 2.5, "step_levels": [2.5, None]},
        {"init_sigma": 2.5, "step_levels": [2.5, 1], "steps_noise": "loud"},
        {"init_sigma": 2.5, "step_levels": list(range(20, 0, -1))},
    ],
)
def test_a_file_with_senseless_steps_is_refused(tmp_path, metadata):
    path = tmp_path / "net.safetensors"
    zoo.save_network(tiny_teacher(), path, **metadata)
    with pytest.raises(UserError, match=r"net\.safetensors: the init_sigma or steps in its metadata"):
        zoo.load_network(path)


def test_more_steps_than_the_teacher_has_levels():
    table = DiscreteTimes(ddpm_sigmas(steps=1000), nearest=True)
    net = dressed(table, "epsilon", torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(UserError, match=r"--steps=8: .* --init_sigma"):
        prepare(Inputs(net), tiny_config(steps=8, init_sigma=table.levels[4].item(), augment=0), CPU)


def test_options_of_samplers(tmp_path):
    path = few_step(tmp_path, Steps((2.5, 0.5)))
    for wrong in ("--init_sigma=1", "--rho=3"):
        done = CliRunner().invoke(generate.main, [f"--network={path}", f"--outdir={tmp_path}/out", "--seeds=0", wrong])
        assert done.exit_code != 0
        assert "means nothing to the steps of a generator" in str(done.output) + str(done.exception)
