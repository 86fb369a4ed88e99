"""Training with EDM2's network: `edm.train --preset`, loss and average, weights normalised after every update."""

import copy
import inspect
import math

import pytest
import torch
from click.testing import CliRunner
from test_edm2 import PUBLISHED, small_network
from tiny import CPU, equal

from edm import train, train_presets, zoo
from edm.published import FILES
from torch_utils.updates import power_function_beta
from training.loss import EDM2Loss
from training.networks_edm2 import MPConv, UNet, normalize
from training.training_loop import Training, TrainingConfig

BATCH = 4
SMALL = ["--cbase=8", "--cres=1,2", "--blocks=1", "--batch=4", "--duration=2e-5", "--cond=1", "--device=cpu"]


def batches(seed=0):
    draws = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.eye(2)[torch.randint(2, [BATCH], generator=draws)]
        yield torch.randint(256, [BATCH, 3, 8, 8], generator=draws, dtype=torch.uint8), labels


def training(net, **changes):
    options = {"total_kimg": 0.1, "batch": BATCH, "lr": 0.02, "lr_rampup_kimg": 0, "beta2": 0.99, "ema_std": 0.1}
    return Training(TrainingConfig(**{**options, **changes}), net, EDM2Loss(), None, CPU, {})


class NormalizedInForward(torch.nn.Module):
    """The published way: in train mode a forward pass first replaces each weight by its normalised value."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma, labels, augment_labels=None):
        with torch.no_grad():
            for module in self.net.modules():
                if isinstance(module, MPConv):
                    module.weight.copy_(normalize(module.weight))
        return self.net(x, sigma, labels)

    def logvar(self, sigma):
        return self.net.logvar(sigma)


def test_normalising_after_the_update_trains_as_normalising_in_the_forward_pass():
    ours, theirs = training(small_network()), training(NormalizedInForward(small_network()))
    data = batches(), batches()
    start = copy.deepcopy(ours.net.state_dict())
    for _ in range(3):
        for run, source in zip((ours, theirs), data):
            run.iteration(source)
    theirs.net.net.normalize_weights()  # what the next pass would begin with
    for (name, a), b in zip(ours.net.state_dict().items(), theirs.net.net.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.ndim < 2 or (a - start[name]).abs().max() > 1e-2
    for module in ours.net.modules():
        if isinstance(module, MPConv):
            rms = module.weight.flatten(1).square().mean(dim=1).sqrt()
            assert (rms - 1).abs().max() < 5e-4


def test_the_loss_learns_the_error_at_each_noise_level():
    """With the denoiser fixed, u converges to the logarithm of the mean weighted error."""
    net = small_network().requires_grad_(False)
    net.logvar_linear.requires_grad_(True)
    loss, images, labels = EDM2Loss(), torch.randn(64, 3, 8, 8), torch.eye(2)[[0, 1] * 32]
    sigma = torch.tensor([0.05, 10.0]).repeat(32).reshape(-1, 1, 1, 1)
    optimizer = torch.optim.Adam(net.logvar_linear.parameters(), lr=0.05)
    torch.manual_seed(0)
    noise = torch.randn_like(images) * sigma
    error = (net(images + noise, sigma, labels) - images) ** 2
    for _ in range(150):
        optimizer.zero_grad()
        loss.weighted(net, error, sigma).mean().backward()
        optimizer.step()
    weighted = loss.weight(sigma) * error
    found = net.logvar(torch.tensor([0.05, 10.0])).flatten()
    for i in range(2):
        # u is a unit vector's product with features of unit variance, so it can't be arbitrarily large.
        assert found[i].item() == pytest.approx(weighted[i::2].mean().log().item(), abs=0.1)


def test_power_function_average_of_a_training():
    run, source, expected = training(small_network()), batches(), None
    for i in range(3):
        run.iteration(source)
        beta = power_function_beta(BATCH, i * BATCH, 0.1)
        value = run.net.state_dict()["unet.out_conv.weight"].clone()
        expected = value if expected is None else beta * expected + (1 - beta) * value
    torch.testing.assert_close(run.ema.state_dict()["unet.out_conv.weight"], expected)


def invoke(*arguments):
    result = CliRunner().invoke(train.main, [*SMALL, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_preset_trains_resumes_and_makes_a_teacher(data, tmp_path):
    given = ["--preset=edm2-small", f"--data={data}", "--nosubdir", "--tick=0.004", "--snap=100", "--dump=1"]
    given += ["--lr-decay=sqrt", "--lr-constant=0.008", "--lr-rampup=0.001"]
    for name, durations in {"whole": ["2e-5"], "parts": ["1.2e-5", "2e-5"]}.items():
        for duration in durations:  # this decay doesn't depend on the length
            invoke(*given, f"--outdir={tmp_path / name}", f"--duration={duration}")
    nets = [zoo.load_network(tmp_path / name) for name in ("whole", "parts")]
    assert type(nets[0]).__name__ == "Precond"
    assert (nets[0].label_dim, nets[0].use_fp16, nets[0].metadata["kind"]) == (3, False, "teacher")
    assert equal(*(net.state_dict() for net in nets))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch=edm2"], "--augment=0.12: --arch=edm2 needs 0"),
        (["--preset=edm2-small", "--precond=vp"], "--precond=vp: --arch=edm2 needs edm"),
        (["--preset=edm2-small", "--sigma=1", "--p-mean=0"], "leave --p-mean and --p-std out"),
        (["--precond=ve", "--p-std=1"], "--p-std: --precond=ve has noise levels of its own"),
        (["--preset=edm2-small", "--ema-std=0.3"], "--ema-std"),
    ],
)
def test_options_that_do_not_fit_are_named(data, tmp_path, arguments, message):
    assert message in invoke(f"--data={data}", f"--outdir={tmp_path}", *arguments)


@pytest.mark.parametrize("name", [name for name in train_presets.PRESETS if name.startswith("edm2-img")])
def test_published_presets(name):
    """Its network is the published one; its length and its average are those in the published file's name."""
    preset, network = train_presets.PRESETS[name], PUBLISHED[name]["init_kwargs"]
    assert {"model_channels": preset["cbase"], "dropout": preset["dropout"]}.items() <= network.items()
    assert network.keys() == {"img_resolution", "img_channels", "label_dim", "model_channels", "dropout"}
    defaults = {key: value.default for key, value in inspect.signature(UNet).parameters.items()}
    shape = (tuple(preset["cres"]), preset["blocks"], tuple(preset["attn"]))
    assert shape == (defaults["channel_mult"], defaults["num_blocks"], defaults["attn_resolutions"])
    snapshot = f"{preset['duration'] * 1000:07.0f}-{preset['ema_std']:.3f}.pkl"
    assert FILES[name].url.endswith(f"/{name}-{snapshot}")
    assert math.isclose(preset["duration"] * 1e6, round(preset["duration"] * 1e6 / 2**20) * 2**20, rel_tol=1e-6)
