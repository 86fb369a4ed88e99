"""Uploading networks to the Hugging Face Hub and loading them from there, with a stand-in server for the Hub."""

import json
import re
import sys

import pytest
import torch
from click.testing import CliRunner
from hub_server import TOKEN, HubServer
from tiny import CPU, NoReport, Spy, tiny_config, tiny_teacher

from dnnlib import UserError
from edm import hub, model_card, zoo
from edm.zoo.__main__ import main as zoo_command
from sid import OneStepGenerator, __version__
from sid.citations import papers
from sid.config import DistillationConfig
from sid.inputs import Inputs
from sid.prepare import prepare
from sid.training_loop import training_loop

huggingface_hub = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how the library sends large files

NAME = "someone/digits"
FILES = {"README.md", "config.json", "images.png", "network.safetensors"}
SECRET = "s3cr3t"
FID = {"kimg": 0.04, "metric": "fid5k", "value": 12.345, "values": {"fid": 12.345}, "num_images": 5000}
FID |= {"seeds": [0, 4999], "detector": "digits", "detector_sha256": "d" * 64, "reference": "reference.npz"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a distilled generator, its picture, its FID, and options that name private places."""
    folder = tmp_path_factory.mktemp("home of Jane Doe") / "00000-digits"
    folder.mkdir()
    teacher = tiny_teacher()
    teacher.metadata = {"licence": "CC BY-NC-SA 4.0", "name": "someone/teacher"}
    training_loop(prepare(Inputs(teacher), tiny_config(guidance="long=2", total_kimg=0.016), CPU), folder, NoReport())
    snapshot = next(folder.glob("network-snapshot-*.safetensors"))
    (folder / snapshot.name.replace("network-snapshot-", "fakes_")).with_suffix(".png").write_bytes(b"a picture")
    for path in folder.glob("training-state-*"):
        path.unlink()
    record = {**FID, "network_sha256": zoo.network_hash(zoo.load_network(snapshot))}
    (folder / "metric-fid5k.jsonl").write_text(json.dumps(record) + "\n")
    options = {
        "edm_model": f"{folder}/teacher.pkl",
        "outdir": str(folder),
        "data": f"https://u:{SECRET}@nas.home/a.zip",
    }
    options |= {"arguments": [f"--outdir={folder}"], "data_stat": "C:\\Users\\Jane Doe\\ref.npz", "alpha": 1.2}
    (folder / "training_options.json").write_text(json.dumps(options))
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that is empty, and its library set to use it."""
    from huggingface_hub import constants

    server = HubServer()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # its protocol is too large to imitate; the library then uses plain addresses
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    yield server
    server.close()


def push(*options):
    return CliRunner().invoke(zoo_command, ["push", *map(str, options)])


def pushed(*options):
    result = push(*options)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*options):
    """The one line that a refused upload ends with."""
    result = push(*options)
    assert result.exit_code == 2, result.output
    *_, last = result.output.splitlines()
    assert last.startswith("Error: ")
    assert "Traceback" not in result.output
    return last


def test_a_run_goes_up_and_comes_back(run, server, monkeypatch):
    """Equal weights, metadata and images; again without internet, from the library's cache."""
    output = pushed(run, NAME, "--message=First")
    assert f"{server.url}/{NAME}: EDMPrecond, sha256 of the weights" in output
    assert "forbids commercial use; the model card says so" in output
    files = server.files(NAME)
    assert files.keys() == {*FILES, ".gitattributes"}
    assert (files["images.png"], len(server.repositories[NAME]), server.messages) == (b"a picture", 2, ["First"])

    before, after = OneStepGenerator.from_pretrained(run, CPU), OneStepGenerator.from_pretrained(NAME, CPU)
    assert zoo.network_hash(after.net) == zoo.network_hash(before.net)
    fid = {"metric": "fid5k", "evaluations_1": 12.345, "num_images": 5000, "seeds": [0, 4999], "detector": "digits"}
    fid |= {"detector_sha256": "d" * 64, "reference": "reference.npz"}
    assert after.net.metadata == {**before.net.metadata, "fid": fid}
    assert torch.equal(after(4, seed=3), before(4, seed=3))

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert zoo.network_hash(zoo.load_network(NAME)) == zoo.network_hash(before.net)


def test_the_model_card(run, tmp_path):
    pushed(run, NAME, "--dry-run", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---\n")[1]
    for line in ("license: cc-by-nc-sa-4.0", "base_model: someone/teacher", "- one-step", "- class-conditional"):
        assert line in front.splitlines()
    for text in (
        'OneStepGenerator.from_pretrained("someone/digits")',
        "python -m edm.generate --network=someone/digits",
        "| fid5k | 12.35 | 1 | 5000 | 0-4999 | digits | reference.npz |",
        "| guidance | long=2 |",
        f"| version of sid-distillation | {__version__} |",
        "| edm_model | teacher.pkl |",
        "| data_stat | ref.npz |",
        "| data | a.zip |",
        "**The licence forbids commercial use**",
        "eprint={2404.04057}",
        "eprint={2406.01561}",
        zoo.network_hash(tiny_teacher()),
    ):
        assert text in card, text
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir()).decode("latin-1")
    for private in (SECRET, "Jane", "nas.home", str(run.parent), "Users"):
        assert private not in everything
    assert re.findall(r"(?<![\w./:])/\w+/", card) == []


def test_the_library_reads_the_front_matter(run, tmp_path):
    pushed(run, NAME, "-n", tmp_path / "out")
    found = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md").data
    assert (found.license, found.base_model, found.library_name) == (
        "cc-by-nc-sa-4.0",
        "someone/teacher",
        "sid-distillation",
    )
    assert found.pipeline_tag == "unconditional-image-generation"


def test_what_is_there_is_replaced_only_by_force(run, server):
    server.repositories[NAME] = [{"README.md": b"mine", "old.bin": b"x"}]
    line = refused(run, NAME)
    assert "is there already and holds 2 files, such as README.md" in line
    assert "--force" in line
    assert len(server.repositories[NAME]) == 1
    assert "public, and --private is for new repositories" in refused(run, NAME, "--force", "--private")
    pushed(run, NAME, "--force")
    assert server.files(NAME).keys() == FILES
    assert len(server.repositories[NAME]) == 2


@pytest.mark.parametrize(
    ("method", "path", "status", "text", "left"),
    [
        ("GET", "api/models", 401, "doesn't accept the token", False),
        ("POST", "api/repos/create", 403, "check the owner, someone", False),
        ("POST", f"api/models/{NAME}/preupload", 403, "the token may not write there", True),
        (
            "POST",
            f"api/models/{NAME}/commit",
            400,
            "the Hugging Face Hub refuses or can't be reached (BadRequestError",
            True,
        ),
    ],
)
def test_refusals_are_one_line_and_leave_no_files(run, server, method, path, status, text, left):
    server.refusals[method, path] = status
    line = refused(run, NAME)
    assert text in line
    assert TOKEN not in line
    assert ("an empty repository of that name was left" in line) == left
    assert [set(commit) for commit in server.repositories.get(NAME, [])] == ([{".gitattributes"}] if left else [])
    server.refusals.clear()
    pushed(run, NAME)  # without --force


def test_what_is_missing_is_said_before_anything_is_sent(run, server, monkeypatch, tmp_path):
    for name in ("digits", "a/b/c", "a/b.safetensors", "a/b--c", f"a/{'x' * 97}", "../x"):
        assert "give owner/name" in refused(run, name)
    assert "no such file, and no published network" in refused(tmp_path / "missing", NAME)
    (tmp_path / "net.pt").write_bytes(b"x")
    refused(tmp_path / "net.pt", NAME)
    assert "exists already; remove it or choose another name" in refused(run, NAME, "--dry-run", tmp_path)
    assert {method for method, _ in server.requests} == {"GET"}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "run hf auth login, or set HF_TOKEN" in refused(run, NAME)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "OfflineModeIsEnabled" in refused(run, NAME)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused(run, NAME)


def test_a_pickled_teacher_goes_up_as_safetensors(server, tmp_path):
    zoo.save_network(tiny_teacher(), tmp_path / "net.pkl", kind="teacher")
    output = pushed(tmp_path / "net.pkl", NAME, "--private")
    assert "goes up as safetensors" in output
    assert "its licence isn't recorded; give --licence=NAME" in output
    assert server.files(NAME).keys() == {*FILES, ".gitattributes"}
    card = server.files(NAME)["README.md"].decode()
    assert "license: other" in card
    assert "**To be filled in:**" in card
    assert "zoo.load_network" in card
    assert zoo.network_hash(zoo.load_network(NAME)) == zoo.network_hash(tiny_teacher())


def test_snapshots_and_texts_in_metadata_cannot_change_the_card(tmp_path):
    zoo.save_network(
        tiny_teacher(), tmp_path / "net.safetensors", licence="x\n---\n<script>", teacher="a|b\n# c", init_sigma=2
    )
    pushed(tmp_path / "net.safetensors", NAME, "-n", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card
    assert card.count("\n---\n") == 1
    assert "\n# c" not in card
    assert r"| teacher | a\|b # c |" in card


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/Jane Doe/runs/net.pkl", "net.pkl"),
        ("~/runs/x/", "x"),
        ("C:\\Users\\jane\\a.npz", "a.npz"),
        ("file:///home/jane/a.zip", "a.zip"),
        ("jane@host:/data/a.zip", "a.zip"),
        (f"https://u:{SECRET}@nas.home:8000/x/a.pkl?token={SECRET}", "a.pkl"),
        ("s3://bucket/jane/a.pkl", "a.pkl"),
        ("someone/teacher", "someone/teacher"),
        ("lognormal=-1.2,1.2", "lognormal=-1.2,1.2"),
        ({"/home/a": ["/home/b", 1, None]}, {"a": ["b", 1, None]}),
    ],
)
def test_what_is_said_in_public(value, expected):
    assert hub.public(value) == expected


@pytest.mark.parametrize(
    ("licence", "name", "forbids"),
    [
        ("CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", True),
        ("from CC BY-NC-SA 4.0 weights", "cc-by-nc-sa-4.0", True),
        ("apache-2.0", "apache-2.0", False),
        ("MIT", "mit", False),
        ("flux-1-dev-non-commercial-license", None, True),
        ("incredible", None, False),
        (None, None, False),
    ],
)
def test_licences(licence, name, forbids):
    assert (model_card.licence_name(licence), model_card.forbids_commerce(licence)) == (name, forbids)


def test_the_papers_of_the_options():
    assert papers(DistillationConfig()) == ["2404.04057"]
    assert papers(DistillationConfig(gan=True, steps=4)) == ["2404.04057", "2410.14919", "2505.12674"]
    assert papers(DistillationConfig(guidance="1.7,long=2", lora_rank=4)) == [
        *("2404.04057", "2406.01561", "2406.02507", "2106.09685"),
    ]
    assert papers(DistillationConfig(objective="dmd")) == ["2404.04057", "2311.18828"]
    assert set(papers(DistillationConfig(guidance="zero"))) <= set(model_card.PAPERS)


def test_a_class_of_ones_own_is_said(tmp_path):
    zoo.save_network(Spy(), tmp_path / "net.safetensors", init_sigma=2.5)
    pushed(tmp_path / "net.safetensors", NAME, "--classes=tiny:Spy", "-n", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("someone/digits", classes={"Spy": Spy})' in card
    assert "--classes=module:Spy" in card


def test_a_name_that_isnt_there_is_one_line(server):
    with pytest.raises(UserError, match="can't be downloaded from the Hugging Face Hub") as error:
        zoo.load_network("someone/nothing")
    assert "\n" not in str(error.value)


def test_what_to_call_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for source, name in {
        "runs/cats/network-snapshot-000040.safetensors": "cats",
        "network-snapshot-000040.safetensors": tmp_path.name,
        "/models/dogs/best.safetensors": "dogs",
        "birds.pkl": "birds.pkl",
        "runs/mine": "mine",
        "owner/name": "owner/name",  # nothing of that name is here
        "edm-cifar10-32x32-uncond-vp": "edm-cifar10-32x32-uncond-vp",
        "https://me:secret@example.org/files/fish.pkl?token=secret": "fish.pkl",
    }.items():
        assert hub.title(source) == name
