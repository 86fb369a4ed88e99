"""Users' mistakes end in one line that names the option, without a traceback; correct command lines run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fid
import sid_train
from dnnlib import download
from edm import dataset_tool, generate, train, zoo
from edm.metrics.detector import save_detector
from edm.metrics.small_classifier import SmallClassifier
from training.networks import EDMPrecond

DATA = Path(__file__).parent / "data"
NETWORK = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
DETECTOR = {"img_resolution": 8, "img_channels": 1, "num_classes": 3, "width": 4}
LARGE = {**DETECTOR, "img_resolution": 16}
TINY_RUN = ["--batch=4", "--batch-gpu=2", "--tick=0.004", "--device=cpu"]


def write_images(folder, sizes, mode="L"):
    folder.mkdir()
    for i, size in enumerate(sizes):
        Image.new(mode, size, color=i).save(folder / f"{i}.png")


def run(main, *options):
    return CliRunner().invoke(main, list(options))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a teacher, a finished run of each kind, and many broken files."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    for name, options in {
        "teacher": {},
        "other": {},
        "wide": {"model_channels": 16},
        "classes": {"label_dim": 3},
    }.items():
        zoo.save_network(EDMPrecond(8, 1, **{**NETWORK, **options}), folder / f"{name}.safetensors")
    write_images(folder / "images", [(8, 8)] * 4)
    write_images(folder / "colour", [(8, 8)] * 2, "RGB")
    write_images(folder / "large", [(16, 16)] * 2)
    write_images(folder / "oblong", [(8, 6)] * 2)
    write_images(folder / "mixed", [(8, 8), (16, 16)])
    write_images(folder / "damaged", [(8, 8)] * 2)
    (folder / "damaged" / "1.png").write_bytes((folder / "images" / "1.png").read_bytes()[:-30])
    (folder / "empty").mkdir()
    (folder / "file").write_bytes(b"a file")
    (folder / "stateless").mkdir()
    (folder / "stateless" / "network-snapshot-000001.safetensors").write_bytes(b"a result")
    (folder / "ruined").mkdir()
    (folder / "ruined" / "training-state-000001.pt").write_bytes(b"garbage")
    for name in ("garbage.pkl", "garbage.safetensors", "garbage.npz", "garbage.zip", "training-state-garbage.pt"):
        (folder / name).write_bytes(b"garbage" * 100)
    snapshot = (DATA / "edm-format-edm-ddpmpp.pkl").read_bytes()
    (folder / "truncated.pkl").write_bytes(snapshot[: len(snapshot) // 2])
    (folder / "unknown.pkl").write_bytes(snapshot.replace(b"EDMPrecond", b"ODDPrecond"))
    save_detector(SmallClassifier(**DETECTOR), folder / "detector.safetensors", DETECTOR)
    np.savez(folder / "ref.npz", mu=np.zeros(5), sigma=np.eye(5))
    options = [f"--data={folder}/images", f"--dest={folder}/good.npz", f"--detector={folder}/detector.safetensors"]
    done = run(fid.main, "ref", *options, "--device=cpu")
    assert done.exit_code == 0, done.output
    save_detector(SmallClassifier(**LARGE), folder / "large.safetensors", LARGE)
    options = [f"--data={folder}/large", f"--dest={folder}/large.npz", f"--detector={folder}/large.safetensors"]
    done = run(fid.main, "ref", *options, "--device=cpu")
    assert done.exit_code == 0, done.output
    options = [*TINY_RUN, "--duration=0.000008", "--nosubdir"]
    done = run(sid_train.main, f"--edm_model={folder}/teacher.safetensors", f"--outdir={folder}/distilled", *options)
    assert done.exit_code == 0, done.output
    options += ["--cbase=8", "--cres=1", "--blocks=1", "--attn=none", "--augment=0", "--workers=0"]
    done = run(train.main, f"--data={folder}/images", f"--outdir={folder}/trained", *options)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """`made` is the current folder; the download cache is empty, and downloads neither repeat nor leave the machine."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(download, "RETRIES", 0)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return made


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(main, options, expected):
    """What is wrong with the way a command refuses some options; None if it is as it should be."""
    result = run(main, *options)
    lines = result.output.splitlines()
    if not isinstance(result.exception, SystemExit) or result.exit_code == 0:
        return f"exit code {result.exit_code}, {result.exception!r}"
    if [line for line in lines if line.startswith("Error: ")] != lines[-1:] or "Traceback" in result.output:
        return result.output
    return None if expected in lines[-1] else lines[-1]


def assert_refused(folder, main, base, cases):
    """Each of the cases (further options, text of the refusal) is refused, and nothing in the folder changes."""
    before = contents(folder)
    found = {" ".join(options): refusal(main, [*base, *options], expected) for options, expected in cases}
    assert {options: problem for options, problem in found.items() if problem} == {}
    assert contents(folder) == before


NETWORKS = [
    ("missing.pkl", "missing.pkl"),
    ("edm-cifar10-32x32-uncond-xx", "edm-cifar10-32x32-uncond-vp"),
    ("cifar10-32x32", "reference"),
    ("garbage.pkl", "garbage.pkl"),
    ("truncated.pkl", "truncated.pkl"),
    ("unknown.pkl", "ODDPrecond"),
    ("garbage.safetensors", "garbage.safetensors"),
    ("images", "images"),
    ("file", "file"),
    ("http://127.0.0.1:9/teacher.pkl", "http://127.0.0.1:9/teacher.pkl"),
    ("ftp://127.0.0.1/teacher.pkl", "ftp://127.0.0.1/teacher.pkl"),
]
FOLDERS = [
    ("missing", "--data=missing"),
    ("empty", "--data=empty"),
    ("file", "--data=file"),
    ("garbage.zip", "--data=garbage.zip"),
    ("oblong", "not square"),
]
BOTH_TRAININGS = [
    (["--save-every=-1"], "--save-every"),
    (["--keep=-1"], "--keep"),
    (["--timeout=0"], "--timeout"),
    (["--duration=-1"], "--duration"),
    (["--duration=0"], "--duration"),
    (["--duration=nan"], "--duration"),
    (["--duration=inf"], "--duration"),
    (["--duration=long"], "--duration"),
    (["--lr=0"], "--lr"),
    (["--lr=nan"], "--lr"),
    (["--ls=inf"], "--ls"),
    (["--ema=-1"], "--ema"),
    (["--tick=0"], "--tick"),
    (["--snap=0"], "--snap"),
    (["--dump=0"], "--dump"),
    (["--seed=-1"], "--seed"),
    (["--dropout=2"], "--dropout"),
    (["--augment=-0.1"], "--augment"),
    (["--batch=0"], "--batch"),
    (["--batch=7"], "--batch-gpu=2"),
    (["--batch-gpu=3"], "--batch-gpu=3"),
    (["--batch-gpu=0"], "--batch-gpu"),
    (["--cres=2,x"], "--cres"),
    (["--cond=maybe"], "--cond"),
    (["--arch=vit"], "--arch"),
    (["--fp16=half"], "--fp16"),
    (["--device=abacus"], "--device"),
    (["--precon=edm"], "--precon"),
    (["--outdir=file"], "--outdir=file"),
    (["--outdir=file/runs"], "--outdir=file/runs"),
    (["--outdir=empty", f"--desc={'long' * 100}"], "--outdir=empty"),
    (["--desc=../elsewhere"], "--desc=../elsewhere"),
    (["--resume=missing"], "--resume=missing"),
    (["--resume=empty"], "--resume=empty"),
    (["--resume=file"], "--resume=file"),
    (["--resume=training-state-garbage.pt"], "--resume=training-state-garbage.pt"),
    (["--resume=teacher.safetensors"], "--resume=teacher.safetensors"),
    (["--transfer=missing"], "missing"),
    (["--transfer=unknown.pkl"], "ODDPrecond"),
]
GAN_NOW = ["--gan", "--gan-freeze=0", "--gan-start=0"]
DISTILLATION = [
    *(([f"--data={name}"], expected) for name, expected in FOLDERS),
    (["--data=large"], "--data=large"),
    (["--data=colour"], "--data=colour"),
    (["--data=damaged"], "--data=damaged"),
    (["--arch=adm"], "--arch=adm"),
    (["--arch=ncsnpp"], "--arch=ncsnpp"),
    (["--precond=vp"], "--precond=vp"),
    (["--cres=1,2"], "--cres=1,2"),
    (["--cbase=16"], "--cbase=16"),
    (["--cond=1"], "--cond=True"),
    (["--edm_model=classes.safetensors", "--cond=0"], "--cond=False"),
    (["--augment=0.12"], "--augment=0.12"),
    (["--transfer=wide.safetensors"], "--transfer=wide.safetensors"),
    (["--resume=trained"], "--resume=trained/training-state"),
    (["--resume=distilled", "--edm_model=other.safetensors"], "--edm_model"),
    (["--resume=distilled", "--lr=1e-3"], "--lr=0.001: the run in distilled"),
    (["--outdir=distilled", "--nosubdir", "--glr=1e-3"], "--glr=1e-05"),
    (["--alpha=nan"], "--alpha"),
    (["--alpha=big"], "--alpha"),
    (["--tmax=1001"], "--tmax"),
    (["--init_sigma=0"], "--init_sigma"),
    (["--objective=l3"], "--objective"),
    (["--weighting=snr"], "--weighting"),
    (["--objective=dmd", "--weighting=none"], "--weighting=none"),
    (["--huber=0"], "--huber"),
    (["--objective=full", "--huber=1"], "--huber=1"),
    (["--score-gradient=late"], "--score-gradient=late"),
    (["--score-gradient=from=-1"], "--score-gradient=from=-1"),
    (["--objective=l1", "--score-gradient=off"], "--score-gradient"),
    (["--sigma-schedule=flat"], "--sigma-schedule=flat"),
    (["--sigma-schedule=single=0"], "--sigma-schedule=single=0"),
    (["--sigma-schedule=lognormal=-1"], "--sigma-schedule=lognormal=-1"),
    (["--sigma-schedule=lognormal=-1,0"], "--sigma-schedule=lognormal=-1,0"),
    (["--fake-sigma-schedule=lognormal=nan,1"], "--fake-sigma-schedule=lognormal=nan,1"),
    (["--fake-sigma-schedule=single=inf"], "--fake-sigma-schedule=single=inf"),
    (["--fake-score-updates=0"], "--fake-score-updates"),
    (["--lora-rank=0"], "--lora-rank"),
    (["--adam-state=bf16", "--g_beta1=0.9"], "--g_beta1=0"),
    (["--optimizer=muon", "--g_beta1=0.9"], "--g_beta1=0"),
    (["--optimizer=muon", "--resume=distilled"], "--optimizer=muon: the run in distilled"),
    (["--adam-state=bf16", "--resume=distilled"], "--adam-state=bf16: the run in distilled"),
    (["--resume=distilled", "--lora-rank=2", "--override"], "has no --lora-rank"),
    (["--resume=distilled", "--g_beta1=0.9"], "--g_beta1=0.9: the run in distilled"),
    (["--resume=distilled", "--spike-guard=10"], "has no --spike-guard; leave it out"),
    (["--gan"], "--data"),
    ([*GAN_NOW, "--data=large"], "--data=large"),
    ([*GAN_NOW, "--data=damaged"], "--data=damaged"),
    ([*GAN_NOW, "--data=images", "--edm_model=classes.safetensors"], "--data=images has no labels"),
    (["--gan", "--data=images", "--chunk=1"], "--chunk"),
    (["--gan", "--data=images", "--score-gradient=off"], "--score-gradient=on"),
    (["--gan", "--data=images", "--objective=dmd"], "dmd"),
    (["--gan", "--data=images", "--gan-start=-1"], "--gan-start"),
    (["--share-noise=1", "--gan", "--data=images"], "--share-noise=0 --share-images=1"),
    (["--gan", "--data=images", "--duration=0.1"], "--gan-freeze=100: the generator would do nothing"),
    (["--gan", "--data=images", "--duration=0.15"], "--gan-start=200: --gan would do nothing"),
    (
        ["--gan", "--data=images", "--duration=0.3", "--trials=0.2"],
        "--gan-freeze=100: the generator would learn nothing",
    ),
    (["--share-noise=1", "--augment=0.1"], "--augment=0"),
    (["--share-noise=1", "--tmax=0"], "--tmax=800"),
    (["--share-noise=1", "--guidance=short=0.5"], "long=K or long-short=K"),
    (["--share-noise=1", "--sigma-schedule=single=1"], "--fake-sigma-schedule"),
    (["--gan", "--data=images", "--gan-freeze=-1"], "--gan-freeze"),
    (["--gan", "--data=images", "--lsd=0"], "--lsd"),
    (["--gan", "--data=images", "--lsg_gan=inf"], "--lsg_gan"),
    ([*GAN_NOW, "--data=images", "--resume=distilled"], "--gan=True: the run in distilled"),
    (["--guidance=long=2"], "--guidance=long=2: the teacher has neither classes"),
    (["--edm_model=classes.safetensors", "--guidance=strong"], "--guidance=strong"),
    (["--edm_model=classes.safetensors", "--guidance=long=1"], "--guidance=long=1"),
    (["--edm_model=classes.safetensors", "--guidance=short=1.5"], "--guidance=short=1.5"),
    (["--edm_model=classes.safetensors", "--guidance=long-short=nan"], "--guidance=long-short=nan"),
    (["--glr=-1e-5"], "--glr"),
    (["--g_beta1=1"], "--g_beta1"),
    (["--lsg=0"], "--lsg"),
    (["--metrics=fid9"], "--data_stat"),
    (["--metrics=fud9", "--data_stat=ref.npz"], "--metrics=fud9"),
    (["--metrics=fid9,", "--data_stat=ref.npz"], "--metrics"),
    (["--metrics=kid9"], "--data"),
    (["--data_stat=missing.npz"], "missing.npz"),
    (["--data_stat=garbage.npz"], "garbage.npz"),
    (["--data_stat=ref.npz", "--detector=missing.pt"], "missing.pt"),
    (["--data_stat=ref.npz", "--detector=detector.safetensors"], "--data_stat=ref.npz holds 5 features"),
    (["--data_stat=large.npz", "--metrics=fid9"], "--data_stat=large.npz is of 16x16 images"),
]
TEACHER_TRAINING = [
    *(([f"--data={name}"], expected) for name, expected in FOLDERS),
    (["--data=mixed"], "--data=mixed"),
    (["--data=damaged"], "--data=damaged"),
    (["--data_stat=large.npz"], "--data_stat=large.npz is of 16x16 images"),
    (["--detector=large.safetensors"], "--detector=large.safetensors measures 16x16 images"),
    (["--sigma=0"], "--sigma"),
    (["--cond=1"], "--cond=0"),
    (["--cres=1,1,1,1,1"], "--cres=1,1,1,1,1"),
    (["--cres=0"], "--cres=0"),
    (["--cbase=5"], "--cbase=5"),
    (["--label-dropout=0.1"], "--label-dropout=0.1 hides labels, of which there are none: --cond=1"),
    (["--cbase=14"], "--cbase, --cres, --attn: no network of these for 8x8 images"),  # groups of channels
    (["--arch=adm", "--cbase=224", "--attn=8"], "no network of these"),  # heads
    (["--attn=8,4"], "--attn=8,4: the network has no layers of 4x4; give some of its sizes, 8, or none"),
    (["--resume=trained", "--xflip=1"], "--xflip=True: the run in trained"),
    (["--transfer=detector.safetensors"], "detector.safetensors"),
    (["--resume=distilled"], "--resume=distilled/training-state"),
    (["--resume=trained", "--cbase=16"], "--resume=trained/training-state"),
    (["--resume=trained", "--augment=0.12"], "--resume=trained/training-state"),
    (["--resume=trained", "--lr-decay=cosine"], "--lr-decay=none"),
    (["--outdir=trained", "--nosubdir", "--batch=2"], "--batch=4"),
    (["--outdir=stateless", "--nosubdir"], "--outdir=stateless"),
    (["--outdir=ruined", "--nosubdir"], "ruined: all training states in it are damaged"),
]
OTHERS = [
    (dataset_tool.main, ["--dest=new.zip"], "--source"),
    (dataset_tool.main, ["--source=missing", "--dest=new.zip"], "--source=missing"),
    (dataset_tool.main, ["--source=garbage.zip", "--dest=new.zip"], "--source=garbage.zip"),
    (dataset_tool.main, ["--source=damaged", "--dest=new.zip"], "--source=damaged"),
    (dataset_tool.main, ["--source=oblong", "--dest=new.zip"], "--resolution"),
    (dataset_tool.main, ["--source=mixed", "--dest=new"], "--resolution"),
    (dataset_tool.main, ["--source=images", "--dest=large"], "--dest=large"),
    (dataset_tool.main, ["--source=images", "--dest=file/new"], "--dest=file/new"),
    (dataset_tool.main, ["--source=images", "--dest=new", "--max-images=-1"], "--max-images"),
    (dataset_tool.main, ["--source=images", "--dest=new", "--resolution=32"], "--resolution=32"),
    (fid.main, ["calc", "--images=missing", "--ref=ref.npz", "--num=4"], "--images=missing"),
    (fid.main, ["calc", "--images=images", "--ref=ref.npz", "--num=-4"], "--num"),
    (fid.main, ["calc", "--images=images", "--ref=ref.npz", "--num=5"], "--num=5"),
    (fid.main, ["calc", "--images=images", "--ref=garbage.npz", "--num=4"], "--ref=garbage.npz"),
    (fid.main, ["calc", "--images=images", "--ref=http://127.0.0.1:9/r.npz", "--num=4"], "http://127.0.0.1:9/r.npz"),
    (fid.main, ["calc", "--images=images", "--ref=good.npz", "--num=4", "--json=empty"], "--json=empty"),
    (fid.main, ["calc", "--images=images", "--ref=good.npz", "--num=4", "--json=file/x"], "--json=file/x"),
    (fid.main, ["ref", "--data=images", "--dest=new.npz", "--detector=detector.safetensors", "--batch=0"], "--batch"),
    (fid.main, ["ref", "--data=oblong", "--dest=new.npz", "--detector=detector.safetensors"], "not square"),
    (fid.main, ["ref", "--data=large", "--dest=new.npz", "--detector=detector.safetensors"], "16x16"),
    (fid.main, ["ref", "--data=images", "--dest=new.npz", "--detector=garbage.safetensors"], "garbage.safetensors"),
    (fid.main, ["ref", "--data=images", "--dest=empty/no/new.npz"], "--dest=empty/no/new.npz"),
]


GENERATION = [
    ([], "--outdir"),
    (["--outdir=new", "--seeds=5-3"], "--seeds"),
    (["--outdir=new", "--seeds=-1"], "--seeds"),
    (["--outdir=new", "--steps=0"], "--steps"),
    (["--outdir=new", "--steps=18", "--init_sigma=3"], "--init_sigma"),
    (["--outdir=new", "--batch=0"], "--batch"),
    (["--outdir=new", "--steps=18", "--sigma_min=90"], "--sigma_min=90"),
    (["--outdir=new", "--steps=18", "--disc=iddpm", "--sigma_min=2.1", "--sigma_max=2.1001"], "--disc=iddpm"),
    (["--outdir=new", "--class=1"], "--class"),
    (["--outdir=new", "--network=classes.safetensors", "--class=3"], "--class=3"),
    (["--outdir=file"], "--outdir=file"),
    (["--outdir=file/new"], "--outdir=file/new"),
    (["--grid=missing/grid.png"], "--grid=missing/grid.png: there is no folder missing"),
    (["--grid=file"], "--grid=file exists already"),
    (["--grid=new.jpg"], "--grid=new.jpg: the picture is a PNG"),
]


DISTIL = ["--edm_model=teacher.safetensors", "--outdir=runs", "--duration=0.000008", *TINY_RUN]
TRAIN = ["--data=images", "--outdir=runs", "--duration=0.000008", "--cbase=8", "--cres=1", "--blocks=1", "--attn=none"]
TRAIN += ["--augment=0", "--workers=0", *TINY_RUN]


def test_networks(work):
    for main, base, option in (
        (sid_train.main, DISTIL, "--edm_model"),
        (generate.main, ["--outdir=new", "--device=cpu"], "--network"),
        (fid.main, ["eval", "--ref=good.npz", "--metrics=fid9", "--device=cpu"], "--network"),
    ):
        assert_refused(work, main, base, [([f"{option}={source}"], expected) for source, expected in NETWORKS])


@pytest.mark.parametrize("cases", [BOTH_TRAININGS, DISTILLATION], ids=["of both trainings", "its own"])
def test_distillation(work, cases):
    assert_refused(work, sid_train.main, DISTIL, cases)


@pytest.mark.parametrize("cases", [BOTH_TRAININGS, TEACHER_TRAINING], ids=["of both trainings", "its own"])
def test_teacher_training(work, cases):
    assert_refused(work, train.main, TRAIN, cases)


def test_generation(work):
    assert_refused(work, generate.main, ["--network=teacher.safetensors", "--device=cpu"], GENERATION)


@pytest.mark.parametrize("main", [dataset_tool.main, fid.main], ids=["data sets", "metrics"])
def test_data_sets_and_metrics(work, main):
    assert_refused(work, main, [], [case for of, *case in OTHERS if of is main])


# --- command lines that users of the published code type

PUBLISHED = "--tmax=800 --init_sigma=2.5 --ls=1 --lsg=100 --snap=50 --dump=500"
UNCONDITIONAL = "--cond=0 --arch=ddpmpp --ema=0.5 --tick=10"
RECIPES = {
    "edm-cifar10-32x32-uncond-vp": f"{UNCONDITIONAL} --alpha=1.2 --batch=256 --batch-gpu=16 --lr=1e-5 --glr=1e-5"
    " --fp16=0 --dropout=0.13 --augment=0.12 --cres=2,2,2 --duration=500",
    "edm-cifar10-32x32-cond-vp": "--cond=1 --arch=ddpmpp --alpha=1.2 --batch=256 --batch-gpu=16 --lr=1e-5 --glr=1e-5"
    " --fp16=0 --dropout=0.13 --augment=0.12 --cres=2,2,2 --ema=0.5 --tick=10 --duration=800",
    "edm-imagenet-64x64-cond-adm": "--cond=1 --arch=adm --alpha=1.2 --batch=8192 --batch-gpu=16 --lr=4e-6 --glr=4e-6"
    " --fp16=1 --dropout=0.10 --augment=0 --cres=1,2,3,4 --ema=2 --tick=20 --duration=1000",
    "edm-ffhq-64x64-uncond-vp": f"{UNCONDITIONAL} --alpha=1.2 --batch=512 --batch-gpu=32 --lr=1e-5 --glr=1e-5"
    " --g_beta1=0.9 --fp16=1 --dropout=0.05 --augment=0.15 --cres=1,2,2,2 --duration=500",
    "edm-afhqv2-64x64-uncond-vp": f"{UNCONDITIONAL} --alpha=1.0 --batch=512 --batch-gpu=32 --lr=5e-6 --glr=5e-6"
    " --fp16=1 --dropout=0.05 --augment=0.15 --cres=1,2,2,2 --duration=500",
}
REFERENCES = ["cifar10-32x32", "cifar10-32x32", "imagenet-64x64", "ffhq-64x64", "afhqv2-64x64"]
EVERYTHING = """
    --outdir=runs --data=images --data_stat=ref.npz --cond=1 --arch=ncsnpp --precond=ve --duration=10 --batch=512
    --batch-gpu=32 --cbase=64 --cres=1,2,2 --ema=1 --dropout=0.1 --augment=0.15 --xflip=1 --bench=0 --cache=0
    --workers=4 --desc=mine --nosubdir --tick=5 --snap=7 --dump=9 --seed=3 --transfer=other.safetensors
    --resume=distilled --dry-run --metrics=fid50k_full,is50k,kid50k_full,pr50k3_full
    --edm_model=edm-ffhq-64x64-uncond-vp
    --init_sigma=2 --fp16=1 --ls=2 --lsg=50 --alpha=1 --tmax=700 --lr=2e-5 --glr=3e-5 --g_beta1=0.9
"""


def dry_run(folder, *options):
    before = contents(folder)
    result = run(sid_train.main, *options, "--dry-run=json")
    assert result.exit_code == 0, result.output
    assert contents(folder) == before
    return json.loads(result.output)


def test_a_dry_run_shows_the_memory_if_the_teacher_is_on_this_machine(work):
    sizes = dry_run(work, "--edm_model=teacher.safetensors", "--batch=8", "--batch-gpu=4")["memory_GB"]
    assert sizes["batch_gpu"] == 4
    assert sizes["peak"] >= sizes["weights"] > 0
    assert sizes["batch_gpu_that_fits"] == {"24 GB": 8, "80 GB": 8}
    assert "memory_GB" not in dry_run(work, "--edm_model=edm-ffhq-64x64-uncond-vp")


def test_a_dry_run_shows_the_run_as_a_run_begins(work):
    """With the words of the run's own first lines, where nothing has to be measured."""
    options = [*TINY_RUN, "--edm_model=teacher.safetensors", "--outdir=shown", "--nosubdir", "--duration=0.000008"]
    options += ["--batch-gpu=4", "--alpha=1"]
    dry = run(sid_train.main, *options, "-n")
    assert dry.exit_code == 0, dry.output
    assert not (work / "shown").exists()
    shown, started = (block(text) for text in (dry.output, run(sid_train.main, *options).output))
    assert shown.pop("Dry run").startswith("nothing was started")
    assert {"--alpha=1", "--batch-gpu=4", "--duration=8e-06"} <= set(shown.pop("Options").split())
    memory = r"about [0-9.e-]+ GB per process \(weights .*; images at once that fit: 4 in 24 GB, 4 in 80 GB"
    assert re.fullmatch(memory, shown.pop("Memory"))
    assert shown.keys() == {"Teacher", "Data", "Method", "Device", "Batch", "Length", "Run folder"}
    assert shown == {name: started[name] for name in shown}
    elsewhere = block(run(sid_train.main, "--edm_model=edm-ffhq-64x64-uncond-vp", "-n").output)
    assert "not on this machine" in elsewhere["Teacher"]
    assert "Memory" not in elsewhere
    measured = block(
        run(sid_train.main, "--recipe=auto", "--edm_model=teacher.safetensors", "--device=cpu", "-n").output
    )
    assert measured["Trials"].startswith("equal-rates (lr 0.02, glr 0.02)")
    assert "a noise level to be measured" in measured["Method"]


def block(text):
    """{name: text} of the lines that a run begins with."""
    found, name = {}, ""
    for line in text.splitlines():
        if line.startswith(" "):
            found[name] += f" {line.strip()}"
        elif "  " in line:
            name, _, value = line.partition("  ")
            found[name] = value.strip()
    return found


@pytest.mark.parametrize("option", ["--transfer=wide.safetensors", "--cond=1", "--cbase=16"])
def test_a_dry_run_refuses_what_the_run_would(work, option):
    for dry in (["-n"], []):
        result = run(sid_train.main, *TINY_RUN, "--edm_model=teacher.safetensors", option, "--outdir=runs", *dry)
        assert result.exit_code == 2, result.output
        assert option.split("=")[0] in result.output


def test_the_references_detector_serves_metrics_without_fid(work):
    options = [*TINY_RUN, "--edm_model=teacher.safetensors", "--outdir=runs", "--nosubdir", "--duration=0.000008"]
    done = run(sid_train.main, *options, "--data_stat=good.npz", "--metrics=is10")
    assert done.exit_code == 0, done.output
    record = json.loads((work / "runs" / "metric-is10.jsonl").read_text().splitlines()[-1])
    assert record["detector"] == "detector"


@pytest.mark.parametrize(("teacher", "reference"), list(zip(RECIPES, REFERENCES)), ids=RECIPES)
def test_recipes(work, teacher, reference):
    given = f"{PUBLISHED} {RECIPES[teacher]}".split()
    found = dry_run(work, "--outdir=runs", f"--edm_model={teacher}", *given)
    assert (found["edm_model"], found["data_stat"], found["metrics"]) == (teacher, reference, ["fid50k_full"])
    values = dict(option.removeprefix("--").split("=") for option in given)
    assert found["total_kimg"] == float(values["duration"]) * 1000
    assert found["ema_halflife_kimg"] == float(values["ema"]) * 1000
    assert (found["kimg_per_tick"], found["snapshot_ticks"], found["state_ticks"]) == (float(values["tick"]), 50, 500)
    assert found["use_fp16"] == (values["fp16"] == "1")
    assert found["cres"] == [int(value) for value in values["cres"].split(",")]
    assert found["g_beta1"] == float(values.get("g_beta1", 0))
    for name in ("alpha", "tmax", "init_sigma", "lr", "glr", "ls", "lsg", "batch", "dropout", "augment"):
        assert found[name] == float(values[name])
    assert found["batch_gpu"] == int(values["batch-gpu"])


def test_the_bare_defaults_are_the_first_recipe(work):
    bare, full = (dry_run(work, *options) for options in ([], [PUBLISHED, *RECIPES.values()][1].split()))
    same = bare.keys() - {"dropout", "augment", "use_fp16", "cond", "arch", "cres"}  # None: as the teacher has it
    same -= {"batch_gpu"}  # None: as the memory allows
    assert {name: bare[name] for name in same} == {name: full[name] for name in same}


def test_every_option_of_published_command_lines(work):
    found = dry_run(work, *EVERYTHING.split())
    assert found["metrics"] == ["fid50k_full", "is50k", "kid50k_full", "pr50k3_full"]
    assert (found["total_kimg"], found["batch"], found["batch_gpu"], found["seed"]) == (10_000, 512, 32, 3)
    assert (found["glr"], found["lr"], found["g_beta1"], found["tmax"]) == (3e-5, 2e-5, 0.9, 700)
