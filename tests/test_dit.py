"""DiT and SiT against the diffusers library's transformer with the same weights, and their published files."""

import dataclasses

import pytest
import torch
from tiny import CPU, tiny_config, tiny_teacher

from dnnlib import UserError
from edm import latents, zoo
from edm.diffusers_pipelines import transformer_of_library, write
from edm.inspection import prediction
from edm.sampler import generate_all
from sid.guidance import Guidance, check_guidance
from sid.inputs import Inputs, check_architecture
from sid.prepare import prepare
from sid.run_options import RunOptions
from training.dit import DiTDenoiser, Transformer
from training.parameterisations import DiscreteTimes, ddpm_sigmas

CLASSES, WIDTH = 3, 64


def denoiser(kind="dit", **changes):
    torch.manual_seed(0)
    arguments = {"img_resolution": 8, "img_channels": 1, "label_dim": CLASSES, "width": WIDTH, "depth": 2}
    net = DiTDenoiser(kind, **{**arguments, "num_heads": 1, "out_channels": 2, **changes})
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    net.net.pos_embed.normal_()
    return net.eval().requires_grad_(False)


def positions(net):
    """Its embeddings of positions become the library's."""
    diffusers = pytest.importorskip("diffusers")
    size, patch = net.img_resolution, net.net._patch_size
    embedding = diffusers.models.embeddings.PatchEmbed(size, size, patch, net.img_channels, net.net.pos_embed.shape[2])
    net.net.pos_embed = embedding.pos_embed
    return net


def test_the_network_is_the_librarys():
    """But for the frequencies of times, which end one step earlier there."""
    net = positions(denoiser(num_heads=2))
    other = transformer_of_library(net).eval()
    for block in other.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, index = torch.randn(4, 1, 8, 8), torch.tensor([0.0, 10.5, 500.0, 999.0]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        expected = other(x, timestep=t, class_labels=index).sample
    torch.testing.assert_close(net.net(x, t, index), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_a_generator_of_latents_is_a_pipeline_of_the_library(kind, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    net = positions(denoiser(kind, img_channels=2, out_channels=4))
    torch.manual_seed(0)
    diffusers.AutoencoderKL(1, 1, latent_channels=2, block_out_channels=[4], norm_num_groups=2).save_pretrained(
        tmp_path / "vae"
    )
    net.metadata = {"kind": "sid-generator", "init_sigma": 2.5, "vae": latents.record_of(tmp_path / "vae")}
    write(net, tmp_path / "pipeline")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    draws = torch.Generator().manual_seed(0)
    images = pipeline([0, 2], num_inference_steps=1, guidance_scale=1, generator=draws, output_type="np").images
    z = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = latents.decoder_of(net).to_images(net(2.5 * z, torch.full([2, 1, 1, 1], 2.5), torch.eye(3)[[0, 2]]))
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2) * 255, ours.float(), rtol=0, atol=1.01)
    assert images.std() > 0.01
    teacher = positions(denoiser(kind, img_channels=2, out_channels=4))
    other = denoiser(kind, img_channels=2, out_channels=4)
    narrow = positions(denoiser(kind, img_channels=2, out_channels=4, mlp_width=64))
    teacher.metadata = {"vae": net.metadata["vae"]}
    other.metadata = narrow.metadata = net.metadata
    reason = "can't run a scheduler of flows" if kind == "sit" else "embeds times otherwise"
    for refused, words in ((teacher, reason), (other, "other embeddings of positions"), (narrow, "has other layers")):
        with pytest.raises(UserError, match=f"--to=diffusers: .*{words}"):
            write(refused, tmp_path / "refused")


def test_dit_predicts_noise_and_sit_a_velocity_whose_time_runs_the_other_way():
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1, 10]).reshape(-1, 1, 1, 1), torch.eye(3)
    dit, sit = denoiser(), denoiser("sit")
    times = DiscreteTimes(ddpm_sigmas("linear"))
    answer = dit.net(x / (1 + sigma**2).sqrt(), times.time(sigma.flatten()), torch.arange(3))[:, :1]
    torch.testing.assert_close(dit(x, sigma, labels), x - sigma * answer)
    t = 1 / (1 + sigma)  # the share of the image
    velocity = sit.net(t * x, t.flatten(), torch.arange(3))[:, :1]
    torch.testing.assert_close(sit(x, sigma, labels), t * x + (1 - t) * velocity)
    assert "times 1 to 0" in prediction(sit)


def test_no_class_is_the_one_after_the_last():
    net, x, sigma = denoiser(), torch.randn(2, 1, 8, 8), torch.ones(2, 1, 1, 1)
    null = net(x, sigma, torch.zeros(2, 3))
    assert torch.equal(null, net(x, sigma))
    answer = net.net(x / 2**0.5, net.times.time(sigma.flatten()), torch.tensor([3, 3]))[:, :1]
    torch.testing.assert_close(null, x - answer)
    assert check_guidance(Guidance(teacher=2), net) is None


@pytest.fixture(scope="module")
def weights():
    return denoiser(width=128, num_heads=2).net.state_dict()


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "SiT-B-2.pt", "sit/checkpoints/0001.pt"])
def test_a_published_file_is_a_teacher(weights, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    training = {"model": {}, "ema": {f"module.{key}": value for key, value in weights.items()}, "opt": {}}
    torch.save(training if "checkpoints" in name else weights, path)
    net = zoo.load_denoiser(path)
    assert (net.img_resolution, net.img_channels, net.label_dim) == (8, 1, 3)
    assert net.times.is_flow == ("sit" in name.lower())
    assert all(torch.equal(value, weights[key]) for key, value in net.net.state_dict().items())
    zoo.save_network(net, tmp_path / "copy.safetensors")
    copied = zoo.load_network(tmp_path / "copy.safetensors")
    assert torch.equal(generate_all(copied, [0, 1], steps=2), generate_all(net, [0, 1], steps=2))


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_distilling_with_guidance_and_recomputed_activations(kind):
    images = []
    for checkpoint in (False, True):
        options = {"checkpoint": checkpoint, "guidance": "long=2", "augment": 0, "sigma_schedule": "lognormal"}
        distillation = prepare(Inputs(denoiser(kind)), tiny_config(**options), CPU)
        distillation.iteration()
        images.append(generate_all(distillation.state.ema, [0, 1]))
    assert (images[0].int() - images[1].int()).abs().max() <= 1


@pytest.mark.parametrize(("kind", "sign"), [("dit", 1), ("sit", -1)])
def test_a_file_without_a_name_is_known_by_its_answers(kind, sign, tmp_path):
    """To noise z, a DiT answers z and a SiT -z, in a transformer that does nothing else."""
    net = denoiser(width=128, num_heads=2).net
    for parameter in net.parameters():
        parameter.data.zero_()
    net.pos_embed.zero_()
    net.x_embedder.proj.weight.data[:4] = torch.eye(4).reshape(4, 1, 2, 2)
    linear = net.final_layer.linear.weight.data.view(2, 2, 2, -1)  # [row, column, output, width]
    linear[:, :, 0, :4] = sign * torch.eye(4).reshape(2, 2, 4)
    torch.save(net.state_dict(), tmp_path / "teacher.pt")
    assert zoo.load_denoiser(tmp_path / "teacher.pt").times.is_flow == (kind == "sit")


class Code:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("teacher.pt", {}, "DiT or SiT"),
        ("dit.pt", {"pos_embed": None}, "not the weights of a DiT"),
        ("dit.pt", {"x_embedder.proj.weight": torch.zeros(128, 4, 2, 2)}, "4 channels are latents"),
        ("dit.pt", {"blocks.1.attn.proj.bias": torch.zeros(7)}, "weights don't fit"),
        ("dit.pt", {"t_embedder.mlp.0.bias": torch.full([128], float("nan"))}, "NaN"),
        ("dit.pt", {"x_embedder.proj.weight": torch.zeros(100, 1, 2, 2)}, "attention heads"),
        ("dit.pt", {"code": Code()}, "not weights alone"),
        ("dit.pt", "text", "not weights alone"),
    ],
)
def test_files_that_are_refused(weights, tmp_path, capsys, name, change, words):
    path = tmp_path / name
    if change == "text":
        path.write_text("nothing")
    else:
        torch.save({key: value for key, value in {**weights, **change}.items() if value is not None}, path)
    with pytest.raises(UserError, match=words) as error:
        zoo.load_denoiser(path)
    assert "\n" not in error.value.message
    assert "code ran" not in capsys.readouterr().out


def test_the_names_are_the_published_ones(weights):
    published = {"x_embedder.proj.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight", "pos_embed"}
    published |= {"blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias", "blocks.1.mlp.fc2.bias"}
    assert published <= set(weights)
    sizes = Transformer(32, 4, 8, 1000, 1152, 1, 16).state_dict()
    assert tuple(sizes["pos_embed"].shape) == (1, 256, 1152)
    assert tuple(sizes["final_layer.linear.weight"].shape) == (32, 1152)


@pytest.mark.parametrize("option", ["arch", "precond", "cbase", "cres"])
def test_options_of_edms_networks_are_refused(option):
    options = dataclasses.replace(RunOptions(), **{option: "ddpmpp"})
    with pytest.raises(
        UserError, match=f"--{option}=ddpmpp: describes networks of EDM, and the teacher is a DiTDenoiser"
    ):
        check_architecture(denoiser(), options)


def test_the_weighting_of_its_own_prediction_needs_one():
    assert prepare(Inputs(denoiser()), tiny_config(fake_score_weighting="prediction", augment=0), CPU).loss.denoising
    with pytest.raises(UserError, match="--fake-score-weighting=prediction: is for teachers that predict noise"):
        prepare(Inputs(tiny_teacher()), tiny_config(fake_score_weighting="prediction"), CPU)
