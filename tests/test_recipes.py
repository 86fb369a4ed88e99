"""Recipes: the published numbers, what wins over what, and run_sid.sh and README saying the same."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

import sid_train
from edm import published
from sid.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = (ROOT / "run_sid.sh").read_text(encoding="utf-8")
COLUMNS = "edm_model alpha batch batch_gpu lr use_fp16 dropout augment cres ema_halflife_kimg kimg_per_tick total_kimg"
SID = {  # the settings of the published results
    "cifar10-uncond": ["edm-cifar10-32x32-uncond-vp", 1.2, 256, 16, 1e-5, False, 0.13, 0.12, [2, 2, 2], 500, 10, 5e5],
    "cifar10-cond": ["edm-cifar10-32x32-cond-vp", 1.2, 256, 16, 1e-5, False, 0.13, 0.12, [2, 2, 2], 500, 10, 8e5],
    "imagenet64-cond": ["edm-imagenet-64x64-cond-adm", 1.2, 8192, 16, 4e-6, True, 0.1, 0, [1, 2, 3, 4], 2000, 20, 1e6],
    "ffhq64": ["edm-ffhq-64x64-uncond-vp", 1.2, 512, 32, 1e-5, True, 0.05, 0.15, [1, 2, 2, 2], 500, 10, 5e5],
    "afhq64-v2": ["edm-afhqv2-64x64-uncond-vp", 1.0, 512, 32, 5e-6, True, 0.05, 0.15, [1, 2, 2, 2], 500, 10, 5e5],
}
SIDA_IMAGES = {"cifar10-uncond": 32, "cifar10-cond": 32, "imagenet64-cond": 32, "ffhq64": 64, "afhq64-v2": 64}


# FID of the published generators, one evaluation.
TEXT_FID = {"sd15": "8.15", "sd21": "9.52", "sdxl": "", "sd35-medium": "", "sana": "", "flux-dev": ""}  # on COCO-2014
EDM2_SIDA = {
    f"imagenet512-edm2-{size}": fid
    for size, fid in zip(
        ("xs", "s", "m", "l", "xl", "xxl"), ("2.156", "1.669", "1.488", "1.413", "1.379", "1.366"), strict=True
    )
}


@pytest.fixture(autouse=True)
def nothing_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


def dry_run(*options):
    result = CliRunner().invoke(sid_train.main, [*options, "--dry-run=json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_published_settings_of_text_to_image():
    for name, kappa, lr in (("sd15", 1.5, 1e-6), ("sd35-medium", 4.5, 1e-6), ("sana", 4.5, 5e-6)):
        found = dry_run(f"--recipe={name}", "--prompts=captions.txt")
        assert (found["alpha"], found["lsg"], found["lr"], found["glr"], found["g_beta1"]) == (1, 1, lr, lr, 0)
        assert (found["guidance"], found["drop_labels"]) == (f"long-short={kappa}", "before")
        levels = "times=20,980" if name == "sd15" else "lognormal=0.693,1.6"
        assert found["sigma_schedule"] == found["fake_sigma_schedule"] == levels
        expected = (1, 2.5017, None, 512) if name == "sd15" else (4, 999, "time", 256)
        assert (found["steps"], found["init_sigma"], found["weighting"], found["batch"]) == expected
    plain, large = (RECIPES[name] for name in ("sd15", "sdxl"))
    assert {name for name in large if large[name] != plain.get(name)} == {"edm_model", "steps"}
    for kappa in (1.5, 2, 3, 4.5):  # SiD-LSG's
        assert dry_run("--recipe=sd21", "--prompts=a.txt", f"--guidance=long-short={kappa}")["guidance"] == (
            f"long-short={kappa}"
        )


@pytest.mark.parametrize("name", SID)
def test_published_settings(name):
    found = dry_run(f"--recipe={name}")
    assert [found[column] for column in COLUMNS.split()] == SID[name]
    assert found["glr"] == found["lr"]
    assert found["g_beta1"] == (0.9 if name == "ffhq64" else 0)
    assert found["arch"] == ("adm" if name == "imagenet64-cond" else "ddpmpp")
    assert found["cond"] == name.endswith("-cond")
    assert (found["tmax"], found["init_sigma"], found["ls"], found["lsg"]) == (800, 2.5, 1, 100)
    assert (found["snapshot_ticks"], found["state_ticks"], found["metrics"]) == (50, 500, ["fid50k_full"])
    assert found["data_stat"] == published.reference_of(published.FILES[found["edm_model"]])
    assert not found["gan"]


@pytest.mark.parametrize("name", EDM2_SIDA)
def test_published_settings_of_edm2(name):
    found, size = dry_run(f"--recipe={name}"), name.rpartition("-")[2]
    assert found["edm_model"] == f"edm2-img512-{size}"
    assert found["data_stat"] == published.reference_of(published.FILES[found["edm_model"]]) == "img512"
    expected = {"alpha": 1, "tmax": 800, "init_sigma": 2.5, "batch": 2048, "lr": 5e-5, "glr": 5e-5, "g_beta1": 0}
    expected |= {"use_fp16": True, "ema_halflife_kimg": 2000, "lsg": 100, "ls": 1, "augment": 0, "uncertainty": True}
    expected |= {"dropout": 0 if size in ("xs", "s") else 0.1, "total_kimg": 1e5 if size == "xxl" else 2e5}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", SIDA_IMAGES)
def test_sida_is_its_sid_recipe_but_for_these(name):
    plain, found = dry_run(f"--recipe={name}"), dry_run(f"--recipe={name}-sida", "--data=images.zip")
    changed = {key: value for key, value in found.items() if value != plain[key]}
    changed.setdefault("alpha", 1.0)  # AFHQ's is 1 without
    assert changed == {
        "gan": True,
        "alpha": 1.0,
        "batch_gpu": SIDA_IMAGES[name],
        "total_kimg": 300_000,
        "data": "images.zip",
    }
    assert [found[key] for key in ("gan_freeze_kimg", "gan_start_kimg", "lsd", "lsg_gan")] == [100, 200, 1, 0.01]


def test_sida_needs_real_images():
    result = CliRunner().invoke(sid_train.main, ["--recipe=ffhq64-sida", "-n"])
    assert result.exit_code == 2
    assert result.output.splitlines() == ["Error: --gan learns from real images; name them with --data"]


def test_given_options_win_over_the_recipe_and_the_recipe_over_the_defaults():
    for options in (["--alpha=0.7", "--recipe=afhq64-v2"], ["--recipe=afhq64-v2", "--alpha=0.7"]):
        found = dry_run(*options)
        assert (found["alpha"], found["lr"], found["lsd"]) == (0.7, 5e-6, 1)
    assert dry_run("--recipe=afhq64-v2", "--alpha=1.2")["alpha"] == 1.2  # the default, but given


def test_the_recipe_for_any_teacher_needs_one():
    result = CliRunner().invoke(sid_train.main, ["--recipe=auto", "-n"])
    assert result.exit_code == 2
    assert result.output.splitlines() == [
        "Error: --recipe=auto: name the teacher with --edm_model, such as the run folder of edm.train"
    ]


def test_unknown_names_are_refused():
    result = CliRunner().invoke(sid_train.main, ["--recipe=cifar10", "-n"])
    assert result.exit_code == 2
    assert "cifar10-uncond" in result.output


def script_recipes():
    """{recipe: (teacher, duration in Mimg)} of run_sid.sh."""
    lines = re.findall(r"^([\w-]+)\) +teacher=(\S*) +duration=(\S+) ;;", SCRIPT, re.MULTILINE)
    return {name: (teacher, float(duration)) for name, teacher, duration in lines}


def test_the_shell_script_shows_each_teacher_and_duration():
    table = {
        name: (recipe["edm_model"].removeprefix(f"{ROOT}/"), recipe["duration"]) for name, recipe in RECIPES.items()
    }
    assert script_recipes() == table


def test_the_shell_script_passes_them_on(tmp_path):
    """With a stand-in for python that prints its arguments."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$@"\n')
    stand_in.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in), "NPROC": "3"}
    for name in ("cifar10-cond", "ffhq64-sida"):
        command = ["bash", str(ROOT / "run_sid.sh"), name, "--alpha=1", "-n"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        teacher, duration = script_recipes()[name]
        expected = f"sid_train.py --recipe={name} --edm_model={teacher} --duration={duration:g} --alpha=1 -n"
        assert done.stdout.strip().endswith(expected)
        assert "--nproc_per_node=3 " in done.stdout
    command = ["bash", str(ROOT / "run_sid.sh"), "demo-text", f"--outdir={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(
        f"--duration=0.004 --outdir={tmp_path}"
    )  # nothing after it: the run is elsewhere
    for name in ("demo-text", "demo-text-4steps"):
        (tmp_path / "training-runs" / f"00001-{name}").mkdir(parents=True)
    for file in ("run_sid.sh", "setup_env.sh"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    for options, trainings in ((["--lr=0.01"], 2), (["--steps=2"], 1)):
        command = ["bash", str(tmp_path / "run_sid.sh"), "demo-text", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        made = [line for line in done.stdout.splitlines() if "sid_train.py" in line]
        assert len(made) == trainings
        assert all(options[0] in line for line in made)
        assert [("--guidance=long-short=1.5" in line) for line in made] == [False, True][:trainings]
        scored = [line for line in done.stdout.splitlines() if line.startswith("fid.py eval")]
        assert len(scored) == trainings + 1
        assert scored[-1].endswith("--network=assets/emoji-32/teacher --steps=13 --guidance=2")
        reports = [line for line in done.stdout.splitlines() if line.startswith("-m sid.report")]
        assert [("--beside=" in line) for line in reports] == [True, False][-trainings:]
    failing = 'case "$*" in *--network=assets*) echo no such teacher >&2; exit 3 ;; esac'
    stand_in.write_text(f"#!/bin/sh\n{failing}\n")
    command = ["bash", str(tmp_path / "run_sid.sh"), "demo-text"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout.strip().endswith("no such teacher")
    wrong = subprocess.run(["bash", str(ROOT / "run_sid.sh"), "cifar"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "afhq64-v2" in wrong.stderr
    assert "usage()" not in wrong.stderr


def test_the_documents_say_the_same():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, recipe in RECIPES.items():
        if name in ("demo", "demo-text", "auto"):
            continue
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
        cells = [cell.strip() for cell in row.split("|")]
        if name in TEXT_FID:
            line = next(line for line in SCRIPT.splitlines() if line.startswith(f"{name})"))
            assert f"teacher={recipe['edm_model']} " in line
            assert f"duration={recipe['duration']} " in line
            assert line.endswith(f"# {TEXT_FID[name]} on COCO" if TEXT_FID[name] else ";;")
            assert cells[2:5] == [f"{recipe.get('steps', 1)}", TEXT_FID[name], f"{recipe['duration']}"]
            continue
        if name in EDM2_SIDA:
            line = next(line for line in SCRIPT.splitlines() if line.startswith(f"{name})"))
            assert line.endswith(f"# {EDM2_SIDA[name]} with SiDA")
            teacher = published.FILES[recipe["edm_model"]]
            assert cells[2:5] == [f"{teacher.fid:.2f}", EDM2_SIDA[name], f"{recipe['duration']}"]
            continue
        generator = name.removesuffix("-sida")
        generator = f"sida-{generator}" if name.endswith("-sida") else f"sid-{generator}"
        assert f"{recipe['duration']}" in cells
        assert f"{published.FILES[generator].fid:.3f}" in cells
        line = next(line for line in SCRIPT.splitlines() if line.startswith(f"{name})"))
        assert line.endswith(f"# {published.FILES[generator].fid:.3f}")
        if name.endswith("-sida"):
            assert cells[-2] == str(recipe["batch_gpu"])
