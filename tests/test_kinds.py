"""What saves memory and time works with teachers of every kind, tiny ones here."""

import numpy as np
import pytest
import test_dit
import tiny_diffusers
import torch
from click.testing import CliRunner
from conftest import slow_ones
from test_edm2_training import small_network
from tiny import BATCH, CPU, assert_same_training, smoothed, tiny_config, weights

import sid_train
from edm import zoo
from edm.onnx_file import can_trace
from sid import lora, memory
from sid.inputs import Inputs
from sid.prepare import prepare

CLASSES = {"num_class_embeds": 3}
DIT_OF_LATENTS = {**tiny_diffusers.DIT, **tiny_diffusers.LATENT}
KINDS = {
    "UNet2DModel, epsilon": lambda _: tiny_diffusers.denoiser(),
    "UNet2DModel, flow": lambda _: tiny_diffusers.denoiser(CLASSES, tiny_diffusers.FLOW),
    "DiTTransformer2DModel": lambda folder: tiny_diffusers.of_latents(folder, DIT_OF_LATENTS, tiny_diffusers.DDPM),
    "DiT": lambda _: transformer("dit"),
    "SiT": lambda _: transformer("sit"),
    "EDM2": lambda _: small_network(),
}
MODES = ({}, {"chunk": 2, "checkpoint": True}, {"lora_rank": 2, "precision": "bf16"})


def transformer(kind):
    """With answers, and so gradients, that aren't so large that rounding moves the keys' biases, which have none."""
    net = test_dit.denoiser(kind)
    for parameter in net.net.final_layer.linear.parameters():
        parameter.data /= 10
    return net


def distillation(teacher, **mode):
    return prepare(Inputs(teacher), tiny_config(augment=0, **mode), CPU)


def trained(teacher, **mode):
    made = smoothed(distillation(teacher, **mode))
    made.iteration()
    return made


@pytest.mark.parametrize("kind", slow_ones(KINDS, "UNet2DModel, flow", "EDM2"))
def test_training(kind, tmp_path):
    """Chunks and recomputed activations give the same training; the other modes train the same class."""
    teacher = KINDS[kind](tmp_path)
    start, plain = weights(distillation(teacher)), weights(trained(teacher))
    assert_same_training(weights(trained(teacher, chunk=2, checkpoint=True)), plain, start)
    for mode in ({"lora_rank": 2}, {"steps": 2}, {"precision": "bf16"}):
        made = trained(teacher, **mode)
        assert all(value.isfinite().all() for value in weights(made).values()), mode
        ema = lora.merge(made.state.ema)
        assert type(ema) is type(teacher)
        moved = [not torch.equal(value, start[f"ema.{name}"]) for name, value in ema.state_dict().items()]
        assert any(moved), mode


@pytest.mark.parametrize("kind", slow_ones(["UNet2DModel, flow", "DiT", "EDM2"], "UNet2DModel, flow", "DiT"))
def test_the_memory_estimate(kind, tmp_path):
    """Savings show in it: chunks keep fewer activations, low-rank updates need less for Adam."""
    teacher = KINDS[kind](tmp_path)
    plain, saving, low_rank = (
        memory.estimate(teacher, tiny_config(**{"augment": 0, "precision": "fp32", **mode}), BATCH) for mode in MODES
    )
    assert saving.generator_activations < plain.generator_activations
    assert low_rank.moments < plain.moments
    assert 0 < low_rank.peak < 1


def test_a_dry_run_of_latents(tmp_path):
    """It needs the VAE's configuration, as the run does, and says what the run needs."""
    net = tiny_diffusers.of_latents(tmp_path, DIT_OF_LATENTS, tiny_diffusers.DDPM)
    tiny_diffusers.write_parts(net, tmp_path)
    command = [f"--edm_model={tmp_path}", "-n", "--batch=8", "--device=cpu", f"--outdir={tmp_path}/runs"]
    done = CliRunner().invoke(sid_train.main, command)
    assert done.exit_code == 0, done.output
    assert "generator activations" in " ".join(done.output.split())
    (tmp_path / "vae" / "config.json").unlink()
    done = CliRunner().invoke(sid_train.main, command)
    assert done.exit_code != 0
    assert "channels are latents, but there is no VAE" in f"{done.output}{done.exception}"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.skipif(not can_trace(), reason="a PyTorch that can't write ONNX")
def test_onnx(tmp_path):
    """A UNet2DModel at any noise level, for more images than it was traced with. DiT, SiT and EDM2 pass, and take long.

    From 64 images, its layers that double the resolution take another path.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    net = tiny_diffusers.denoiser({**CLASSES, **blocks}, tiny_diffusers.FLOW).eval()
    zoo.save_network(net, tmp_path / "net.onnx")
    model = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    n = 66
    sigma, x = torch.linspace(0.05, 20, n), torch.randn(n, net.img_channels, net.img_resolution, net.img_resolution)
    inputs, labels = {"x": x.numpy(), "sigma": sigma.numpy()}, None
    if net.label_dim:
        labels = torch.eye(net.label_dim)[torch.arange(n) % net.label_dim]
        inputs["class_labels"] = labels.numpy()
    (found,) = model.run(["denoised"], inputs)
    with torch.no_grad():
        expected = net(x, sigma, labels).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
