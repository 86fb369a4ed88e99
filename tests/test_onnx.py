"""Networks as ONNX files: onnxruntime, another program, computes what PyTorch does."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from tiny import Spy, tiny_teacher

from dnnlib import UserError
from edm import onnx_file, zoo
from edm.zoo.__main__ import main as zoo_command
from sid import OneStepGenerator
from training import networks

NCSNPP = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
NCSNPP |= {"attn_resolutions": [], "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
NCSNPP |= {"resample_filter": [1, 3, 3, 1]}
ADM = {"model_type": "DhariwalUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
ADM |= {"attn_resolutions": [8], "channel_mult_emb": 2}

pytestmark = pytest.mark.skipif(not onnx_file.can_trace(), reason="a PyTorch that can't write ONNX")


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def shaken(net):
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval()


def test_a_generator_from_noise_to_images(tmp_path):
    source, path = tmp_path / "net.safetensors", tmp_path / "net.onnx"
    zoo.save_network(tiny_teacher(3), source, kind="sid-generator", init_sigma=1.5)
    done = CliRunner().invoke(zoo_command, ["convert", str(source), str(path)])
    assert done.exit_code == 0, done.output
    assert "EDMPrecond" in done.output
    model = session(path)
    assert_same_images(model, OneStepGenerator.from_pretrained(source, "cpu"), 3)
    told = json.loads(model.get_modelmeta().custom_metadata_map["network"])
    assert told["metadata"] == {"kind": "sid-generator", "init_sigma": 1.5}
    assert str(Path(onnx_file.__file__).parents[1]).encode() not in path.read_bytes()  # no paths of this machine


def test_weights_in_16_bits_take_half_the_space_and_make_the_same_pictures(tmp_path):
    net, path = tiny_teacher(3).eval(), tmp_path / "net.onnx"
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    net.metadata = {"kind": "sid-generator", "init_sigma": 1.5}
    zoo.save_network(net, path, **net.metadata)
    whole = path.stat().st_size
    onnx_file.halve(path)
    weights = sum(parameter.nbytes for parameter in net.parameters() if parameter.ndim > 1)
    assert whole - path.stat().st_size > 0.8 * weights / 2
    assert_same_images(session(path), OneStepGenerator(net), 3)
    assert "network" in session(path).get_modelmeta().custom_metadata_map


def test_weights_beyond_16_bits_are_refused(tmp_path):
    net = tiny_teacher()
    next(p for p in net.parameters() if p.ndim > 1).data.flatten()[0] = 7e4
    zoo.save_network(net, tmp_path / "net.onnx")
    before = (tmp_path / "net.onnx").read_bytes()
    with pytest.raises(UserError, match=r"^--half: net\.\S+ holds a weight beyond 65504; leave the option out$"):
        onnx_file.halve(tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == before


def test_a_generator_without_classes(tmp_path):
    net = shaken(Spy())
    net.metadata = {"kind": "sid-generator", "init_sigma": 1.5}
    zoo.save_network(net, tmp_path / "net.onnx", **net.metadata)
    assert_same_images(session(tmp_path / "net.onnx"), OneStepGenerator(net), 0)


def assert_same_images(model, generator, label_dim):
    channels = generator.net.img_channels
    for n in (1, 5):
        draws = [torch.Generator().manual_seed(7 + i) for i in range(n)]
        inputs = {"z": torch.stack([torch.randn([channels, 8, 8], generator=g) for g in draws]).numpy()}
        if label_dim:
            inputs["class_labels"] = np.eye(label_dim, dtype=np.float32)[[2] * n]
        (images,) = model.run(["images"], inputs)
        expected = generator(n, seed=7, class_idx=2 if label_dim else None).numpy()
        assert (images.dtype, images.shape) == (np.uint8, (n, channels, 8, 8))
        assert np.abs(images.astype(int) - expected).max() <= 1
        assert (images == expected).mean() > 0.95
        assert len(np.unique(images)) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), [("VEPrecond", NCSNPP), ("iDDPMPrecond", ADM)])
def test_a_denoiser_at_any_noise_level(tmp_path, name, kwargs):
    net, path = shaken(getattr(networks, name)(8, 3, 2, **kwargs)), tmp_path / "net.onnx"
    zoo.save_network(net, path)
    labels, sigma = torch.eye(2)[[0, 1, 1]], torch.tensor([0.05, 1.0, 20.0])
    x = sigma.reshape(-1, 1, 1, 1) * torch.randn([3, 3, 8, 8])
    inputs = {"x": x.numpy(), "sigma": sigma.numpy(), "class_labels": labels.numpy()}
    (denoised,) = session(path).run(["denoised"], inputs)
    with torch.no_grad():
        expected = net(x, sigma, labels)
    assert expected.std() > 0.1
    assert denoised == pytest.approx(expected.numpy(), abs=1e-4 * float(expected.abs().max()))


def test_a_network_of_another_class(tmp_path):
    net = shaken(Spy())
    zoo.save_network(net, tmp_path / "net.onnx")
    x, sigma = torch.randn([4, 3, 8, 8]), torch.tensor([0.1, 0.5, 2.0, 8.0])
    (denoised,) = session(tmp_path / "net.onnx").run(None, {"x": x.numpy(), "sigma": sigma.numpy()})
    with torch.no_grad():
        assert denoised == pytest.approx(net(x, sigma).numpy(), abs=1e-4)


class Untraceable(Spy):
    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return x if float(x.mean()) > 0 else super().forward(x, sigma)


def test_what_cannot_be_written_is_one_line_and_no_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    with pytest.raises(UserError, match=r"^Untraceable can't be made an ONNX model by PyTorch [^\n\x1b]+$"):
        zoo.save_network(Untraceable(), path)
    with pytest.raises(UserError, match="No such file or directory: choose another place"):
        zoo.save_network(Untraceable(), tmp_path / "nowhere" / "net.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_file, "MAX_BYTES", 1000)
        with pytest.raises(UserError, match="at most 2 GiB"):
            zoo.save_network(tiny_teacher(), path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        zoo.save_network(tiny_teacher(), path)
    assert not path.exists()
    path.write_bytes(b"onnx")
    with pytest.raises(UserError, match=r"a network is a \.pkl or \.safetensors file"):
        zoo.load_network(path)
