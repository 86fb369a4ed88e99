"""The options of sid_train.py, by section of its --help; builds the config and the run's other options from them.

It doesn't import torch, so that command lines are checked at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import click

from dnnlib import Command, FiniteRange, IntList, UserError, WholeRange
from dnnlib.options import COUNT, FLAG, NOT_NEGATIVE, POSITIVE, PROBABILITY, Idle, dry_run_option, is_given, option
from edm import own_classes
from training.steps import INIT_NOISES, MAX_STEPS, STEPS_NOISES

from . import recipes
from .config import ADAM_STATES, DROP_LABELS, FAKE_SCORE_WEIGHTINGS, LORA_BASES, OPTIMIZERS, DistillationConfig
from .guidance import parse_guidance
from .objectives import OBJECTIVES, WEIGHTINGS
from .run_options import RunOptions

D, R = DistillationConfig, RunOptions  # their class attributes are the defaults


class Measured(FiniteRange):
    """A number; `auto` becomes None."""

    name = "number or auto"  # what click calls it in messages

    def convert(self, value: Any, param: Any, ctx: Any) -> float | None:  # type: ignore[override]
        return None if value == "auto" else super().convert(value, param, ctx)


USUAL = [name for name, objective in OBJECTIVES.items() if not objective.for_study]

SECTIONS: dict[str, list[click.Parameter]] = {
    "Where": [
        option(
            "--recipe",
            f"Settings by name, which other options override: {', '.join(recipes.RECIPES)}",
            click.Choice(list(recipes.RECIPES)),
            metavar="NAME",
            callback=recipes.use,
            is_eager=True,
            expose_value=False,
        ),
        option("--edm_model", "Teacher: short name, path, URL or run folder", str, R.edm_model),
        option("--classes", own_classes.HELP, metavar="MODULE:CLASS"),
        option("--prompts", "Prompts for a text-to-image teacher: a text file, one per line, or .jsonl"),
        option("--outdir", "Folder for run folders", str, R.outdir),
        option("--data", "Real images, used only for a picture, metrics and --gan"),
        option("--data_stat", "Reference statistics (.npz) for FID  [default: the published teacher's]"),
        option("--detector", "Detector for metrics  [default: the one that --data_stat was made with]"),
        option("--metrics", "fid50k_full,is50k,kid50k_full,pr50k3_full or none  [default: fid50k_full]"),
        option(
            "--measure-teacher",
            "Measure the teacher's FID at 35 evaluations first, unless it is known  [default: if that takes at most one"
            " evaluation for two images of the run]",
            bool,
        ),
        option("--transfer", "Network whose weights the generator starts from  [default: the teacher]"),
        option(
            "--resume",
            "Training state or run folder to continue, or auto for this command's own run folder if it exists"
            "  [default: auto with --nosubdir]",
        ),
        option("--override", "Let --resume change options of the method", FLAG),
    ],
    "Method": [
        option(
            "--objective",
            f"The generator's loss: {', '.join(USUAL)} (sid is L2 - alpha L1; diff-instruct-l1 subtracts alpha L1"
            " from diff-instruct); docs/method.md lists others, for study",
            click.Choice(list(OBJECTIVES)),
            D.objective,
            metavar="NAME",
        ),
        option("--alpha", "Weight of L1 in L2 - alpha L1", FiniteRange(), D.alpha),
        option(
            "--fake-score-weighting",
            "Weights the fake score's loss as EDM does, or as the squared error of what the teacher predicts (noise, v,"
            " a flow), or of the noise",
            FAKE_SCORE_WEIGHTINGS,
            D.fake_score_weighting,
        ),
        option(
            "--uncertainty",
            "Let the fake score learn the size of its error at each noise level, and balance both losses by it; for"
            " EDM2's networks",
            bool,
            D.uncertainty,
        ),
        option(
            "--weighting",
            "Divides the loss by omega, sigma^2, 1 + sigma (time) or nothing  [default: none for diff-instruct,"
            " otherwise omega]",
            WEIGHTINGS,
        ),
        option("--huber", "Pseudo-Huber distance with this c, in pixels of [-1, 1]  [default: squared]", POSITIVE),
        option(
            "--score-gradient",
            "Whether gradients pass through both score networks: on, off or from=KIMG",
            str,
            str(D.score_gradient),
        ),
        option(
            "--sigma-schedule",
            "Noise levels of the generator's loss: karras, lognormal[=MEAN,STD], single=SIGMA, or times=FROM,TO of the"
            " teacher's own",
            str,
            str(D.sigma_schedule),
        ),
        option("--fake-sigma-schedule", "Noise levels of the fake score's loss", str, str(D.fake_sigma_schedule)),
        option(
            "--tmax",
            "Highest time of karras schedules, of 1000; auto measures on the teacher's samples which levels are of use",
            Measured(0, 1000),
            D.tmax,
        ),
        option("--fake-score-updates", "Updates of the fake score per update of the generator", COUNT, 1),
        option(
            "--init_sigma",
            "Noise level at which the generator starts; auto measures on the teacher which is best",
            Measured(0, min_open=True),
            D.init_sigma,
        ),
        option(
            "--init-noise",
            "Noise that the generator starts from: white, or with mean and covariance of the teacher's noisy samples",
            INIT_NOISES,
            D.init_noise,
        ),
        option(
            "--steps",
            f"Evaluations per image, 1 to {MAX_STEPS}, at noise levels from --init_sigma down",
            WholeRange(1, MAX_STEPS),
            D.steps,
        ),
        option(
            "--steps-noise",
            "Noise between steps: newly drawn, the first noise again, or what the last step removed",
            STEPS_NOISES,
            D.steps_noise,
        ),
        option("--steps-shift", "Above 1, steps after the first start at more noise", POSITIVE, D.steps_shift),
        option(
            "--optimizer",
            "Of both networks; muon orthogonalises updates and wants rates near 0.02",
            OPTIMIZERS,
            D.optimizer,
        ),
        option("--lr", "Learning rate of the fake score network", POSITIVE, D.lr),
        option("--glr", "Learning rate of the generator", POSITIVE, D.glr),
        option("--g_beta1", "Adam's beta1 for the generator", FiniteRange(0, 1, max_open=True), D.g_beta1),
        option("--lr-rampup", "Warm-up of both learning rates in kimg", NOT_NEGATIVE, 0.0),
        option("--lr-decay", "Decay of both learning rates over --duration", ["none", "linear", "cosine"], D.lr_decay),
        option("--ls", "Scale of the fake score's loss", POSITIVE, D.ls),
        option("--lsg", "Scale of the generator's loss", POSITIVE, D.lsg),
        option("--ema", "Half-life of the generator's moving average in Mimg", NOT_NEGATIVE, 0.5),
        option(
            "--ema-rampup",
            "Limits the half-life to this share of the images that the generator has learnt from",
            NOT_NEGATIVE,
            D.ema_rampup_ratio,
        ),
        option(
            "--spike-guard",
            "Skip updates whose gradient norm is this many times the usual one, such as 10  [default: never]",
            FiniteRange(1, min_open=True),
        ),
        option(
            "--augment",
            "Augmentation probability, 0 for none  [default: 0.12, or 0 for a teacher trained without]",
            PROBABILITY,
        ),
        option("--dropout", "Dropout probability  [default: the teacher's]", FiniteRange(0, 1, max_open=True)),
        option(
            "--trials",
            "Share of --duration for short trials of settings, of which the best goes on; 0: none",
            FiniteRange(0, 0.5),
            R.trials,
        ),
        option(
            "--returns",
            "How often the run may go back to its last good state, with lower rates, when it diverges or clearly goes"
            " away from the teacher",
            WholeRange(0),
            D.returns,
        ),
        option("--duration", "Length of the training in Mimg", POSITIVE, 500.0),
        option("--batch", "Images per update, all processes together", COUNT, D.batch),
    ],
    "Guidance and real images": [
        option(
            "--guidance",
            "Guides by classes or prompts: long=K, short=K, long-short=K, zero, anti=K or kappa=K1:K2:K4; with --guide"
            " a weight, such as 1.7",
        ),
        option("--guide", "A weaker network than the teacher, which then guides the teacher (autoguidance)"),
        option(
            "--drop-labels",
            "Whether guidance drops labels before generating, as published, or after",
            DROP_LABELS,
            D.drop_labels,
        ),
        option("--gan", "SiDA: an adversarial loss from the images of --data", FLAG),
        option("--gan-freeze", "With --gan, kimg before the generator learns", NOT_NEGATIVE, D.gan_freeze_kimg),
        option("--gan-start", "With --gan, kimg before its adversarial loss begins", NOT_NEGATIVE, D.gan_start_kimg),
        option("--lsd", "Scale of the discriminator's loss", POSITIVE, D.lsd),
        option("--lsg_gan", "Scale of the generator's adversarial loss", POSITIVE, D.lsg_gan),
        option("--xflip", "With --gan, add the mirror images of --data", bool, R.xflip),
        option("--cache", "Keep the images for --gan in memory", bool, R.cache),
    ],
    "Speed and memory (docs/performance.md)": [
        option("--batch-gpu", "Images per process and round  [default: the most that fits]", COUNT),
        option(
            "--precision",
            "Precision of the layers  [default: fp32, or fp16 with --fp16 on a GPU]",
            ["fp32", "tf32", "bf16", "fp16"],
        ),
        option("--fp16", "Half precision on a GPU  [default: the teacher's]", bool),
        option("--compile", "Compile the networks: a slow start, faster steps", bool, D.compile),
        option("--channels-last", "Store images with their channels last", bool, D.channels_last),
        option(
            "--chunk",
            "Images per pass through teacher and fake score in the generator's phase  [default: all of a round]",
            COUNT,
        ),
        option("--checkpoint", "Recompute activations instead of keeping them", bool, D.checkpoint),
        option("--share-images", "Use one batch of generated images for both phases", bool, D.share_images),
        option("--share-noise", "Share the noisy images, too, and one output of the fake score", bool, D.share_noise),
        option(
            "--adam-state", "Precision of Adam's second moments; bf16 rounds stochastically", ADAM_STATES, D.adam_state
        ),
        option(
            "--lora-rank", "Learn updates of this rank to one shared copy of the weights  [default: all weights]", COUNT
        ),
        option(
            "--lora-vectors",
            "With --lora-rank, train the generator's biases and norms, too; 0 for edm.zoo convert --to=lora",
            bool,
            D.lora_vectors,
        ),
        option(
            "--lora-base",
            "With --lora-rank, store the shared weights in full precision, or half as --precision=bf16 or fp16",
            LORA_BASES,
            D.lora_base,
        ),
        option("--bench", "cuDNN benchmarking", bool, R.bench),
        option("--metrics-batch", "Images per step of the metrics", COUNT, R.metrics_batch),
    ],
    "Run": [
        option("--tick", "Kimg between reports", POSITIVE, D.kimg_per_tick),
        option("--snap", "Ticks between snapshots, with picture and metrics", COUNT, D.snapshot_ticks),
        option("--dump", "Ticks between training states", COUNT, D.state_ticks),
        option("--save-every", "Minutes between training states, 0 for --dump only", NOT_NEGATIVE, D.save_minutes),
        option("--keep", "How many training states to keep, 0 for all", WholeRange(0), D.keep_states),
        option(
            "--timeout",
            "End the run after this many minutes without progress",
            FiniteRange(0, 1e5, min_open=True),
            R.timeout,
        ),
        option("--log", "Show curves and pictures elsewhere, too: tensorboard, wandb or both, comma-separated"),
        option("--seed", "Seed of all random draws", WholeRange(0), D.seed),
        option("--device", "Where to run  [default: the first available]", ["cuda", "mps", "cpu"]),
        option("--desc", "Description in the run folder's name"),
        option("--nosubdir", "Use --outdir itself as the run folder", FLAG),
        dry_run_option("Show what would be run and the memory that it needs"),
    ],
    "Compatibility: checked against the teacher, or without effect": [
        option("--cond", "Whether the teacher is class-conditional", bool),
        option("--arch", "The teacher's architecture", ["ddpmpp", "ncsnpp", "adm"]),
        option("--precond", "The teacher's preconditioning", ["vp", "ve", "edm"]),
        option("--cbase", "The teacher's channels at full resolution", COUNT),
        option("--cres", "The teacher's channel multiplier per resolution", IntList()),
        option("--workers", "Accepted for EDM's command lines, without effect", WholeRange(0), R.workers),
    ],
}


def _never_drops_labels(options: dict[str, Any]) -> bool:
    guidance = parse_guidance(options["guidance"])
    return guidance is None or not guidance.label_dropout or options["share_noise"]


def _check_sharing(context: click.Context) -> None:
    if context.params["share_noise"] and not context.params["share_images"] and is_given(context, "share_images"):
        raise UserError(
            "--share-images=0: with --share-noise=1, both phases have the same images; give --share-noise=0"
        )


CHECKS = (
    Idle(
        ("alpha",),
        "without an --objective that has it, such as sid",
        lambda o: not OBJECTIVES[o["objective"]].has_alpha,
    ),
    Idle(
        ("tmax",),
        "without a karras schedule",
        lambda o: "karras" not in (o["sigma_schedule"], o["fake_sigma_schedule"]),
    ),
    Idle(("steps_noise", "steps_shift"), "without --steps of 2 or more", lambda o: o["steps"] == 1),
    Idle(("drop_labels",), "without --guidance that drops labels", _never_drops_labels),
    Idle(("gan_freeze", "gan_start", "lsd", "lsg_gan"), "without --gan", lambda o: not o["gan"]),
    Idle(("lora_vectors", "lora_base"), "without --lora-rank", lambda o: o["lora_rank"] is None),
    Idle(("override",), "without --resume", lambda o: o["resume"] is None and not o["nosubdir"]),
    _check_sharing,
)


def parse(arguments: Sequence[str]) -> tuple[DistillationConfig, RunOptions]:
    """The config and the run's options of a command line of sid_train.py.

    Errors: click.ClickException when sid_train.py would refuse it.
    """
    command = Command(name="sid_train.py", sections=SECTIONS, checks=CHECKS)
    return options_of(command.make_context("sid_train.py", list(arguments)))


def options_of(context: click.Context) -> tuple[DistillationConfig, RunOptions]:
    """As `parse`, of a command line that click has parsed. Errors: UserError when options contradict each other."""
    values = dict(context.params)
    config = _take_config(values)
    given = tuple(name for name in context.params if is_given(context, name))
    return config, RunOptions(
        **values, given=given, recipe=context.meta.get("recipe"), arguments=context.meta["arguments"]
    )


def run_options(values: dict[str, Any], given: Sequence[str] = ()) -> RunOptions:
    """The options of a run that is started from Python.

    values: by name; None stands for the default. given: names of the options that the caller has given.
    Errors: UserError when sid_train.py would refuse a value.
    """
    types = {option.name: option.type for options in SECTIONS.values() for option in options}
    found = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            found[name] = types[name].convert(value, None, None)
        except click.UsageError as error:
            raise UserError(f"{name}={value}: {error.message}") from None
    return RunOptions(**found, given=tuple(given))


def _take_config(options: dict[str, Any]) -> DistillationConfig:
    """Moves the settings of the training from `options` into a DistillationConfig."""
    same = {field.name for field in dataclasses.fields(DistillationConfig)} & options.keys()
    return DistillationConfig(
        total_kimg=options.pop("duration") * 1000,
        lr_rampup_kimg=options.pop("lr_rampup"),
        ema_halflife_kimg=options.pop("ema") * 1000,
        ema_rampup_ratio=options.pop("ema_rampup"),
        use_fp16=options.pop("fp16"),
        gan_freeze_kimg=options.pop("gan_freeze"),
        gan_start_kimg=options.pop("gan_start"),
        kimg_per_tick=options.pop("tick"),
        snapshot_ticks=options.pop("snap"),
        state_ticks=options.pop("dump"),
        save_minutes=options.pop("save_every"),
        keep_states=options.pop("keep"),
        **{name: options.pop(name) for name in same},
    )
