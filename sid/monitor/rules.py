"""Rules that judge a distillation by the statistics of its ticks; `diagnose` applies them.

docs/method.md has a table of the rules and says where the thresholds come from.
"""

import dataclasses
import statistics
from collections import deque
from typing import Any

from ..config import parse_score_gradient
from ..objectives import OBJECTIVES, PROJECTED

OPTIONS = ("objective", "alpha", "lr", "glr", "lr_decay", "fake_score_updates", "batch")
OPTIONS += ("ema_halflife_kimg", "ema_rampup_ratio")
# Older runs lack them.
LATER_OPTIONS = ("gan", "gan_freeze_kimg", "gan_start_kimg", "lsd", "lsg_gan")
LATER_OPTIONS += ("score_gradient", "spike_guard", "weighting")
MAY_BE_NONE = ("ema_rampup_ratio", "spike_guard", "weighting")
DESTRUCTIVE = [name for name, objective in OBJECTIVES.items() if objective.for_study]
MIN_TICKS = 6  # fewer are no evidence: the fake score starts as the teacher and needs time to reach the generator
MIN_TICKS_OF_TREND = 12  # until then the divergence grows because the fake score approaches the generator
WATCHED_TICKS = 60  # how far back the run's own warnings look
STILL = 1e-4  # the divergence stays below this while the fake score has learnt nothing
MOVED = 1e-3  # the two denoising losses differ by at least this share once it has learnt anything
LAG = 3.0  # |L2/L1|
OUTRUN, OFTEN = 1.1, 0.25  # the fake score's loss over the teacher's; share of ticks with half that excess
WANDER = 0.5  # distance from average to generator, over the distance from generator to start
NARROWED = 0.6  # diversity over the start's
ASTRAY = 0.7  # the fake score's loss over the teacher's: it knows the images far better
BETTER = 1.05  # growth of that ratio where the generator approaches the teacher
WORSE = 1.5  # growth of the divergence
LOST, KNOWN = 1.4, 1.2  # divergence over its lowest, among ticks where psi kept up (L2/L1 below the second)
LOST_CLASS = 2.5  # divergence of the worst class over the median class'
FLAT, FALLEN = 1.1, 0.5  # growth of the divergence where little moves; divergence over its highest
NOTICED = 0.03  # of the energy distance; less is the noise of 256 images
FEW_UPDATES = 10  # half-life of the average, in updates
SEES, WINS = 0.55, 0.9  # share of positions where the discriminator is right; half is chance
LIMITED = 5.0  # the generator's adversarial loss; at 10 all logits are at their limit and give no gradient
SPIKES = 0.05  # share of the updates that the spike guard skipped
CERTAIN = 1.5  # a figure this many times beyond its threshold is no accident


@dataclasses.dataclass
class Finding:
    """name: for programs. text: the observation, its figure and the option to change. certain: worth a warning."""

    name: str
    text: str
    certain: bool = True


class Window:
    """The last third of a run's records, the third before for comparison, and all of them."""

    def __init__(self, records: list[dict[str, float]]):
        third = max(len(records) // 3, 1)
        self.all = records
        self._now, self._before = records[-third:], records[-2 * third : -third]
        self.kimg = (self._now[0]["Progress/kimg"], self._now[-1]["Progress/kimg"])

    def median(self, name: str) -> float | None:
        return _median(self._now, name)

    def most(self, name: str) -> float | None:
        """The most frequent value."""
        values = [record[name] for record in self._now if name in record]
        return statistics.mode(values) if values else None

    def growth(self, name: str) -> float | None:
        """The median of the last third over the median of the third before."""
        now, before = _median(self._now, name), _median(self._before, name)
        return now / before if now is not None and before else None

    def highest(self, name: str) -> float:
        return max((record[name] for record in self.all if name in record), default=0.0)

    def farthest(self, name: str, point: float) -> float:
        """The largest distance of the figure from `point` in the last third."""
        return max((abs(record[name] - point) for record in self._now if name in record), default=0.0)

    def share(self, name: str, limit: float) -> float:
        """Share of the ticks whose figure is above the limit, of all that have it."""
        values = [record[name] for record in self.all if name in record]
        return sum(value > limit for value in values) / len(values) if values else 0.0


def _median(records: list[dict[str, float]], name: str) -> float | None:
    values = [record[name] for record in records if name in record]
    return statistics.median(values) if values else None


def diagnose(records: list[dict[str, float]], options: dict[str, Any]) -> list[Finding]:
    """What is wrong with the run, or how it is doing if nothing is.

    records: of stats.jsonl, oldest first. options: from training_options.json, by the names in OPTIONS and
    LATER_OPTIONS.
    """
    begin, since = _phase(records, options)
    phase = [record for record in records if record["Progress/kimg"] > begin]
    if len(phase) < MIN_TICKS:
        return [Finding("too-early", f"{len(phase)} ticks{since} are too few to judge; it takes {MIN_TICKS}", False)]
    window = Window(phase)
    first = [
        _skipped(window),
        _spikes(window, options),
        _discriminator(window, Window(records), options),
        _gan(window, records, options),
    ]
    fake_score = _fake_score(window, options)
    away = _lost_class(window, options) or (None if fake_score else _alpha(window, options))
    findings = [f for f in (*first, fake_score, _collapse(window, options), away, _average(window, options)) if f]
    return findings or [_astray(window, options) or _lost(window, options) or _progress(window, options)]


def _phase(records: list[dict[str, float]], options: dict[str, Any]) -> tuple[float, str]:
    """(kimg, words) of the last change of theta's loss by --gan: only figures since then are compared."""
    kimg = records[-1]["Progress/kimg"] if records else 0.0
    starts = [(options[f"gan_{name}_kimg"], f" since --gan-{name}") for name in ("freeze", "start") if options["gan"]]
    return max((start for start in starts if start[0] < kimg), default=(0.0, ""))


def _frozen(window: Window, options: dict[str, Any]) -> bool:
    return options["gan"] and window.kimg[1] <= options["gan_freeze_kimg"]


def _discriminator(window: Window, whole: Window, options: dict[str, Any]) -> Finding | None:
    """Whether theta can learn from the discriminator, which neither always wins nor guesses. whole: all records."""
    names = ("Health/discriminator_accuracy", "Loss/discriminator", "Loss/adversarial")
    accuracy, loss, adversarial = (window.median(name) for name in names)
    if adversarial is None or accuracy is None or loss is None:
        return None
    seen = f"it is right at {accuracy:.0%} of the positions"
    if accuracy > WINS or adversarial > LIMITED:
        certain = accuracy > 1 - (1 - WINS) / CERTAIN or adversarial > CERTAIN * LIMITED
        text = f"the discriminator wins: {seen}, the generator's adversarial loss is {adversarial:.2g} (0.69 when even)"
        remedy = f"raise --lsg_gan ({options['lsg_gan']:g}), or lower --lsd ({options['lsd']:g})"
        return Finding("discriminator-wins", f"{text}; {remedy}", certain)
    if accuracy < SEES:
        never = whole.share(names[0], SEES) < OFTEN
        text = f"the discriminator guesses: {seen}, and its loss is {loss:.2f}; guessing gives 50% and 0.69"
        remedy = f"raise --lsd ({options['lsd']:g}) or --lr ({options['lr']:g}), or raise --gan-start"
        if not never:
            remedy = f"the generator deceives it, or it lags: if the images don't improve, {remedy}"
        return Finding("discriminator-blind", f"{text}; {remedy}", never)
    return None


def _gan(window: Window, records: list[dict[str, float]], options: dict[str, Any]) -> Finding | None:
    """Whether the adversarial part pulls theta away from the teacher."""
    before = [record for record in records if record["Progress/kimg"] <= options["gan_start_kimg"]]
    was, now = _median(before, "Health/divergence"), window.median("Health/divergence")
    if not was or now is None or window.median("Loss/adversarial") is None or now / was < WORSE:
        return None
    text = f"the divergence from the teacher is {now / was:.2f} times what it was before --gan-start"
    return Finding("gan-too-strong", f"{text}; lower --lsg_gan ({options['lsg_gan']:g})", now / was > CERTAIN * WORSE)


def _skipped(window: Window) -> Finding | None:
    last = window.all[-1]
    skipped = sum(int(last.get(f"Health/{name}_skipped", 0)) for name in ("generator", "fake_score"))
    if not skipped:
        return None
    text = f"{skipped} updates had non-finite gradients and were skipped; lower --glr and --lr, or try --precision=fp32"
    return Finding("skipped", text)


def _spikes(window: Window, options: dict[str, Any]) -> Finding | None:
    """Whether the spike guard mistakes ordinary updates for spikes."""
    last, batch = window.all[-1], options["batch"] / 1000
    kimg = {"generator": _generator_kimg(window, options), "fake_score": window.kimg[1] * options["fake_score_updates"]}
    updates = {name: max(seen / batch, 1) for name, seen in kimg.items()}
    often = max(last.get(f"Health/{name}_spikes", 0) / updates[name] for name in updates)
    if options["spike_guard"] is None or often < SPIKES:
        return None
    text = f"the spike guard skipped {often:.0%} of the updates; raise --spike-guard ({options['spike_guard']:g})"
    return Finding("spikes", text, often > CERTAIN * SPIKES)


def _fake_score(window: Window, options: dict[str, Any]) -> Finding | None:
    """Whether psi keeps up with theta."""
    ratio, lag, distance = (window.median(f"Health/{n}") for n in ("fake_score_ratio", "l2_per_l1", "ema_distance"))
    if ratio is None:
        return None
    slower = f"lower --glr ({options['glr']:g})"
    quicker = f"raise --lr ({options['lr']:g}) or --fake-score-updates ({options['fake_score_updates']})"
    farthest = window.farthest("Health/fake_score_ratio", 1.0)
    if farthest < MOVED and (window.median("Health/divergence") or 0) < STILL:
        text = f"the fake score is still the teacher: their losses on generated images differ by {farthest:.0e}"
        return Finding("psi-lags", f"{text}; {quicker}")
    often = window.share("Health/fake_score_ratio", 1 + (OUTRUN - 1) / 2)
    if (ratio > OUTRUN or often > OFTEN) and _frozen(window, options):
        text = (
            f"the fake score denoises {ratio:.2f} times as badly as the teacher, and the generator isn't even trained"
        )
        return Finding("psi-diverges", f"{text}; lower --lr ({options['lr']:g}) or --lsd ({options['lsd']:g})")
    if ratio > OUTRUN or often > OFTEN:
        text = (
            f"the generator outruns the fake score, which denoises its images {ratio:.2f} times as badly as the teacher"
        )
        certain = ratio > 1 + CERTAIN * (OUTRUN - 1) or often > CERTAIN * OFTEN
        return Finding("theta-too-fast", f"{text} (worse in {often:.0%} of the ticks); {slower} and --lr", certain)
    settled = _halflife_kimg(window, options) < _generator_kimg(window, options) / 4
    if distance is not None and distance > WANDER and settled:
        text = (
            f"the generator wanders: its distance from its own average is {distance:.2f} of its distance from the start"
        )
        return Finding("theta-too-fast", f"{text}; {slower}", distance > CERTAIN * WANDER)
    if lag is not None and abs(lag) > LAG:
        text = f"the fake score lags behind the generator: L2/L1 is {lag:.1f} (1 when it keeps up)"
        return Finding("psi-lags", f"{text}; {quicker}, or {slower}", abs(lag) > CERTAIN * LAG)
    return None


def _collapse(window: Window, options: dict[str, Any]) -> Finding | None:
    diversity = window.median("Health/diversity")
    if diversity is None or diversity > NARROWED:
        return None
    slower = f"lower --glr ({options['glr']:g}) and --lr ({options['lr']:g}), or resume from an earlier state"
    remedy = _less_destructive(options, slower)
    text = f"the generator collapses: its images are {diversity:.2f} times as far apart as they were at the start"
    return Finding("collapse", f"{text}; {remedy}", diversity < NARROWED / CERTAIN)


def _alpha(window: Window, options: dict[str, Any]) -> Finding | None:
    growth, alpha = window.growth("Health/divergence"), options["alpha"]
    grows = growth is not None and growth > WORSE and len(window.all) >= MIN_TICKS_OF_TREND
    follows = (window.median("Health/fake_score_ratio") or 1) < 1 and (
        window.median("Health/diversity") or 1
    ) > NARROWED
    if growth is None or not (grows and follows and _may_run_away(window, options)):
        return None
    text = (
        f"the divergence from the teacher grows although the fake score keeps up ({growth:.2f} times the earlier value)"
    )
    remedy = f"lower --alpha ({alpha:g}); 0.5 to 1 is safe"
    if options["gan"]:
        remedy += f", or --lsg_gan ({options['lsg_gan']:g})"
    return Finding("alpha-too-large", f"{text}; {remedy}", growth > CERTAIN * WORSE)


def _lost_class(window: Window, options: dict[str, Any]) -> Finding | None:
    """Whether the images of one class are much farther from the teacher than other classes' images."""
    number, ratio = window.most("Health/worst_class"), window.median("Health/worst_class_divergence")
    if number is None or ratio is None or ratio < LOST_CLASS or _frozen(window, options):
        return None
    remedy = f"a lower --glr ({options['glr']:g}) and --lr"
    if options["objective"] in PROJECTED and not options["gan"] and _passes_scores(window, options):
        remedy = "--score-gradient=off until it is back"
    remedy = _less_destructive(options, f"go on with --override and {remedy}")
    text = f"class {number:g} is lost: the divergence of its images is {ratio:.1f} times the median class'; {remedy}"
    return Finding("lost-class", text, ratio > CERTAIN * LOST_CLASS)


def _passes_scores(window: Window, options: dict[str, Any]) -> bool:
    """Whether theta's gradient currently passes through the score networks."""
    return parse_score_gradient(options["score_gradient"]).passes(int(window.kimg[1] * 1000))


def _may_run_away(window: Window, options: dict[str, Any]) -> bool:
    """Whether alpha is above 1 and matters: without gradients through the scores, all alphas have one direction."""
    return _passes_scores(window, options) and options["objective"] == "sid" and options["alpha"] > 1


def _astray(window: Window, options: dict[str, Any]) -> Finding | None:
    """Whether the generator stays away from what the teacher knows, although the fake score follows it."""
    ratio, growth = window.median("Health/fake_score_ratio"), window.growth("Health/fake_score_ratio")
    early = len(window.all) < MIN_TICKS_OF_TREND or _frozen(window, options)
    if early or ratio is None or growth is None or ratio > ASTRAY or growth > BETTER:
        return None
    remedy = _less_destructive(options, f"lower --glr ({options['glr']:g}), or resume from an earlier state")
    text = (
        f"the generator goes astray: the teacher denoises its images {1 / ratio:.2f} times as badly as the fake score,"
        f" and that isn't improving; {remedy}"
    )
    return Finding("astray", text, ratio < ASTRAY / CERTAIN)


def _lost(window: Window, options: dict[str, Any]) -> Finding | None:
    """Whether the generator was closer to the teacher at a time when the fake score knew it as well as now."""
    ticks, now = window.all, window.median("Health/divergence")
    if len(ticks) < MIN_TICKS_OF_TREND or now is None or _frozen(window, options):
        return None
    size = max(len(ticks) // 10, 3)
    parts = [ticks[start : start + size] for start in range(0, len(ticks) - size + 1, size // 3)]
    known = [part for part in parts if all(record.get("Health/l2_per_l1", KNOWN) < KNOWN for record in part)]
    lowest = min(filter(None, (_median(part, "Health/divergence") for part in known)), default=now)
    if now < LOST * lowest:
        return None
    before = f"resume from an earlier state, with a lower --glr ({options['glr']:g}) and --lr"
    before += f", or a lower --alpha ({options['alpha']:g})" if _may_run_away(window, options) else ""
    text = f"the generator lost ground: its divergence from the teacher is {now / lowest:.2f} times its lowest"
    return Finding("lost-ground", f"{text}; {_less_destructive(options, before)}", now > CERTAIN * LOST * lowest)


def _less_destructive(options: dict[str, Any], otherwise: str) -> str:
    """The remedy for a loss that is known to destroy the generator; `otherwise` for other losses."""
    if options["objective"] in DESTRUCTIVE:
        return f"--objective={options['objective']} does that; use sid"
    if options["weighting"] == "sigma":
        return f"use --weighting=omega instead of sigma, or {otherwise}"
    return otherwise


def _generator_kimg(window: Window, options: dict[str, Any]) -> float:
    return max(window.kimg[1] - (options["gan_freeze_kimg"] if options["gan"] else 0), 0)


def _halflife_kimg(window: Window, options: dict[str, Any]) -> float:
    longest, ratio = options["ema_halflife_kimg"], options["ema_rampup_ratio"]
    return longest if ratio is None else min(longest, ratio * _generator_kimg(window, options))


def _average(window: Window, options: dict[str, Any]) -> Finding | None:
    updates = options["ema_halflife_kimg"] * 1000 / options["batch"]
    if updates >= FEW_UPDATES:
        return None
    text = f"the moving average is too short to smooth anything: its half-life is {updates:.2g} updates"
    return Finding("ema-too-short", f"{text}; raise --ema ({options['ema_halflife_kimg'] / 1000:g} Mimg)")


def _progress(window: Window, options: dict[str, Any]) -> Finding:
    divergence, growth = window.median("Health/divergence"), window.growth("Health/divergence")
    if _frozen(window, options):
        text = f"no problem found; the generator isn't trained until {options['gan_freeze_kimg']:g} kimg (--gan-freeze)"
        return Finding("frozen", text, False)
    if divergence is None or growth is None:
        return Finding("unknown", "no Health/divergence is recorded", False)
    figure = f"divergence {divergence:.3g} in the last third, {growth:.2f} times the value of the third before"
    fallen = len(window.all) >= MIN_TICKS_OF_TREND and divergence < FALLEN * window.highest("Health/divergence")
    if fallen and 1 / FLAT < growth < FLAT:
        text = (
            f"no problem found, and little changes: {figure}; stop, or finish with --lr-decay ({options['lr_decay']})"
        )
        return Finding("converged", text, False)
    does = (
        "the divergence falls"
        if growth < 1 / FLAT
        else "the divergence isn't falling yet (it rises at first, while the fake score learns)"
    )
    return Finding("healthy", f"no problem found, and {does}: {figure}", False)


def judge_distance(records: list[dict[str, Any]]) -> Finding | None:
    """A finding when the snapshots went away from the teacher. records: with kimg and value, the first of the start."""
    if len(records) < 2:
        return None
    start, last = records[0]["value"], records[-1]["value"]
    best = min(records, key=lambda record: record["value"])
    if not last > max(LOST * best["value"], best["value"] + NOTICED):  # NaN is no loss that can be measured
        return None
    where = "the start" if best is records[0] else f"the snapshot at {best['kimg']:g} kimg"
    text = f"its images are farther from the teacher's samples than {where}: energy distance {last:.3g}"
    remedy = "take that snapshot, or resume from an earlier state with lower --glr and --lr"
    if best is records[0]:
        remedy = "lower --glr and --lr, or let gradients pass through the scores (--score-gradient=on)"
    return Finding("away-from-teacher", f"{text} instead of {best['value']:.3g} (start: {start:.3g}); {remedy}")


class Watch:
    """Warns of problems in a running distillation that are certain, once each."""

    def __init__(self, options: dict[str, Any]):
        self._options = options
        self._records: deque[dict[str, float]] = deque(maxlen=WATCHED_TICKS)
        self._told: set[str] = set()

    def tick(self, nimg: int, collected: dict[str, dict[str, float]]) -> list[str]:
        """The new warnings. collected: the statistics, as for `TickLog.tick`."""
        means = {name: record["mean"] for name, record in collected.items()}
        self._records.append({"Progress/kimg": nimg / 1e3, **means})
        new = [f for f in diagnose(list(self._records), self._options) if f.certain and f.name not in self._told]
        self._told.update(finding.name for finding in new)
        return [f"warning: {finding.text}" for finding in new]
