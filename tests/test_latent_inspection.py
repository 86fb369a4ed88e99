"""python -m edm.zoo inspect: whether latents have the scale, shift and VAE that they are declared to have.

The VAE was trained on scikit-learn's digits with the library (KL weight 1e-5), and the teacher is
exact for twenty of its latents. So both are what a real pair is.
"""

import re

import pytest
import torch
from click.testing import CliRunner
from parity import DATA
from safetensors.torch import load_file
from test_inspection import ExactNet, declared, discrete

from edm import latents
from edm.inspection import misfit
from edm.latent_inspection import latents_misfit, vae_misfit
from edm.zoo.__main__ import main as zoo_command
from training.parameterisations import FlowTimes

diffusers = pytest.importorskip("diffusers")
SCALE = 0.698  # with which the latents have a standard deviation of 1


def raw_latents():
    return load_file(DATA / "digits-vae" / "latents.safetensors")["latents"].float()  # [20, 2, 4, 4]


def teacher(scale=SCALE, shift=0.0, prediction="epsilon", times=None):
    """An exact teacher of (raw - shift) scale."""
    scales, shifts = (torch.tensor(value).reshape(1, -1, 1, 1) for value in (scale, shift))
    times = times or discrete()
    net = declared(ExactNet(prediction, times, images=(raw_latents() - shifts) * scales), prediction, times)
    net.img_resolution, net.img_channels, net.sigma_data = 4, 2, 1.0
    record = latents.record_of(DATA / "digits-vae")
    net.metadata = {"vae": {**record, "scale": scale, "shift": shift}}
    return net


@pytest.mark.parametrize(
    "right",
    [
        {},
        {"prediction": "v"},
        {"prediction": "flow", "times": FlowTimes()},
        {"scale": 1.0},
        {"scale": 0.35},
        {"scale": [0.7, -0.4], "shift": [-1.4, 0.2]},
    ],
)
def test_a_right_declaration_is_not_accused(right):
    net = teacher(**right)
    assert misfit(net) is None
    assert latents_misfit(net) is None


@pytest.mark.parametrize("seed", range(4))
def test_nor_is_a_poor_teacher(seed):
    """Noise of the latents' mean and standard deviation at each place, which no teacher with any training exceeds."""
    torch.manual_seed(seed)
    raw = raw_latents()
    for strength in (0.3, 0.6, 1.0):
        mixed = raw[:8] + strength * (raw.mean(dim=0) + raw.std(dim=0) * torch.randn(8, 2, 4, 4) - raw[:8])
        record = latents.record_of(DATA / "digits-vae")
        assert vae_misfit(latents.decoder_of(teacher()).vae, record, mixed * record["scale"]) is None


@pytest.mark.parametrize(
    ("scale", "claimed"),
    [(SCALE, 2 * SCALE), (SCALE, SCALE / 2), (SCALE, 0.18215), (0.18215, 1.0), (1.0, 0.18215), (SCALE, 5.0)],
)
def test_a_wrong_scale_is_named_with_the_right_one(scale, claimed):
    net = teacher(scale)
    net.metadata["vae"]["scale"] = claimed
    net.sigma_data = 1.43 * scale
    assert misfit(net) is None
    found = re.fullmatch(
        r"its latents aren't scaled by (.*), as declared, but by about (.*): correct the scale .*", latents_misfit(net)
    )
    assert float(found[1]) == pytest.approx(claimed, rel=0.05)
    assert float(found[2]) == pytest.approx(scale, rel=0.3)


def test_unscaled_latents_are_named():
    """Latents with the standard deviation of Stable Diffusion's before they are scaled."""
    net = teacher(5.0)
    assert misfit(net) is None
    assert latents_misfit(net).startswith("its latents have a standard deviation of 5.")


@pytest.mark.parametrize("shift", [1.4, -1.4, 2.8, -2.8])
def test_a_wrong_shift_is_noticed(shift):
    """By one and two standard deviations of the latents."""
    net = teacher()
    net.metadata["vae"]["shift"] = shift
    assert "don't fit its VAE" in latents_misfit(net)


@pytest.mark.parametrize("seed", range(3))
def test_another_vae_is_noticed(seed):
    torch.manual_seed(seed)
    config = latents.decoder_of(teacher()).vae.config
    other = diffusers.AutoencoderKL.from_config(config).requires_grad_(False)
    found = vae_misfit(other, latents.record_of(DATA / "digits-vae"), raw_latents()[:8] * SCALE)
    assert "don't fit its VAE" in found


def test_the_command(monkeypatch):
    net = teacher()
    monkeypatch.setattr("edm.zoo.__main__.load_denoiser", lambda *_: net)
    done = CliRunner().invoke(zoo_command, ["inspect", "teacher"])
    assert (done.exit_code, "denoises its own samples" in done.output) == (0, True), done.output
    net.metadata["vae"]["scale"] = 2 * SCALE
    done = CliRunner().invoke(zoo_command, ["inspect", "teacher"])
    assert done.exit_code == 2
    assert "teacher: its latents aren't scaled by 1.4, as declared" in done.output
