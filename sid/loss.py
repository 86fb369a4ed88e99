"""The mathematics of Score identity Distillation (SiD, arXiv:2404.04057) and of its family. docs/method.md derives it.

Denoisers predict the clean image: f_phi (teacher), f_psi (fake score network); x_g is what the generator made and
x_t = x_g + sigma n. The functions on tensors come first; `SiDLoss` draws noise and calls the networks around them.
"""

import math
from collections.abc import Callable

import torch

from training.loss import EDMLoss

from .config import P_MEAN, P_STD, STOPPED, Guidance, Schedule, check_objective, parse_schedule
from .guidance import drop_labels, guided

OMEGA_MIN = 1e-5  # clips the per-image weight, published value


def karras_sigma(t: torch.Tensor, sigma_min: float, sigma_max: float, rho: float) -> torch.Tensor:
    """Noise level at time t in [0, 1]: t = 0 is sigma_min, t = 1 is sigma_max (EDM eq. 5 in continuous time)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + (1 - t) * (low - high)) ** rho


def omega(x_g: torch.Tensor, f_phi: torch.Tensor) -> torch.Tensor:
    """Per-image weight: mean |x_g - f_phi|, [N, 1, 1, 1], without gradient."""
    return (x_g - f_phi).detach().abs().mean(dim=[1, 2, 3], keepdim=True).clamp(min=OMEGA_MIN)


# Objectives: (x_g, x_t, f_phi, f_psi) -> per pixel [N, C, H, W], before weighting. They are the forms in noise
# predictions times sigma^2, with sigma eps = x_t - f and sigma n = x_t - x_g.


def l1(x_g, x_t, f_phi, f_psi) -> torch.Tensor:
    """|f_phi - f_psi|^2: the Fisher divergence itself."""
    return (f_phi - f_psi).square()


def l2(x_g, x_t, f_phi, f_psi) -> torch.Tensor:
    """(f_phi - f_psi)(f_phi - x_g): one factor projected."""
    return (f_phi - f_psi) * (f_phi - x_g)


def sid(x_g, x_t, f_phi, f_psi, alpha: float) -> torch.Tensor:
    """L2 - alpha L1 (SiD eq. 23; its weight is eq. 24)."""
    difference = f_phi - f_psi
    return difference * ((f_phi - x_g) - alpha * difference)


def cross(x_g, x_t, f_phi, f_psi) -> torch.Tensor:
    """|eps_phi - n|^2 + |eps_psi|^2 - |n|^2: only the cross term of L1 projected."""
    return (f_phi - x_g).square() + (x_t - f_psi).square() - (x_t - x_g).square()


def full(x_g, x_t, f_phi, f_psi) -> torch.Tensor:
    """|eps_phi|^2 - 2 eps_phi n + eps_psi n: every term with psi projected."""
    noise = x_t - x_g
    return (x_t - f_phi).square() - 2 * (x_t - f_phi) * noise + (x_t - f_psi) * noise


def diff_instruct(x_g, x_t, f_phi, f_psi) -> torch.Tensor:
    """(f_psi - f_phi) x_g, both stopped: the reverse KL divergence's direction (Diff-Instruct, arXiv:2305.18455)."""
    return (f_psi - f_phi).detach() * x_g


OBJECTIVES = {
    "l1": l1, "l2": l2, "cross": cross, "full": full, "diff-instruct": diff_instruct, "dmd": diff_instruct
}  # fmt: skip
LESS_L1 = "-l1"  # the name of an objective from which alpha L1 is taken, as sid is l2-l1


def pseudo_huber_factor(difference: torch.Tensor, c: float) -> torch.Tensor:
    """1 / sqrt(1 + mean difference^2 / c^2) per image, [N, 1, 1, 1]; it keeps its gradient.

    It makes of a squared distance's gradient that of the pseudo-Huber distance (Score Implicit Matching,
    arXiv:2410.16794). c: in units of pixels; far below c nothing changes, far above only the direction counts.
    """
    return (1 + difference.square().mean(dim=[1, 2, 3], keepdim=True) / c**2).rsqrt()


def divergence(x_g: torch.Tensor, f_phi: torch.Tensor, f_psi: torch.Tensor) -> torch.Tensor:
    """Per-image estimate of the weighted Fisher divergence, mean (f_phi - f_psi)^2 / omega, [N].

    Unlike the signed loss it falls as the generator learns, and it needs no data.
    """
    return ((f_phi - f_psi).square() / omega(x_g, f_phi)).detach().mean(dim=[1, 2, 3])


class SiDLoss:
    """Both losses of SiD around the networks; every draw comes from torch's default generator, in a fixed order.

    alpha        weight of L1 in L2 - alpha L1: 1.2 for most data sets, 1.0 for AFHQ
    tmax         noise levels reach karras_sigma(tmax / 1000)
    sigma_min, sigma_max, rho    the noise schedule 'karras'
    P_mean, P_std                the noise schedule 'lognormal' where it is given no numbers: EDM's
    sigma_data                   weight of the fake score's loss, EDM's
    objective    of the generator, one of `sid.config.OBJECTIVES`; those that end in -l1 take alpha L1 away, as sid does
    weighting    'omega', 'sigma' (1/sigma^2) or 'none'; None: what the objective was published with
    huber        c of `pseudo_huber_factor`; None: the squared distance. For sid and l2
    score_gradient    whether gradients pass through f_phi and f_psi; may be changed at any time. For sid and l2
    sigma_schedule, fake_sigma_schedule    noise levels of the two losses, as `sid.config.parse_schedule` reads them
    guidance     of the networks by their labels; None: none

    Errors: UserError when these don't fit together.
    """

    def __init__(
        self,
        alpha: float = 1.2,
        tmax: float = 800,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        P_mean: float = P_MEAN,
        P_std: float = P_STD,
        sigma_data: float = 0.5,
        *,
        objective: str = "sid",
        weighting: str | None = None,
        huber: float | None = None,
        score_gradient: bool = True,
        sigma_schedule: str = "karras",
        fake_sigma_schedule: str = "lognormal",
        guidance: Guidance | None = None,
    ):
        self.alpha = alpha
        self.tmax = tmax
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.objective = objective
        self.weighting = check_objective(objective, weighting, huber, score_gradient)
        self.huber = huber
        self.score_gradient = score_gradient
        self.guidance = guidance or Guidance()
        self.adversarial = False  # of a subclass that can be
        self.sigma_schedule = parse_schedule(sigma_schedule, "--sigma-schedule", P_mean, P_std)
        self.fake_sigma_schedule = parse_schedule(fake_sigma_schedule, "--fake-sigma-schedule", P_mean, P_std)
        self.denoising = EDMLoss(sigma_data=sigma_data)  # which is given its noise levels

    def draw_noise(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sigma [N, 1, 1, 1], n [N, C, H, W]) of theta's loss on `images` [N, C, H, W]."""
        sigma = self._draw_sigma(self.sigma_schedule, images)
        return sigma, torch.randn_like(images)

    def draw_shared_noise(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sigma, n) of both losses: the noise level of each image comes from either's schedule, at even odds."""
        sigma = self._draw_sigma(self.sigma_schedule, images)
        if self.fake_sigma_schedule != self.sigma_schedule:
            other = self._draw_sigma(self.fake_sigma_schedule, images)
            sigma = torch.where(torch.rand_like(sigma) < 0.5, sigma, other)
        return sigma, torch.randn_like(images)

    def shared_weights(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What (theta's, psi's) loss at shared noise levels is multiplied by: in the mean both are as ever.

        The density of its own schedule over that of the two mixed (the balance heuristic of multiple importance
        sampling, Veach and Guibas 1995), hence 2 at most, and together 2.
        """
        if self.fake_sigma_schedule == self.sigma_schedule:
            return torch.ones_like(sigma), torch.ones_like(sigma)
        own, other = (self._density(s, sigma) for s in (self.sigma_schedule, self.fake_sigma_schedule))
        return 2 * own / (own + other), 2 * other / (own + other)

    def generator_loss(
        self, teacher, fake_score, images, labels=None, noise=None, report: Callable | None = None
    ) -> torch.Tensor:
        """theta's loss on generated images x_g [N, C, H, W], per pixel; gradients reach x_g through both networks.

        noise: as `draw_noise` gives it; None draws it. report: called as report(name, values [N], groups=labels) with
        what shows convergence, if given.
        """
        sigma, n = noise or self.draw_noise(images)
        x_t = images + sigma * n
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.through_scores):
            f_phi, f_psi = (net(x_t, sigma, labels) for net in self.score_networks(teacher, fake_score))
        if report is not None:
            report("Health/divergence", divergence(images, f_phi, f_psi), groups=labels)
        return self._weighted(self._terms(images, x_t, f_phi, f_psi), sigma, images, f_phi)

    def shared_losses(
        self, teacher, fake_score, images, labels=None, noise=None, report: Callable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(theta's loss, psi's denoising loss), per pixel, from one answer of psi to the same noisy images.

        They share a graph: the first reaches the images, the second psi's weights. noise: as `draw_shared_noise` gives
        it. The other arguments are those of `generator_loss`.
        """
        sigma, n = noise or self.draw_shared_noise(images)
        x_t = images + sigma * n
        teacher, fake_score = self.score_networks(teacher, fake_score)
        with torch.set_grad_enabled(self.through_scores):
            f_phi = teacher(x_t, sigma, labels)
        f_psi = fake_score(x_t if self.through_scores else x_t.detach(), sigma, labels)
        denoising = self.denoising.weight(sigma) * (f_psi - images.detach()) ** 2
        f_psi = f_psi if self.through_scores else f_psi.detach()
        of_generator, of_fake_score = self.shared_weights(sigma)
        if report is not None:
            report("Health/divergence", of_generator.flatten() * divergence(images, f_phi, f_psi), groups=labels)
        loss = self._weighted(self._terms(images, x_t, f_phi, f_psi), sigma, images, f_phi)
        return of_generator * loss, of_fake_score * denoising

    @property
    def through_scores(self) -> bool:
        """Whether theta's gradient passes through phi and psi."""
        return self.score_gradient and self.objective not in STOPPED

    def score_networks(self, teacher, fake_score) -> tuple[Callable, Callable]:
        """(phi, psi) as theta's loss asks them: guided where there is guidance."""
        return guided(teacher, self.guidance.teacher), guided(fake_score, self.guidance.fake_score)

    def fake_score_loss(
        self, fake_score, images, labels=None, augment_pipe=None, report: Callable | None = None
    ) -> torch.Tensor:
        """psi's denoising loss on generated images [N, C, H, W], per pixel; no gradient reaches the images.

        report: as for `generator_loss`; there is nothing to report here, but subclasses have something.
        """
        sigma = self._draw_sigma(self.fake_sigma_schedule, images)
        labels = drop_labels(labels, self.guidance.label_dropout)
        net = guided(fake_score, self.guidance.fake_score_step)
        return self.denoising(net, images.detach(), labels, augment_pipe, sigma=sigma)

    def quantile(self, q: torch.Tensor) -> torch.Tensor:
        """The noise level that a share q, in (0, 1), of those in the generator's loss stay below; shaped as q."""
        schedule = self.sigma_schedule
        if schedule.kind == "karras":
            return karras_sigma(q * self.tmax / 1000, self.sigma_min, self.sigma_max, self.rho)
        if schedule.kind == "lognormal":
            return (torch.special.ndtri(q) * schedule.std + schedule.mean).exp()
        return torch.full_like(q, schedule.level)

    def _draw_sigma(self, schedule: Schedule, images: torch.Tensor) -> torch.Tensor:
        """[N, 1, 1, 1], on the images' device."""
        size, device = [images.shape[0], 1, 1, 1], images.device
        if schedule.kind == "karras":
            t = torch.rand(size, device=device) * self.tmax / 1000
            return karras_sigma(t, self.sigma_min, self.sigma_max, self.rho)
        if schedule.kind == "lognormal":
            return (torch.randn(size, device=device) * schedule.std + schedule.mean).exp()
        return torch.full(size, schedule.level, device=device)

    def _density(self, schedule: Schedule, sigma: torch.Tensor) -> torch.Tensor:
        """Probability density of log sigma, shaped as sigma."""
        if schedule.kind == "lognormal":
            z = (sigma.log() - schedule.mean) / schedule.std
            return (-(z**2) / 2).exp() / (schedule.std * math.sqrt(2 * math.pi))
        low, high = (level ** (1 / self.rho) for level in (self.sigma_min, self.sigma_max))
        u = sigma ** (1 / self.rho)  # uniform from low to where tmax ends
        width = (high - low) * self.tmax / 1000
        return u / (self.rho * width) * ((u >= low) & (u <= low + width))

    def _terms(self, x_g, x_t, f_phi, f_psi) -> torch.Tensor:
        if self.objective == "sid":
            terms = sid(x_g, x_t, f_phi, f_psi, self.alpha)
        else:
            terms = OBJECTIVES[self.objective.removesuffix(LESS_L1)](x_g, x_t, f_phi, f_psi)
            if self.objective.endswith(LESS_L1):
                terms = terms - self.alpha * l1(x_g, x_t, f_phi, f_psi)
        return terms if self.huber is None else terms * pseudo_huber_factor(f_phi - f_psi, self.huber)

    def _weighted(self, terms, sigma, x_g, f_phi) -> torch.Tensor:
        if self.weighting == "omega":
            return terms / omega(x_g, f_phi)
        return terms / sigma**2 if self.weighting == "sigma" else terms
