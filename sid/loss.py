"""The losses of Score identity Distillation (SiD, arXiv:2404.04057) and of its family. docs/method.md derives them.

Denoisers predict the clean image: f_phi (teacher), f_psi (fake score network); x_g is the generator's image and
x_t = x_g + sigma n. `sid.objectives` has the formulas; `SiDLoss` draws noise and calls the networks around them.
"""

from collections.abc import Callable
from typing import Any

import torch

from training.conditions import Classes, Conditions
from training.denoiser import SIGMA_DATA, known_sigma
from training.guidance import autoguided, class_guided
from training.loss import EDM2Loss, EDMLoss, PredictionLoss, squared_error

from .guidance import Guidance
from .objectives import check_objective
from .schedules import TMAX, Schedule, parse_schedule

OMEGA_MIN = 1e-5  # lower limit of the per-image weight (SiD's value)


def omega(x_g: torch.Tensor, f_phi: torch.Tensor) -> torch.Tensor:
    """Per-image weight: mean |x_g - f_phi|, [N, 1, 1, 1], without gradient."""
    return (x_g - f_phi).detach().abs().mean(dim=[1, 2, 3], keepdim=True).clamp(min=OMEGA_MIN)


def pseudo_huber_factor(difference: torch.Tensor, c: float) -> torch.Tensor:
    """1 / sqrt(1 + mean difference^2 / c^2) per image, [N, 1, 1, 1], not detached.

    It turns the gradient of a squared distance into that of the pseudo-Huber distance (Score Implicit Matching,
    arXiv:2410.16794). c: in units of pixels; far below c nothing changes, far above it only the direction counts.
    """
    return (1 + difference.square().mean(dim=[1, 2, 3], keepdim=True) / c**2).rsqrt()


def divergence(x_g: torch.Tensor, f_phi: torch.Tensor, f_psi: torch.Tensor) -> torch.Tensor:
    """Per-image estimate of the weighted Fisher divergence, mean (f_phi - f_psi)^2 / omega, [N].

    Unlike the signed loss it falls as the generator learns, and it needs no data.
    """
    return ((f_phi - f_psi).square() / omega(x_g, f_phi)).detach().mean(dim=[1, 2, 3])


class SiDLoss:
    """Both losses of SiD around the networks. All draws come from torch's default generator, in a fixed order.

    alpha        weight of L1 in L2 - alpha L1: 1.2 for most data sets, 1.0 for AFHQ
    tmax         a Karras schedule reaches up to time tmax / 1000
    sigma_data   standard deviation of the images, in the weight of the fake score's loss (EDM's)
    objective    the generator's, one of `sid.objectives.OBJECTIVES`
    weighting    'omega', 'sigma' (1/sigma^2), 'time' (1/(1 + sigma), which is 1 - t of a flow) or 'none'; None: the
                 weighting the objective was published with
    huber        c of `pseudo_huber_factor`; None: the squared distance. For sid and l2 only
    score_gradient    whether gradients pass through f_phi and f_psi; methods may override it; False: sid and l2 only
    sigma_schedule, fake_sigma_schedule    noise levels of the generator's and of the fake score's loss, or their names
    guidance     of the score networks; None: none
    guide        the weaker denoiser of guidance.over_guide; None: none
    conditions   what the networks are conditioned on
    uncertainty  whether psi learns u(sigma), the logarithm of its weighted error: psi's loss is EDM2's, and theta's is
                 divided by e^u. For EDM2's networks
    fake_score_weight    the weight of psi's squared error at noise levels [N, 1, 1, 1]; None: EDM's

    Noise levels are limited and rounded to levels that the network knows (`training.denoiser.known_sigma`).
    Errors: UserError when these don't fit together.
    """

    def __init__(
        self,
        alpha: float = 1.2,
        tmax: float = TMAX,
        sigma_data: float = SIGMA_DATA,
        *,
        objective: str = "sid",
        weighting: str | None = None,
        huber: float | None = None,
        score_gradient: bool = True,
        sigma_schedule: str | Schedule = "karras",
        fake_sigma_schedule: str | Schedule = "lognormal",
        guidance: Guidance | None = None,
        guide: Callable | None = None,
        conditions: Conditions | None = None,
        uncertainty: bool = False,
        fake_score_weight: Callable | None = None,
    ):
        self.alpha = alpha
        self.objective = check_objective(objective, weighting, huber, score_gradient)
        self.huber = huber
        self.score_gradient = score_gradient
        self.guidance = guidance or Guidance()
        self.guide = guide
        self.conditions = conditions or Classes(0)
        self.sigma_schedule = parse_schedule(sigma_schedule, "--sigma-schedule", tmax)
        self.fake_sigma_schedule = parse_schedule(fake_sigma_schedule, "--fake-sigma-schedule", tmax)
        self.uncertainty = uncertainty
        self.denoising = (EDM2Loss if uncertainty else EDMLoss)(sigma_data=sigma_data)  # given its noise levels
        if fake_score_weight is not None:
            self.denoising = PredictionLoss(fake_score_weight)

    def draw_noise(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sigma [N, 1, 1, 1], n [N, C, H, W]) of the generator's loss on `images` [N, C, H, W]."""
        sigma = self.sigma_schedule.draw(len(images), images.device)
        return sigma, torch.randn_like(images)

    def draw_shared_noise(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(sigma, n, theta's weight, psi's weight) of both losses on the same images; weights and sigma [N, 1, 1, 1].

        The noise level of each image comes from one of the two schedules, with equal probability. Each loss is weighted
        by the density of its own schedule over the mixture's, which leaves its mean unchanged (the balance heuristic of
        multiple importance sampling, Veach and Guibas 1995). A weight is at most 2, and the two add up to 2.
        """
        sigma = self.sigma_schedule.draw(len(images), images.device)
        if self.fake_sigma_schedule == self.sigma_schedule:
            ones = torch.ones_like(sigma)
            return sigma, torch.randn_like(images), ones, ones
        sigma_psi = self.fake_sigma_schedule.draw(len(images), images.device)
        sigma = torch.where(torch.rand_like(sigma) < 0.5, sigma, sigma_psi)
        p_theta, p_psi = self.sigma_schedule.density(sigma), self.fake_sigma_schedule.density(sigma)
        return sigma, torch.randn_like(images), 2 * p_theta / (p_theta + p_psi), 2 * p_psi / (p_theta + p_psi)

    def generator_loss(
        self,
        teacher: Callable,
        fake_score: Callable,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        noise: tuple[torch.Tensor, ...] | None = None,
        report: Callable | None = None,
        score_gradient: bool | None = None,
    ) -> torch.Tensor:
        """The generator's loss on its images x_g [N, C, H, W], per pixel; gradients reach x_g through both networks.

        labels: the images' conditions. noise: from `draw_noise`; None draws it. report: called as report(name,
        values [N], groups=classes of the images) with measures of convergence. score_gradient: overrides the
        constructor's.
        """
        sigma, n = noise or self.draw_noise(images)
        sigma = known_sigma(teacher, sigma)
        x_t, f_phi, f_psi = self.denoised(teacher, fake_score, images, sigma, n, labels, score_gradient)
        if report is not None:
            groups = self.conditions.groups(labels)
            report("Health/divergence", divergence(images, f_phi, f_psi), groups=groups)
        loss = self.weighted(self.terms(images, x_t, f_phi, f_psi), sigma, images, f_phi)
        return self.balanced(loss, fake_score, sigma)

    def denoised(
        self,
        teacher: Callable,
        fake_score: Callable,
        images: torch.Tensor,
        sigma: torch.Tensor,
        n: torch.Tensor,
        labels: torch.Tensor | None,
        score_gradient: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_t, f_phi, f_psi) at noise levels sigma and noise n, guided, with gradients where they should pass."""
        x_t = images + sigma * n
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.passes_scores(score_gradient)):
            f_phi, f_psi = (net(x_t, sigma, labels) for net in self.score_networks(teacher, fake_score))
        return x_t, f_phi, f_psi

    def shared_losses(
        self,
        teacher: Callable,
        fake_score: Callable,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        noise: tuple[torch.Tensor, ...] | None = None,
        report: Callable | None = None,
        score_gradient: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(theta's loss, psi's denoising loss), per pixel, from one output of psi for the same noisy images.

        They share a graph: the first reaches the images, the second psi's weights. noise: from `draw_shared_noise`. The
        other arguments are as for `generator_loss`.
        """
        sigma, n, weight_theta, weight_psi = noise or self.draw_shared_noise(images)
        sigma = known_sigma(teacher, sigma)
        x_t = images + sigma * n
        through_scores = self.passes_scores(score_gradient)
        phi, psi = self.score_networks(teacher, fake_score)
        with torch.set_grad_enabled(through_scores):
            f_phi = phi(x_t, sigma, labels)
        f_psi = psi(x_t if through_scores else x_t.detach(), sigma, labels)
        denoising = self.denoising.weighted(fake_score, (f_psi - images.detach()) ** 2, sigma)
        f_psi = f_psi if through_scores else f_psi.detach()
        if report is not None:
            groups = self.conditions.groups(labels)
            report("Health/divergence", weight_theta.flatten() * divergence(images, f_phi, f_psi), groups=groups)
        loss = self.weighted(self.terms(images, x_t, f_phi, f_psi), sigma, images, f_phi)
        return weight_theta * self.balanced(loss, fake_score, sigma), weight_psi * denoising

    def passes_scores(self, score_gradient: bool | None = None) -> bool:
        """Whether theta's gradient passes through phi and psi; None means the constructor's score_gradient."""
        wanted = self.score_gradient if score_gradient is None else score_gradient
        return wanted and self.objective.passes_scores

    def score_networks(self, teacher: Callable, fake_score: Callable) -> tuple[Callable, Callable]:
        """(phi, psi) as the generator's loss calls them, guided if there is guidance."""
        phi = autoguided(teacher, self.guide, self.guidance.over_guide or 1)
        phi = class_guided(phi, self.guidance.teacher, self.conditions)
        return phi, class_guided(fake_score, self.guidance.fake_score, self.conditions)

    def fake_score_loss(
        self,
        fake_score: Callable,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_pipe: Callable | None = None,
        report: Callable | None = None,
    ) -> torch.Tensor:
        """psi's denoising loss on generated images [N, C, H, W], per pixel; no gradient reaches the images.

        labels: the images' conditions. report: only called by SiDA's loss.
        """
        sigma = known_sigma(fake_score, self.fake_sigma_schedule.draw(len(images), images.device))
        net = class_guided(fake_score, self.guidance.fake_score_step, self.conditions)
        error = squared_error(net, images.detach(), sigma, labels, augment_pipe)
        return self.denoising.weighted(fake_score, error, sigma)

    def terms(self, x_g: torch.Tensor, x_t: torch.Tensor, f_phi: torch.Tensor, f_psi: torch.Tensor) -> torch.Tensor:
        """The objective per pixel, before weighting."""
        terms = self.objective.terms(x_g, x_t, f_phi, f_psi, self.alpha)
        return terms if self.huber is None else terms * pseudo_huber_factor(f_phi - f_psi, self.huber)

    def weighted(
        self, terms: torch.Tensor, sigma: torch.Tensor, x_g: torch.Tensor, f_phi: torch.Tensor
    ) -> torch.Tensor:
        """Terms per pixel under the objective's weighting."""
        if self.objective.weighting == "omega":
            return terms / omega(x_g, f_phi)
        if self.objective.weighting == "sigma":
            return terms / sigma**2
        if self.objective.weighting == "time":
            return terms / (1 + sigma)
        return terms

    def balanced(self, loss: torch.Tensor, fake_score: Callable, sigma: torch.Tensor) -> torch.Tensor:
        """theta's loss [N, C, H, W], with `uncertainty` divided by e^u of psi at noise levels sigma [N, 1, 1, 1]."""
        if not self.uncertainty:
            return loss
        psi: Any = fake_score
        return loss / psi.logvar(sigma).detach().exp()
