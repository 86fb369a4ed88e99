"""The command for networks and published files.

python -m edm.zoo list
python -m edm.zoo fetch edm-cifar10-32x32-uncond-vp
python -m edm.zoo verify
python -m edm.zoo verify runs/00000-mine
python -m edm.zoo inspect edm-cifar10-32x32-uncond-vp
python -m edm.zoo convert edm-cifar10-32x32-uncond-vp teacher.safetensors
python -m edm.zoo convert runs/00000-mine page --to=site
python -m edm.zoo push runs/00000-mine owner/name
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from dnnlib import Group, UserError, check_new_file, user_path
from dnnlib.download import cache_path, verify
from dnnlib.errors import printable
from edm import diffusers_pipelines, lora_files, network_files, site, text_encoders
from edm.own_classes import classes_option, own_classes
from edm.published import FILES, NETWORK_KINDS, SID_NAMES, find
from edm.zoo import load_denoiser, network_hash, resolve, save_network
from training.steps import Steps


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Published networks, reference statistics and detectors; conversion between file formats."""


def mirror_option(function: Any) -> Any:
    """Sets --mirror for this process and the processes that it starts."""

    def use(_context: Any, _option: Any, value: str | None) -> None:
        if value is not None:
            os.environ["DNNLIB_MIRROR"] = value

    text = "Folder or address that holds all files as the cache does  [default: $DNNLIB_MIRROR]"
    return click.option("--mirror", help=text, callback=use, expose_value=False)(function)


@main.command("list")
def list_command() -> None:
    """List the published files: short name, size, published FID (at network evaluations), licence, address."""
    for file in FILES.values():
        path = cache_path(file.url)
        size = path.stat().st_size if path.is_file() else file.bytes
        size = f"{size / 1e6:.0f} MB" if size else "?"
        fid = f"FID {file.fid} ({file.nfe})" if file.fid is not None else ""
        click.echo(f"{'*' if path.is_file() else ' '} {file.name:27} {size:>7}  {fid:14}  {file.description}")
        also = [f"  also {name}" for name, of in SID_NAMES.items() if of == file.name]
        click.echo(f"    {file.url}  [{file.licence}]{''.join(also)}")
    click.echo("\n*    already downloaded\n?    size unknown before the download")
    click.echo("FID  as published (network evaluations per image)")


@main.command()
@click.argument("names", nargs=-1, required=True)
@mirror_option
def fetch(names: tuple[str, ...]) -> None:
    """Download the published files NAMES and print their paths."""
    for name in names:
        click.echo(resolve(name, _kind(name)))


@main.command("verify")
@click.argument("names", nargs=-1)
def verify_command(names: tuple[str, ...]) -> None:
    """Compare files with their checksums and print one line for each.

    NAMES: short names of downloaded files, whose published or first-seen hashes are compared; files that this project
    has written; run folders, with all their snapshots, states, references, pictures and records. Without NAMES: all
    downloaded files. Exit code 2 if a file is damaged or missing.
    """
    wrong = 0
    for name in names or FILES:
        entry = find(name)
        if entry is None:
            from edm.integrity import examine

            for finding in examine(user_path(name)):
                click.echo(printable(f"{finding.path}: {finding.text}"))
                wrong += finding.damaged
            continue
        try:
            found = verify(entry.url, entry.sha256)
        except UserError as error:
            wrong += 1
            click.echo(f"{name}: WRONG: {error.message}")
            continue
        if found is not None:
            click.echo(f"{name}: {'as published' if entry.sha256 else 'as first seen'}, sha256 {found}")
        elif names:
            wrong += 1
            click.echo(f"{name}: not downloaded")
    if wrong:
        raise UserError(f"{wrong} file{'s are' if wrong > 1 else ' is'} damaged or missing: see above")


@main.command()
@click.argument("source")
@click.argument("destination")
@click.option("--to", type=click.Choice(["diffusers", "lora", "site"]), help="Write a folder for another program")
@click.option("--base", help="With --to=lora: the teacher that the generator was distilled from")
@click.option("--runtime", help="With --to=site: folder of the npm package onnxruntime-web, which the site then holds")
@click.option("--class-names", help="With --to=site: text file with the name of each class in its line")
@click.option("--prompts", help="With --to=site, for a text-to-image generator: file with a prompt in each line")
@click.option("--half", is_flag=True, help="With --to=site: weights and prompts in 16 bits, half as much to load")
@classes_option
@mirror_option
def convert(
    source: str,
    destination: str,
    to: str | None,
    base: str | None,
    runtime: str | None,
    class_names: str | None,
    prompts: str | None,
    half: bool,
    classes: str | None,
) -> None:
    """Load the network SOURCE (name, path or URL) and save it as the new DESTINATION.

    DESTINATION: .safetensors, .pkl (for EDM's and SiD's tools), .onnx (to run elsewhere: a generator from noise to
    8-bit images; can't be loaded again), or without a suffix a folder with config.json. With --to=diffusers, a folder
    that the diffusers library opens with DiffusionPipeline.from_pretrained; for networks of its own classes. With
    --to=lora, a folder for load_lora_weights, of a text-to-image generator distilled with --lora-rank. With
    --to=site, a folder with a web page that makes a generator's images in the browser.
    """
    if (to == "lora") != (base is not None):
        raise UserError("--to=lora and --base=TEACHER go together: the file holds what is added to the teacher")
    if to != "site" and (runtime, class_names, prompts, half) != (None, None, None, False):
        raise UserError("--runtime, --class-names, --prompts, --half: are for --to=site; leave them out")
    path = Path(destination)
    if to is None and path.suffix:
        check_new_file(path)
    else:
        network_files.check_new_folder(path)
    net: Any = load_denoiser(source, own_classes(classes))
    if base is not None:
        click.echo(lora_files.write(net, load_denoiser(base, own_classes(classes)), path))
    elif to == "diffusers":
        click.echo(diffusers_pipelines.write(net, path))
    elif to == "site":
        click.echo(site.write(net, source, destination, runtime, class_names, half, prompts))
    else:
        save_network(net, destination, **net.metadata)
    click.echo(f"{destination}: {type(net).__name__}, sha256 of the weights {network_hash(net)}")


@main.command()
@click.argument("source")
@click.argument("name")
@click.option("--private", is_flag=True, help="Make a new repository private")
@click.option("-n", "--dry-run", metavar="FOLDER", help="Write what would be uploaded into this new folder instead")
@click.option("--force", is_flag=True, help="Replace the files that the repository holds already")
@click.option("--message", default="Upload a network", show_default=True, help="Of the commit")
@click.option("--licence", help="The weights' licence, such as apache-2.0  [default: as the network's file says]")
@click.option("--onnx", is_flag=True, help="Add an ONNX model")
@click.option("--to", type=click.Choice(["diffusers"]), help="Upload a pipeline of the diffusers library")
@classes_option
@mirror_option
def push(
    source: str,
    name: str,
    private: bool,
    dry_run: str | None,
    force: bool,
    message: str,
    licence: str | None,
    onnx: bool,
    to: str | None,
    classes: str | None,
) -> None:
    """Upload the network or run SOURCE to the Hugging Face Hub as the repository NAME, owner/name, in one commit.

    It holds safetensors, config.json and a model card that is filled in from the network's metadata and the run's
    records, without passwords and paths on this machine. NAME then stands for it wherever a network is asked for.
    """
    from edm import hub, hub_folder

    hub.check_name(name)
    if "" in (dry_run, message.strip()):
        raise UserError("--dry-run, --message: empty; name a folder, or give the text of the commit")
    repository = None if dry_run is not None else hub.find_repository(name, force, private)
    with tempfile.TemporaryDirectory() as temporary:
        folder = user_path(dry_run) if dry_run is not None else Path(temporary) / "repository"
        line = hub_folder.write(source, name, folder, own_classes(classes), to, onnx, licence)
        address = folder if repository is None else hub.upload(folder, repository, private, message)
    click.echo(printable(f"{address}: {line}"))


@main.command("inspect")
@click.argument("source")
@classes_option
@mirror_option
def inspect_command(source: str, classes: str | None) -> None:
    """Say what the network SOURCE is, and test whether it denoises its own samples as a teacher should.

    A teacher whose prediction, times or scale of latents are declared wrongly is named; exit code 2.
    """
    from edm.inspection import facts, misfit
    from edm.latent_inspection import latents_misfit

    net = load_denoiser(source, own_classes(classes))
    for name, text in facts(net).items():
        click.echo(printable(f"{name:13} {text}"))
    if Steps.of(net) is not None:
        click.echo("test          none: a generator is no denoiser")
        return
    if getattr(net, "prompt_dim", 0):
        net.prompts = text_encoders.prompts_for(net, [""])
    wrong = misfit(net) or latents_misfit(net)
    if wrong is not None:
        raise UserError(f"{source}: {wrong}")
    click.echo("test          denoises its own samples as a teacher should")


def _kind(name: str) -> str:
    entry = find(name)
    return "network" if entry is None or entry.kind in NETWORK_KINDS else entry.kind


if __name__ == "__main__":
    main()
