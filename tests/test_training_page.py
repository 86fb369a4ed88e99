"""The page of a training by edm.train: what it shows, and that the commands on it are right."""

import html
import json
import os
import re
import shlex
import urllib.request

import browser
import PIL.Image
import pytest
from click.testing import CliRunner
from pages import Page, images_of, write_lines

import fid
import sid_train
from dnnlib import format_figure
from edm import generate, train
from sid.report import __main__ as report
from sid.report.embedded import TRAINING_COLUMNS, first_columns
from sid.report.page import write_page
from sid.report.run_record import read_run
from sid.report.serve import make_server
from sid.report.training_page import changed_options, continuing, data_name, facts

ARGUMENTS = ["--data=pets.zip", "--outdir=runs", "--cond=1", "--cbase=16", "--lr=2e-3", "--duration=0.03"]
NETWORK = {"class_name": "EDMPrecond", "model_type": "SongUNet", "model_channels": 16, "channel_mult": [1, 2]}
NETWORK |= {"img_resolution": 8, "img_channels": 3, "label_dim": 10, "attn_resolutions": [4], "dropout": 0.0}


def test_figures_are_written_as_people_write_them():
    assert [format_figure(value) for value in (4296.5, 17.189, 0.012345, 2.0)] == ["4300", "17.2", "0.0123", "2"]


def recorded(arguments, **options):
    """What edm.train records of a command line."""
    context = train.main.make_context("edm.train", list(arguments))
    found = {"network": NETWORK, "total_kimg": 30.0, "batch": 64, "batch_gpu": None, "lr": 2e-3, "lr_rampup_kimg": 1.5}
    found |= {"lr_decay": "none", "beta2": 0.999, "ema_halflife_kimg": 10.0, "ema_std": None, "sigma": None}
    found |= {"data": "pets.zip", "loss": {"class_name": "EDMLoss"}, "images": 1500, "parameters": 188_945}
    found |= {"options": context.params, "preset": context.meta.get("preset"), "arguments": list(arguments)}
    return {**found, "processes": 1, "environment": {"device": "cpu with 1 thread"}, **options}


def make_training(folder, ticks=30, arguments=ARGUMENTS, **options):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_options.json").write_text(json.dumps(recorded(arguments, **options)))
    figures = {"Timing/img_per_sec": 500.0, "Resources/gpu_mem_GB": 0.0, "Resources/cpu_mem_GB": 0.4}
    lines = [{"Progress/kimg": k + 1.0, "Loss/loss": 1 / (k + 1), "Rate/lr": 2e-3, **figures} for k in range(ticks)]
    write_lines(folder / "stats.jsonl", lines)
    write_lines(folder / "metric-fid5k.jsonl", [{"kimg": k, "value": 90.0 - k} for k in (10.0, 20.0) if k <= ticks])
    for k in (10, 20):
        PIL.Image.new("L", (64, 64), 10 * k).save(folder / f"fakes_{k:06d}.png")
    return folder


def commands_on(path):
    """{label: words} of the commands on a page."""
    found = re.findall(r'<pre [^>]*aria-label="([^"]*)"><code>(.*?)</code>', path.read_text(encoding="utf-8"))
    return {name: shlex.split(html.unescape(text)) for name, text in found}


def test_it_shows_the_training(tmp_path):
    run = make_training(tmp_path / "run", ticks=21)
    page = Page(write_page(run, is_running=True))
    assert "pets.zip, training of a teacher" in page.text
    assert "running 21 kimg of 30 (70%) · 500 img/s, about 18s left · loss 0.04762 · fid5k 70" in page.text
    captions = [attributes["data-label"] for _, attributes in page.elements if "data-label" in attributes]
    assert captions == ["10 kimg, loss 0.1, fid5k 80", "20 kimg, loss 0.05, fid5k 70"]
    assert [image["alt"] for image in images_of(page)][-1] == "Images of the network after 20 kimg, of equal seeds"
    charts = {chart["name"]: chart for chart in page.data["charts"]}
    assert list(charts) == ["metric-fid5k", "loss", "rate", "speed", "memory"]
    assert charts["loss"]["values"][0][:3] == [1.0, 0.5, 0.33333]
    assert charts["memory"]["labels"] == ["CPU"]
    PIL.Image.new("L", (64, 64)).save(run / "reals.png")
    assert [image["alt"] for image in images_of(Page(write_page(run)))][-1] == "Images of the data set"


def test_facts_and_their_absence(tmp_path):
    found = dict(facts(read_run(make_training(tmp_path / "run", ticks=15))))
    assert found == {
        "Network": "EDMPrecond, SongUNet, 189k parameters",
        "Layers": "16 channels times 1,2, attention at 4, dropout 0",
        "Data": "pets.zip, 1500 images, 3 x 8 x 8, 10 classes",
        "Passes": "10 of 20",
        "Loss": "EDMLoss, augmentation with probability 0.12",
        "Optimizer": "Adam, lr 0.002 after a warm-up of 1.5 kimg, no decay, beta2 0.999",
        "Average": "half-life 10 kimg",
        "Batch": "64 images",
        "Device": "cpu with 1 thread",
        "Length": "30 kimg (469 updates)",
    }
    run = tmp_path / "older"  # of a version that recorded less
    run.mkdir()
    (run / "training_options.json").write_text(json.dumps({"network": {"class_name": "Precond"}, "ema_std": 0.1}))
    record = read_run(run)
    assert facts(record) == [("Network", "Precond"), ("Average", "power function of width 0.1")]
    assert changed_options(record) == []
    assert continuing(record) == (
        f"The command that started the run goes on with it, with --resume={run} added.",
        None,
    )
    assert "training of a teacher" in Page(write_page(run)).text


def test_the_options_that_differ(tmp_path):
    record = read_run(make_training(tmp_path / "run"))
    rows = [("--cond", "yes", "no"), ("--cbase", "16", "by --arch"), ("--duration", "0.03", "200")]
    assert changed_options(record) == [*rows, ("--lr", "0.002", "0.001")]
    arguments = ["--data=x", "--outdir=x", "--preset=edm2-small", "--batch=32", "--lr=0.01"]
    record = read_run(make_training(tmp_path / "preset", arguments=arguments))
    found = {name: values for name, *values in changed_options(record)}
    assert found["--batch"] == ["32", "512", "64"]
    assert found["--lr"] == ["0.01", "0.001", "0.01"]
    assert [name for name, (own, _, preset) in found.items() if own != preset] == ["--batch"]
    assert len(found) > 8
    assert "--preset=edm2-small" in Page(write_page(tmp_path / "preset")).text


def test_the_command_that_continues(tmp_path):
    arguments = [*ARGUMENTS, "--resume", "old", "--desc=it's"]
    record = read_run(make_training(tmp_path / "a run", ticks=3, arguments=arguments, processes=2), is_running=False)
    words = shlex.split(continuing(record)[1])
    assert words[:5] == ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "edm.train"]
    given = train.main.make_context("edm.train", words[5:]).params
    assert given == record.options["options"] | {"resume": f"{tmp_path}/a run"}
    for decay, override in (("none", False), ("sqrt", False), ("cosine", True)):
        record = read_run(make_training(tmp_path / decay, lr_decay=decay))
        given = train.main.make_context("edm.train", shlex.split(continuing(record)[1])[3:]).params
        assert (given["duration"], given["override"]) == (0.06, override)


@pytest.mark.parametrize(
    ("more", "distils", "measures"),
    [
        ([], {"metrics": "none", "data_stat": None}, {"ref": None, "data": "pets.zip", "metrics": "fid5k"}),
        (
            ["--data_stat=it's.npz", "--detector=d", "--metrics=fid2k"],
            {"metrics": None, "data_stat": "it's.npz", "detector": "d"},
            {"ref": "it's.npz", "data": None, "detector": "d", "metrics": "fid2k"},
        ),
        (["--metrics=none"], {"metrics": "none"}, {"data": "pets.zip", "metrics": "fid5k"}),
    ],
)
def test_the_commands_that_use_the_teacher(tmp_path, more, distils, measures):
    run = make_training(tmp_path / "a run", arguments=[*ARGUMENTS, *more])
    found = commands_on(write_page(run))
    assert list(found) == ["Command that continues the training", "Distil", "Measure FID", "Make images"]
    given = sid_train.main.make_context("sid_train", found["Distil"][2:]).params
    assert (given["edm_model"], given["outdir"]) == (str(run), "runs-sid")
    assert {name: given[name] for name in distils} == distils
    given = fid.main.commands["eval"].make_context("eval", found["Measure FID"][3:]).params
    assert given["network"] == str(run)
    assert {name: given[name] for name in measures} == measures
    given = generate.main.make_context("generate", found["Make images"][3:]).params
    assert (given["network"], given["steps"]) == (str(run), 18)


@pytest.mark.skipif(not browser.IS_HERE, reason="needs Chromium and chromedriver")
def test_pages_fit_a_narrow_screen(tmp_path):
    (tmp_path / "runs").mkdir()
    training = make_training(tmp_path / "runs" / "training")
    distillation = make_training(tmp_path / "runs" / ("d" * 250), network=None, edm_model="teacher.safetensors")
    for name in ("reals.png", "nearest.png"):
        for run in (training, distillation):
            PIL.Image.new("RGB", (1024, 512)).save(run / name)
    (tmp_path / "profile").mkdir()
    with browser.browser(tmp_path / "profile") as window:
        size = {"width": 360, "height": 8000, "deviceScaleFactor": 1, "mobile": True}  # high enough for all charts
        window.command("Emulation.setDeviceMetricsOverride", size)
        for run, curves in ((training, 5), (distillation, 3)):
            window.open(write_page(run).as_uri())
            window.wait(f"document.querySelectorAll('.u-wrap').length === {curves}")
            assert window.run("return document.documentElement.scrollWidth") == 360
        with browser.running(make_server(tmp_path / "runs", 0)) as address:
            window.open(address)
            window.wait("document.querySelectorAll('.u-wrap').length >= 3")
            assert window.run("return document.documentElement.scrollWidth") == 360


def test_a_teacher_of_one_noise_level_makes_no_samples(tmp_path):
    page = write_page(make_training(tmp_path / "run", sigma=2.5))
    assert list(commands_on(page)) == ["Command that continues the training", "Distil"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("a/pets.zip", "pets.zip"),
        ("a/data.zip", "a/data.zip"),
        ("data.zip", "data.zip"),
        ("/", "/"),
        (3, "Unknown data"),
    ],
)
def test_the_name_of_the_data(tmp_path, data, name):
    assert data_name(read_run(make_training(tmp_path / "run", data=data))) == name


@pytest.mark.parametrize(
    ("size", "columns", "shown"),
    [
        ((512, 512), TRAINING_COLUMNS, (512, 512)),
        ((2048, 2048), TRAINING_COLUMNS, (1024, 1024)),  # 8 x 8 images of 256 pixels: 4 x 4
        ((4096, 4096), TRAINING_COLUMNS, (2048, 2048)),  # of 512 pixels: 4 x 4, which are made smaller afterwards
        ((2048, 512), TRAINING_COLUMNS, (1024, 256)),  # a small data set
        ((4096, 2048), 16, (1024, 512)),  # of a distillation
    ],
)
def test_large_pictures_are_cut_between_images(size, columns, shown):
    assert first_columns(PIL.Image.new("L", size), columns).size == shown


def test_the_report_writes_the_page_and_the_video(tmp_path):
    run, video = make_training(tmp_path / "run"), tmp_path / "new.png"
    result = CliRunner().invoke(report.main, [str(run), f"--video={video}"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [f"Page:      {run}/index.html", f"Video:     {video}  (2 pictures)"]
    with PIL.Image.open(video) as animation:
        assert animation.n_frames == 2


def test_trainings_are_served_with_distillations(tmp_path):
    make_training(tmp_path / "teacher")
    options = {"edm_model": "teacher", "total_kimg": 2.0}
    (tmp_path / "generator").mkdir()
    (tmp_path / "generator" / "training_options.json").write_text(json.dumps(options))
    write_lines(tmp_path / "generator" / "stats.jsonl", [{"Progress/kimg": 2.0, "Timing/img_per_sec": 9.0}])
    before = sorted(os.listdir(tmp_path / "teacher"))
    with browser.running(make_server(tmp_path, 0)) as address:
        texts = {
            place: urllib.request.urlopen(address + place).read().decode() for place in ("runs.json", "run/teacher")
        }
    generator, teacher = json.loads(texts["runs.json"])
    assert (generator["what"], teacher["what"]) == ("teacher, distilled", "training on pets.zip")
    assert (generator["loss"], teacher["loss"], teacher["fid"]) == (None, pytest.approx(1 / 30), 70)
    assert (teacher["finding"], teacher["state"]) == ("", "finished")
    assert set(teacher["charts"]) == {"metric-fid5k", "loss", "speed"}
    assert set(generator["charts"]) == {"speed"}
    assert "pets.zip, training of a teacher" in texts["run/teacher"]
    assert sorted(os.listdir(tmp_path / "teacher")) == before
