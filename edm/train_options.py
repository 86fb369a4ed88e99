"""The options of edm.train, by section of its --help, and the settings made from them.

Importing it doesn't load torch, so that command lines are checked at once.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from dnnlib import FiniteRange, IntList, UserError, WholeRange
from dnnlib.options import COUNT, FLAG, NOT_NEGATIVE, POSITIVE, PROBABILITY, Idle, dry_run_option, is_given, option

from . import train_presets

if TYPE_CHECKING:
    from training.dataset import ImageFolderDataset
    from training.latent_dataset import LatentDataset
    from training.training_loop import TrainingConfig

# The published settings, for 200 Mimg, and the largest share of a shorter run that they may take.
LR_RAMPUP_KIMG, LR_RAMPUP_SHARE = 10_000, 1 / 20
TICK_KIMG, TICKS = 50, 40
SNAPSHOT_TICKS, SNAPSHOTS = 50, 4

ARCHITECTURES = {
    "ddpmpp": {
        "model_type": "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
    },
    "ncsnpp": {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
    },
    "adm": {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4]},
    "edm2": {"model_channels": 192, "channel_mult": [1, 2, 3, 4]},
}
PRECONDITIONINGS = {"vp": ("VPPrecond", "VPLoss"), "ve": ("VEPrecond", "VELoss"), "edm": ("EDMPrecond", "EDMLoss")}
EDM2 = ("Precond", "EDM2Loss")  # its network has EDM's preconditioning inside
MAX_EMA_STD = 0.288  # that of a plain mean of all weights is 0.2887

# The options that change a network's constructor arguments.
NETWORK_OPTIONS = {
    "model_channels": "cbase",
    "channel_mult": "cres",
    "num_blocks": "blocks",
    "attn_resolutions": "attn",
}
# Of `auto`: images are halved until they are smaller than this, and have self-attention at the largest of the halves up
# to this size.
SMALL_SIZE = 8
# What the command line calls the settings whose names differ there, and how many of our units its unit is.
COMMAND_LINE = {
    "total_kimg": ("duration", 1000),
    "ema_halflife_kimg": ("ema", 1000),
    "lr_rampup_kimg": ("lr-rampup", 1),
    "lr_constant_kimg": ("lr-constant", 1),
    "ema_std": ("ema-std", 1),
    "loss_scaling": ("ls", 1),
    "use_fp16": ("fp16", 1),
    "images": ("data (images)", 1),
    "img_resolution": ("data", 1),
    **{setting: (name, 1) for setting, name in NETWORK_OPTIONS.items()},
}

SECTIONS: dict[str, Sequence[click.Parameter]] = {
    "Where": [
        option(
            "--preset",
            f"Settings by name, which other options override: {', '.join(train_presets.PRESETS)}",
            click.Choice(list(train_presets.PRESETS)),
            metavar="NAME",
            callback=train_presets.use,
            is_eager=True,
            expose_value=False,
        ),
        option("--outdir", "Folder for run folders", required=True),
        option("--data", "Training images: folder or zip", required=True),
        option("--transfer", "Network whose weights the training starts from"),
        option(
            "--resume",
            "Training state or run folder to continue, or auto for this command's own run folder if it exists"
            "  [default: auto with --nosubdir]",
        ),
        option("--override", "Let --resume change options of the training", FLAG),
    ],
    "Network": [
        option("--cond", "Train a class-conditional network", bool, False),
        option("--arch", "Architecture", list(ARCHITECTURES), "ddpmpp"),
        option("--precond", "Preconditioning, with its own loss", list(PRECONDITIONINGS), "edm"),
        option("--cbase", "Channels at full resolution  [default: by --arch]", WholeRange(4)),
        option("--cres", "Channel multiplier per resolution, or auto  [default: by --arch]", IntList("auto")),
        option("--blocks", "Residual blocks per resolution  [default: by --arch]", COUNT),
        option(
            "--attn",
            "Resolutions with self-attention, auto or none  [default: by --arch]",
            IntList("auto", "none"),
        ),
        option("--dropout", "Dropout probability", PROBABILITY, 0.13),
        option(
            "--label-dropout", "Probability of hiding an image's label, for guidance without a class", PROBABILITY, 0.0
        ),
    ],
    "Training": [
        option("--sigma", "The only noise level to train for  [default: all, as --precond draws them]", POSITIVE),
        option(
            "--p-mean",
            "Mean of ln sigma in training, with --precond=edm  [default: -1.2; --arch=edm2: -0.4]",
            FiniteRange(),
        ),
        option("--p-std", "Its standard deviation  [default: 1.2; --arch=edm2: 1]", NOT_NEGATIVE),
        option("--augment", "Augmentation probability, 0 for none", PROBABILITY, 0.12),
        option("--xflip", "Add the mirror images of --data", bool, False),
        option("--duration", "Length of the training in Mimg", POSITIVE, 200.0),
        option("--batch", "Images per update, all processes together", COUNT, 512),
        option("--lr", "Learning rate", POSITIVE, 1e-3),
        option(
            "--lr-rampup",
            f"Warm-up in kimg  [default: {LR_RAMPUP_KIMG}, at most a 20th of --duration]",
            NOT_NEGATIVE,
        ),
        option(
            "--lr-decay",
            "Decay of the learning rate: linear or cosine over --duration; sqrt: with the square root of the images",
            ["none", "linear", "cosine", "sqrt"],
            "none",
        ),
        option("--lr-constant", "Kimg before --lr-decay=sqrt begins", NOT_NEGATIVE, 0.0),
        option("--beta2", "Adam's second beta", FiniteRange(0, 1, max_open=True), 0.999),
        option("--ema", "Half-life of the moving average in Mimg", NOT_NEGATIVE, 0.5),
        option(
            "--ema-std",
            "In place of --ema, a moving average whose width is this share of the training so far (EDM2)",
            FiniteRange(0.01, MAX_EMA_STD),
        ),
        option("--ls", "Scale of the loss", POSITIVE, 1.0),
    ],
    "Speed and memory": [
        option("--batch-gpu", "Images per process and round  [default: all]", COUNT),
        option("--fp16", "Half precision on a GPU", bool, False),
        option("--bench", "cuDNN benchmarking", bool, True),
        option("--cache", "Keep the images in memory", bool, True),
        option("--workers", "Data-loader processes", WholeRange(0, 1024), 1),
    ],
    "Metrics at snapshots": [
        option("--data_stat", "Reference statistics (.npz) for FID  [default: computed from --data]"),
        option("--detector", "Detector for metrics  [default: the one that --data_stat was made with]"),
        option("--metrics", "fid5k,kid5k,… or none  [default: fid5k with --data_stat or --detector, otherwise none]"),
    ],
    "Run": [
        option("--tick", f"Kimg between reports  [default: {TICK_KIMG}, at most a 40th of --duration]", POSITIVE),
        option(
            "--snap", f"Ticks between snapshots  [default: {SNAPSHOT_TICKS}, at most a quarter of --duration]", COUNT
        ),
        option("--dump", "Ticks between training states", COUNT, 500),
        option("--save-every", "Minutes between training states, 0 for --dump only", NOT_NEGATIVE, 10.0),
        option("--keep", "How many training states to keep, 0 for all", WholeRange(0), 2),
        option(
            "--timeout",
            "End the run after this many minutes without progress",
            FiniteRange(0, 1e5, min_open=True),
            30.0,
        ),
        option("--log", "Show curves and pictures elsewhere, too: tensorboard, wandb or both, comma-separated"),
        option("--seed", "Seed of all random draws", WholeRange(0), 0),
        option("--device", "Where to run  [default: the first available]", ["cuda", "mps", "cpu"]),
        option("--desc", "Description in the run folder's name"),
        option("--nosubdir", "Use --outdir itself as the run folder", FLAG),
        dry_run_option("Show what would be trained"),
    ],
}


def _choose_average(context: click.Context) -> None:
    """--ema takes the place of a preset's --ema-std. Errors: UserError when the command line has both."""
    if is_given(context, "ema"):
        if is_given(context, "ema_std"):
            raise UserError("--ema and --ema-std are two moving averages; give one of them")
        context.params["ema_std"] = None


CHECKS = (
    Idle(("lr_constant",), "without --lr-decay=sqrt", lambda options: options["lr_decay"] != "sqrt"),
    Idle(("override",), "without --resume", lambda options: options["resume"] is None and not options["nosubdir"]),
    Idle(
        ("metrics", "data_stat", "detector"),
        "with --sigma: images are made from all noise levels, and the network learns only one",
        lambda options: options["sigma"] is not None and options["metrics"] != "none",
    ),
    _choose_average,
)


def network_arguments(
    options: dict[str, Any], dataset: "ImageFolderDataset | LatentDataset", augment_dim: int
) -> dict[str, Any]:
    """The network's constructor arguments. Errors: UserError naming the option that doesn't fit the images."""
    arguments = {
        **ARCHITECTURES[options["arch"]],
        "img_resolution": dataset.resolution,
        "img_channels": dataset.num_channels,
        "label_dim": dataset.label_dim,
        "use_fp16": options["fp16"],
        "dropout": options["dropout"],
        **({} if is_edm2(options) else {"label_dropout": options["label_dropout"], "augment_dim": augment_dim}),
        **{name: options[given] for name, given in NETWORK_OPTIONS.items() if options[given] is not None},
    }
    if options["label_dropout"] and not dataset.label_dim:
        raise UserError(f"--label-dropout={options['label_dropout']:g} hides labels, of which there are none: --cond=1")
    if arguments["channel_mult"] == "auto":
        arguments["channel_mult"] = [1] + [2] * len(halves(dataset.resolution))
    _check_multipliers(arguments["channel_mult"], dataset.resolution, options["data"])
    sizes = [dataset.resolution >> halvings for halvings in range(len(arguments["channel_mult"]))]
    if options["attn"] is not None:
        arguments["attn_resolutions"] = _attention(options["attn"], sizes)
    if arguments["model_channels"] % 2:
        raise UserError(f"--cbase={arguments['model_channels']} must be even")
    if is_edm2(options):
        heads = math.gcd(64, *(arguments["model_channels"] * mult for mult in arguments["channel_mult"]))
        arguments |= {} if heads == 64 else {"channels_per_head": heads}
    return arguments


def halves(resolution: int) -> list[int]:
    """The sizes to which `auto` halves images of a resolution, the largest first: 32 gives 16, 8, 4."""
    sizes = []
    while resolution >= SMALL_SIZE and resolution % 2 == 0:
        resolution //= 2
        sizes.append(resolution)
    return sizes


def is_edm2(options: dict[str, Any]) -> bool:
    """Whether EDM2's network is to be trained. Errors: UserError naming an option that it doesn't have."""
    if options["arch"] != "edm2":
        return False
    for name, value in {"precond": "edm", "augment": 0, "label_dropout": 0}.items():
        if options[name] != value:
            raise UserError(f"--{name.replace('_', '-')}={options[name]}: --arch=edm2 needs {value}; give that")
    return True


def network_and_loss(options: dict[str, Any]) -> tuple[str, str, dict[str, float]]:
    """(class of the network, class of its loss, arguments of the loss).

    Errors: UserError naming an option that doesn't fit the loss.
    """
    network, loss = EDM2 if is_edm2(options) else PRECONDITIONINGS[options["precond"]]
    given = {name: options[name.lower()] for name in ("P_mean", "P_std") if options[name.lower()] is not None}
    if options["sigma"] is not None:
        if given:
            raise UserError(f"--sigma={options['sigma']:g} is the only noise level; leave --p-mean and --p-std out")
        given = {"P_mean": math.log(options["sigma"]), "P_std": 0.0}
        loss = loss if is_edm2(options) else "EDMLoss"
    elif given and options["precond"] != "edm":
        names = " and ".join(f"--{name.lower().replace('_', '-')}" for name in given)
        raise UserError(f"{names}: --precond={options['precond']} has noise levels of its own; give --precond=edm")
    return network, loss, given


def _check_multipliers(multipliers: Sequence[int], resolution: int, data: str) -> None:
    """Errors: UserError when images of this resolution can't be halved as often as --cres asks."""
    cres, halvings = ",".join(map(str, multipliers)), len(multipliers) - 1
    if 0 in multipliers:
        raise UserError(f"--cres={cres}: multipliers start at 1")
    if resolution >> halvings < 1:
        raise UserError(f"--cres={cres} halves {resolution} pixels too often; give fewer")
    size = 2**halvings
    if resolution % size:
        below, above = (size * (resolution // size + i) for i in range(2))
        raise UserError(
            f"--data={data}: images of {resolution}x{resolution} pixels can't be halved {halvings} times"
            f" (--cres={cres}); sizes that fit are multiples of {size}, such as {below} or {above}:"
            f" use edm.dataset_tool --resolution={above}x{above}, or fewer --cres"
        )


def _attention(asked: Sequence[int] | str, sizes: Sequence[int]) -> Sequence[int]:
    """The resolutions with self-attention that --attn asks for, of the `sizes` at which a network has layers.

    Errors: UserError when it names another one.
    """
    if isinstance(asked, str):
        return [size for size in sizes[1:] if size <= SMALL_SIZE][:1] if asked == "auto" else []
    missing = [size for size in asked if size not in sizes]
    if missing:
        attn, known = (",".join(map(str, listed)) for listed in (asked, sizes))
        raise UserError(
            f"--attn={attn}: the network has no layers of {missing[0]}x{missing[0]}; give some of its sizes, {known},"
            " or none"
        )
    return asked


def training_config(options: dict[str, Any]) -> "TrainingConfig":
    """The training's settings; warm-up, ticks and snapshots that aren't given are shorter in a short run."""
    from training.training_loop import TrainingConfig

    total_kimg = options["duration"] * 1000
    lr_rampup, tick, snap = (options[name] for name in ("lr_rampup", "tick", "snap"))
    if lr_rampup is None:
        lr_rampup = min(LR_RAMPUP_KIMG, total_kimg * LR_RAMPUP_SHARE)
    if tick is None:
        tick = min(TICK_KIMG, max(total_kimg / TICKS, options["batch"] / 1000))
    if snap is None:
        snap = min(SNAPSHOT_TICKS, max(1, round(total_kimg / tick / SNAPSHOTS)))
    return TrainingConfig(
        total_kimg=total_kimg,
        batch=options["batch"],
        batch_gpu=options["batch_gpu"],
        lr=options["lr"],
        lr_rampup_kimg=lr_rampup,
        lr_decay=options["lr_decay"],
        lr_constant_kimg=options["lr_constant"],
        beta2=options["beta2"],
        ema_halflife_kimg=options["ema"] * 1000,
        ema_std=options["ema_std"],
        loss_scaling=options["ls"],
        kimg_per_tick=tick,
        snapshot_ticks=snap,
        state_ticks=options["dump"],
        save_minutes=options["save_every"],
        keep_states=options["keep"],
        seed=options["seed"],
        workers=options["workers"],
    )
