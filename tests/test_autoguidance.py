"""Guidance by a weaker network: its formula, where it enters a distillation, and what doesn't fit."""

import json

import pytest
import torch
from click.testing import CliRunner
from tiny import CPU, Spy, equal, save, tiny_config, tiny_teacher, weights

from dnnlib import UserError
from edm import generate, zoo
from edm.sampler import sample
from sid import memory
from sid.guidance import Guidance, parse_guidance
from sid.inputs import Inputs
from sid.loss import SiDLoss
from sid.prepare import prepare
from sid.run import distil
from sid.teacher_distance import TeacherDistance
from training.guidance import GuidedDenoiser, check_guide
from training.networks import EDMPrecond

WEIGHT = 1.7


class Gaussian(torch.nn.Module):
    """The exact denoiser of pixels from N(mean, std^2)."""

    img_resolution, img_channels, label_dim = 4, 1, 0

    def __init__(self, mean=0.0, std=0.5):
        super().__init__()
        self.mean, self.std = (torch.nn.Parameter(torch.tensor(value)) for value in (mean, std))

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        share = self.std**2 / (self.std**2 + sigma**2)
        return self.mean + share * (x - self.mean)


def weaker(label_dim=3, **changes):
    """A guide for `tiny_teacher`, of another architecture."""
    torch.manual_seed(7)
    arguments = {"model_channels": 4, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0}
    net = EDMPrecond(**{"img_resolution": 8, "img_channels": 1, **changes}, label_dim=label_dim, **arguments)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval()


def distillation(guidance, guide, resume=None, **changes):
    teacher = tiny_teacher(augment_dim=0)
    config = tiny_config(guidance=guidance, augment=0, **changes)
    return prepare(Inputs(teacher, guide=guide), config, CPU, resume)


def trained(*args, **changes):
    found = distillation(*args, **changes)
    found.iteration()
    found.iteration()
    return found


def test_the_formula():
    net, guide = tiny_teacher(augment_dim=0).eval(), weaker()
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1, 10]).reshape(-1, 1, 1, 1), torch.eye(3)
    with torch.no_grad():
        strong, weak, null = net(x, sigma, labels), guide(x, sigma, labels), net(x, sigma, torch.zeros(3, 3))
        for other, base in ((guide, weak), (None, null)):
            guided = GuidedDenoiser(net, other, WEIGHT)(x, sigma, labels)
            torch.testing.assert_close(guided, base + WEIGHT * (strong - base))
            assert torch.equal(GuidedDenoiser(net, other, 1)(x, sigma, labels), strong)


def test_samples_of_a_guided_gaussian():
    """The guide's data have another mean m: the guided probability flow ends at N(0, s^2) moved by (1 - w) m."""
    net = GuidedDenoiser(Gaussian(0.0), Gaussian(0.3), 2.0)
    images, plain = (sample(n, range(8), num_steps=64) for n in (net, net.net))
    torch.testing.assert_close(images - plain, torch.full_like(plain, -0.3), atol=1e-2, rtol=0)


def test_the_generators_loss_sees_the_guided_teacher_and_then_the_classes():
    phi, psi, guide = (net.eval() for net in (tiny_teacher(augment_dim=0), tiny_teacher(augment_dim=0), weaker()))
    for parameter in psi.parameters():
        parameter.data += 0.05
    x_g, labels = torch.randn(3, 1, 8, 8), torch.eye(3)
    noise = torch.full([3, 1, 1, 1], 0.7), torch.randn(3, 1, 8, 8)

    def guided(x, sigma, condition):
        return guide(x, sigma, condition) + WEIGHT * (phi(x, sigma, condition) - guide(x, sigma, condition))

    for text in ("1.7", "1.7,long=2"):
        found, expected = (x_g.clone().requires_grad_() for _ in range(2))
        guidance = parse_guidance(text)
        loss = SiDLoss(guidance=guidance, guide=guide).generator_loss(phi, psi, found, labels, noise)
        by_class = None if text == "1.7" else Guidance(teacher=2)
        same = SiDLoss(guidance=by_class).generator_loss(guided, psi, expected, labels, noise)
        torch.testing.assert_close(loss, same)
        (a,), (b,) = torch.autograd.grad(loss.sum(), found), torch.autograd.grad(same.sum(), expected)
        torch.testing.assert_close(a, b)  # through phi and the guide


@pytest.mark.parametrize(
    ("text", "guidance"),
    [
        ("1.7", Guidance(over_guide=1.7)),
        ("1", Guidance(over_guide=1)),
        ("2.5,long=2", Guidance(teacher=2, over_guide=2.5)),
        ("long-short=1.5,3", Guidance(1.5, 1.5, 1.5, over_guide=3)),
        ("3,short=0.5", Guidance(0.5, over_guide=3)),
    ],
)
def test_parsing(text, guidance):
    assert parse_guidance(text) == guidance == parse_guidance(str(guidance))


@pytest.mark.parametrize("text", ["0.5", "1,2", "long=2,short=0.5", "", "nan", "inf", "=2", "1.7,", "w=2"])
def test_what_is_no_guidance(text):
    with pytest.raises(UserError, match="--guidance"):
        parse_guidance(text)


def test_a_weight_of_one_changes_no_bit_and_another_does():
    plain = weights(trained(None, None))
    assert equal(weights(trained("1", weaker())), plain)
    for options in ({"share_noise": True}, {"chunk": 2, "checkpoint": True, "lora_rank": 2}):
        guided = weights(trained("1.7", weaker(), **options))
        assert all(value.isfinite().all() for value in guided.values())
        assert not equal(guided, plain)


def test_a_resumed_run_needs_the_same_guide_and_ends_the_same(tmp_path):
    whole = trained("1.7", weaker())
    half = distillation("1.7", weaker())
    half.iteration()
    state = save(half, tmp_path)
    assert half.state.ema.metadata["guide_sha256"] == zoo.network_hash(weaker())
    resumed = distillation("1.7", weaker(), resume=state)
    resumed.iteration()
    assert equal(weights(resumed), weights(whole))
    other = weaker()
    next(other.parameters()).data += 1
    with pytest.raises(UserError, match="another network; give the --guide"):
        distillation("1.7", other, resume=state)
    with pytest.raises(UserError, match="--guide"):
        distillation(None, None, resume=state)
    with pytest.raises(UserError, match="no network; leave --guide out"):
        distillation("1.7", weaker(), resume=save(trained(None, None), tmp_path))


def test_memory_counts_the_guide():
    config = distillation("1.7", weaker()).config
    plain, guided = (memory.estimate(tiny_teacher(augment_dim=0), config, 4, guide) for guide in (None, weaker()))
    extra = sum(p.numel() * 4 for p in weaker().parameters()) / memory.GB
    assert guided.weights - plain.weights == pytest.approx(extra)
    assert guided.generator_activations > plain.generator_activations
    assert guided.fake_score_activations == plain.fake_score_activations


def test_bf16_stores_and_calls_the_guide_in_bf16():
    found = distillation("1.7", weaker(), precision="bf16")
    found.iteration()
    assert found.networks.guide.compute_dtype == torch.bfloat16
    assert any(weight.dtype == torch.bfloat16 for weight in found.networks.guide.parameters())


def generator():
    net = weaker()
    net.metadata = {"init_sigma": 2.5}
    return net


def one_level():
    net = weaker()
    net.sigma_min, net.sigma_max = 0.5, 20.0
    return net


def rounding():
    net = weaker()
    net.round_sigma = lambda sigma: torch.as_tensor(sigma).log2().round().exp2()
    return net


def fewer_classes():
    net = weaker()
    net.metadata = {"classes": "0-1"}
    return net


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: weaker(img_resolution=16), "images are 1 x 16 x 16"),
        (lambda: weaker(img_channels=3), "images are 3 x 8 x 8"),
        (lambda: weaker(4), "classes are 4"),
        (lambda: weaker(0), "classes are 0"),
        (lambda: weaker(sigma_data=1.0), "sigma_data are 1"),
        (generator, "is a generator"),
        (one_level, "noise levels from 0.5 to 20"),
        (rounding, "rounds noise levels"),
        (fewer_classes, "never seen class 2"),
    ],
)
def test_a_guide_that_does_not_fit(make, words):
    with pytest.raises(UserError, match=words) as error:
        check_guide(make(), tiny_teacher())
    assert error.value.message.startswith("--guide: ")
    assert "\n" not in error.value.message


def test_a_guide_that_changes_nothing():
    assert "own weights" in check_guide(tiny_teacher(), tiny_teacher())
    assert check_guide(weaker(), tiny_teacher()) is None


def test_a_weight_without_a_guide_and_the_other_way_round():
    for guidance, guide in (("1.7", None), ("long=2", weaker()), (None, weaker())):
        with pytest.raises(UserError, match="--guid"):
            distillation(guidance, guide)
    with pytest.raises(UserError, match="neither classes nor prompts"):
        prepare(Inputs(Spy().eval(), guide=Spy().eval()), tiny_config(guidance="1.7,long=2", augment=0), CPU)


def test_a_run_keeps_its_guide_and_measures_the_guided_teacher(tmp_path, monkeypatch):
    """From Python: the folder holds the guide, resumes with it, and its record names it."""
    run = tmp_path / "run"
    monkeypatch.setattr("sid.teacher_samples.NUM_IMAGES", 4)
    seen = []
    monkeypatch.setattr(
        "sid.plan.TeacherDistance", lambda net, **options: seen.append(net) or TeacherDistance(net, **options)
    )
    config = {"total_kimg": 0.016, "augment": 0, "guidance": "1.7", "init_sigma": None}
    one = distil(tiny_teacher(augment_dim=0), tiny_config(**config), run, guide=weaker(), device="cpu")
    guide = zoo.load_network(run / "guide.safetensors")
    assert zoo.network_hash(guide) == zoo.network_hash(weaker()) == one.net.metadata["guide_sha256"]
    options = json.loads((run / "training_options.json").read_text())
    assert [(type(net), net.weight) for net in seen] == [(GuidedDenoiser, 1.7)]
    assert (options["guide"], options["guidance"]) == (str(run / "guide.safetensors"), "1.7")
    with pytest.raises(UserError, match="--guide"):
        distil(tiny_teacher(augment_dim=0), tiny_config(**{**config, "guidance": None}), run, device="cpu")


def run_command(command, *arguments):
    result = CliRunner().invoke(command, list(map(str, arguments)))
    return result.exit_code, str(result.exception or "") + result.output


def test_generate_and_fid_take_guidance(tmp_path):
    zoo.save_network(tiny_teacher(augment_dim=0), tmp_path / "teacher.safetensors")
    zoo.save_network(weaker(), tmp_path / "guide.safetensors")
    zoo.save_network(weaker(), tmp_path / "generator.safetensors", init_sigma=2.5)
    network, guide = f"--network={tmp_path}/teacher.safetensors", f"--guide={tmp_path}/guide.safetensors"
    shared = ["--seeds=0-3", "--steps=3", "--device=cpu"]
    pictures = {}
    for name, options in {
        "plain": [],
        "one": [guide, "--guidance=1"],
        "auto": [guide, "--guidance=3"],
        "classes": ["--guidance=3"],
    }.items():
        code, text = run_command(generate.main, network, *shared, *options, f"--grid={tmp_path}/{name}.png")
        assert code == 0, text
        pictures[name] = (tmp_path / f"{name}.png").read_bytes()
    assert pictures["plain"] == pictures["one"]
    assert len(set(pictures.values())) == 3
    wrong = {
        "say how strongly": [network, guide],
        "one step": [f"--network={tmp_path}/generator.safetensors", "--guidance=2"],
        "is a generator": [network, f"--guide={tmp_path}/generator.safetensors", "--guidance=2"],
    }
    for words, options in wrong.items():
        code, text = run_command(generate.main, *options, "--seeds=0", f"--grid={tmp_path}/wrong.png")
        assert code != 0, text
        assert words in text
