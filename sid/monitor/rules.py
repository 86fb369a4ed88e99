"""Rules that judge a distillation by the statistics of its ticks: by the losses, and what theta's images are like.

A rule is a function from a Run to a Finding, or to None where it has nothing to say. PROBLEMS and STATES list them
all; `sid.monitor.diagnosis` applies them. docs/method.md has a table of them and says where the thresholds come from.
"""

import dataclasses
from collections.abc import Callable, Iterable

from ..objectives import PROJECTED
from .evidence import Run, median

CERTAIN = 1.5  # a figure this many times beyond its threshold is no accident


@dataclasses.dataclass
class Finding:
    """name: for programs. text: the observation, its figure and the option to change. certain: worth a warning."""

    name: str
    text: str
    certain: bool = True


Rule = Callable[[Run], Finding | None]


def first_finding(rules: Iterable[Rule], run: Run) -> Finding | None:
    """What the first rule that applies says."""
    return next((finding for finding in (rule(run) for rule in rules) if finding), None)


# --- updates that were skipped


def skipped(run: Run) -> Finding | None:
    last = run.all[-1]
    count = sum(int(last.get(f"Health/{name}_skipped", 0)) for name in ("generator", "fake_score"))
    if not count:
        return None
    text = f"{count} updates had non-finite gradients and were skipped; lower --glr and --lr, or try --precision=fp32"
    return Finding("skipped", text)


SPIKES = 0.05  # share of the updates that the spike guard skipped


def spikes(run: Run) -> Finding | None:
    """The spike guard mistakes ordinary updates for spikes."""
    last, options = run.all[-1], run.options
    kimg = {"generator": run.generator_kimg, "fake_score": run.kimg * options["fake_score_updates"]}
    updates = {name: max(seen / (options["batch"] / 1000), 1) for name, seen in kimg.items()}
    often = max(last.get(f"Health/{name}_spikes", 0) / updates[name] for name in updates)
    if options["spike_guard"] is None or often < SPIKES:
        return None
    text = f"the spike guard skipped {often:.0%} of the updates; raise --spike-guard ({options['spike_guard']:g})"
    return Finding("spikes", text, often > CERTAIN * SPIKES)


# --- the discriminator of --gan

SEES, WINS = 0.55, 0.9  # share of positions where the discriminator is right; half is chance
LIMITED = 5.0  # the generator's adversarial loss; at 10 all logits are at their limit and give no gradient
GUESSING = 0.25  # share of all ticks in which the discriminator saw something
ADVERSARY = ("Health/discriminator_accuracy", "Loss/discriminator", "Loss/adversarial")


def discriminator_wins(run: Run) -> Finding | None:
    """The generator can't learn from a discriminator that is always right."""
    accuracy, loss, adversarial = (run.median(name) for name in ADVERSARY)
    if adversarial is None or accuracy is None or loss is None or not (accuracy > WINS or adversarial > LIMITED):
        return None
    text = (
        f"the discriminator wins: it is right at {accuracy:.0%} of the positions, the generator's adversarial loss is"
        f" {adversarial:.2g} (0.69 when even); raise --lsg_gan ({run.options['lsg_gan']:g}),"
        f" or lower --lsd ({run.options['lsd']:g})"
    )
    certain = accuracy > 1 - (1 - WINS) / CERTAIN or adversarial > CERTAIN * LIMITED
    return Finding("discriminator-wins", text, certain)


def discriminator_guesses(run: Run) -> Finding | None:
    """Neither can it learn from one that guesses."""
    accuracy, loss, adversarial = (run.median(name) for name in ADVERSARY)
    if adversarial is None or accuracy is None or loss is None or accuracy >= SEES:
        return None
    never = run.whole.share(ADVERSARY[0], SEES) < GUESSING
    text = (
        f"the discriminator guesses: it is right at {accuracy:.0%} of the positions, and its loss is {loss:.2f};"
        " guessing gives 50% and 0.69"
    )
    remedy = f"raise --lsd ({run.options['lsd']:g}) or --lr ({run.options['lr']:g}), or raise --gan-start"
    if not never:
        remedy = f"the generator deceives it, or it lags: if the images don't improve, {remedy}"
    return Finding("discriminator-blind", f"{text}; {remedy}", never)


WORSE = 1.5  # growth of the divergence


def gan_too_strong(run: Run) -> Finding | None:
    """The adversarial part pulls theta away from the teacher."""
    before = [record for record in run.whole.all if record["Progress/kimg"] <= run.options["gan_start_kimg"]]
    earlier, now = median(before, "Health/divergence"), run.median("Health/divergence")
    if not earlier or now is None or run.median("Loss/adversarial") is None or now / earlier < WORSE:
        return None
    text = f"the divergence from the teacher is {now / earlier:.2f} times what it was before --gan-start"
    remedy = f"lower --lsg_gan ({run.options['lsg_gan']:g})"
    return Finding("gan-too-strong", f"{text}; {remedy}", now / earlier > CERTAIN * WORSE)


# --- does psi keep up with theta?

STILL = 1e-4  # the divergence stays below this while the fake score has learnt nothing
MOVED = 1e-3  # the two denoising losses differ by at least this share once it has learnt anything


def fake_score_stands_still(run: Run) -> Finding | None:
    if run.median("Health/fake_score_ratio") is None:
        return None
    farthest = run.farthest("Health/fake_score_ratio", 1.0)
    if farthest >= MOVED or (run.median("Health/divergence") or 0) >= STILL:
        return None
    text = f"the fake score is still the teacher: their losses on generated images differ by {farthest:.0e}"
    return Finding("psi-lags", f"{text}; {_quicker(run)}")


OUTRUN, OFTEN = 1.1, 0.25  # the fake score's loss over the teacher's; share of ticks with half that excess


def generator_outruns(run: Run) -> Finding | None:
    """psi denoises theta's images worse than the teacher, from which it starts."""
    ratio = run.median("Health/fake_score_ratio")
    often = run.share("Health/fake_score_ratio", 1 + (OUTRUN - 1) / 2)
    if ratio is None or not (ratio > OUTRUN or often > OFTEN):
        return None
    lr = run.options["lr"]
    if run.is_frozen:
        text = (
            f"the fake score denoises {ratio:.2f} times as badly as the teacher, and the generator isn't even trained"
        )
        return Finding("psi-diverges", f"{text}; lower --lr ({lr:g}) or --lsd ({run.options['lsd']:g})")
    text = (
        f"the generator outruns the fake score, which denoises its images {ratio:.2f} times as badly as the teacher"
        f" (worse in {often:.0%} of the ticks)"
    )
    certain = ratio > 1 + CERTAIN * (OUTRUN - 1) or often > CERTAIN * OFTEN
    return Finding("theta-too-fast", f"{text}; {_slower(run)} and --lr", certain)


WANDER = 0.5  # distance from average to generator, over the distance from generator to start


def generator_wanders(run: Run) -> Finding | None:
    distance = run.median("Health/ema_distance")
    is_settled = run.halflife_kimg < run.generator_kimg / 4
    if run.median("Health/fake_score_ratio") is None or distance is None or distance <= WANDER or not is_settled:
        return None
    text = f"the generator wanders: its distance from its own average is {distance:.2f} of its distance from the start"
    return Finding("theta-too-fast", f"{text}; {_slower(run)}", distance > CERTAIN * WANDER)


LAG = 3.0  # |L2/L1|


def fake_score_lags(run: Run) -> Finding | None:
    lag = run.median("Health/l2_per_l1")
    if run.median("Health/fake_score_ratio") is None or lag is None or abs(lag) <= LAG:
        return None
    text = f"the fake score lags behind the generator: L2/L1 is {lag:.1f} (1 when it keeps up)"
    return Finding("psi-lags", f"{text}; {_quicker(run)}, or {_slower(run)}", abs(lag) > CERTAIN * LAG)


def _slower(run: Run) -> str:
    return f"lower --glr ({run.options['glr']:g})"


def _quicker(run: Run) -> str:
    return f"raise --lr ({run.options['lr']:g}) or --fake-score-updates ({run.options['fake_score_updates']})"


def alpha_too_large(run: Run) -> Finding | None:
    """The divergence grows although psi keeps up, as the rules above have found, and no single class explains it."""
    growth, options = run.growth("Health/divergence"), run.options
    knows_images = (run.median("Health/fake_score_ratio") or 1) < 1
    is_diverse = (run.median("Health/diversity") or 1) > NARROWED
    if growth is None or growth <= WORSE or run.is_early or not (knows_images and is_diverse and run.may_run_away):
        return None
    if lost_class(run):
        return None
    text = (
        f"the divergence from the teacher grows although the fake score keeps up ({growth:.2f} times the earlier value)"
    )
    remedy = f"lower --alpha ({options['alpha']:g}); 0.5 to 1 is safe"
    if options["gan"]:
        remedy += f", or --lsg_gan ({options['lsg_gan']:g})"
    return Finding("alpha-too-large", f"{text}; {remedy}", growth > CERTAIN * WORSE)


# --- what theta's images are like

NARROWED = 0.6  # diversity over the start's


def collapse(run: Run) -> Finding | None:
    diversity = run.median("Health/diversity")
    if diversity is None or diversity > NARROWED:
        return None
    slower = f"{_slower(run)} and --lr ({run.options['lr']:g}), or resume from an earlier state"
    text = f"the generator collapses: its images are {diversity:.2f} times as far apart as they were at the start"
    return Finding("collapse", f"{text}; {run.less_destructive(slower)}", diversity < NARROWED / CERTAIN)


LOST_CLASS = 2.5  # divergence of the worst class over the median class'


def lost_class(run: Run) -> Finding | None:
    """The images of one class are much farther from the teacher than other classes' images."""
    number, ratio = run.most("Health/worst_class"), run.median("Health/worst_class_divergence")
    if number is None or ratio is None or ratio < LOST_CLASS or run.is_frozen:
        return None
    remedy = f"a lower --glr ({run.options['glr']:g}) and --lr"
    if run.options["objective"] in PROJECTED and not run.options["gan"] and run.passes_scores:
        remedy = "--score-gradient=off until it is back"
    remedy = run.less_destructive(f"go on with --override and {remedy}")
    text = f"class {number:g} is lost: the divergence of its images is {ratio:.1f} times the median class'; {remedy}"
    return Finding("lost-class", text, ratio > CERTAIN * LOST_CLASS)


FEW_UPDATES = 10  # half-life of the average, in updates


def average_too_short(run: Run) -> Finding | None:
    halflife_kimg = run.options["ema_halflife_kimg"]
    updates = halflife_kimg * 1000 / run.options["batch"]
    if updates >= FEW_UPDATES:
        return None
    text = f"the moving average is too short to smooth anything: its half-life is {updates:.2g} updates"
    return Finding("ema-too-short", f"{text}; raise --ema ({halflife_kimg / 1000:g} Mimg)")


# --- how a run without problems is doing

ASTRAY = 0.7  # the fake score's loss over the teacher's: it knows the images far better
BETTER = 1.05  # growth of that ratio where the generator approaches the teacher


def astray(run: Run) -> Finding | None:
    """The generator stays away from what the teacher knows, although the fake score follows it."""
    ratio, growth = run.median("Health/fake_score_ratio"), run.growth("Health/fake_score_ratio")
    if run.is_early or run.is_frozen or ratio is None or growth is None or ratio > ASTRAY or growth > BETTER:
        return None
    remedy = run.less_destructive(f"{_slower(run)}, or resume from an earlier state")
    text = (
        f"the generator goes astray: the teacher denoises its images {1 / ratio:.2f} times as badly as the fake score,"
        f" and that isn't improving; {remedy}"
    )
    return Finding("astray", text, ratio < ASTRAY / CERTAIN)


LOST, KNOWN = 1.4, 1.2  # divergence over its lowest, among ticks where psi kept up (L2/L1 below the second)


def lost_ground(run: Run) -> Finding | None:
    """The generator was closer to the teacher at a time when the fake score knew it as well as now."""
    ticks, now = run.all, run.median("Health/divergence")
    if run.is_early or now is None or run.is_frozen:
        return None
    size = max(len(ticks) // 10, 3)
    parts = [ticks[start : start + size] for start in range(0, len(ticks) - size + 1, size // 3)]
    known = [part for part in parts if all(record.get("Health/l2_per_l1", KNOWN) < KNOWN for record in part)]
    lowest = min(filter(None, (median(part, "Health/divergence") for part in known)), default=now)
    if now < LOST * lowest:
        return None
    remedy = f"resume from an earlier state, with a lower --glr ({run.options['glr']:g}) and --lr"
    remedy += f", or a lower --alpha ({run.options['alpha']:g})" if run.may_run_away else ""
    text = f"the generator lost ground: its divergence from the teacher is {now / lowest:.2f} times its lowest"
    return Finding("lost-ground", f"{text}; {run.less_destructive(remedy)}", now > CERTAIN * LOST * lowest)


def frozen(run: Run) -> Finding | None:
    if not run.is_frozen:
        return None
    until = f"{run.options['gan_freeze_kimg']:g} kimg (--gan-freeze)"
    return Finding("frozen", f"no problem found; the generator isn't trained until {until}", False)


FLAT, FALLEN = 1.1, 0.5  # growth of the divergence where little moves; divergence over its highest


def figures(run: Run) -> str:
    """The divergence in words. The run has recorded it."""
    divergence, growth = run.median("Health/divergence"), run.growth("Health/divergence")
    return f"divergence {divergence:.3g} in the last third, {growth:.2f} times the value of the third before"


def progress(run: Run) -> Finding:
    divergence, growth = run.median("Health/divergence"), run.growth("Health/divergence")
    if divergence is None or growth is None:
        return Finding("unknown", "no Health/divergence is recorded", False)
    figure = figures(run)
    has_fallen = not run.is_early and divergence < FALLEN * run.highest("Health/divergence")
    if has_fallen and 1 / FLAT < growth < FLAT:
        remedy = f"stop, or finish with --lr-decay ({run.options['lr_decay']})"
        return Finding("converged", f"no problem found, and little changes: {figure}; {remedy}", False)
    falls = "the divergence falls"
    if growth >= 1 / FLAT:
        falls = "the divergence isn't falling yet (it rises at first, while the fake score learns)"
    return Finding("healthy", f"no problem found, and {falls}: {figure}", False)


def unknown(run: Run) -> Finding:
    """Where nothing but the fake score has seen the images, the loss's figures can't say that they are good."""
    found = progress(run)
    if found.name == "unknown":
        return found
    text = f"no problem found, but nothing has measured whether the images are like the teacher's: {figures(run)}"
    return Finding("unknown", f"{text}; look at the pictures, or give --data_stat", certain=False)


# In each line, only what the first rule that applies says is reported: it explains the others.
PROBLEMS: list[list[Rule]] = [
    [skipped],
    [spikes],
    [discriminator_wins, discriminator_guesses],
    [gan_too_strong],
    [fake_score_stands_still, generator_outruns, generator_wanders, fake_score_lags, alpha_too_large],
    [collapse],
    [lost_class],
    [average_too_short],
]
# Of a run without problems whose images nobody compared with others; if none applies, it's `unknown`.
STATES: list[Rule] = [astray, lost_ground, frozen]
