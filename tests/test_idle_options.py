"""Options that would do nothing next to others are refused; defaults, and what a recipe brings along, pass."""

import pytest
from click.testing import CliRunner

import fid
import sid_train
from dnnlib import UserError
from edm import generate, train
from sid.bench import __main__ as bench
from sid.config import DistillationConfig
from sid.inputs import choose_metrics
from sid.options import parse
from sid.report import __main__ as report
from sid.run_options import RunOptions

DISTIL = (sid_train.main, [])
TRAIN = (train.main, ["--outdir=runs", "--data=images"])
KARRAS = ["--sigma-schedule=lognormal", "--fake-sigma-schedule=karras"]
GENERATE = (generate.main, ["--network=net.safetensors", "--outdir=out"])
CALC = (fid.main.commands["calc"], ["--images=images"])
EVAL = (fid.main.commands["eval"], ["--network=net.safetensors"])
REPORT = (report.main, ["."])
BENCH = (bench.main, [])

IDLE = [  # (command, an option, what makes it work)
    (DISTIL, "--alpha=1", "--objective=diff-instruct", ["--objective=diff-instruct-l1"]),
    (
        DISTIL,
        "--tmax=600",
        "--sigma-schedule=lognormal",
        ["--sigma-schedule=lognormal", "--fake-sigma-schedule=karras"],
    ),
    (DISTIL, "--steps-noise=ddim", None, ["--steps=2"]),
    (DISTIL, "--steps-shift=2", None, ["--steps=2"]),
    (DISTIL, "--drop-labels=after", None, ["--guidance=short=0.5"]),
    (DISTIL, "--drop-labels=after", "--guidance=zero", ["--guidance=long-short=2"]),
    (DISTIL, "--gan-freeze=1", None, ["--gan"]),
    (DISTIL, "--gan-start=1", None, ["--gan"]),
    (DISTIL, "--lsd=2", None, ["--gan"]),
    (DISTIL, "--lsg_gan=2", None, ["--recipe=ffhq64-sida"]),
    (DISTIL, "--lora-vectors=0", None, ["--lora-rank=4"]),
    (DISTIL, "--lora-base=half", None, ["--lora-rank=4"]),
    (DISTIL, "--override", None, ["--nosubdir"]),
    (DISTIL, "--share-images=0", "--recipe=demo", ["--recipe=demo", "--share-noise=0"]),
    (TRAIN, "--lr-constant=9", None, ["--lr-decay=sqrt"]),
    (TRAIN, "--override", None, ["--resume=auto"]),
    (TRAIN, "--metrics=fid5k", "--sigma=1", []),
    (TRAIN, "--ema=1", "--ema-std=0.1", []),
    (GENERATE, "--S_noise=1.01", None, ["--S_churn=40"]),
    (GENERATE, "--rho=5", "--disc=ve", ["--disc=edm"]),
    (CALC, "--data=images", "--ref=ref.npz", []),
    (EVAL, "--data=images", "--ref=ref.npz", ["--ref=ref.npz", "--metrics=fid5k,kid5k"]),
    (EVAL, "--data=images", "--metrics=is5k", ["--metrics=is5k,fid5k"]),
    (EVAL, "--detector=d.safetensors", "--metrics=clip1k", []),
    (EVAL, "--S_min=1", None, ["--S_churn=40"]),
    (REPORT, "--port=80", None, ["--serve"]),
    (REPORT, "--page-only", "--serve", []),
    (REPORT, "--beside=.", "--page-only", []),
    (BENCH, "--modes=fp32", "--what=sampling", ["--what=step,sampling"]),
    (BENCH, "--eval-batch=8", "--what=step,profile", ["--what=metrics"]),
    (BENCH, "--detector=d.safetensors", None, ["--what=metrics"]),
    (BENCH, "--seconds=1", "--steps=2", []),
]


@pytest.mark.parametrize(("command", "option", "company", "with_effect"), IDLE, ids=lambda value: str(value)[:40])
def test_idle_options_are_refused(command, option, company, with_effect):
    main, base = command
    result = CliRunner().invoke(main, [*base, option, *([] if company is None else [company])])
    (line,) = result.output.splitlines()
    assert (result.exit_code, line.startswith(f"Error: {option.partition('=')[0]}")) == (2, True), line
    main.make_context("command", [*base, option, *with_effect])


def test_defaults_may_be_spelled_out():
    defaults = {f"--{name.replace('_', '-')}={value}" for name, value in DistillationConfig().options().items()}
    names = ("--alpha", "--tmax", "--steps-noise", "--drop-labels", "--lsd", "--lora-vectors")
    spelled = [option for option in defaults if option.startswith(names)]
    assert len(spelled) == len(names)
    parse([*spelled, "--gan-freeze=100", "--objective=diff-instruct", "--sigma-schedule=lognormal"])


def test_what_a_recipe_brings_may_be_overridden():
    assert parse(["--recipe=afhq64-v2", "--objective=dmd"])[0].alpha == 1
    options = train.main.make_context("train", [*TRAIN[1], "--preset=edm2-img64-s", "--lr-decay=cosine"]).params
    assert options["lr_constant"] > 0


def test_ema_takes_the_place_of_a_presets_width():
    arguments = [*TRAIN[1], "--preset=edm2-small"]
    assert train.main.make_context("train", list(arguments)).params["ema_std"] == 0.1
    options = train.main.make_context("train", [*arguments, "--ema=0.02"]).params
    assert (options["ema"], options["ema_std"]) == (0.02, None)


def test_a_detector_needs_metrics():
    with pytest.raises(UserError, match="--detector means nothing without metrics; give --data_stat"):
        choose_metrics(None, None, "images", "detector.safetensors")
    assert choose_metrics(None, "ref.npz", None, "detector.safetensors") == ["fid50k_full"]
    assert choose_metrics("none", None, None, "detector.safetensors") == []


def test_every_option_of_a_run_has_its_default_in_python_too():
    assert parse([])[1] == RunOptions(arguments=[])
