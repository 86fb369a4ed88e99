"""NaN and infinity end in one clear line wherever they arise, and never in an image or a metric."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny import CPU, NoReport, Spy, save, tiny_config, tiny_distillation, tiny_teacher

import fid
import sid_train
from dnnlib import UserError
from edm import generate, zoo
from edm.metrics.detector import ModuleDetector, load_detector, save_detector
from edm.metrics.evaluate import Evaluator, evaluate
from edm.metrics.frechet import frechet_distance
from edm.metrics.kid import kernel_distance
from edm.metrics.precision_recall import precision_recall
from edm.metrics.reference import load_reference
from edm.metrics.small_classifier import SmallClassifier
from edm.metrics.sources import NetworkSource, TensorSource
from edm.sampler import NonFiniteImagesError, generate_images
from edm.zoo.__main__ import main as zoo_command
from sid import OneStepGenerator
from sid.report.progress import Report
from sid.training_loop import training_loop
from torch_utils import checkpoint
from torch_utils.updates import DivergenceError
from training.networks import EDMPrecond

NAN, INF = float("nan"), float("inf")
SUFFIXES = ("", ".pkl", ".safetensors")
ARGUMENTS = {"img_resolution": 8, "img_channels": 1, "num_classes": 3, "width": 4}


def teacher(label_dim=0):
    return tiny_teacher(label_dim, augment_dim=0)


def with_value(net, value, place=-1):
    """The network with another value for one of its weights."""
    parameter = list(net.parameters())[place]
    parameter.data.reshape(-1)[0] = value
    return net


def write_images(folder):
    folder.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def write_detector(path, change=None):
    torch.manual_seed(0)
    module = SmallClassifier(**ARGUMENTS)
    if change is not None:
        change(module)
    save_detector(module, path, ARGUMENTS, dtype=torch.float32)
    return path


def run(main, *arguments):
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code != 0, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    return done.output.splitlines()[-1]


# --- networks


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("value", "place"), [(NAN, 0), (INF, 5), (-INF, -1)])
def test_a_network_with_one_bad_weight_is_refused(tmp_path, suffix, value, place):
    path = tmp_path / f"net{suffix}"
    zoo.save_network(with_value(teacher(), value, place), path, kind="sid-generator", init_sigma=2.5)
    for load in (zoo.load_network, OneStepGenerator.from_pretrained):
        with pytest.raises(UserError, match=r"holds NaN or infinity.*take an earlier snapshot"):
            load(path)


def test_buffers(tmp_path):
    net = EDMPrecond(
        8,
        1,
        model_type="SongUNet",
        model_channels=8,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[],
        resample_filter=[1, 3, 3, 1],
    )
    next(net.buffers()).reshape(-1)[0] = INF
    zoo.save_network(net, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="resample_filter holds NaN or infinity"):
        zoo.load_network(tmp_path / "net.safetensors")


class Masked(Spy):
    """Buffers that aren't saved may hold infinity."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full([2], -INF), persistent=False)


class Double(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2, dtype=torch.float64)


def test_networks_of_others(tmp_path):
    zoo.save_network(Masked(), tmp_path / "mask.safetensors")
    assert not zoo.load_network(tmp_path / "mask.safetensors", {"Masked": Masked}).mask.isfinite().any()
    net = with_value(Double(), 1e300)
    from edm import network_files

    header = {"network": json.dumps({"class_name": "Double", "metadata": {}})}
    (tmp_path / "double.safetensors").write_bytes(network_files._tensors_bytes(net, header))
    with pytest.raises(UserError, match="bias holds NaN or infinity"):
        zoo.load_network(tmp_path / "double.safetensors", {"Double": Double})


def test_every_command_refuses_the_network(tmp_path):
    path, images = tmp_path / "nan.safetensors", write_images(tmp_path / "images")
    zoo.save_network(with_value(teacher(), NAN), path)
    zoo.save_network(teacher(), tmp_path / "good.safetensors")
    detector = write_detector(tmp_path / "detector.safetensors")
    common = [f"--data={images}", f"--detector={detector}", "--metrics=fid4", "--device=cpu"]
    short = ["--duration=0.00008", "--batch=4", "--device=cpu", f"--outdir={tmp_path / 'run'}", "--nosubdir"]
    lines = [
        run(generate.main, f"--network={path}", f"--outdir={tmp_path / 'out'}", "--seeds=0-3", "--device=cpu"),
        run(fid.main, "eval", f"--network={path}", "--steps=2", *common),
        run(zoo_command, "convert", path, tmp_path / "net.pkl"),
        run(zoo_command, "convert", path, tmp_path / "net.onnx"),
        run(zoo_command, "verify", path),
        run(sid_train.main, f"--edm_model={path}", *short),
        run(sid_train.main, f"--edm_model={tmp_path / 'good.safetensors'}", f"--transfer={path}", *short),
    ]
    for line in lines[:4] + lines[5:]:
        assert "NaN or infinity" in line
        assert str(path) in line
    left = {"nan.safetensors", "good.safetensors", "images", "detector.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == left


# --- images


class Overflows(Spy):
    """Weights and answers are finite except at one noise level, for one image."""

    def __init__(self, label_dim=0, level=2.5, value=INF):
        super().__init__(label_dim)
        self.bad_level, self.bad_value = level, value

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        denoised = super().forward(x.float(), sigma.float(), class_labels, augment_labels)
        bad = (sigma.reshape(-1, 1, 1, 1) - self.bad_level).abs() < 0.05 * self.bad_level
        bad = bad & (torch.arange(len(x)).reshape(-1, 1, 1, 1) == 1)
        return torch.where(bad, self.bad_value, denoised)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_images_of_finite_weights_that_overflow(value):
    net = Overflows(value=value).eval()
    with pytest.raises(NonFiniteImagesError, match=r"image of seed 6 .*1 of 3 images.*--init_sigma"):
        list(generate_images(net, range(5, 8), steps=1, init_sigma=2.5))
    net.metadata = {"init_sigma": 2.5}
    with pytest.raises(UserError, match="seed 1 "):
        OneStepGenerator(net)(2)
    assert len(OneStepGenerator(net)(1)) == 1
    net.bad_level = 0.002
    with pytest.raises(UserError, match="seed 1 "):
        list(generate_images(net, range(2), steps=4))
    assert len(list(generate_images(net, range(2), steps=4, sigma_min=0.1))) == 1
    with pytest.raises(UserError, match="seed 1 "):
        list(generate_images(net, range(2), sampler="ablation", discretization="edm", num_steps=4))


def test_no_metric_of_images_that_are_not_finite(tmp_path):
    detector = load_detector(write_detector(tmp_path / "detector.safetensors"))
    evaluator = Evaluator(["fid4"], data=write_images(tmp_path / "images"), detector=detector)
    with pytest.raises(UserError, match="seed 1 "):
        evaluator(NetworkSource(Gray().eval(), steps=1, init_sigma=2.5))


class Gray(Overflows):
    """Of the detector's number of channels."""

    def __init__(self):
        super().__init__()
        self.img_channels = 1

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        denoised = super().forward(x.expand(-1, 3, -1, -1), sigma, class_labels, augment_labels)
        return denoised.mean(dim=1, keepdim=True)


def test_onnx_files_are_made_of_finite_answers_only(tmp_path):
    pytest.importorskip("onnxscript")
    net = with_value(teacher(), NAN)
    with pytest.raises(UserError, match="holds NaN or infinity"):
        zoo.save_network(net, tmp_path / "net.onnx")
    with pytest.raises(UserError, match=r"noise level 2\.5 is NaN or infinite"):
        zoo.save_network(Overflows(), tmp_path / "net.onnx", init_sigma=2.5)
    with pytest.raises(UserError, match=r"noise level 80 is NaN or infinite"):
        zoo.save_network(Overflows(level=80.0), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


# --- detectors and references


def spoil(name, value):
    def change(module):
        module.get_parameter(name).data.reshape(-1)[0] = value

    return change


def test_detectors_that_are_not_finite(tmp_path, monkeypatch):
    for value in (NAN, INF):
        with pytest.raises(UserError, match=r"hidden\.bias holds NaN or infinity.*diverged"):
            write_detector(tmp_path / "new.safetensors", spoil("hidden.bias", value))
    module = SmallClassifier(**ARGUMENTS)
    spoil("hidden.bias", 1e5)(module)  # beyond half precision, in which detectors are kept
    with pytest.raises(UserError, match="float16"):
        save_detector(module, tmp_path / "new.safetensors", ARGUMENTS)
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=torch.bool))
    path = write_detector(tmp_path / "nan.safetensors", spoil("hidden.bias", NAN))  # of an older version
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"hidden\.bias holds NaN or infinity"):
        load_detector(path)


@pytest.mark.parametrize("metric", ["fid4", "is10", "kid4", "pr4"])
def test_features_that_overflow(tmp_path, metric, monkeypatch):
    """The weights are finite but the answers aren't. All metrics would be finite, some of them even good."""
    detector = load_detector(write_detector(tmp_path / "detector.safetensors"))
    data = write_images(tmp_path / "images")
    evaluator = Evaluator([metric], data=data, detector=detector)
    generated = TensorSource([torch.randint(256, [12, 1, 8, 8], dtype=torch.uint8)])
    assert len(evaluator(generated)) == 1
    measure = ModuleDetector.measure

    def overflowing(self, images, features=True, probabilities=False):
        answers = measure(self, images, features, probabilities)
        return tuple(None if a is None else a.index_fill(0, torch.tensor([1]), NAN) for a in answers)

    monkeypatch.setattr(ModuleDetector, "measure", overflowing)
    with pytest.raises(UserError, match=r"--detector=.*NaN or infinite"):
        evaluator(generated)


def test_figures_themselves():
    mean, covariance = np.zeros(2), np.eye(2)
    for bad in (NAN, INF):
        for arguments in (
            ([bad, 0], covariance, mean, covariance),
            (mean, covariance, [0, bad], covariance),
            (mean, covariance * [[1, 1], [1, bad]], mean, covariance),
            (mean, covariance, mean, [[bad, 0], [0, 1]]),
        ):
            with pytest.raises(ValueError, match="NaN"):
                frechet_distance(*arguments)
        good, features = torch.randn(9, 3), torch.randn(9, 3)
        features[4, 1] = bad
        for figure in (kernel_distance, precision_recall):
            for pair in ((good, features), (features, good)):
                with pytest.raises(ValueError, match="NaN"):
                    figure(*pair)


@pytest.mark.parametrize(
    ("mu", "sigma"),
    [
        ([0, NAN], [[1, 0], [0, 1]]),
        ([0, INF], [[1, 0], [0, 1]]),
        ([0, 0], [[1, 0], [0, NAN]]),
        ([0, 0], [[1, 0], [0, -INF]]),
        ([0, 0], [[1, 0], [0, -1]]),
        ([0, 0], [[1, 0.5], [0, 1]]),
    ],
)
def test_files_that_are_no_references(tmp_path, mu, sigma):
    np.savez(tmp_path / "reference.npz", mu=np.array(mu, dtype=float), sigma=np.array(sigma, dtype=float))
    with pytest.raises(UserError, match="not a mean and a covariance of finite numbers"):
        load_reference(tmp_path / "reference.npz")


def test_a_distance_beyond_all_numbers(tmp_path):
    detector = load_detector(write_detector(tmp_path / "detector.safetensors"))
    np.savez(tmp_path / "reference.npz", mu=np.full(128, 1e200), sigma=np.eye(128))
    images = TensorSource([torch.randint(256, [4, 1, 8, 8], dtype=torch.uint8)])
    with pytest.raises(UserError, match="--metrics=fid4: comes out as"):
        evaluate(images, ["fid4"], reference=tmp_path / "reference.npz", detector=detector)


# --- training


def test_weights_that_overflow_are_never_saved(tmp_path):
    distillation = tiny_distillation(total_kimg=0.016)
    original = distillation.iteration

    def iteration():
        original()
        if distillation.state.nimg == 16:
            with_value(distillation.state.ema, INF)

    distillation.iteration = iteration
    with pytest.raises(DivergenceError, match=r"^average: .* at 0\.016 kimg; there is no earlier training state"):
        training_loop(distillation, tmp_path, NoReport())
    assert not checkpoint.states(tmp_path)
    assert not checkpoint.snapshots(tmp_path)


def test_a_state_with_bad_weights_is_refused(tmp_path):
    distillation = tiny_distillation()
    with_value(distillation.state.fake_score, NAN)
    path = save(distillation, tmp_path)
    with pytest.raises(UserError, match="fake_score are NaN or infinite; try an earlier one"):
        tiny_distillation(resume=path)


def test_divergence_speaks_of_states_that_are_there(tmp_path):
    from torch_utils import updates

    def diverge(distillation):
        def fake_score_loss(*args, **kwargs):
            return original(*args, **kwargs) * NAN

        original, distillation.loss.fake_score_loss = distillation.loss.fake_score_loss, fake_score_loss
        with pytest.raises(DivergenceError) as error:
            training_loop(distillation, tmp_path, NoReport())
        assert error.value.message.count("--override") <= 1
        assert f"{updates.MAX_SKIPPED_UPDATES} updates in a row" in error.value.message
        assert "noise levels" in error.value.message
        return error.value.message

    assert "there is no earlier training state: start again, with lower --lr and --glr" in diverge(
        tiny_distillation(total_kimg=1, batch=2, batch_gpu=2)
    )
    distillation = tiny_distillation(total_kimg=1, batch=2, batch_gpu=2)
    distillation.iteration()
    path = save(distillation, tmp_path)
    assert f"--resume={path}, with lower --lr and --glr and --override" in diverge(distillation)


@pytest.mark.parametrize("nimg", [0, 16])
def test_pictures_that_are_not_finite_end_a_distillation(tmp_path, nimg):
    """At the start the teacher is at fault (exit code 2); later the run has diverged (3). No picture is left behind."""
    from sid.inputs import Inputs
    from sid.prepare import prepare

    config = tiny_config(augment=None, total_kimg=0.016, snapshot_ticks=1, init_sigma=2.5)
    distillation = prepare(Inputs(Overflows(value=0.0)), config, CPU)
    if nimg == 0:
        distillation.state.ema.bad_value = NAN
    else:
        original = distillation.iteration

        def iteration():
            original()
            if distillation.state.nimg == nimg:
                distillation.state.ema.bad_value = NAN

        distillation.iteration = iteration
    with pytest.raises(UserError) as error:
        training_loop(distillation, tmp_path, Report(tmp_path, batch=config.batch))
    assert error.value.exit_code == (2 if nimg == 0 else 3)
    assert "seed 1 " in error.value.message
    pictures = {path.name for path in tmp_path.glob("fakes*.png")}
    assert pictures == (set() if nimg == 0 else {"fakes_init.png", "fakes_000000.008.png"})
    if nimg:
        assert "at 0.016 kimg; go on from a state before" in error.value.message
        assert "000000.008.pt" in error.value.message
