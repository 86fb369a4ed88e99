"""Trains an EDM-family diffusion model: python -m edm.train --outdir=runs --data=images.zip --duration=200"""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib import LongCommand, UserError, without_passwords
from dnnlib.options import AS_JSON
from edm import next_steps
from edm.train_options import CHECKS, COMMAND_LINE, SECTIONS, network_and_loss, network_arguments, training_config
from edm.train_presets import PRESET

if TYPE_CHECKING:
    import torch

    from torch_utils.checkpoint import StateFile
    from torch_utils.run_folder import ResumeRules
    from training.augment import AugmentPipe
    from training.dataset import ImageFolderDataset
    from training.latent_dataset import LatentDataset
    from training.training_loop import TrainingConfig


@click.command(cls=LongCommand, sections=SECTIONS, checks=CHECKS, context_settings={"show_default": True})
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Train a diffusion model (EDM, EDM2, VP or VE) on a folder or zip of images."""
    from torch_utils import batches, distributed
    from torch_utils.tracking import trackers_of
    from torch_utils.watchdog import SPARE_SEC, watching
    from training import augment
    from training.conditions import metadata_of
    from training.latent_dataset import open_dataset

    dataset = open_dataset(options["data"], options["cond"], options["xflip"], options["cache"])
    if options["augment"] and dataset.metadata:
        raise UserError(f"--augment={options['augment']:g}: latents can't be augmented; use --augment=0")
    pipe = augment.AugmentPipe(p=options["augment"], **augment.EDM_MULTIPLIERS) if options["augment"] else None
    network_kwargs = network_arguments(options, dataset, pipe.augment_dim if pipe else 0)
    config = training_config(options)
    precond, loss_name, loss_kwargs = network_and_loss(options)
    shapes = check_sizes(precond, network_kwargs)
    summary = {"network": {"class_name": precond, **network_kwargs}, **vars(config), "data": options["data"]}
    summary |= {"loss": {"class_name": loss_name, **loss_kwargs}}
    summary |= {name: options[name] for name in ("sigma", "resume", "log")}
    summary |= {"images": len(dataset), "options": options, "preset": context.meta.get(PRESET)}
    summary["arguments"] = context.meta["arguments"]
    summary = without_passwords({**summary, **metadata_of(dataset.classes, dataset.label_dim)})
    device = distributed.init(options["device"], timeout_sec=60 * options["timeout"] + SPARE_SEC)
    with watching(60 * options["timeout"]) as training_begins:
        batches.split_batch(config.batch, config.batch_gpu, distributed.world_size())
        summary["processes"] = distributed.world_size()
        trackers = trackers_of(options["log"])
        if options["dry_run"]:
            distributed.print0(dry_run(options, dataset, shapes, config, summary, device))
            return
        train(options, dataset, pipe, network_kwargs, config, summary, device, training_begins, trackers)
    distributed.shutdown()


def dry_run(
    options: dict[str, Any],
    dataset: "ImageFolderDataset | LatentDataset",
    shapes: "torch.nn.Module | None",
    config: "TrainingConfig",
    summary: dict[str, Any],
    device: "torch.device",
) -> str:
    """What --dry-run prints. shapes: as `check_sizes` returns it. summary: what the run would record."""
    from edm.training_report import describe_plan
    from torch_utils.run_lines import start_block

    if options["dry_run"] == AS_JSON:
        return json.dumps(summary, indent=2)
    return start_block(describe_plan(shapes, config, device, dataset, options))


def train(
    options: dict[str, Any],
    dataset: "ImageFolderDataset | LatentDataset",
    pipe: "AugmentPipe | None",
    network_kwargs: dict[str, Any],
    config: "TrainingConfig",
    summary: dict[str, Any],
    device: "torch.device",
    training_begins: threading.Event,
    trackers: Sequence[str],
) -> None:
    """Trains a network to the end of the run, from its beginning or from the state that --resume names.

    options: of the command line. pipe: augments the images; None leaves them as they are. summary: what the run folder
    records. training_begins: is set before the first iteration. trackers: show the run (`torch_utils.tracking`).
    Errors: UserError naming the option at fault.
    """
    import torch

    from edm import training_report
    from torch_utils import checkpoint, distributed, run_folder, seeding
    from torch_utils.run_lines import environment, start_block
    from torch_utils.tracking import Tracking
    from training import loss
    from training.training_loop import Training, training_loop

    torch.backends.cudnn.benchmark = options["bench"]
    seeding.seed_at(config.seed)
    precond, loss_name, loss_kwargs = network_and_loss(options)
    loss_fn = getattr(loss, loss_name)(**loss_kwargs)
    net = build_network(precond, network_kwargs, options["transfer"])
    description = options["desc"] or f"{dataset.name}-{options['arch']}-{options['precond']}-batch{config.batch}"
    place = (options["outdir"], description, options["nosubdir"])
    former = run_folder.find_run(options["resume"], *place)
    resume = None if former is None else former.state
    asked = {**network_kwargs, **vars(config)}
    asked |= {name: options[name] for name in ("precond", "augment", "xflip", "sigma", "p_mean", "p_std")}
    asked["images"] = len(dataset)  # after xflip, which changes it
    if dataset.metadata:  # its pictures are decoded
        asked["vae"] = json.dumps(dataset.metadata["vae"])
        vars(net)["metadata"] = dict(dataset.metadata)
    if resume is not None:
        check_resume(resume, net, options, config, asked, device)
        summary["lr_rampup_kimg"] = config.lr_rampup_kimg
    summary |= {"parameters": sum(p.numel() for p in net.parameters()), "environment": environment(device)}
    evaluator = training_report.make_evaluator(options, net, device)
    training = Training(config, net, loss_fn, pipe, device, asked, resume)
    with run_folder.create(*place, summary, resume and resume.path) as run_dir:
        sources = (options["data"], options["data_stat"])
        about = training_report.describe_start(training, dataset, *sources, evaluator, run_dir)
        distributed.print0(start_block(about))
        report = training_report.TeacherReport(run_dir, evaluator, config.batch)
        # Heun's method can't sample with a denoiser of a single noise level.
        pictures = report.snapshot if options["sigma"] is None else None
        report.draw_reals(dataset, training.net)
        training_begins.set()
        save_snapshot = snapshot_writer(run_dir, options, dataset, config)
        with Tracking(run_dir, trackers, training.nimg, config.batch) as tracking:
            training_loop(training, dataset, run_dir, save_snapshot, pictures, tracking.update)
        distributed.print0(f"Page: {next_steps.report(run_dir)}")
        checkpoint.check_saved(checkpoint.snapshot_path(run_dir, training.nimg, config.batch))
        distributed.print0(f"Next: {next_steps.distil(run_dir, options)}")


def build_network(precond: str, network_kwargs: dict[str, Any], transfer: str | None) -> "torch.nn.Module":
    """The network to train, with the weights of `transfer` where they fit.

    Errors: UserError when there is no memory for it, or no weight fits.
    """
    from edm import zoo

    try:
        net = network_class(precond)(**network_kwargs)
    except (MemoryError, RuntimeError, OverflowError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"--cbase, --cres, --blocks: a network of these can't be made here ({reason})") from None
    if transfer:
        copy_weights(zoo.load_network(transfer), net, transfer)
    return net


def snapshot_writer(
    run_dir: Path, options: dict[str, Any], dataset: "ImageFolderDataset | LatentDataset", config: "TrainingConfig"
) -> Callable[["torch.nn.Module", int], None]:
    """A function that saves the average of the weights after a number of images as a snapshot of the run."""
    from edm import zoo
    from torch_utils import checkpoint
    from training.conditions import metadata_of

    metadata = {"data": dataset.name, **metadata_of(dataset.classes, dataset.label_dim)}
    if options["sigma"] is not None:
        metadata["sigma"] = options["sigma"]
    metadata |= dataset.metadata

    def save_snapshot(ema: "torch.nn.Module", nimg: int) -> None:
        path = checkpoint.snapshot_path(run_dir, nimg, config.batch)
        zoo.save_network(ema, path, kind="teacher", kimg=nimg / 1000, **metadata)

    return save_snapshot


def check_resume(
    resume: "StateFile",
    net: "torch.nn.Module",
    options: dict[str, Any],
    config: "TrainingConfig",
    asked: dict[str, Any],
    device: "torch.device",
) -> None:
    """Compares a run with the state that it goes on from, and takes the state's warm-up if none is given.

    asked: the options that states record; it changes with the config. Errors: UserError naming the option.
    """
    from torch_utils import checkpoint, run_folder
    from training.training_loop import check_state

    check_state(resume, net)
    if options["lr_rampup"] is None:
        recorded = resume.read()["options"].get("lr_rampup_kimg", config.lr_rampup_kimg)
        config.lr_rampup_kimg = asked["lr_rampup_kimg"] = recorded
    current = checkpoint.setting(asked, device)
    run_folder.check_setting(resume.path, resume.read(), current, resume_rules(config, options["override"]))


def resume_rules(config: "TrainingConfig", override: bool = False) -> "ResumeRules":
    """What a resumed training may change (`run_folder.ResumeRules`)."""
    from torch_utils.run_folder import ResumeRules
    from training.training_loop import FREE_ON_RESUME, ROUNDING

    # Without a decay, and with this one, the end changes nothing before it.
    free = FREE_ON_RESUME | ({"total_kimg"} if config.lr_decay in ("none", "sqrt") else set())
    return ResumeRules(free, ROUNDING, override, COMMAND_LINE)


def check_sizes(precond: str, network_kwargs: dict[str, Any]) -> "torch.nn.Module | None":
    """A network of these sizes on the meta device, without weights; None if it can't be made here.

    Errors: UserError when it can't be called.
    """
    import torch

    size, labels = network_kwargs["img_resolution"], network_kwargs["label_dim"]
    with torch.device("meta"):
        try:
            net = network_class(precond)(**network_kwargs)
        except (MemoryError, RuntimeError, OverflowError):
            return None  # `build_network` reports it
        x, sigma = torch.zeros([2, network_kwargs["img_channels"], size, size]), torch.ones([2, 1, 1, 1])
        try:
            net(x, sigma, torch.zeros([2, labels]) if labels else None)
        except (RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0][:200]
            raise UserError(
                f"--cbase, --cres, --attn: no network of these for {size}x{size} images ({reason})"
            ) from None
    return net


def network_class(name: str) -> Any:
    """The class of a network to train, by name."""
    from training import networks, networks_edm2

    return getattr(networks_edm2 if hasattr(networks_edm2, name) else networks, name)


def copy_weights(source: "torch.nn.Module", target: "torch.nn.Module", name: str) -> None:
    """Copies all parameters and buffers that both networks have in the same shape.

    Errors: UserError when there are none.
    """
    state = target.state_dict()
    fitting = {k: v for k, v in source.state_dict().items() if k in state and state[k].shape == v.shape}
    if not fitting:
        raise UserError(f"--transfer={name}: no weight of it fits this network; give the same --arch, --cbase, --cres")
    target.load_state_dict(fitting, strict=False)


if __name__ == "__main__":
    main()
