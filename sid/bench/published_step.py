"""The training step as the paper's experiments ran it, without optimisations for speed.

The benchmark's baseline, and the reference that the tests hold `sid.distillation.Distillation` against. Both take the
same random draws; the formulas and constants here are written out once more rather than imported, so that a mistake
in one of the two shows as a difference.

float32 without TF32 (or the recipe's fp16 on a GPU), NCHW, attention as an explicit float32 softmax, resampling as
depthwise convolutions, Adam and clean-up of gradients and averaging one parameter at a time, fresh images for each
phase, one wait for the device per iteration.
"""

import dataclasses
import types

import torch

from edm import zoo
from sid.config import DistillationConfig, resolve
from sid.distillation import FAKE_SCORE_PHASE, GENERATOR_PHASE
from torch_utils import batches, seeding
from training.augment import EDM_MULTIPLIERS, AugmentPipe
from training.denoiser import DenoiserModule
from training.networks import Conv2d, UNetBlock
from training.training_loop import freeze_augment_mapping

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # noise levels of the generator's loss, as published
P_MEAN, P_STD, SIGMA_DATA = -1.2, 1.2, 0.5  # of the fake score's
OMEGA_MIN = 1e-5  # lower limit of omega, the weight of an image in the generator's loss
EPSILON = {False: 1e-8, True: 1e-6}  # Adam's, in full and in half precision
GRADIENT_LIMIT = 1e5  # gradients are clipped to this absolute value


class PublishedStep:
    """One iteration of SiD at a time, on one process, with the attributes of `Distillation` and its state.

    teacher: phi, a network of training/networks.py; it is copied. config: only the method's settings are used.
    """

    def __init__(self, teacher: DenoiserModule, config: DistillationConfig, device: torch.device):
        self.config = config = resolve(dataclasses.replace(config, precision=None), teacher, device)
        self.device, self.nimg = device, 0
        self.batch_gpu, self.rounds = batches.split_batch(config.batch, config.batch_gpu, 1)
        self.augment_pipe = AugmentPipe(p=config.augment, **EDM_MULTIPLIERS) if config.augment else None

        overrides = config.network_overrides(teacher)
        self.teacher = plain_network(teacher).to(device).eval().requires_grad_(False)
        self.generator, self.fake_score, self.ema = (
            plain_network(teacher, **overrides).to(device).requires_grad_(True) for _ in range(3)
        )
        self.ema.eval().requires_grad_(False)
        freeze_augment_mapping(self.generator)
        if not config.augment:
            freeze_augment_mapping(self.fake_score)
        self._trained = {
            net: [p for p in net.parameters() if p.requires_grad] for net in (self.generator, self.fake_score)
        }
        epsilon = EPSILON[self.config.precision == "fp16"]
        self._optimizers = {
            net: torch.optim.Adam(
                self._trained[net], lr=lr, betas=(float(beta1), 0.999), eps=epsilon, foreach=False, fused=False
            )
            for net, lr, beta1 in (
                (self.fake_score, config.lr, 0.0),
                (self.generator, config.glr, config.g_beta1),
            )
        }

    def iteration(self) -> float:
        """Updates psi, then theta, then theta's moving average; returns theta's loss of the last round, per image."""
        self.fake_score_phase()
        loss = self.generator_phase()
        self.average()
        self.nimg += self.config.batch
        return loss.item() / self.batch_gpu

    def generate(self, labels: torch.Tensor | None) -> torch.Tensor:
        net, sigma = self.generator, self.config.init_sigma
        assert sigma is not None
        z = torch.randn([self.batch_gpu, net.img_channels, net.img_resolution, net.img_resolution], device=self.device)
        levels = torch.full([self.batch_gpu, 1, 1, 1], sigma, dtype=torch.float32, device=self.device)
        return net(sigma * z, levels, labels)

    def fake_score_phase(self) -> None:
        self.generator.eval()
        self.fake_score.train()
        for labels in self._rounds(FAKE_SCORE_PHASE):
            with torch.no_grad():
                images = self.generate(labels)
            self._backward_fake_score(images, labels)
        self._update(self.fake_score)

    def generator_phase(self) -> torch.Tensor:
        self.generator.train()
        self.fake_score.eval().requires_grad_(False)
        for labels in self._rounds(GENERATOR_PHASE):
            loss = self._backward_generator(self.generate(labels), labels)
        for parameter in self._trained[self.fake_score]:
            parameter.requires_grad_(True)
        self._update(self.generator)
        return loss

    def _backward_fake_score(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        sigma = (torch.randn([self.batch_gpu, 1, 1, 1], device=self.device) * P_STD + P_MEAN).exp()
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        y, augment_labels = self.augment_pipe(images) if self.augment_pipe else (images, None)
        denoised = self.fake_score(y + torch.randn_like(y) * sigma, sigma, labels, augment_labels=augment_labels)
        loss = weight * (denoised - y) ** 2
        loss.sum().mul(self.config.ls / self.config.batch).backward()

    def _backward_generator(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
        assert self.config.tmax is not None
        t = torch.rand([self.batch_gpu, 1, 1, 1], device=self.device) * self.config.tmax / 1000
        sigma = (high + (1 - t) * (low - high)) ** RHO
        x_t = images + sigma * torch.randn_like(images)
        f_phi = self.teacher(x_t, sigma, labels)
        f_psi = self.fake_score(x_t, sigma, labels)
        with torch.no_grad():
            omega = (images - f_phi).abs().mean(dim=[1, 2, 3], keepdim=True).clip(min=OMEGA_MIN)
        loss = ((f_phi - f_psi) * ((f_phi - images) - self.config.alpha * (f_phi - f_psi)) / omega).sum()
        loss.mul(self.config.lsg / self.config.batch).backward()
        return loss.detach()

    def _update(self, net: DenoiserModule) -> None:
        """Cleans the gradients of one network and makes a step of Adam, one parameter after the other."""
        for parameter in self._trained[net]:
            gradient = parameter.grad
            assert gradient is not None
            torch.nan_to_num(gradient, nan=0, out=gradient)
            gradient.clamp_(-GRADIENT_LIMIT, GRADIENT_LIMIT)
        self._optimizers[net].step()
        self._optimizers[net].zero_grad(set_to_none=True)

    @torch.no_grad()
    def average(self) -> None:
        config = self.config
        halflife = config.ema_halflife_kimg * 1000
        if config.ema_rampup_ratio is not None:
            halflife = min(halflife, self.nimg * config.ema_rampup_ratio)
        beta = 0.5 ** (config.batch / halflife) if halflife else 0.0
        for average, parameter in zip(self.ema.parameters(), self.generator.parameters()):
            average.copy_(parameter.lerp(average, beta))
        for average, buffer in zip(self.ema.buffers(), self.generator.buffers()):
            average.copy_(buffer)

    def _rounds(self, phase: int):
        """The seeds and class labels of `Distillation`, so that both train on the same draws."""
        for r in range(self.rounds):
            seeding.seed_at(self.config.seed, phase, self.nimg + r * self.batch_gpu)
            labels = None
            if self.generator.label_dim:
                classes = torch.randint(self.generator.label_dim, [self.batch_gpu], device=self.device)
                labels = torch.nn.functional.one_hot(classes, self.generator.label_dim).to(torch.float32)
            yield labels


def plain_network(net: DenoiserModule, **overrides) -> DenoiserModule:
    """A copy whose attention is explicit and whose resampling is convolution, as in the published networks."""
    net = zoo.clone_network(net, **overrides)
    explicit_attention(net)
    for module in net.modules():
        if isinstance(module, Conv2d):
            module.box_filter = False
    return net


def explicit_attention(net: torch.nn.Module) -> None:
    """Makes the attention of a network, in place, products of matrices around a float32 softmax."""
    for module in net.modules():
        if isinstance(module, UNetBlock):
            module._attend = types.MethodType(_attend, module)


def _attend(block: UNetBlock, x: torch.Tensor) -> torch.Tensor:
    n, c, height, width = x.shape
    channels = c // block.num_heads
    q, k, v = block.qkv(x).reshape(n * block.num_heads, channels, 3, height * width).unbind(2)
    logits = torch.einsum("ncq,nck->nqk", q.to(torch.float32), k.to(torch.float32) / channels**0.5)
    weights = logits.softmax(dim=2).to(q.dtype)
    return torch.einsum("nqk,nck->ncq", weights, v).reshape(n, c, height, width)
