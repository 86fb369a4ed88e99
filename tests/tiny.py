"""Tiny networks and distillations for tests, and what tests of training have in common."""

import os
import sys

import torch
import torch.distributed as dist

from sid.config import DistillationConfig
from sid.inputs import Inputs
from sid.prepare import prepare
from torch_utils import checkpoint
from training.networks import EDMPrecond

CPU = torch.device("cpu")
TINY_VAE = {  # an AutoencoderKL of the diffusers library
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [4, 4],
    "latent_channels": 2,
    "norm_num_groups": 2,
}
BATCH, BATCH_GPU = 8, 4
SMOOTH_EPS = 1e-2  # of Adam, near the tiny networks' gradients


def tiny_teacher(label_dim=3, augment_dim=9):
    """A denoiser with dropout, classes and augmentation labels whose weights are far from their initialisation."""
    torch.manual_seed(0)
    kwargs = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.2}
    net = EDMPrecond(8, 1, label_dim, model_type="SongUNet", augment_dim=augment_dim, **kwargs)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def tiny_config(**changes):
    values = {"batch": BATCH, "batch_gpu": BATCH_GPU, "lr": 1e-3, "glr": 2e-3, "total_kimg": 0.04, "seed": 5}
    return DistillationConfig(**{**values, "kimg_per_tick": 0.008, "snapshot_ticks": 10, "augment": 0.5, **changes})


def tiny_distillation(teacher=None, resume=None, **changes):
    return prepare(Inputs(teacher or tiny_teacher()), tiny_config(**changes), CPU, resume)


def smoothed(distillation):
    """The same with a large eps in Adam, for comparing trainings that round differently.

    With the usual eps, a gradient that is nothing but rounding makes a full step (those of keys' biases always are,
    any other may be), and from there the trainings part.
    """
    for updater in (distillation.state.generator_updater, distillation.state.fake_score_updater):
        for group in updater.optimizer.param_groups:
            group["eps"] = SMOOTH_EPS
    return distillation


def save(distillation, folder):
    """Writes its state into the folder; the file's path."""
    path = checkpoint.state_path(folder, distillation.state.nimg, distillation.config.batch)
    checkpoint.save_state(path, distillation.state.contents(distillation.config, distillation.collector.state_dict()))
    return path


class NoReport:
    samples = None

    def start(self, ema):
        pass

    def snapshot(self, ema, nimg):
        pass

    def fid(self, ema):
        pass


class Spy(torch.nn.Module):
    """A denoiser of a class from elsewhere, with what DESIGN asks for and nothing else; it records its calls."""

    def __init__(self, label_dim=0):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = 8, 3, label_dim
        self.sigma_min, self.sigma_max = 0.0, float("inf")
        self.hidden = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.level = torch.nn.Linear(1 + label_dim, 8)
        self.out = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 3, padding=1))

    calls = []  # noqa: RUF012  of all copies: (network, in train mode, with gradients, to its parameters)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        sigma = sigma.reshape(-1, 1, 1, 1)
        self.calls.append((self, self.training, torch.is_grad_enabled(), self.hidden.weight.requires_grad))
        levels = sigma.log().reshape(-1, 1)
        if self.label_dim:
            assert class_labels.shape == (len(x), self.label_dim)
            levels = torch.cat([levels, class_labels], dim=1)
        features = self.hidden(x / (1 + sigma**2).sqrt()) + self.level(levels)[:, :, None, None]
        return x / (1 + sigma**2) + sigma / (1 + sigma**2).sqrt() * self.out(features)


def weights(distillation):
    state = distillation.state
    networks = {"generator": state.generator, "fake_score": state.fake_score, "ema": state.ema}
    return {f"{name}.{key}": value.clone() for name, n in networks.items() for key, value in n.state_dict().items()}


def assert_same_training(actual, expected, start):
    """Equal but for rounding, measured by how far training moved the weights; all three are {name: tensor}.

    The trainings are `smoothed`.
    """
    for name, value in expected.items():
        difference, moved = (actual[name] - value).abs(), (value - start[name]).abs().max()
        assert difference.max() <= 2e-3 * moved + 1e-6, name


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start_two(function, *args, join=True):
    """Two processes that run function(rank, *args), forked from one that has loaded torch and so started at once."""
    return torch.multiprocessing.start_processes(function, args, 2, join=join, start_method="forkserver")


def on_two_processes(function, folder, *args):
    """What function(*args) returns on each of two gloo processes, in order of rank."""
    start_two(_one_of_two, function, str(folder), *args)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _one_of_two(rank, function, folder, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    dist.barrier()  # neither leaves while the other needs it
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads, torn down with the interpreter, abort it now and then
