"""The page of a run: what it shows, that it is self-contained and small, and that no run folder breaks or enters it."""

import base64
import hashlib
import http.client
import json
import os
import random
import re
import shlex
import threading
import time

import pytest
import torch
from browser import IS_HERE, browser
from pages import HOSTILE, Page, images_of, write_lines
from PIL import Image

from edm import training_report
from sid import inputs, trials
from sid.config import DistillationConfig
from sid.options import parse
from sid.report import commands, embedded, pictures, run_record, sections, serve
from sid.report.curves import MAX_VALUES, charts, thinned
from sid.report.page import PAGE_FILE, RunPage, write_page
from sid.report.serve import make_server


def make_run(folder, ticks=30, total=30.0, **options):
    folder.mkdir(exist_ok=True)
    config = DistillationConfig(total_kimg=total)
    recorded = {**config.options(), "edm_model": "runs/my-teacher/network-snapshot-000100.safetensors", **options}
    (folder / "training_options.json").write_text(json.dumps(recorded))
    figures = {"Loss/fake_score": 0.6, "Health/divergence_sigma0.1-2": 0.3, "Timing/img_per_sec": 50.0}
    figures |= {"Resources/gpu_mem_GB": 0.0, "Resources/cpu_mem_GB": 2.0}
    lines = [{"Progress/kimg": k + 1.0, "Health/divergence": 1 / (k + 1), **figures} for k in range(ticks)]
    write_lines(folder / "stats.jsonl", lines)
    write_lines(folder / "teacher-distance.jsonl", [{"kimg": k, "value": 0.1 / (k + 1)} for k in (0.0, 10.24, 20.0)])
    write_lines(folder / "metric-fid5k.jsonl", [{"kimg": k, "value": 90.0 - k} for k in (0.0, 10.24, 20.0)])
    for shade, name in enumerate(("init", "000010", "000020")):
        Image.new("L", (64, 32), 40 * shade).save(folder / f"fakes_{name}.png")
    return folder


def test_it_shows_the_run(tmp_path):
    run = make_run(tmp_path / "run", teacher_fid={"value": 9.5, "evaluations": 35})
    page = Page(write_page(run))
    assert "my-teacher, distilled" in page.text
    assert "finished 30 kimg of 30 (100%)" in page.text
    assert "fid5k: 70 at 20 kimg, the best so far; the teacher has 9.5" in page.text
    assert "far-from-teacher" in page.text  # the doctor's word: 70 is above twice 9.5
    captions = [attributes["data-label"] for _, attributes in page.elements if "data-label" in attributes]
    assert captions[1:] == ["10 kimg, distance 0.00890, fid5k 79.8".replace("0890", "089"), captions[2]]
    assert [image["alt"] for image in images_of(page)][-1] == "Images of the generator after 20 kimg, of equal seeds"
    found = {chart["name"]: chart for chart in page.data["charts"]}
    assert list(found) == ["metric-fid5k", "distance", "divergence", "fake-score", "speed", "memory"]
    assert found["metric-fid5k"]["goal"] == {"label": "teacher", "value": 9.5}
    assert found["metric-fid5k"]["values"] == [[90.0, 79.76, 70.0]]
    assert found["divergence"]["labels"] == ["all noise levels", "σ 0.1 to 2"]
    assert found["divergence"]["log"]
    assert found["memory"]["labels"] == ["CPU"]
    assert [chart["name"] for chart in page.data["charts"] if chart["zero"]] == ["speed", "memory"]


def test_it_shows_which_kinds_of_images_are_missing(tmp_path):
    run = make_run(tmp_path / "run")
    Image.new("RGB", (64, 32)).save(run / "clusters.png")
    counts = {"teacher": [30, 100, 126], "generator": [60, 2, 194]}
    first = {"kimg": 0.0, "value": 0.1, "lost_share": 0.0}
    write_lines(run / "teacher-distance.jsonl", [first, {"kimg": 20.0, "value": 0.01, "lost_share": 0.39}])
    assert "Kinds of images" not in Page(write_page(run)).text  # as earlier versions recorded it
    last = {"kimg": 20.0, "value": 0.01, "lost_share": 0.39, "clusters": counts}
    write_lines(run / "teacher-distance.jsonl", [first, last])
    page = Page(write_page(run))
    assert page.text.index("139.1%0.8%lost") < page.text.index("011.7%23.4%") < page.text.index("249.2%75.8%")
    assert "lost-cluster Cluster 1 of the teacher's samples is lost" in page.text
    assert [image["alt"] for image in images_of(page)][-1].endswith("in three clusters")
    (chart,) = [chart for chart in page.data["charts"] if chart["name"] == "lost"]
    assert chart["values"] == [[0.0, 0.39]]
    for wrong in (HOSTILE, {"teacher": [HOSTILE], "generator": [1]}, {"teacher": [1] * 99, "generator": [1] * 99}):
        write_lines(run / "teacher-distance.jsonl", [first, {**last, "clusters": wrong}])
        assert "Kinds of images" not in Page(write_page(run)).text


def test_images_of_prompts_have_their_prompts(tmp_path):
    run = make_run(tmp_path / "run")
    Image.new("RGB", (64, 32)).save(run / "prompts.png")
    assert "of these prompts" not in Page(write_page(run)).text  # nobody knows which
    (run / "prompts.json").write_text(json.dumps({"prompts": ["a red\x1b[1m cat", HOSTILE, 3, "x" * 10_000]}))
    page = Page(write_page(run))
    tags = [tag for tag, _ in page.elements]
    assert tags[tags.index("ol") :].count("li") == 3
    assert HOSTILE in page.text
    assert "\x1b" not in page.text
    assert "x" * 501 not in page.text
    assert [tag for tag, _ in page.elements].count("script") == 4
    for wrong in (b"[]", b'{"prompts": 3}', b"\xff", b'{"prompts": {"a": 1}}'):
        (run / "prompts.json").write_bytes(wrong)
        assert "of these prompts" not in Page(write_page(run)).text


def test_it_needs_no_network_and_runs_its_own_scripts_only(tmp_path):
    page = Page(write_page(make_run(tmp_path / "run")))
    places = [a[name] for _, a in page.elements for name in ("src", "href", "action", "srcset") if name in a]
    anchors = {f"#{a['id']}" for _, a in page.elements if "id" in a}
    assert {"#findings", "#curves"} < anchors & set(places)  # sections that the page links to
    assert all(place.startswith("data:") or place in anchors for place in places)
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    for tag in ("script", "style"):  # what the browser computes of each element
        texts = [data for name, attributes, data in page.texts if name == tag and not attributes]
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert rules[f"{tag}-src"].split() == [f"'sha256-{digest}'" for digest in digests]
        assert not any("url(" in text or "@import" in text for text in texts if tag == "style")


DISTILLATION = {"edm_model": HOSTILE, "environment": {HOSTILE: HOSTILE}, "desc": HOSTILE, "steps": HOSTILE}
DISTILLATION |= {"arguments": [HOSTILE], "batch": [HOSTILE], "init_sigma": float("nan"), "objective": HOSTILE}
TRAINING = {"network": {"class_name": HOSTILE, "img_resolution": float("nan"), "label_dim": [HOSTILE]}}
TRAINING |= {"data": HOSTILE, "loss": {"class_name": {HOSTILE: HOSTILE}}, "images": -1, "parameters": float("inf")}
TRAINING |= {"options": {"lr": HOSTILE, "outdir": HOSTILE, "metrics": [HOSTILE], "cres": {HOSTILE: 1}, HOSTILE: 1}}
TRAINING |= {"preset": [HOSTILE], "arguments": [HOSTILE, "--resume"], "processes": 10**400, "environment": [HOSTILE]}
TRAINING |= {"optimizer": HOSTILE, "lr_decay": [HOSTILE], "batch": 0.0, "total_kimg": 1e300, "ema_std": HOSTILE}


def nested(depth):
    """Options that hold lists in lists."""
    value = b"[" * depth + b"]" * depth
    return b'{"network": {"model_channels": %b}, "options": {"lr": %b}, "environment": {"x": %b}}' % ((value,) * 3)


@pytest.mark.parametrize("options", [DISTILLATION, TRAINING], ids=["distillation", "training"])
def test_nothing_in_a_run_folder_enters_the_page_or_breaks_it(tmp_path, options):
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>", **options)
    random.seed(0)
    odd = [float("nan"), float("inf"), 1e300, HOSTILE, None, [], 10**400, -1, True]
    names = ["Progress/kimg", "Health/divergence", "Health/worst_class", "Health/worst_class_divergence", HOSTILE]
    names += ["Health/divergence_sigma1-2", f"Health/divergence_sigma{HOSTILE}", "Timing/sec_per_tick"]
    names += ["Loss/loss", "Rate/lr"]
    lines = [{"Progress/kimg": i, random.choice(names): random.choice(odd)} for i in range(200)]
    for name in ("stats.jsonl", "teacher-distance.jsonl", "metric-fid5k.jsonl", "metric-<b>.jsonl"):
        write_lines(run / name, [*lines, *({"kimg": i, "value": value} for i, value in enumerate(odd))])
        with open(run / name, "ab") as file:
            file.write(b"\xff\x00\n[1]\n" + b"[" * 5000 + b'\n{"Progress/kimg": 3')
    (run / "trials").mkdir()
    (run / "trials" / "results.json").write_text(json.dumps({HOSTILE: {"lr": HOSTILE, "distance": HOSTILE}, "b": 3}))
    (run / "fakes_000021.png").write_text(HOSTILE)
    (run / "fakes_000022.png").write_bytes((run / "fakes_init.png").read_bytes()[:50])
    (run / "fakes_000023.png").mkdir()
    Image.new("L", (64, 32)).save(tmp_path / "secret.png")
    for name, target in (("000024", "../secret.png"), ("000025", "fakes_000025.png"), ("000026", "/dev/zero")):
        os.symlink(target, run / f"fakes_{name}.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(run / "fakes_000027.png")
    page = Page(write_page(run))
    assert [tag for tag, _ in page.elements].count("script") == 4  # data, uPlot, curves, page
    assert len(images_of(page)) == 3
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert HOSTILE in page.text  # shown as it is
    for name in ("training_options.json", "stats.jsonl", "teacher-distance.jsonl"):
        for content in (b"", b"[" * 5000, b"\xff\xfe", b"[1]\n", b'{"network": {}}', *map(nested, range(900, 1000, 4))):
            (run / name).write_bytes(content)
            Page(write_page(run))
    Page(write_page(tmp_path))  # not a run at all


def test_thinned_curves_keep_ends_and_extremes():
    kimg = 10_000
    low = [float(i % 97) for i in range(kimg)]
    low[4321], low[777] = -5.0, None
    high = [None if i % 2 else 1.0 for i in range(kimg)]
    high[6000] = 1e6
    keep = thinned([low, high], kimg)
    assert keep == sorted(set(keep))
    assert len(keep) * 3 <= MAX_VALUES + 6
    assert {0, 4321, 6000, kimg - 1} <= set(keep)
    assert thinned([low[:100]], 100) == list(range(100))


@pytest.mark.skipif(not IS_HERE, reason="needs Chromium and chromedriver")
@pytest.mark.parametrize("way", ["scrolled", "printed"])
def test_charts_are_drawn_when_they_come_near_the_screen(tmp_path, way):
    address = write_page(make_run(tmp_path / "run")).as_uri()
    drawn = "return [...document.querySelectorAll('.plot')].map((place) => place.querySelector('canvas') !== null)"
    with browser(tmp_path / "profile") as window:
        size = {"width": 360, "height": 300, "deviceScaleFactor": 1, "mobile": False}
        window.command("Emulation.setDeviceMetricsOverride", size)
        window.open(address)
        assert window.run(drawn) == [False] * 6  # below the pictures
        if way == "printed":
            window.command("Page.printToPDF", {})
        else:
            window.run("document.getElementById('chart-divergence').scrollIntoView()")
            window.wait("document.querySelector('#chart-divergence canvas') !== null")
            assert not window.run(drawn)[-1]
            window.run("document.getElementById('chart-memory').scrollIntoView()")
        window.wait(f"(() => {{ {drawn} }})().every(Boolean)")


def test_long_runs_have_small_pages(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", ticks=10_000)
    monkeypatch.setattr(embedded, "FRAMES_BYTES", 33_000)
    noise = Image.frombytes("L", (128, 64), random.Random(0).randbytes(128 * 64))  # 8 kB in any exact format
    for k in range(30, 130):
        noise.save(run / f"fakes_{k:06d}.png")
    cache = embedded.PictureCache(run)
    frames = cache.frames()
    assert frames[0].kimg == 0
    assert frames[-1].kimg == 129
    assert 16 <= len(frames) <= embedded.MAX_FRAMES + 1
    assert sum(len(frame.picture.uri) for frame in frames) < 33_000 * 1.4
    monkeypatch.setattr(embedded, "_read", None)  # nothing is read twice
    assert cache.frames() == frames
    size = write_page(run, pictures=cache).stat().st_size
    shown = charts(run_record.read_run(run))
    assert size < 300_000
    assert sum(len(chart.plain()["kimg"]) for chart in shown) < 4 * MAX_VALUES


def test_the_command_continues_the_run_and_the_options_differ_from_the_recipe(tmp_path):
    arguments = ["--recipe=demo", "--alpha", "1", "--resume", "old", "--desc=it's"]
    config, options = parse(arguments)
    recorded = {**config.options(), **options.record(), "recipe": "demo", "arguments": arguments, "processes": 2}
    record = run_record.read_run(make_run(tmp_path / "a run", ticks=3, **recorded), is_running=False)
    assert record.state == "stopped"
    words = shlex.split(commands.continuing(record)[1])
    assert words[:5] == ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "sid_train"]
    again, now = parse(words[5:])
    assert again == config
    assert (now.resume, now.desc) == (f"{tmp_path}/a run", "it's")
    rows = {name: values for name, *values in commands.changed_options(record.options)}
    assert rows["--alpha"] == ["1", "1.2", "1.2"]
    assert rows["--lr"] == ["0.0004", "1e-05", "0.0004"]
    assert rows["--duration"] == ["0.02", "500", "0.02"]
    assert [name for name, (own, _, recipe) in rows.items() if own != recipe] == ["--alpha", "--desc"]
    longer = run_record.read_run(make_run(tmp_path / "a run", ticks=20, **recorded))
    assert longer.state == "finished"
    again, now = parse(shlex.split(commands.continuing(longer)[1])[5:])
    assert (again.total_kimg, now.override) == (40, True)  # its learning rate decays over the length


def test_the_length_is_the_command_lines_with_the_trials_that_were_dropped():
    found = {**parse(["--recipe=auto", "--duration=0.012"])[0].options(), "total_kimg": 10.816, "dropped_kimg": 1.184}
    rows = {name: values for name, *values in commands.changed_options({**found, "recipe": "auto"})}
    assert rows["--duration"] == ["0.012", "500", "0.02"]


def test_the_header_has_the_last_distances_and_the_time(tmp_path):
    run = make_run(tmp_path / "run")
    write_lines(run / "stats.jsonl", [{"Progress/kimg": 30.0, "Timing/total_sec": 3661.0}])
    write_lines(run / "teacher-distance.jsonl", [{"kimg": 20.0, "value": 0.01, "features": 1.25}])
    page = Page(write_page(run))
    measured = "distance 0.01 · features 1.25 (teacher 1) · fid5k 70"
    assert f"finished 30 kimg of 30 (100%) in 1h 01m 01s · {measured}" in page.text


@pytest.mark.parametrize(
    ("rows", "usual", "expected"),
    [
        ([("--lr", "2", "1")], None, "Option this run default --lr 2 1"),
        (
            [("--lr", "2", "1", "2"), ("--seed", "3", "0", "0")],
            "--recipe=x",
            "The first one differs from --recipe=x; the others are its own, which differ from the defaults."
            " Option this run default --recipe=x --seed 3 0 0 --lr 2 1 2",
        ),
        ([("--lr", "2", "1", "2")], "--recipe=x", "None differs from --recipe=x; the others are its own, which"),
        ([("--a", "2", "1", "1"), ("--b", "2", "1", "1")], "--recipe=x", "The first 2 differ from --recipe=x. Option"),
    ],
)
def test_options_of_ones_own_come_first(rows, usual, expected):
    text = " ".join(re.sub("<[^>]*>", " ", sections.options(rows, usual)).replace(" .", ".").split())
    assert text.startswith(f"Options that differ {expected}")


@pytest.mark.skipif(not IS_HERE, reason="needs Chromium and chromedriver")
def test_in_the_browser_axes_begin_at_zero_and_commands_are_copied(tmp_path):
    run = make_run(tmp_path / "a run", arguments=["--recipe=demo", "--desc=it's  wide"])
    command = commands.continuing(run_record.read_run(run, is_running=False))[1]
    with browser(tmp_path / "profile") as window:
        window.open(write_page(run).as_uri())
        window.run("for (const chart of document.querySelectorAll('.plot')) chart.scrollIntoView()")
        window.run("document.getElementById('continue').scrollIntoView()")
        window.wait("document.querySelector('#chart-memory canvas') !== null")
        low, high = window.run(
            "const y = plots.plots.get(document.getElementById('chart-memory')).plot.scales.y; return [y.min, y.max]"
        )
        assert low == 0
        assert 2 < high < 3  # GB
        window.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        window.run("document.querySelector('section[aria-labelledby=continue] button').click()")
        assert window.run("return window.copied") == command
        window.wait("document.querySelector('section[aria-labelledby=continue] button').textContent === 'Copied'")


@pytest.mark.skipif(not IS_HERE, reason="needs Chromium and chromedriver")
def test_runs_are_sorted_by_a_column(tmp_path, ask):
    (tmp_path / "runs").mkdir()
    for name, features in (("a", 3.0), ("b", None), ("c", 20.0)):
        run = make_run(tmp_path / "runs" / name)
        figures = {} if features is None else {"features": features}
        write_lines(run / "teacher-distance.jsonl", [{"kimg": 20.0, "value": 0.01, **figures}])
    names = "[...document.querySelectorAll('#table tbody th')].map((cell) => cell.textContent).join()"
    click = "[...document.querySelectorAll('#table button')].find((b) => b.textContent === 'features').click()"
    with browser(tmp_path / "profile") as window:
        window.open(ask.address)
        window.wait(f"{names} === 'a,b,c'")
        window.run(click)
        assert window.run(f"return {names}") == "a,c,b"
        window.run(click)
        assert window.run(f"return {names}") == "c,a,b"  # the run without the figure stays last
        assert window.run("return document.querySelector('[aria-sort]').textContent") == "features"


def test_a_run_keeps_its_page_up_to_date_whatever_happens(tmp_path, capsys):
    run = make_run(tmp_path / "run", ticks=10)

    def interrupted():
        with RunPage(run) as page:
            page.write()
            assert "running 10 kimg of 30 (33%) · 50 img/s, about 6m 40s left" in Page(run / PAGE_FILE).text
            (run / "training_options.json").unlink()
            page.write()
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        interrupted()
    assert "stopped 10 kimg" in Page(run / PAGE_FILE).text
    assert capsys.readouterr().out == ""
    (run / PAGE_FILE).unlink()
    (run / PAGE_FILE).mkdir()
    RunPage(run).write()
    assert "index.html" in capsys.readouterr().out
    assert not list(run.glob(".*"))


@pytest.fixture
def ask(tmp_path):
    """ask(place, method="GET", host=None) -> (status, content) of a server of all runs in the folder `runs`."""
    server = make_server(tmp_path / "runs", 0)
    port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})

    def call(place, method="GET", host=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(method, place, headers={"Host": host or f"127.0.0.1:{port}"})
        answer = connection.getresponse()
        found = answer.status, answer.read().decode()
        connection.close()
        return found

    thread.start()
    call.address = f"http://127.0.0.1:{port}/"
    yield call
    server.shutdown()
    thread.join()
    server.server_close()


def test_all_runs_of_a_folder_are_served_and_nothing_else(tmp_path, ask, monkeypatch):
    runs = tmp_path / "runs"
    runs.mkdir()
    make_run(runs / "one", teacher_fid={"value": 9.5})
    (runs / "deep").mkdir()
    make_run(runs / "deep" / "<b>", ticks=3)
    (tmp_path / "secret").write_text("secret")
    os.symlink(make_run(tmp_path / "elsewhere"), runs / "link")
    before = sorted(tmp_path.rglob("*"))
    status, text = ask("/runs.json")
    assert status == 200
    found = {run["name"]: run for run in json.loads(text)}
    assert list(found) == ["deep/<b>", "one"]
    assert found["one"]["kimg"] == 30
    assert found["one"]["charts"]["metric-fid5k"]["goal"]["value"] == 9.5
    with open(runs / "deep" / "<b>" / "stats.jsonl", "a") as file:
        file.write('{"Progress/kimg": 7.0}\n')
    assert [run["kimg"] for run in json.loads(ask("/runs.json")[1])] == [7, 30]  # live
    assert [run["state"] for run in json.loads(ask("/runs.json")[1])] == ["running", "finished"]
    with monkeypatch.context() as later:  # nothing has changed since, so nothing is read
        now = time.time()
        later.setattr(serve.time, "time", lambda: now + run_record.SILENT_SEC)
        later.setattr(serve, "read_run", None)
        assert [run["state"] for run in json.loads(ask("/runs.json")[1])] == ["stopped", "finished"]
    assert "my-teacher, distilled" in ask("/run/deep%2F%3Cb%3E")[1]
    assert "overview" not in ask("/run/one")[1]
    assert ask("/")[0] == 200
    for place in ("/run/../secret", "/run/%2e%2e%2fsecret", "/run/link", "/run/", "/run/.", "/secret", "/run/%00"):
        assert ask(place)[0] == 404, place
    assert ask("/", host="attacker.example")[0] == 403  # a name that resolves to this computer
    assert ask("/runs.json", "POST")[0] == 501
    assert ask("/runs.json", "HEAD") == (200, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_nearest_sample_is_found():
    torch.manual_seed(0)
    samples = torch.randint(256, (50, 3, 128, 128), dtype=torch.uint8)  # more than the pixels that are compared
    which = torch.tensor([7, 0, 49, 7])
    noise = torch.randint(-20, 21, (4, 3, 128, 128))
    images = (samples[which] + noise).clamp(0, 255).to(torch.uint8)
    assert torch.equal(pictures.nearest(images, samples), which)


def test_names_and_sizes_agree_with_modules_that_load_torch():
    assert f"{trials.TRIALS}/{trials.RESULTS_FILE}" == run_record.TRIAL_RESULTS
    assert embedded.GRID_COLUMNS == pictures.GRID_COLUMNS
    assert embedded.TRAINING_COLUMNS == training_report.PICTURE_COLUMNS
    assert commands.KEPT_TEACHER == inputs.TEACHER_FILE
