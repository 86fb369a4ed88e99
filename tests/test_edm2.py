"""EDM2's network, loss, rates and averages against reference numbers (tests/data/index-edm2.json) and closed forms."""

import copy
import json
import math
import pickle

import numpy as np
import parity
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from edm import zoo
from edm.metrics.reference import load_reference
from edm.zoo.__main__ import main as zoo_command
from torch_utils.updates import lr_factor, power_function_beta, power_function_exponent
from training.loss import EDM2Loss
from training.networks_edm2 import MPConv, Precond, mp_cat, mp_silu, mp_sum, normalize

INDEX = json.loads((parity.DATA / "index-edm2.json").read_text())
PUBLISHED = json.loads((parity.DATA / "published_networks_edm2.json").read_text())
NETWORKS = ["network-edm2-cond.npz", "network-edm2-uncond-latent.npz"]
SNAPSHOTS = {"edm2-format-rgb": parity.TOLERANCE, "edm2-format-latent": 5e-3}  # the latter in half precision


def seeded_network(name):
    """The network of a file of reference numbers with weights by index-edm2.json's weights_rule, in eval mode."""
    net = Precond(**INDEX[name]["init_kwargs"])
    rng, state = np.random.RandomState(INDEX[name]["weights_seed"]), net.state_dict()
    for key in sorted(state):
        w = np.float32(rng.standard_normal(state[key].shape))
        if key.endswith("freqs"):
            w = 2 * math.pi * w
        elif key.endswith("phases"):
            w = 2 * math.pi * (w - np.floor(w))
        elif state[key].ndim == 0:
            w = 0.5 + 0.1 * w
        state[key].copy_(torch.as_tensor(w))
    return net.eval()


def small_network(**kwargs):
    torch.manual_seed(0)
    sizes = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    net = Precond(8, 3, 2, **{**sizes, "channels_per_head": 8, **kwargs})
    for name, parameter in net.named_parameters():
        if parameter.ndim == 0:  # zero gains would hide everything
            parameter.data.fill_(0.5 + 0.1 * len(name) / 40)
    return net


# --- reference numbers


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_log_variances(name):
    net, data = seeded_network(name), parity.arrays(name)
    x, labels = data["x"].requires_grad_(), data.get("class_labels")
    denoised, logvar = net(x, data["sigma"], labels, return_logvar=True)
    parity.assert_close(denoised, data["D"])
    parity.assert_close(logvar, data["logvar"])
    (denoised * data["cotangent"]).sum().backward()
    parity.assert_close(x.grad, data["grad_x"])
    norms = [math.nan if p.grad is None else p.grad.norm().item() for p in net.parameters()]
    expected, found = data["grad_norms"], torch.tensor(norms)
    assert torch.equal(found.isnan(), expected.isnan())
    parity.assert_close(found.nan_to_num(), expected.nan_to_num())
    if "D_without_labels" in data:
        parity.assert_close(net(data["x"], data["sigma"]), data["D_without_labels"])


@pytest.mark.parametrize("name", NETWORKS)
def test_loss(name):
    net, data = seeded_network(name), parity.arrays(name)
    torch.manual_seed(41)
    with torch.no_grad():
        loss = EDM2Loss(sigma_data=net.sigma_data)(net, data["loss_images"], data.get("loss_labels"))
    parity.assert_close(loss, data["loss_seed41"])


def test_forced_normalisation_gives_the_weights_of_a_training_forward_pass():
    net, data = seeded_network(NETWORKS[0]), parity.arrays(NETWORKS[0])
    net.normalize_weights()
    with torch.no_grad():
        parity.assert_close(net.train()(data["x"], data["sigma"], data["class_labels"]), data["D_train_mode"])
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    *layers, logvar = zip(weights, (p.norm() for p in weights.values()), data["weight_norms_after_training_forward"])
    assert logvar[0] == "logvar_linear.weight"  # which that pass didn't call
    parity.assert_close(torch.stack([norm for _, norm, _ in layers]), torch.stack([norm for *_, norm in layers]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    entry = PUBLISHED[name]
    with torch.device("meta"):
        net = Precond(**entry["init_kwargs"])
    assert sum(p.numel() for p in net.parameters()) == entry["parameters"]
    if "state" in entry:
        assert [(k, list(v.shape)) for k, v in net.state_dict().items()] == list(entry["state"].items())


def test_learning_rates():
    table = INDEX["learning_rate"]
    for (reference, batches, rampup_mimg), (nimg, batch, expected) in zip(table["args"], table["values"]):
        factor = lr_factor(int(nimg), 1e9, rampup_mimg * 1e6, "sqrt", batches * batch)
        assert reference * factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_published_snapshots(name, tmp_path):
    """Through the reader that runs no code, and from our own formats."""
    expected = parity.arrays(f"{name}.npz")
    net = zoo.load_network(parity.DATA / f"{name}.pkl")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    for copied in ("network.safetensors", "network.pkl", "folder"):
        zoo.save_network(net, tmp_path / copied)
        net = zoo.load_network(tmp_path / copied)
        denoised = net(expected["x"], expected["sigma"], expected.get("class_labels"))
        parity.assert_close(denoised, expected["D"], SNAPSHOTS[name])


def test_the_encoder_of_latents_is_recorded():
    """As latents = (raw - shift) scale; published are raw latents' means and standard deviations."""
    assert "vae" not in zoo.load_network(parity.DATA / "edm2-format-rgb.pkl").metadata
    record = zoo.load_network(parity.DATA / "edm2-format-latent.pkl").metadata["vae"]
    assert (record["source"], record["channels"]) == ("stabilityai/sd-vae-ft-mse", 4)
    assert record["shift"] == pytest.approx([5.81, 3.25, 0.12, -2.15], abs=1e-5)
    assert record["scale"] == pytest.approx([0.5 / std for std in (4.17, 4.62, 3.71, 3.28)], abs=1e-5)


def test_inspection_of_a_snapshot():
    result = CliRunner().invoke(zoo_command, ["inspect", str(parity.DATA / "edm2-format-latent.pkl")])
    assert "Precond of EDM2" in result.output
    assert "4 x 8 x 8" in result.output
    assert "no better than a linear denoiser" in result.output  # its weights are random


def test_published_references(tmp_path):
    """Pickles of {metric: {mu, sigma}}, of which the arrays are the only objects that aren't plain values."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 4))
    sigma = np.asfortranarray(np.cov(features.T))
    contents = {"fid": {"mu": features.mean(0), "sigma": sigma}, "fd_dinov2": {"mu": np.zeros(2), "sigma": np.eye(2)}}
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps(contents, protocol=4))
    reference = load_reference(path)
    assert np.array_equal(reference.mu, features.mean(0))
    assert np.array_equal(reference.sigma, sigma)
    for wrong in (
        {"fd_dinov2": contents["fd_dinov2"]},
        {"fid": {"mu": np.arange(4), "sigma": np.eye(4)}},
        {"fid": {"mu": [0.0], "sigma": [[1.0]]}},
    ):
        path.write_bytes(pickle.dumps(wrong, protocol=4))
        with pytest.raises(UserError, match=r"img512\.pkl"):
            load_reference(path)
    path.write_bytes(pickle.dumps({"fid": {"mu": np.array([print]), "sigma": np.eye(1)}}, protocol=4))
    with pytest.raises(UserError, match="a plain number"):
        load_reference(path)


# --- closed forms


def test_magnitudes_are_preserved():
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 96, 96).unbind()
    a, b = a[None], b[None].repeat(1, 3, 1, 1)
    assert mp_silu(a).square().mean() == pytest.approx(1, abs=2e-3)
    assert mp_sum(a, b[:, :64], 0.3).square().mean() == pytest.approx(1, abs=5e-3)
    joined = mp_cat(a, b, 0.5)
    assert joined.square().mean() == pytest.approx(1, abs=5e-3)
    shares = joined[:, :64].square().sum(), joined[:, 64:].square().sum()
    assert shares[0] == pytest.approx(shares[1].item(), rel=1e-2)  # although b has three times the channels
    assert normalize(7 * a, dims=[1]).square().mean(dim=1).sub(1).abs().max() < 1e-3
    out = MPConv(64, 32, [3, 3])(a).detach()
    assert out[:, :, 1:-1, 1:-1].square().mean() == pytest.approx(1, abs=0.05)


def test_only_directions_of_weights_matter_and_repeated_normalisation_changes_nothing():
    net = small_network().eval().requires_grad_(False)
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 3.0]), torch.eye(2)
    for module in net.modules():
        if isinstance(module, MPConv):
            module.weight *= 1 + 2 * torch.rand_like(module.weight[:1])  # of all output channels alike
    before = net(x, sigma, labels)
    net.normalize_weights()
    torch.testing.assert_close(net(x, sigma, labels), before, rtol=1e-3, atol=1e-3)
    net.normalize_weights()  # the fixed point is 1 - EPSILON, reached in two steps up to EPSILON^2
    twice = copy.deepcopy(net.state_dict())
    net.normalize_weights()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, twice[name], rtol=1e-7, atol=1e-6)
        if value.ndim > 1:
            rms = value.flatten(1).square().mean(dim=1).sqrt()
            assert (rms - 1).abs().max() < 2e-4


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_power_function_average_has_the_relative_width_asked_for(std):
    steps, batch = 5000, 4
    share = np.zeros(steps)  # of each update in the average
    for i in range(steps):
        beta = power_function_beta(batch, i * batch, std)
        share[:i] *= beta
        share[i] = 1 - beta
    times = (np.arange(steps) + 0.5) / steps
    mean = (share * times).sum()
    assert share.sum() == pytest.approx(1)
    assert math.sqrt((share * (times - mean) ** 2).sum()) == pytest.approx(std, rel=1e-2)
    gamma = power_function_exponent(std)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_half_precision_and_checkpointing_compute_the_same():
    net, x, labels = small_network(), torch.randn(4, 3, 8, 8), torch.eye(2)[[0, 1, 1, 0]]
    sigma = torch.tensor([0.1, 0.5, 2.0, 20.0])

    def gradients():
        net.zero_grad()
        out = net(x, sigma, labels)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    full = gradients()
    for module in net.modules():
        if hasattr(type(module), "checkpoint"):
            module.checkpoint = True
    for a, b in zip(gradients(), full):
        torch.testing.assert_close(a, b)
    net.compute_dtype = torch.bfloat16
    with torch.no_grad():
        parity.assert_close(net(x, sigma, labels), full[0], 0.05)
        parity.assert_close(net(x, sigma, labels, force_fp32=True), full[0])
