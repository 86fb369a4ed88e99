"""Measures how a distillation is doing, once a tick on a few images. docs/method.md explains the figures."""

import functools
import itertools
import math

import torch

from edm.latents import decoder_of
from edm.metrics.energy import energy_distance_of_vectors
from torch_utils import distributed, seeding
from torch_utils.precision import same_dtype
from training.decoder import PixelDecoder
from training.denoiser import known_sigma
from training.generator import Generator
from training.moments import start_of

from ..distillation import Distillation
from ..loss import divergence
from ..schedules import Single
from ..teacher_clusters import points_of

HEALTH_PHASE = 3  # random stream of the measurements, separate from training's draws
BANDS = 4  # of noise levels, each with the same share of training's draws; a single level is one band
EDGE = 1e-4  # distance of quantiles from 0 and 1, where a lognormal's are infinite
# Images per measurement: a small share of the tick's, so that its four forward passes cost little.
IMAGES_SHARE, MIN_IMAGES, MAX_IMAGES = 1 / 32, 16, 256
DIVERGENCE = "Health/divergence"  # as the loss reports it
PER_CLASS = 64  # fewest images per class, collected over several ticks if necessary; fewer are too noisy


def worst_class(moments: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Statistics of the class with the worst images. moments: by class, from `Collector.collect_groups`.

    Health/worst_class              the class whose images have the highest divergence
    Health/worst_class_divergence   that divergence over the median class'
    """
    if DIVERGENCE not in moments:
        return {}
    count, total, _ = moments[DIVERGENCE].unbind(dim=1)
    means = total / count
    if not means.isfinite().all() or not means.median() > 0:
        return {}
    figures = {"": means.argmax(), "_divergence": means.max() / means.median()}
    return {f"Health/worst_class{name}": {"mean": value.item()} for name, value in figures.items()}


class Health:
    """Measures theta, psi and the average on the same latents and noise at every tick.

    samples: the teacher's own images, uint8 [N, C, H, W], to compare with; None on the other processes, or if there are
        none. Images that a VAE would have to decode aren't compared.
    """

    def __init__(self, distillation: Distillation, samples: torch.Tensor | None = None):
        self._distillation = distillation
        images = distillation.config.kimg_per_tick * 1000 * IMAGES_SHARE
        share = math.ceil(min(max(images, MIN_IMAGES), MAX_IMAGES) / distributed.world_size())
        self._size = min(distillation.batch_gpu, share)
        self._rounds = math.ceil(share / self._size)
        decoder = decoder_of(distillation.teacher)
        self._decoder = decoder if isinstance(decoder, PixelDecoder) else None
        self._points = points_of(samples) if samples is not None and self._decoder is not None else None
        self._compares = distributed.from_process_0(self._points is not None)
        self._start: list[torch.Tensor] = []  # the teacher's one-step images, one batch a round
        quantiles = torch.linspace(0, 1, BANDS + 1).clamp(EDGE, 1 - EDGE)
        schedule = distillation.loss.sigma_schedule
        edges = known_sigma(distillation.teacher, schedule.quantile(quantiles)).tolist()
        bands = [f"{low:.2g}-{high:.2g}" for low, high in itertools.pairwise(edges)]
        if isinstance(schedule, Single):
            bands = [f"{edges[0]:.2g}"]
        self._bands = [f"Health/divergence_sigma{band}" for band in bands]

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """Statistics by name, as `TickLog.tick` takes them, the same on every process; all processes must call it.

        Health/divergence_sigmaA-B   mean (f_phi - f_psi)^2 / omega over the noise levels from A to B
        Health/fake_score_ratio      psi's denoising loss on theta's images over phi's on the same
        Health/l2_per_l1             1 if psi is optimal, more if it lags behind theta
        Health/diversity             root mean square distance between two of theta's images, over the same of the
                                     teacher's one-step images, from which theta starts
        Health/ema_distance          distance of the average's images from theta's, over theta's from the teacher's
        Health/teacher_distance      energy distance of thumbnails of the average's images from the teacher's samples
        """
        state = self._distillation.state
        state.serve(len(state.steps) - 1)
        for net in (state.generator, state.fake_score):
            net.eval()
        with same_dtype(state.ema, state.generator):  # otherwise rounding would count as distance
            rounds = [self._measure_round(r) for r in range(self._rounds)]
        *sums, averaged = zip(*rounds)
        per_band, images, squares = (distributed.all_reduce_sum(functools.reduce(torch.add, parts)) for parts in sums)
        count = per_band[:, 0].sum()
        statistics = {name: row[1] / row[0] for name, row in zip(self._bands, per_band)}
        l1, l2, psi, phi = per_band[:, 2:].sum(dim=0)
        variance = squares[:2] / count - (images / count).square().sum(dim=1)
        statistics["Health/fake_score_ratio"] = psi / phi
        statistics["Health/l2_per_l1"] = l2 / l1
        statistics["Health/diversity"] = (variance[0] / variance[1]).sqrt()
        statistics["Health/ema_distance"] = (squares[2] / squares[3]).sqrt()
        found = {name: value.item() for name, value in statistics.items() if value.isfinite()}
        if self._compares:
            found["Health/teacher_distance"] = self._distance_from_samples(torch.cat(averaged))
        return {name: {"mean": value} for name, value in found.items()}

    def _distance_from_samples(self, averaged: torch.Tensor) -> float:
        """averaged: this process' images of the average, as it makes them."""
        assert self._decoder is not None
        points = distributed.gather(points_of(self._decoder.to_images(averaged).cpu()).to(averaged.device))
        if self._points is None:
            return distributed.from_process_0(None)
        return distributed.from_process_0(energy_distance_of_vectors(points.flatten(0, 1).cpu(), self._points))

    def _measure_round(self, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums over one batch: [bands, 6] of per-image values, [2, pixels] of images, [4] of squares of images.

        And the average's images, [n, C, H, W].
        """
        d, n = self._distillation, self._size
        state, moments = d.state, start_of(d.state.generator)
        theta, ema, start = (Generator(net, state.steps, moments) for net in (state.generator, state.ema, d.teacher))
        first = (r * distributed.world_size() + distributed.rank()) * n
        seeding.seed_at(d.config.seed, HEALTH_PHASE, first)
        z = theta.latents(n, d.device)
        labels = d.draw_conditions(n)
        bands = len(self._bands)
        band = (first + torch.arange(n, device=d.device)) % bands
        quantiles = ((band + torch.rand([n], device=d.device)) / bands).clamp(EDGE, 1 - EDGE)
        sigma = known_sigma(d.teacher, d.loss.sigma_schedule.quantile(quantiles)).reshape(n, 1, 1, 1)
        with d.autocast():
            if len(self._start) == r:
                self._start.append(start.sample(z, labels))
            x_g, averaged = theta.sample(z, labels), ema.sample(z, labels)
            x_t = x_g + sigma * torch.randn_like(x_g)
            f_phi, f_psi = (f(x_t, sigma, labels) for f in d.loss.score_networks(d.teacher, d.state.fake_score))
        weight = d.loss.denoising.weight(sigma)
        terms = [
            (f_phi - f_psi).square(),
            (f_phi - f_psi) * (f_phi - x_g),
            (f_psi - x_g).square(),
            (f_phi - x_g).square(),
        ]
        columns = [torch.ones_like(quantiles), divergence(x_g, f_phi, f_psi)]
        columns += [(weight * term).mean(dim=[1, 2, 3]) for term in terms]
        wide = torch.float32 if d.device.type == "mps" else torch.float64
        values = torch.stack(columns, dim=1).to(wide)
        per_band = torch.zeros([bands, values.shape[1]], dtype=wide, device=d.device).index_add(0, band, values)
        x_g, start, of_average = (x.to(wide).flatten(1) for x in (x_g, self._start[r], averaged))
        squares = torch.stack([x.square().sum() for x in (x_g, start, of_average - x_g, x_g - start)])
        return per_band, torch.stack([x_g.sum(dim=0), start.sum(dim=0)]), squares, averaged
