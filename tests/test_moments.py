"""--init-noise=moments: generators that start from noise with the mean and the covariance of the teacher's images."""

import dataclasses
import json
import signal

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import CPU, equal, save, tiny_config, tiny_distillation, tiny_teacher, weights

import sid
from dnnlib import UserError
from edm import network_files, onnx_file, zoo
from edm.network_files import read_tensors
from edm.sampler import generate_all
from edm.zoo.__main__ import main as zoo_command
from sid import OneStepGenerator, memory
from sid.distillation import Distillation
from sid.inputs import Inputs, checked_guide, checked_teacher
from sid.monitor.records import read_records
from sid.prepare import prepare
from sid.probe import gradients
from sid.run_options import RunOptions
from sid.start import measure_starts
from sid.state import SavedState
from sid.teacher_distance import TeacherDistance
from torch_utils import checkpoint
from training.generator import Generator
from training.moments import ATTRIBUTE, LEAST, Moments, attach, start_of
from training.steps import INIT_NOISES, ONE_STEP, Steps

LEVEL = 0.7


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.1, 2, 16).reshape(1, 4, 4)
    return torch.randn([40, 1, 4, 4], generator=generator) * scales + 0.3


def tiny_moments():
    return Moments.of(torch.randn([12, 1, 8, 8], generator=torch.Generator().manual_seed(1))).for_noise(2.5)


def with_moments(**changes):
    """Inputs and options of a distillation that starts from them."""
    changes = {"augment": 0, "share_noise": True, "init_noise": "moments", **changes}
    return Inputs(tiny_teacher(), moments=tiny_moments()), changes


def test_the_noise_has_the_moments_of_noisy_images(images):
    moments, flat = Moments.of(images), images.flatten(1)
    basis = torch.eye(16).reshape(16, 1, 4, 4)
    mean = moments(torch.zeros([1, 1, 4, 4]), LEVEL)
    assert torch.allclose(mean[0], images.mean(dim=0), atol=1e-6)
    root = (moments(basis, LEVEL) - mean).flatten(1)  # noise is linear in z
    assert torch.allclose(root.T @ root, torch.cov(flat.T) + LEVEL**2 * torch.eye(16), atol=1e-5)


def test_what_noise_hides_is_left_out(images):
    moments = Moments.of(images)
    for level, least in ((0.01, 10), (1.0, 1)):
        kept = moments.for_noise(level)
        assert len(kept.variances) >= least
        assert kept.variances.min() > LEAST * level**2
        assert (moments.variances[len(kept.variances) :] <= LEAST * level**2).all()
    z = torch.randn([500, 1, 4, 4], generator=torch.Generator().manual_seed(2))
    difference = moments(z, 1.0) - moments.for_noise(1.0)(z, 1.0)
    assert difference.flatten(1).std(dim=0).max() < (1 + LEAST) ** 0.5 - 1 + 0.02
    assert difference.std() > 0


def test_large_images_have_fewer_directions(images, monkeypatch):
    monkeypatch.setattr("training.moments.MAX_VALUES", 3 * 64 + 63)
    assert memory.moments_bytes(Blobs()) == 4 * (64 + 3 * (64 + 1))
    monkeypatch.setattr("training.moments.MAX_VALUES", 3 * 16 + 15)
    moments = Moments.of(images)
    kept = moments.for_noise(LEVEL)
    assert kept.variances.equal(moments.variances[:3])  # those along which they vary most


def test_what_is_left_out_takes_no_memory(images):
    kept = Moments.of(images).for_noise(1.0)
    assert 0 < len(kept.variances) < 16
    for tensor in kept.buffers():  # a file holds the whole storage behind a view
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_autocast_leaves_the_noise_as_it_is_where_a_device_has_one(images):
    moments, z = Moments.of(images), torch.randn([2, 1, 4, 4])
    expected = moments(z, LEVEL)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moments(z, LEVEL), expected)
    assert moments.to("meta")(z.to("meta"), LEVEL).shape == z.shape  # which has none, as MPS in PyTorch 2.4


def test_fewer_images_than_pixels_and_equal_ones():
    few = Moments.of(torch.randn([3, 2, 4, 4], generator=torch.Generator().manual_seed(0)))
    assert few.directions.shape == (2, 32)
    assert torch.allclose(few.directions @ few.directions.T, torch.eye(2), atol=1e-5)
    same = Moments.of(torch.full([5, 1, 4, 4], 0.5))
    assert same.directions.shape == (0, 16)
    z = torch.randn([2, 1, 4, 4])
    assert torch.allclose(same(z, 2.0), 0.5 + 2 * z)


class Blobs(torch.nn.Module):
    """The exact denoiser of Gaussian images that differ in their brightness alone, far from 0."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max, sigma_data = 8, 1, 0, 0.002, 80.0, 0.5

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(0.6))

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        shade = (x - self.mean).mean(dim=[1, 2, 3], keepdim=True)
        return self.mean + 0.04 / (0.04 + sigma**2 / 64) * shade * torch.ones_like(x)


def test_the_teachers_one_evaluation_is_closer_from_there():
    distance = TeacherDistance(Blobs(), finds_moments=True)
    white = measure_starts(Blobs(), distance)
    closer = measure_starts(Blobs(), distance, distance.moments)
    assert closer[2.5] < white[2.5] / 2
    assert closer[1.0] < white[1.0] / 100


def test_the_start_is_measured_on_the_teachers_device():
    found, moments = [], tiny_moments()

    class Elsewhere:
        def of_pixels(self, _teacher, *, moments, **_options):
            found.append(moments.mean.device.type)
            return 1.0

    measure_starts(Blobs().to("meta"), Elsewhere(), moments)
    assert {*found} == {"meta"}
    assert moments.mean.device == CPU  # for the other processes


@pytest.mark.parametrize("steps", [Steps((2.5,)), Steps((2.5, 0.5), "fresh")])
@pytest.mark.parametrize("name", ["net.safetensors", "net"])
def test_they_travel_with_the_weights(tmp_path, steps, name):
    net = tiny_teacher().eval()
    net.metadata = steps.record()
    without = generate_all(net, range(3))
    attach(net, tiny_moments())
    expected = generate_all(net, range(3))
    assert not torch.equal(expected, without)
    zoo.save_network(net, tmp_path / name, **net.metadata)
    loaded = zoo.load_network(tmp_path / name)
    assert torch.equal(generate_all(loaded, range(3)), expected)
    assert torch.equal(OneStepGenerator.from_pretrained(tmp_path / name, "cpu")(3), expected)
    assert zoo.network_hash(loaded) == zoo.network_hash(net)
    assert equal(zoo.clone_network(loaded, dropout=0.3).state_dict(), loaded.state_dict())
    done = CliRunner().invoke(zoo_command, ["inspect", str(tmp_path / name)])
    assert "starts from   noise with the moments of the teacher's images" in done.output


class Small(torch.nn.Module):
    """A denoiser of few operations, since PyTorch takes seconds to export the usual ones."""

    img_resolution, img_channels, label_dim = 8, 1, 0

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return self.conv(x / (1 + sigma.reshape(-1, 1, 1, 1)))


@pytest.mark.skipif(not onnx_file.can_trace(), reason="a PyTorch that can't write ONNX")
def test_an_onnx_file_starts_from_them(tmp_path):
    torch.manual_seed(0)
    net = Small().eval()
    net.metadata = Steps((2.5,)).record()
    attach(net, tiny_moments())
    zoo.save_network(net, tmp_path / "net.onnx", **net.metadata)
    z = torch.stack([torch.randn([1, 8, 8], generator=torch.Generator().manual_seed(i)) for i in range(4)])
    (images,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(["images"], {"z": z.numpy()})
    expected = OneStepGenerator(net)(4).numpy()
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert len(np.unique(images)) > 20


def test_other_tools_files_are_refused(tmp_path):
    net = tiny_teacher().eval()
    net.metadata = Steps((2.5,)).record()
    attach(net, tiny_moments())
    with pytest.raises(UserError, match=r"net\.pkl: .* plain noise only, .* --init-noise=white"):
        zoo.save_network(net, tmp_path / "net.pkl", **net.metadata)
    assert not (tmp_path / "net.pkl").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"mean": torch.zeros([1, 4, 4])},
        {"mean": torch.full([1, 8, 8], float("nan"))},
        {"variances": torch.full([2], -1.0), "directions": torch.zeros([2, 64])},
        {"variances": torch.zeros([70]), "directions": torch.zeros([70, 64])},
        {"variances": torch.zeros([2])},
        {"directions": torch.zeros([3, 64], dtype=torch.int32), "variances": torch.zeros([3])},
        {"more": torch.zeros([1])},
        {"mean": None},
    ],
)
def test_damaged_files_are_refused(tmp_path, change):
    path = tmp_path / "net.safetensors"
    net = tiny_teacher()
    attach(net, tiny_moments())
    zoo.save_network(net, path, **Steps((2.5,)).record())
    header = header_without_checksum(path)
    state = load_file(path) | {f"{ATTRIBUTE}.{name}": value for name, value in change.items()}
    save_file({name: value for name, value in state.items() if value is not None}, path, header)
    with pytest.raises(UserError, match=r"net\.safetensors: ") as error:
        zoo.load_network(path)
    assert "\n" not in error.value.message


class Shapeless(torch.nn.Module):
    """A network that says nothing of images."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones([3]))


def test_files_without_them_need_not_be_of_images(tmp_path):
    zoo.save_network(Shapeless(), tmp_path / "net.safetensors")
    net, _ = network_files.read(tmp_path / "net.safetensors", {"Shapeless": Shapeless})
    assert start_of(net) is None


def header_without_checksum(path):
    """So that what is wrong has to be noticed."""
    header, _ = read_tensors(path)
    network = json.loads(header["network"])
    network.pop(checkpoint.CHECKSUM)
    return {"network": json.dumps(network)}


@pytest.mark.parametrize("changes", [{}, {"steps": 2}, {"lora_rank": 2}, {"precision": "bf16"}])
def test_training_starts_from_them_and_resumes_exactly(tmp_path, changes):
    inputs, options = with_moments(**changes)
    straight = prepare(inputs, tiny_config(**options), CPU)
    plain = tiny_distillation(**{**options, "init_noise": "white"})
    z = Generator(plain.state.generator, plain.state.steps).latents(4)
    start, others = (Generator(d.state.ema, d.state.steps).sample(z) for d in (straight, plain))
    moments = start_of(straight.state.ema)
    assert torch.equal(start, Generator(plain.state.ema, straight.state.steps, moments).sample(z)) or changes
    assert not torch.allclose(start, others)
    for _ in range(3):
        straight.iteration()
    path = save(straight, tmp_path)
    inputs, options = with_moments(**changes)
    resumed = prepare(inputs, tiny_config(**options), CPU, path)
    for distillation in (straight, resumed):
        for _ in range(2):
            distillation.iteration()
    assert equal(weights(straight), weights(resumed))
    assert equal(start_of(straight.state.generator).state_dict(), tiny_moments().state_dict())  # they aren't trained


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr("sid.teacher_samples.NUM_IMAGES", 16)
    monkeypatch.setattr("sid.teacher_samples.STEPS", 2)


LENGTHS = {"augment": 0, "total_kimg": 0.048, "kimg_per_tick": 0.016, "init_noise": "moments"}


@pytest.mark.parametrize("trials", [0.0, 0.5])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch, few_samples, trials):
    teacher, average, done = tiny_teacher(label_dim=0, augment_dim=0), Distillation.average, 0
    config = tiny_config(**LENGTHS, init_sigma=None)
    whole = sid.distil(teacher, config, tmp_path / "whole", device="cpu", trials=trials)

    def interrupted(self):
        nonlocal done
        average(self)
        done += 1
        if done == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Distillation, "average", interrupted)
    with pytest.raises(SystemExit):
        sid.distil(teacher, config, tmp_path / "parts", device="cpu", trials=trials)
    again = sid.distil(teacher, config, tmp_path / "parts", device="cpu", trials=trials)
    assert zoo.network_hash(again.net) == zoo.network_hash(whole.net)
    assert len(start_of(again.net).variances) > 0
    found = zoo.load_network(checkpoint.snapshots(tmp_path / "whole")[0])
    assert zoo.network_hash(found) == zoo.network_hash(whole.net)


def test_a_resumed_run_keeps_its_kind_of_start(tmp_path, few_samples):
    teacher = tiny_teacher(label_dim=0, augment_dim=0)
    config = tiny_config(**LENGTHS)
    white = dataclasses.replace(config, init_noise="white")
    sid.distil(teacher, dataclasses.replace(config, total_kimg=0.032), tmp_path / "moments", device="cpu")
    sid.distil(teacher, dataclasses.replace(white, total_kimg=0.032), tmp_path / "white", device="cpu")
    with pytest.raises(UserError, match=r"init-noise"):
        sid.distil(teacher, white, tmp_path / "moments", device="cpu")
    with pytest.raises(UserError, match=r"starts from plain noise; give --init-noise=white"):
        sid.distil(teacher, config, tmp_path / "white", device="cpu")


@pytest.mark.parametrize("kind", INIT_NOISES)
def test_the_record_holds_the_features_of_plain_noise(tmp_path, few_samples, kind):
    teacher = tiny_teacher(label_dim=0, augment_dim=0)
    config = tiny_config(**{**LENGTHS, "init_noise": kind, "init_sigma": 1.0}, returns=1)
    sid.distil(teacher, config, tmp_path, device="cpu")
    start, *others = read_records(tmp_path / "teacher-distance.jsonl", "kimg", "value")
    expected = TeacherDistance(teacher.eval())(teacher, sampler="one-step", init_sigma=2.5).features
    assert start.get("features_white") == (pytest.approx(expected) if kind == "moments" else None)
    assert others
    assert all("features_white" not in record for record in others)


def test_a_probe_of_the_gradients_reads_such_a_run(tmp_path, few_samples):
    teacher = tiny_teacher(label_dim=0, augment_dim=0)
    made = sid.distil(teacher, tiny_config(**LENGTHS), tmp_path, device="cpu")
    found = gradients.load(tmp_path, 2, CPU)
    assert equal(start_of(found.state.generator).state_dict(), start_of(made.net).state_dict())


@pytest.mark.parametrize("noise", ["white", "moments"])
def test_a_generator_teaches_none(noise):
    generator = tiny_teacher()
    if noise == "moments":
        attach(generator, tiny_moments())
    else:
        generator.metadata = ONE_STEP.record()
    with pytest.raises(UserError, match=r"^--edm_model: names a generator, .* name the diffusion model"):
        checked_teacher(tiny_config(), RunOptions(), generator)
    with pytest.raises(UserError, match=r"^--guide: names a generator, .* name the diffusion model"):
        checked_guide(tiny_teacher(), RunOptions(), generator)


def saved_with(folder, **changes):
    """A saved state whose moments are changed; None takes one of their tensors out."""
    inputs, options = with_moments()
    path = save(prepare(inputs, tiny_config(**options), CPU), folder)
    state = checkpoint.load_state(path)
    names = {f"{ATTRIBUTE}.{name}": value for name, value in changes.items()}
    state["generator"] = {n: v for n, v in {**state["generator"], **names}.items() if v is not None}
    checkpoint.save_state(path, state)
    return SavedState(checkpoint.StateFile(path), inputs.weight_hashes(tiny_config(**options)))


def test_a_state_gives_back_its_moments(tmp_path):
    found = saved_with(tmp_path).start_moments(tiny_teacher())
    assert found is not None
    assert equal(found.state_dict(), tiny_moments().state_dict())
    absent = dict.fromkeys(("mean", "directions", "variances"))
    assert saved_with(tmp_path, **absent).start_moments(tiny_teacher()) is None


@pytest.mark.parametrize(
    "changes", [Moments.of(torch.randn([5, 1, 4, 4])).state_dict(), {"mean": None}, {"variances": torch.zeros([3])}]
)
def test_damaged_moments_of_a_state_and_those_of_other_images_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match=r"^--resume=.* damaged; resume from another state$"):
        saved_with(tmp_path, **changes).start_moments(tiny_teacher())


def test_the_estimate_of_memory_counts_them():
    options = {"augment": 0, "precision": "fp32", "compile": False, "channels_last": False}
    plain, others = (
        memory.estimate(tiny_teacher(), tiny_config(**options, init_noise=kind), 2) for kind in INIT_NOISES
    )
    every = Moments.of(torch.randn([256, 1, 8, 8], generator=torch.Generator().manual_seed(0)))
    size = sum(tensor.nbytes for tensor in every.buffers()) / memory.GB
    assert others.weights - plain.weights == pytest.approx(2 * size)
    assert others.generator_activations == plain.generator_activations


def test_a_teacher_of_one_noise_level_has_none():
    teacher = tiny_teacher()
    teacher.metadata = {"sigma": 5.0}
    with pytest.raises(UserError, match=r"^--init-noise=moments: .* give --init-noise=white"):
        sid.plan.measure_teacher(Inputs(teacher), tiny_config(init_noise="moments"), False, CPU, False)


def test_a_generator_starts_from_anothers_weights_alone():
    other = tiny_teacher()
    attach(other, Moments.of(torch.zeros([4, 1, 8, 8])))
    inputs, options = with_moments()
    state = prepare(dataclasses.replace(inputs, start=other), tiny_config(**options), CPU).state
    assert equal(start_of(state.generator).state_dict(), tiny_moments().state_dict())
