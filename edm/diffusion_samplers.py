"""EDM's samplers of diffusion models (arXiv:2206.00364, Algorithms 1 and 2), called as `edm.sampler` says."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dnnlib import UserError
from training.denoiser import noise_range
from training.networks import iddpm_sigmas

Function = Callable[[Tensor], Tensor]


@torch.no_grad()
def heun_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = float("inf"),
    S_noise: float = 1.0,
) -> Tensor:
    """EDM's second-order sampler, deterministic unless S_churn > 0. It evaluates the network 2 num_steps - 1 times.

    Errors: UserError when no noise level lies both within sigma_min to sigma_max and within the network's own range.
    """
    sigmas = _karras_steps(num_steps, *_limit_range(net, sigma_min, sigma_max), rho, latents.device)
    sigmas = _until_zero(_round_sigma(net, sigmas))
    x = latents.to(torch.float64) * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= sigma <= S_max else 0.0
        sigma_hat = _round_sigma(net, sigma * (1 + gamma))
        x_hat = x + (sigma_hat**2 - sigma**2).sqrt() * S_noise * randn_like(x)
        slope = (x_hat - _denoise(net, x_hat, sigma_hat, class_labels)) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * slope
        if i < num_steps - 1:
            slope_next = (x - _denoise(net, x, sigma_next, class_labels)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (slope + slope_next) / 2
    return x


@torch.no_grad()
def ablation_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
) -> Tensor:
    """The deterministic samplers of EDM's ablation, which combine the choices of DDPM, NCSN++ and iDDPM.

    solver euler | heun; discretization vp | ve | iddpm | edm; schedule vp | ve | linear; scaling vp | none.
    sigma_min, sigma_max: None takes the range of the discretization.
    Errors: UserError when a choice isn't one of these, or the range and the network's own have no level in common.
    """
    choices = {"solver": (solver, "euler heun"), "discretization": (discretization, "vp ve iddpm edm")}
    choices |= {"schedule": (schedule, "vp ve linear"), "scaling": (scaling, "vp none")}
    for option, (value, known) in choices.items():
        if value not in known.split():
            raise UserError(f"--{option}={value}: choose one of {known.replace(' ', ', ')}")

    low, high = _default_range(discretization, epsilon_s)
    low, high = _limit_range(net, low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)
    vp = _VPSchedule.through(low, high, epsilon_s)
    sigma, sigma_deriv, sigma_inv = _schedules(vp)[schedule]
    s, s_deriv = _scalings(sigma, sigma_deriv)[scaling]
    if discretization == "vp":
        steps = vp.sigma(1 + _ramp(num_steps, latents.device) * (epsilon_s - 1))
    elif discretization == "ve":
        steps = (high**2 * (low**2 / high**2) ** _ramp(num_steps, latents.device)).sqrt()
    elif discretization == "iddpm":
        steps = _iddpm_steps(num_steps, low, high, C_1, C_2, M, latents.device)
    else:
        steps = _karras_steps(num_steps, low, high, rho, latents.device)
    times = _until_zero(sigma_inv(_round_sigma(net, steps)))

    def slope(x: Tensor, t: Tensor) -> Tensor:
        denoised = _denoise(net, x / s(t), sigma(t), class_labels)
        return (sigma_deriv(t) / sigma(t) + s_deriv(t) / s(t)) * x - sigma_deriv(t) * s(t) / sigma(t) * denoised

    x = latents.to(torch.float64) * (sigma(times[0]) * s(times[0]))
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        d = slope(x, t)
        x_next = x + (t_next - t) * d
        if solver == "heun" and i < num_steps - 1:
            x_next = x + (t_next - t) * (d + slope(x_next, t_next)) / 2
        x = x_next
    return x


def _denoise(net: Any, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
    """The network's answer to a float64 state [N, C, H, W] at one noise level, in float64; the call is in float32."""
    levels = sigma.to(torch.float32).expand(x.shape[0]).reshape(-1, 1, 1, 1)
    return net(x.to(torch.float32), levels, class_labels).to(torch.float64)


def _round_sigma(net: Any, sigma: Tensor) -> Tensor:
    """The float64 noise levels that the network knows, which is asked in float32.

    A network that takes any level leaves them as they are, to the last digit of float64.
    """
    asked = sigma.to(torch.float32)
    if getattr(net, "round_sigma", None) is None:
        return sigma
    rounded = torch.as_tensor(net.round_sigma(asked)).to(torch.float32)
    return sigma if torch.equal(rounded, asked) else rounded.to(torch.float64)


def _limit_range(net: Any, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = noise_range(net)
    low, high = max(sigma_min, low), min(sigma_max, high)
    if low > high:
        raise UserError(f"--sigma_min={low:g} is above --sigma_max={high:g} (the network's own limits included)")
    return low, high


def _until_zero(steps: Tensor) -> Tensor:
    return torch.cat([steps.to(torch.float64), torch.zeros_like(steps[:1], dtype=torch.float64)])


def _ramp(num_steps: int, device: torch.device) -> Tensor:
    """As many numbers from 0 to 1, evenly spaced, float64; the number 0 for one step."""
    return torch.arange(num_steps, dtype=torch.float64, device=device) / max(num_steps - 1, 1)


def _karras_steps(num_steps: int, sigma_min: float, sigma_max: float, rho: float, device: torch.device) -> Tensor:
    ramp = _ramp(num_steps, device)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


class _VPSchedule:
    """sigma(t) of the variance-preserving process with noise rates beta_d, beta_min."""

    def __init__(self, beta_d: float, beta_min: float):
        self.beta_d, self.beta_min = beta_d, beta_min

    @classmethod
    def through(cls, sigma_min: float, sigma_max: float, epsilon_s: float) -> "_VPSchedule":
        """The schedule with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max."""
        low, high = math.log(sigma_min**2 + 1), math.log(sigma_max**2 + 1)
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d, high - 0.5 * beta_d)

    def sigma(self, t: Tensor) -> Tensor:
        return (torch.as_tensor(0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_deriv(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return ((self.beta_min**2 + 2 * self.beta_d * (sigma**2 + 1).log()).sqrt() - self.beta_min) / self.beta_d


def _default_range(discretization: str, epsilon_s: float) -> tuple[float, float]:
    if discretization == "vp":
        vp = _VPSchedule(19.9, 0.1)
        return float(vp.sigma(torch.tensor(epsilon_s, dtype=torch.float64))), float(vp.sigma(torch.ones([]).double()))
    return {"ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}[discretization]


def _schedules(vp: _VPSchedule) -> dict[str, tuple[Function, Function, Function]]:
    """{name: (sigma(t), its derivative, its inverse)}"""
    return {
        "vp": (vp.sigma, vp.sigma_deriv, vp.sigma_inv),
        "ve": (lambda t: t.sqrt(), lambda t: 0.5 / t.sqrt(), lambda sigma: sigma**2),
        "linear": (lambda t: t, torch.ones_like, lambda sigma: sigma),
    }


def _scalings(sigma: Function, sigma_deriv: Function) -> dict[str, tuple[Function, Function]]:
    """{name: (s(t), its derivative)}"""

    def s(t: Tensor) -> Tensor:
        return 1 / (1 + sigma(t) ** 2).sqrt()

    return {
        "vp": (s, lambda t: -sigma(t) * sigma_deriv(t) * s(t) ** 3),
        "none": (torch.ones_like, torch.zeros_like),
    }


def _iddpm_steps(
    num_steps: int, sigma_min: float, sigma_max: float, C_1: float, C_2: float, M: int, device: torch.device
) -> Tensor:
    u = iddpm_sigmas(C_1, C_2, M, torch.float64)
    u = u[(u >= sigma_min) & (u <= sigma_max)]
    if len(u) == 0:
        raise UserError(f"--sigma_min={sigma_min:g} to --sigma_max={sigma_max:g} holds no noise level of --disc=iddpm")
    index = (
        ((len(u) - 1) / max(num_steps - 1, 1) * torch.arange(num_steps, dtype=torch.float64)).round().to(torch.int64)
    )
    return u[index].to(device)
