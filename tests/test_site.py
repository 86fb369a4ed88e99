"""The web page that makes pictures: what its folder holds, and, in Chromium, that they are the pictures of PyTorch."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import IS_HERE, ISOLATED, browser, served
from click.testing import CliRunner
from tiny import Spy, tiny_teacher

from dnnlib import UserError
from edm import onnx_file, site, zoo
from edm.sampler import generate_images
from edm.text_encoders import prompts_for
from edm.zoo.__main__ import main as zoo_command
from training.conditions import Prompts
from training.generator import Generator
from training.steps import Steps

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = '</script><img src=x onerror="document.title=1">'
SCRIPTS = ("page.js", "worker.js", "noise.js")


def generator(net, **metadata):
    net.eval().metadata = {"kind": "sid-generator", "init_sigma": 2.5, **metadata}
    return net


@pytest.fixture
def runtime(tmp_path):
    """A folder as `npm pack` makes it, with files that are no runtime."""
    folder = tmp_path / "package" / "dist"
    folder.mkdir(parents=True)
    for name, _ in site.RUNTIME.values():
        (folder / name).write_text(f"content of {name}")
    (tmp_path / "package" / "package.json").write_text('{"name": "onnxruntime-web", "version": "1.99.0"}')
    return tmp_path / "package"


@pytest.fixture
def no_export(monkeypatch):
    """The ONNX export, which takes seconds, writes b"model"."""
    monkeypatch.setattr(zoo, "save_network", lambda _net, path, **_metadata: path.write_bytes(b"model"))


@pytest.mark.usefixtures("no_export")
def test_what_the_folder_holds(tmp_path, runtime):
    (tmp_path / "names.txt").write_text(f"one\n{HOSTILE}\ndrei \N{SNOWMAN}\n")
    zoo_file = tmp_path / "00007-mine" / "network-snapshot-000001.safetensors"
    net = generator(tiny_teacher(3), step_levels=[2.5, 0.8], classes="1-2", licence="/home/me/licence")
    told = site.write(net, str(zoo_file), str(tmp_path / "a new"), str(runtime), str(tmp_path / "names.txt"))
    command, _, rest = told.partition("; ")
    assert command == f"to see the page: python -m http.server --directory '{tmp_path}/a new'"
    assert rest == "it holds onnxruntime-web 1.99.0 and needs no other server"
    description = json.loads((tmp_path / "a new" / "site.json").read_text())
    files = description.pop("runtime")["files"]
    assert description == {
        "title": "00007-mine",
        "shape": [1, 8, 8],
        "resolution": 8,
        "steps": 2,
        "noise_steps": 1,
        "parameters": sum(p.numel() for p in net.parameters()),
        "label_dim": 3,
        "classes": [1, 2],
        "class_names": ["one", HOSTILE, "drei \N{SNOWMAN}"],
        "licence": "licence",
        "model_bytes": len(b"model"),
    }
    for record in files.values():
        content = (tmp_path / "a new" / record["url"]).read_bytes()
        assert content == (runtime / "dist" / record["url"].removeprefix("runtime/")).read_bytes()
        assert record["integrity"] == "sha384-" + base64.b64encode(hashlib.sha384(content).digest()).decode()
    found = {str(path.relative_to(tmp_path / "a new")) for path in (tmp_path / "a new").rglob("*") if path.is_file()}
    assert found == {*site.PAGE_FILES, "site.json", "network.onnx", f"runtime/{site.RUNTIME_LICENCE}"} | {
        record["url"] for record in files.values()
    }
    for name in site.PAGE_FILES:  # nothing of a network is in them
        assert (tmp_path / "a new" / name).read_bytes() == (site.STATIC / name).read_bytes()


@pytest.mark.usefixtures("no_export")
def test_without_a_folder_the_runtime_is_a_pinned_version(tmp_path):
    told = site.write(generator(Spy()), "owner/name", str(tmp_path / "new"))
    assert "cdn.jsdelivr.net" in told
    description = json.loads((tmp_path / "new" / "site.json").read_text())
    assert (description["title"], description["classes"]) == ("owner/name", [])
    for record in description["runtime"]["files"].values():
        assert record["url"].startswith(f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{site.RUNTIME_VERSION}/dist/ort")
        assert len(base64.b64decode(record["integrity"].removeprefix("sha384-"))) == 48
    assert not (tmp_path / "new" / "runtime").exists()


def test_documents_name_the_pinned_version():
    for name in ("docs/browser.md", ".github/workflows/tests.yml"):
        text = (ROOT / name).read_text()
        assert set(re.findall(r"onnxruntime-web@([\d.]+\d)", text)) == {site.RUNTIME_VERSION}


def test_the_page_runs_its_own_scripts_only():
    text = (site.STATIC / "index.html").read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["worker-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert re.findall(r"<script.*", text) == ['<script type="module" src="page.js"></script>']
    assert "<style" not in text
    assert not re.search(r"\s(style|on\w+)=", text)
    for name in SCRIPTS:  # no text becomes HTML or code
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", script(name))


def script(name):
    return (site.STATIC / name).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": "absent.txt"}, "--class-names=absent.txt: can't be read (No such file or directory)"),
        ({"class_names": "two.txt"}, "--class-names=two.txt: has 2 lines, and the network 3 classes; one each"),
        ({"class_names": "latin.txt"}, "--class-names=latin.txt: is no text in UTF-8; save it as such"),
        ({"runtime": "empty"}, "--runtime=empty: has no ort.wasm.min.mjs: name the package's folder; npm pack"),
        ({"destination": "full"}, "full exists already; remove it"),
        ({"destination": "nowhere/new"}, "nowhere/new: No such file or directory: choose another place"),
    ],
)
@pytest.mark.usefixtures("no_export")
def test_what_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\na\nb\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refused:
        site.write(generator(tiny_teacher(3)), "net", **{"destination": "new", **options})
    assert refused.value.message.startswith(message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_export")
def test_only_generators_of_pictures_have_a_page(tmp_path):
    teacher, four = Spy(), generator(Spy())
    teacher.metadata, four.img_channels = {}, 4
    for net, reason in ((teacher, "distil it first"), (four, "makes 4 channels")):
        with pytest.raises(UserError, match=f"^--to=site: .*{reason}"):
            site.write(net, "net", str(tmp_path / "new"))
    with pytest.raises(UserError, match="--class-names=x: this network has no classes"):
        site.write(generator(Spy()), "net", str(tmp_path / "new"), class_names="x")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def of_prompts(monkeypatch):
    """A generator of prompts, whose text encoders make five random numbers of each."""
    torch.manual_seed(0)
    net, rows = generator(Spy()), torch.randn(10, 5).numpy()
    net.prompt_dim = 5
    monkeypatch.setattr(site, "prompts_for", lambda _, texts: Prompts(rows[: len(texts)], torch.zeros(5), texts))
    monkeypatch.setattr(onnx_file, "halve", lambda _path: None)
    return net, rows


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("half", [False, True])
def test_encoded_prompts_are_in_one_file(tmp_path, of_prompts, half):
    (net, rows), texts = of_prompts, ["a dog", HOSTILE, "ein Haus \N{SNOWMAN}"]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    told = site.write(net, "net", str(tmp_path / "new"), half=half, prompts=str(tmp_path / "texts.txt"))
    assert f"; its 3 prompts take {'3' if half else '6'}e-05 MB; it loads" in told
    description = json.loads((tmp_path / "new" / "site.json").read_text())
    bits = 16 if half else 32
    assert description["prompts"] == {"texts": texts, "dim": 5, "bits": bits, "bytes": 3 * 5 * bits // 8}
    assert description["classes"] == []
    found = np.fromfile(tmp_path / "new" / "prompts.bin", f"<f{bits // 8}").reshape(3, 5)
    assert (found == rows[:3].astype(found.dtype)).all()


@pytest.mark.usefixtures("no_export")
def test_which_prompts_are_refused(tmp_path, monkeypatch, of_prompts):
    (net, _), path = of_prompts, tmp_path / "texts.txt"
    path.write_text("\n".join("abcdefg"))
    before = sorted(tmp_path.rglob("*"))

    def refused(net=net, **options):
        with pytest.raises(UserError) as error:
            site.write(net, "net", str(tmp_path / "new"), **options)
        assert sorted(tmp_path.rglob("*")) == before
        return error.value.message

    assert "makes images of prompts: give --prompts=FILE" in refused()
    assert "--prompts: this network makes no images of prompts" in refused(generator(Spy()), prompts=str(path))
    monkeypatch.setattr(site, "MAX_PROMPT_BYTES", 60)
    assert refused(prompts=str(path)).endswith("keep 3 of them, or twice as many with --half")
    assert refused(prompts=str(path), half=True).endswith("keep 6 of them")
    monkeypatch.setattr(site, "MAX_PROMPTS", 2)
    assert refused(prompts=str(path)).endswith("at most 2 and 0 MB: keep 2 of them")


@pytest.mark.usefixtures("no_export")
def test_prompts_beyond_16_bits_are_refused(tmp_path, of_prompts):
    (net, rows), path = of_prompts, tmp_path / "texts.txt"
    path.write_text("a\nb\n")
    rows[1, 3] = -7e4
    with pytest.raises(UserError, match=r"^--half: an encoded prompt holds a number beyond 65504; leave it out$"):
        site.write(net, "net", str(tmp_path / "new"), half=True, prompts=str(path))
    assert not (tmp_path / "new").exists()


def test_its_options_belong_to_it():
    for option in ("--runtime=x", "--class-names=x", "--prompts=x", "--half"):
        done = CliRunner().invoke(zoo_command, ["convert", "net", "new", option])
        assert done.exit_code == 2
        assert "are for --to=site" in done.output


# --- against PyTorch


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_a_seed_draws_what_pytorch_draws(tmp_path):
    (tmp_path / "noise.mjs").write_text(script("noise.js"))
    cases = [(0, 256), (7, 3072), (2**32 - 1, 27), (123456789, 1000)]
    (tmp_path / "run.mjs").write_text(
        f"""import {{ drawn }} from "./noise.mjs";
        const found = {json.dumps(cases)}.map(([seed, size]) => drawn(seed, size, 10, 2));
        console.log(JSON.stringify(found.map(({{ z, which, further }}) => [[...z], which, [...further]])));"""
    )
    done = subprocess.run(["node", tmp_path / "run.mjs"], capture_output=True, text=True, check=True)
    for (seed, size), (z, which, further) in zip(cases, json.loads(done.stdout)):
        draws = torch.Generator().manual_seed(seed)
        assert z == pytest.approx(torch.randn(size, generator=draws).tolist(), abs=4e-6)
        assert which == torch.randint(10, [1], generator=draws)
        expected = torch.cat([torch.randn(size, generator=draws) for _ in range(2)])
        assert further == pytest.approx(expected.tolist(), abs=4e-6)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_all_numbers_of_16_bits_are_read(tmp_path):
    (tmp_path / "noise.mjs").write_text(script("noise.js"))
    (tmp_path / "run.mjs").write_text(
        """import { fromHalf } from "./noise.mjs";
        console.log(JSON.stringify(Array.from({ length: 65536 }, (_, i) => fromHalf(i))));"""
    )
    done = subprocess.run(["node", tmp_path / "run.mjs"], capture_output=True, text=True, check=True)
    expected = np.arange(65536, dtype=np.uint16).view(np.float16).astype(float)
    finite = np.isfinite(expected)
    assert (np.array(json.loads(done.stdout))[finite] == expected[finite]).all()


needs_onnx = pytest.mark.skipif(not onnx_file.can_trace(), reason="a PyTorch that can't write ONNX")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not IS_HERE:
        pytest.skip("needs Chromium and chromedriver")
    with browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def real_runtime():
    folder = os.environ.get("ONNXRUNTIME_WEB")
    if not folder:
        pytest.skip("needs ONNXRUNTIME_WEB, the folder of the npm package onnxruntime-web")
    return folder


PIXELS = """return [...document.querySelectorAll(arguments[0])].map(canvas => {
    const { width, height } = canvas;
    return [height, width, [...canvas.getContext("2d").getImageData(0, 0, width, height).data]];
})"""


def pictures(window, selector):
    """uint8 [N, 3, H, W]"""
    found = [np.array(data, np.uint8).reshape(h, w, 4) for h, w, data in window.run(PIXELS, selector)]
    assert all((picture[..., 3] == 255).all() for picture in found)
    return np.stack(found)[..., :3].transpose(0, 3, 1, 2)


def assert_same(shown, images):
    images = np.broadcast_to(images, shown.shape)
    assert np.abs(shown.astype(int) - images).max() <= 1
    assert (shown == images).mean() > 0.95
    assert len(np.unique(images)) > 20


READY = "document.querySelector('#save-grid:enabled') && document.querySelector('#save-blend:enabled') && true"


def change(window, **values):
    """Sets the form's values by their ids, as a user does, and waits for the pictures."""
    for name, value in values.items():
        window.run(
            """const found = document.getElementById(arguments[0]);
            found.value = arguments[1];
            found.dispatchEvent(new Event("change", { bubbles: true }));""",
            name.replace("_", "-"),
            str(value),
        )
    window.wait(READY)


@pytest.mark.slow
@needs_onnx
def test_pictures_of_classes_and_steps_are_those_of_pytorch(tmp_path, chromium, real_runtime):
    """Two steps with fresh noise; threads; blends; a class whose name is HTML."""
    net = generator(tiny_teacher(3), step_levels=[2.5, 0.8])
    (tmp_path / "names.txt").write_text(f"one\n{HOSTILE}\nthree\n")
    site.write(net, HOSTILE, str(tmp_path / "site"), real_runtime, str(tmp_path / "names.txt"))
    with served(tmp_path / "site", ISOLATED) as address:
        chromium.open(address)
        chromium.wait(READY)
        change(chromium, seed=7, count=9)
        (drawn,) = generate_images(net, range(7, 16))
        assert_same(pictures(chromium, "#grid canvas"), drawn.numpy())
        told = chromium.run("return document.querySelector('#grid-time').textContent")
        threads = min(8, chromium.run("return navigator.hardwareConcurrency"))
        how = "one thread" if threads == 1 else f"{threads} threads"
        assert re.fullmatch(rf"9 pictures, \d[\d.]* ms each with {how}", told)

        change(chromium, **{"class": 1}, count=4, seed=2**32 - 2)  # after the last seed comes 0
        (second,) = generate_images(net, [2**32 - 2, 2**32 - 1, 0, 1], class_idx=1)
        assert_same(pictures(chromium, "#grid canvas"), second.numpy())
        assert chromium.run("return document.querySelector('#grid .name').textContent") == HOSTILE
        assert chromium.run("return document.querySelectorAll('img, main script').length") == 0
        assert HOSTILE.rpartition("/")[2] in chromium.run("return document.title")

        chromium.run("document.querySelectorAll('#grid button').forEach((b, i) => i < 2 || b.click())")
        chromium.wait(READY)
        chosen = (
            "return ['from-seed', 'from-class', 'to-seed', 'to-class'].map(id => document.getElementById(id).value)"
        )
        assert chromium.run(chosen) == ["0", "1", "1", "1"]

        change(chromium, from_seed=3, from_class=2, to_seed=4, to_class=0)
        assert_same(pictures(chromium, "#strip canvas"), blend(net, (3, 2), (4, 0), 17))
        chromium.run("place.value = 0; place.dispatchEvent(new Event('input'))")
        (start,) = generate_images(net, [3], class_idx=2)
        assert_same(pictures(chromium, "#shown"), start.numpy())


@pytest.mark.slow
@needs_onnx
@pytest.mark.usefixtures("own_cache")
def test_pictures_of_prompts_are_those_of_pytorch(tmp_path, chromium, real_runtime):
    """Stable Diffusion with two steps, its VAE and a prompt that is HTML; weights and prompts in 16 bits."""
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    import tiny_pipelines

    pipeline = tiny_pipelines.stable_diffusion()
    for part in (pipeline.unet, pipeline.vae):
        for parameter in part.parameters():
            parameter.data = parameter.data.half().float()
    pipeline.save_pretrained(tmp_path / "teacher")
    net = zoo.load_denoiser(tmp_path / "teacher")
    net.metadata |= {"kind": "sid-generator", "init_sigma": 2.5, "step_levels": [2.5, 0.8]}
    texts = ["a red apple", HOSTILE, "a cat in a hat"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    site.write(net, "net", str(tmp_path / "site"), real_runtime, half=True, prompts=str(tmp_path / "texts.txt"))

    def expected(seeds, numbers):
        rows = prompts_for(net, texts).all().half().float().numpy()
        images = []
        for seed, number in zip(seeds, numbers):
            net.prompts = Prompts(rows[[number]], torch.zeros(net.prompt_dim), [texts[number]])
            images += generate_images(net, [seed])
        return torch.cat(images).numpy()

    with served(tmp_path / "site") as address:
        chromium.open(address)
        chromium.wait(READY)
        change(chromium, seed=7, count=4)
        assert_same(pictures(chromium, "#grid canvas"), expected([7, 8, 9, 10], [1, 2, 0, 1]))
        names = "return [...document.querySelectorAll('#grid .name')].map(name => name.textContent)"
        assert chromium.run(names) == [texts[i] for i in (1, 2, 0, 1)]
        change(chromium, **{"class": "each"})
        assert_same(pictures(chromium, "#grid canvas"), expected([7, 8, 9, 10], [0, 1, 2, 0]))
        change(chromium, **{"class": 2})
        chosen = pictures(chromium, "#grid canvas")
        assert_same(chosen, expected([7, 8, 9, 10], [2] * 4))
        assert (chosen[2] != expected([9], [0])[0]).any()  # the prompt is seen
        change(chromium, from_seed=3, from_class=2, to_seed=4, to_class=0)
        assert_same(pictures(chromium, "#strip canvas")[[0, -1]], expected([3, 4], [2, 0]))
        labels = "return [...document.querySelectorAll('.of-classes .what')].map(what => what.textContent)"
        assert chromium.run(labels) == ["Prompt"] * 3
        assert "3 prompts" in chromium.run("return document.querySelector('#facts').textContent")
        assert chromium.run("return document.querySelectorAll('img, main script').length") == 0


def blend(net, start, end, count):
    """uint8 [count, C, H, W] on the arc from one (seed, class) to another; the noise of further steps moves, too."""
    shape, ends = [net.img_channels, net.img_resolution, net.img_resolution], []
    for seed, which in (start, end):
        draws = torch.Generator().manual_seed(seed)
        z = torch.randn(shape, generator=draws)
        torch.randint(net.label_dim, [1], generator=draws)
        ends.append((z, torch.randn(shape, generator=draws), torch.eye(net.label_dim)[which]))
    share = torch.linspace(0, 1, count).reshape(-1, 1, 1, 1)

    def on_arc(a, b):
        angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
        return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()

    (z, noise), labels = (
        (on_arc(ends[0][i], ends[1][i]) for i in (0, 1)),
        torch.lerp(*(e[2] for e in ends), share[:, 0, 0]),
    )
    with torch.no_grad():
        x = Generator(net, Steps.of(net)).sample(z, labels, lambda _: noise)
    return (x * 127.5 + 128).clip(0, 255).byte().numpy()


DEMO = ROOT / "docs" / "demo"


def test_the_page_in_docs_is_as_it_would_be_written_now():
    description = json.loads((DEMO / "site.json").read_text())
    assert {path.name for path in DEMO.iterdir()} == {*site.PAGE_FILES, "site.json", "network.onnx"}
    for name in site.PAGE_FILES:  # links, which web servers and MkDocs follow
        assert (DEMO / name).read_bytes() == (site.STATIC / name).read_bytes()
    assert description["model_bytes"] == (DEMO / "network.onnx").stat().st_size < 2.5e6
    assert description["runtime"] == site._runtime_record({}, site.RUNTIME_VERSION)
    names = (ROOT / "assets" / "fashion-mnist-16" / "classes.txt").read_text().split("\n")[:-1]
    assert description["class_names"] == names


@pytest.mark.slow
def test_the_page_in_docs_makes_the_pictures_of_its_network(tmp_path, chromium, real_runtime):
    """Its network by onnxruntime's own program, which is another than the browser's."""
    shutil.copytree(DEMO, tmp_path / "site")
    description = json.loads((tmp_path / "site" / "site.json").read_text())
    for record in description["runtime"]["files"].values():
        name = record["url"].rpartition("/")[2]
        shutil.copy(f"{real_runtime}/dist/{name}", tmp_path / "site")
        record["url"] = name  # with the published hash
    (tmp_path / "site" / "site.json").write_text(json.dumps(description))
    seeds = range(100, 116)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = torch.stack([torch.randn(description["shape"], generator=g) for g in draws])
    classes = torch.cat([torch.randint(10, [1], generator=g) for g in draws])
    session = pytest.importorskip("onnxruntime").InferenceSession(DEMO / "network.onnx")
    (images,) = session.run(None, {"z": z.numpy(), "class_labels": torch.eye(10)[classes].numpy()})
    with served(tmp_path / "site") as address:
        chromium.open(address)
        chromium.wait(READY)
        change(chromium, seed=100)
        assert_same(pictures(chromium, "#grid canvas"), images)
        shown = chromium.run("return [...document.querySelectorAll('#grid .name')].map(name => name.textContent)")
        assert shown == [description["class_names"][i] for i in classes]


@pytest.mark.slow
@needs_onnx
def test_the_runtime_of_another_server_is_taken_if_it_is_the_pinned_one(tmp_path, chromium, real_runtime, monkeypatch):
    """A network without classes, in colour; no threads."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, _ in site.RUNTIME.values():
        shutil.copy(f"{real_runtime}/dist/{name}", elsewhere)
    torch.manual_seed(0)
    net = generator(Spy())
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    with served(elsewhere, {"Access-Control-Allow-Origin": "*"}) as runtime, served(tmp_path / "site") as address:
        monkeypatch.setattr(site, "RUNTIME_ADDRESS", runtime)
        site.write(net, "net", str(tmp_path / "site"))
        chromium.open(address)
        chromium.wait(READY)
        (images,) = generate_images(net, range(16))
        assert_same(pictures(chromium, "#grid canvas"), images.numpy())
        assert chromium.run("return document.querySelector('#grid-time').textContent").endswith("with one thread")
        assert chromium.run("return document.querySelector('.of-classes').hidden")
        with open(elsewhere / site.RUNTIME["loader"][0], "a") as file:
            file.write("\n")
        chromium.open(address)
        chromium.wait("document.querySelector('#status.problem')?.checkVisibility()")
        told = chromium.run("return document.querySelector('#status').textContent")
        assert told.startswith(f"It doesn't work: {site.RUNTIME['loader'][0]} can't be loaded")
    chromium.open((tmp_path / "site" / "index.html").as_uri())
    chromium.wait("getComputedStyle(document.querySelector('#status')).visibility === 'visible'")
    assert "http.server" in chromium.run("return document.querySelector('#status').textContent")
