"""Networks against the reference numbers and the published names and shapes."""

import json

import parity
import pytest
import torch

from training import networks

NETWORKS = sorted(k[len("network-") : -len(".npz")] for k in parity.INDEX if k.startswith("network-"))
PUBLISHED = json.loads((parity.DATA / "published_networks.json").read_text())


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_input_gradients(name):
    net, data = parity.seeded_network(name), parity.arrays(f"network-{name}.npz")
    labels = {key: data[key] for key in ("class_labels", "augment_labels") if key in data}
    x = data["x"].requires_grad_()
    denoised = net(x, data["sigma"], **labels)
    parity.assert_close(denoised, data["D"])
    (grad,) = torch.autograd.grad((denoised * data["cotangent"]).sum(), x)
    parity.assert_close(grad, data["grad_x"])
    if "D_without_augment_labels" in data:
        labels.pop("augment_labels")
        parity.assert_close(net(data["x"], data["sigma"], **labels), data["D_without_augment_labels"])


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_state_dicts(name):
    entry = PUBLISHED[name]
    with torch.device("meta"):
        net = getattr(networks, entry["class_name"])(**entry["init_kwargs"])
    assert sum(p.numel() for p in net.parameters()) == entry["parameters"]
    assert [(k, list(v.shape)) for k, v in net.state_dict().items()] == list(entry["state"].items())


def test_noise_ranges():
    vp = networks.VPPrecond(8, 1, model_channels=8, channel_mult=[1], num_blocks=1)
    assert vp.sigma_min == 0.0009765625
    assert vp.sigma_max == pytest.approx(152.16697, rel=1e-7)
    iddpm = networks.iDDPMPrecond(8, 1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1)
    assert iddpm.sigma_min == pytest.approx(0.0064223, rel=1e-4)
    assert iddpm.sigma_max == pytest.approx(20291, rel=1e-4)
    assert iddpm.round_sigma(torch.tensor([0.0, 1e9])).tolist() == [0.0, iddpm.sigma_max]


@pytest.mark.parametrize("kind", ["fused", "separate"])
def test_resampling_with_the_box_filter_is_nearest_and_mean(kind):
    """The fast path for [1, 1] equals the general path written out with the outer-product filter."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for up in (True, False):
        conv = networks.Conv2d(3, 5, 3, up=up, down=not up, fused_resample=kind == "fused").double()
        fast = conv(x)
        conv.box_filter = False
        torch.testing.assert_close(fast, conv(x))


def test_zero_augment_labels_equal_none_and_labels_matter():
    net = parity.seeded_network("edm-ddpmpp-uncond-augment")
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 2.0])
    plain = net(x, sigma)
    torch.testing.assert_close(net(x, sigma, augment_labels=torch.zeros(2, 9)), plain)
    assert (net(x, sigma, augment_labels=torch.ones(2, 9)) - plain).abs().max() > 1e-3


def test_label_dropout_only_in_training():
    net = networks.EDMPrecond(
        8, 1, label_dim=4, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, label_dropout=1.0
    )
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.ones(3), torch.eye(4)[:3]
    for parameter in net.parameters():  # zero-initialised layers would hide the labels
        torch.nn.init.normal_(parameter, std=0.3)
    net.train()
    for module in net.modules():
        if isinstance(module, networks.UNetBlock):
            module.dropout = 0.0
    torch.testing.assert_close(net(x, sigma, labels), net(x, sigma))
    net.eval()
    assert (net(x, sigma, labels) - net(x, sigma)).abs().max() > 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_blocks_keep_the_memory_layout(model_type, layout):
    """Attention with one head gives a transposed view, which could turn all later layers to the other layout."""
    kwargs = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8, 4]}
    net = networks.EDMPrecond(8, 3, 0, model_type=model_type, **kwargs).to(memory_format=layout)
    found = []
    for module in net.modules():
        if isinstance(module, networks.UNetBlock):
            assert module.num_heads in (0, 1)
            module.register_forward_hook(lambda block, _, out: found.append(out.is_contiguous(memory_format=layout)))
    images = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    net(images, torch.ones(2, 1, 1, 1))
    assert len(found) > 4
    assert all(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attention_in_every_precision(dtype):
    """Values and gradients against float64 written out, for logits beyond what float16 could sum exponentials of."""
    torch.manual_seed(0)
    scales = (4.0, 4.0, 1.0)
    exact = [(s * torch.randn(2, 3, 16, 8, dtype=torch.float64)).to(dtype).double().requires_grad_() for s in scales]
    q, k, v = exact
    expected = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1) @ v
    weight = torch.randn_like(expected)
    rounded = [t.detach().to(dtype).requires_grad_() for t in exact]
    found = networks.attention(*rounded)
    assert found.dtype == dtype
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-5)  # fused kernels approximate the exponential
    pairs = zip(torch.autograd.grad(found, rounded, weight.to(dtype)), torch.autograd.grad(expected, exact, weight))
    for a, b in [(found, expected), *pairs]:
        assert (a.double() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize(("size", "levels", "fits"), [(9, 1, True), (9, 2, False), (6, 2, True), (30, 3, False)])
def test_sizes_that_fit(model_type, size, levels, fits):
    """Sizes are refused exactly where the decoder's sizes wouldn't match the encoder's."""

    def build():
        return networks.EDMPrecond(
            size, 1, model_type=model_type, model_channels=8, channel_mult=[1] * levels, num_blocks=1
        )

    if fits:
        x = torch.zeros([1, 1, size, size])
        assert build()(x, torch.ones([1, 1, 1, 1])).shape == x.shape
    else:
        with pytest.raises(ValueError, match=f"img_resolution={size} must be a multiple of {2 ** (levels - 1)}"):
            build()
