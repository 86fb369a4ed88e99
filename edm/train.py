"""Trains an EDM-family diffusion model: python -m edm.train --outdir=runs --data=images.zip --duration=200"""

from typing import TYPE_CHECKING, Any

import click

from dnnlib import FiniteRange, IntList, LongCommand, UserError, WholeRange, without_passwords

if TYPE_CHECKING:
    import torch

    from torch_utils.run_folder import ResumeRules
    from training.dataset import ImageFolderDataset
    from training.loss import EDMLoss
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
}
PRECONDITIONINGS = {"vp": ("VPPrecond", "VPLoss"), "ve": ("VEPrecond", "VELoss"), "edm": ("EDMPrecond", "EDMLoss")}

# What the command line calls the options whose names differ there, and how many of our units its unit is.
COMMAND_LINE = {
    "total_kimg": ("duration", 1000),
    "ema_halflife_kimg": ("ema", 1000),
    "lr_rampup_kimg": ("lr-rampup", 1),
    "loss_scaling": ("ls", 1),
    "use_fp16": ("fp16", 1),
    "images": ("data (images)", 1),
    "img_resolution": ("data", 1),
    "model_channels": ("cbase", 1),
    "channel_mult": ("cres", 1),
    "num_blocks": ("blocks", 1),
    "attn_resolutions": ("attn", 1),
}


@click.command(cls=LongCommand)
@click.option("--outdir", help="Where to make the run folder", required=True)
@click.option("--data", help="Training images: folder or zip", required=True)
@click.option("--cond", help="Train a class-conditional model", type=bool, default=False, show_default=True)
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), default="ddpmpp", show_default=True)
@click.option("--precond", type=click.Choice(list(PRECONDITIONINGS)), default="edm", show_default=True)
@click.option("--sigma", help="The one noise level to train for  [default: all, as --precond draws them]",
              type=FiniteRange(0, min_open=True))  # fmt: skip
@click.option("--cbase", help="Channels at full resolution [default: by --arch]", type=WholeRange(min=4))
@click.option("--cres", help="Channel multiplier per resolution [default: by --arch]", type=IntList())
@click.option("--blocks", help="Residual blocks per resolution [default: by --arch]", type=WholeRange(min=1))
@click.option("--attn", help="Resolutions with self-attention [default: by --arch]", type=IntList())
@click.option("--dropout", type=FiniteRange(0, 1), default=0.13, show_default=True)
@click.option("--label-dropout", type=FiniteRange(0, 1), default=0.0, show_default=True,
              help="Probability of hiding an image's label, so that guidance can leave it out")  # fmt: skip
@click.option("--augment", help="Augmentation probability, 0 = off", type=FiniteRange(0, 1), default=0.12)
@click.option("--xflip", help="Add the mirrored images", type=bool, default=False, show_default=True)
@click.option("--fp16", help="Half precision on a GPU", type=bool, default=False, show_default=True)
@click.option("--duration", help="Length in Mimg", type=FiniteRange(0, min_open=True), default=200.0)
@click.option("--batch", help="Images per update", type=WholeRange(min=1), default=512, show_default=True)
@click.option("--batch-gpu", help="Images per process and round", type=WholeRange(min=1))
@click.option("--lr", type=FiniteRange(0, min_open=True), default=1e-3, show_default=True)
@click.option("--lr-rampup", type=FiniteRange(0),
              help="Warm-up in kimg  [default: 10000, at most a 20th of --duration]")  # fmt: skip
@click.option("--lr-decay", type=click.Choice(["none", "linear", "cosine"]), default="none", show_default=True)
@click.option("--ema", help="Half-life of the moving average in Mimg", type=FiniteRange(0), default=0.5)
@click.option("--ls", help="Loss scaling", type=FiniteRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--bench", help="cuDNN benchmarking", type=bool, default=True, show_default=True)
@click.option("--cache", help="Keep the images in memory", type=bool, default=True, show_default=True)
@click.option("--workers", help="Data-loader processes", type=WholeRange(0, 1024), default=1, show_default=True)
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the first there]")
@click.option("--desc", help="Description in the run folder's name")
@click.option("--nosubdir", help="Use --outdir itself as the run folder", is_flag=True)
@click.option("--tick", type=FiniteRange(0, min_open=True),
              help="Report every so many kimg  [default: 50, at most a 40th of --duration]")  # fmt: skip
@click.option("--snap", type=WholeRange(min=1),
              help="Snapshot every so many ticks  [default: 50, at most a quarter of --duration]")  # fmt: skip
@click.option("--data_stat", help="Reference statistics (.npz) for FID at snapshots  [default: computed from --data]")
@click.option("--detector", help="Detector for metrics at snapshots  [default: the one --data_stat was made with]")
@click.option("--metrics", help="fid5k,kid5k,… or none  [default: fid5k with --data_stat or --detector, else none]")
@click.option("--dump", help="Training state every so many ticks", type=WholeRange(min=1), default=500)
@click.option("--save-every", help="Training state every so many minutes, 0 = by --dump only", type=FiniteRange(0),
              default=10.0, show_default=True)  # fmt: skip
@click.option("--keep", help="How many training states to keep, 0 = all", type=WholeRange(min=0), default=2)
@click.option("--timeout", help="End the run when its processes make no progress for so many minutes", default=30.0,
              type=FiniteRange(0, 1e5, min_open=True))  # fmt: skip
@click.option("--seed", type=WholeRange(min=0), default=0, show_default=True)
@click.option("--transfer", help="Start from the weights of this network")
@click.option("--resume", help="Training state or run folder to continue; auto: this command's own run folder, if it"
              " is there  [default: auto with --nosubdir]")  # fmt: skip
@click.option("--override", help="Let --resume change options of the training", is_flag=True)
@click.option("-n", "--dry-run", help="Print the options and stop", is_flag=True)
def main(**options: Any) -> None:
    """Train a diffusion model (EDM, VP or VE) on a folder or zip of images."""
    import json

    import torch

    from edm import training_report, zoo
    from torch_utils import checkpoint, distributed, misc, run_folder
    from torch_utils.watchdog import SPARE_SEC, watching
    from training import augment, loss
    from training.conditions import metadata_of
    from training.dataset import ImageFolderDataset
    from training.training_loop import Training, check_state, training_loop

    dataset = ImageFolderDataset(
        options["data"], use_labels=options["cond"], xflip=options["xflip"], cache=options["cache"]
    )
    pipe = augment.AugmentPipe(p=options["augment"], **augment.EDM_MULTIPLIERS) if options["augment"] else None
    network_kwargs, config = build_config(options, dataset, pipe.augment_dim if pipe else 0)
    precond, loss_name = PRECONDITIONINGS[options["precond"]]
    check_sizes(precond, network_kwargs)
    summary = {"network": {"class_name": precond, **network_kwargs}, **vars(config), "data": options["data"]}
    summary |= {name: options[name] for name in ("sigma", "resume")}
    learnt = metadata_of(dataset.classes, dataset.label_dim)
    summary = without_passwords({**summary, **learnt})
    loss_fn = getattr(loss, loss_name)() if options["sigma"] is None else single_level_loss(options["sigma"])
    device = distributed.init(options["device"], timeout_sec=60 * options["timeout"] + SPARE_SEC)
    with watching(60 * options["timeout"]) as training_begins:
        misc.split_batch(config.batch, config.batch_gpu, distributed.world_size())
        if options["dry_run"]:
            distributed.print0(json.dumps(summary, indent=2))
            return

        torch.backends.cudnn.benchmark = options["bench"]
        misc.seed_at(config.seed)
        net = build_network(precond, network_kwargs)
        if options["transfer"]:
            copy_weights(zoo.load_network(options["transfer"]), net, options["transfer"])
        description = options["desc"] or f"{dataset.name}-{options['arch']}-{options['precond']}-batch{config.batch}"
        place = (options["outdir"], description, options["nosubdir"])
        resume = run_folder.resolve_resume(options["resume"], *place)
        asked = {**network_kwargs, **vars(config)}
        asked |= {name: options[name] for name in ("precond", "augment", "xflip", "sigma")} | {"images": len(dataset)}
        if resume is not None:
            check_state(resume, net)
            if options["lr_rampup"] is None:  # goes on with the warm-up that the run was started with
                recorded = resume.read()["options"].get("lr_rampup_kimg", config.lr_rampup_kimg)
                config.lr_rampup_kimg = asked["lr_rampup_kimg"] = summary["lr_rampup_kimg"] = recorded
            now = checkpoint.setting(asked, device)
            run_folder.check_setting(resume.path, resume.read(), now, resume_rules(config, options["override"]))
        evaluator = training_report.make_evaluator(options, device)
        distributed.print0(training_report.describe_start(net, dataset, config, device))
        training = Training(config, net, loss_fn, pipe, device, asked, resume)
        with run_folder.create(*place, summary, resume and resume.path) as run_dir:
            report = training_report.TeacherReport(run_dir, evaluator, config.batch)
            distributed.print0(f"Run folder: {run_dir}")

            def save_snapshot(ema: torch.nn.Module, nimg: int) -> None:
                path = checkpoint.snapshot_path(run_dir, nimg, config.batch)
                only = {} if options["sigma"] is None else {"sigma": options["sigma"]}
                zoo.save_network(ema, path, kind="teacher", kimg=nimg / 1000, data=dataset.name, **only, **learnt)

            training_begins.set()
            # A denoiser of one noise level can't be sampled by Heun's method.
            training_loop(
                training, dataset, run_dir, save_snapshot, report.snapshot if options["sigma"] is None else None
            )
            distributed.print0(f"next: {training_report.next_command(run_dir, options, evaluator)}")
    distributed.shutdown()


def resume_rules(config: "TrainingConfig", override: bool = False) -> "ResumeRules":
    """What a resumed training may change (`run_folder.ResumeRules`)."""
    from torch_utils.run_folder import ResumeRules
    from training.training_loop import FREE_ON_RESUME, ROUNDING

    # Without a decay the end changes nothing before it.
    free = FREE_ON_RESUME | ({"total_kimg"} if config.lr_decay == "none" else set())
    return ResumeRules(free, ROUNDING, override, COMMAND_LINE)


def check_sizes(precond: str, network_kwargs: dict[str, Any]) -> None:
    """Errors: UserError when a network of these sizes can't be called, found out on a device without values."""
    import torch

    from training import networks

    size, labels = network_kwargs["img_resolution"], network_kwargs["label_dim"]
    with torch.device("meta"):
        try:
            net = getattr(networks, precond)(**network_kwargs)
        except (MemoryError, RuntimeError, OverflowError):
            return  # `build_network` says so
        x, sigma = torch.zeros([2, network_kwargs["img_channels"], size, size]), torch.ones([2, 1, 1, 1])
        try:
            net(x, sigma, torch.zeros([2, labels]) if labels else None)
        except (RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0][:200]
            raise UserError(
                f"--cbase, --cres, --attn: no network of these for {size}x{size} images ({reason})"
            ) from None


def build_network(precond: str, network_kwargs: dict[str, Any]) -> "torch.nn.Module":
    """The network that is to be trained. Errors: UserError when there is no room for it."""
    from training import networks

    try:
        return getattr(networks, precond)(**network_kwargs)
    except (MemoryError, RuntimeError, OverflowError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"--cbase, --cres, --blocks: a network of these can't be made here ({reason})") from None


def single_level_loss(sigma: float) -> "EDMLoss":
    """EDM's loss at one noise level: a denoiser that gives the score of the data smoothed by sigma, and no other."""
    import math

    from training.loss import EDMLoss

    return EDMLoss(P_mean=math.log(sigma), P_std=0.0)


def build_config(
    options: dict[str, Any], dataset: "ImageFolderDataset", augment_dim: int
) -> tuple[dict[str, Any], "TrainingConfig"]:
    """(constructor arguments of the network, TrainingConfig) from the command line and the data set's shape."""
    from training.training_loop import TrainingConfig

    network = dict(ARCHITECTURES[options["arch"]])
    network.update(
        img_resolution=dataset.resolution,
        img_channels=dataset.num_channels,
        label_dim=dataset.label_dim,
        use_fp16=options["fp16"],
        dropout=options["dropout"],
        label_dropout=options["label_dropout"],
        augment_dim=augment_dim,
    )
    given = {"model_channels": "cbase", "channel_mult": "cres", "num_blocks": "blocks", "attn_resolutions": "attn"}
    network.update({name: options[option] for name, option in given.items() if options[option] is not None})
    cres = ",".join(map(str, network["channel_mult"]))
    if 0 in network["channel_mult"]:
        raise UserError(f"--cres={cres}: multipliers start at 1")
    if dataset.resolution >> (len(network["channel_mult"]) - 1) < 1:
        raise UserError(f"--cres={cres} halves {dataset.resolution} pixels too often; give fewer")
    halvings = len(network["channel_mult"]) - 1
    if dataset.resolution % 2**halvings:
        size = 2**halvings
        fitting = [f"{size * (dataset.resolution // size + i)}" for i in range(2)]
        raise UserError(
            f"--data={options['data']}: images of {dataset.resolution}x{dataset.resolution} pixels can't be halved"
            f" {halvings} times (--cres={cres}); sizes that fit are multiples of {size}, such as"
            f" {' or '.join(fitting)}: use edm.dataset_tool --resolution={fitting[1]}x{fitting[1]}, or fewer --cres"
        )
    if network["model_channels"] % 2:
        raise UserError(f"--cbase={network['model_channels']} must be even")
    total_kimg = options["duration"] * 1000
    given_tick, given_snap, given_rampup = (options[name] for name in ("tick", "snap", "lr_rampup"))
    tick = min(TICK_KIMG, max(total_kimg / TICKS, options["batch"] / 1000)) if given_tick is None else given_tick
    snap = min(SNAPSHOT_TICKS, max(1, round(total_kimg / tick / SNAPSHOTS))) if given_snap is None else given_snap
    config = TrainingConfig(
        total_kimg=total_kimg,
        batch=options["batch"],
        batch_gpu=options["batch_gpu"],
        lr=options["lr"],
        lr_rampup_kimg=min(LR_RAMPUP_KIMG, total_kimg * LR_RAMPUP_SHARE) if given_rampup is None else given_rampup,
        lr_decay=options["lr_decay"],
        ema_halflife_kimg=options["ema"] * 1000,
        loss_scaling=options["ls"],
        kimg_per_tick=tick,
        snapshot_ticks=snap,
        state_ticks=options["dump"],
        save_minutes=options["save_every"],
        keep_states=options["keep"],
        seed=options["seed"],
        workers=options["workers"],
    )
    return network, config


def copy_weights(source: "torch.nn.Module", target: "torch.nn.Module", name: str) -> None:
    """Copies every parameter and buffer that both networks have in the same shape; refuses when none fits."""
    state = target.state_dict()
    fitting = {k: v for k, v in source.state_dict().items() if k in state and state[k].shape == v.shape}
    if not fitting:
        raise UserError(f"--transfer={name}: no weight of it fits this network; give the same --arch, --cbase, --cres")
    target.load_state_dict(fitting, strict=False)


if __name__ == "__main__":
    main()
