"""fid.py on tiny folders with a randomly initialised detector."""

import json
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fid
from edm import generate, zoo
from edm.metrics.detector import load_detector, save_detector
from edm.metrics.frechet import frechet_distance
from edm.metrics.small_classifier import SmallClassifier
from training.networks import EDMPrecond

ROOT = Path(__file__).resolve().parents[1]
DETECTOR_ARGUMENTS = {"img_resolution": 8, "img_channels": 1, "num_classes": 3, "width": 4}
pytestmark = pytest.mark.filterwarnings("ignore:.*deficient rank")


def write_images(folder, count, seed, size=8, channels=1):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (size, size, channels), dtype=np.uint8).squeeze()
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fid")
    write_images(folder / "real", 140, 0)
    write_images(folder / "fake", 135, 1)
    torch.manual_seed(0)
    save_detector(SmallClassifier(**DETECTOR_ARGUMENTS), folder / "detector.safetensors", DETECTOR_ARGUMENTS)
    invoke("ref", f"--data={folder}/real", f"--detector={folder}/detector.safetensors", f"--dest={folder}/ref.npz")
    net = EDMPrecond(8, 1, model_type="SongUNet", model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    zoo.save_network(net, folder / "network.safetensors", kind="sid-generator", init_sigma=2.5)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    zoo.save_network(net, folder / "other.safetensors")
    return folder


def invoke(command, *options, code=0):
    result = CliRunner().invoke(fid.main, [command, *options, "--device=cpu"])
    assert result.exit_code == code, result.output
    return result.output


def features(folder, detector):
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    return load_detector(detector).features(torch.from_numpy(images)[:, None]).double().numpy()


def test_ref_and_calc(work):
    output = invoke("calc", f"--images={work}/fake", f"--ref={work}/ref.npz", "--num=135", "--batch=50")
    line, record = output.strip().splitlines()[-2:]
    record = json.loads(record)
    fake, real = (features(work / name, work / "detector.safetensors") for name in ("fake", "real"))
    expected = frechet_distance(fake.mean(0), np.cov(fake.T), real.mean(0), np.cov(real.T))
    assert record["value"] == pytest.approx(expected, rel=1e-5)
    assert line.startswith(f"fid135: fid {record['value']:.6g};")
    assert (record["images"], record["reference_source"], record["reference_images"]) == ("fake", "real", 140)


def test_calc_of_a_subset_is_seeded(work):
    options = [f"--images={work}/fake", f"--ref={work}/ref.npz", "--num=60", f"--json={work}/new/records.jsonl"]
    for seed in (0, 0, 1):
        invoke("calc", *options, f"--seed={seed}")
    values = [json.loads(line)["value"] for line in (work / "new" / "records.jsonl").read_text().splitlines()]
    assert values[0] == values[1] != values[2]


def test_one_line_for_what_users_get_wrong(work):
    write_images(work / "large", 3, 0, size=16)
    write_images(work / "color", 3, 0, channels=3)
    np.savez(work / "foreign.npz", mu=np.zeros(5), sigma=np.eye(5))
    images, ref = f"--images={work}/fake", f"--ref={work}/ref.npz"
    cases = [
        (["calc", images, ref], "--num=50000"),
        (["calc", f"--images={work}/none", ref], f"--images={work}/none"),
        (["calc", images, f"--ref={work}/none.npz", "--num=9"], "none.npz"),
        (
            ["calc", images, f"--ref={work}/foreign.npz", "--num=9", f"--detector={work}/detector.safetensors"],
            "5 features",
        ),
        (["calc", f"--images={work}/large", ref, "--num=3"], "16x16"),
        (["calc", f"--images={work}/color", ref, "--num=3"], "8x8 with 3"),
        (["ref", f"--data={work}/fake", "--dest=x.npy"], "--dest=x.npy"),
        (["ref", f"--data={work}/fake", f"--dest={work}/no/x.npz"], "--dest="),
        (["eval", f"--network={work}/network.safetensors", "--metrics=fid9"], "--ref"),
        (["eval", f"--network={work}/network.safetensors", ref, "--metrics=fud9"], "--metrics=fud9"),
        (["eval", f"--network={work}/network.safetensors", ref, "--metrics=fid9", "--S_churn=9"], "--S_churn"),
        (["eval", f"--network={work}/none.pkl", ref, "--metrics=fid9"], "none.pkl"),
    ]
    for command, names in cases:
        (line,) = invoke(*command, code=2).strip().splitlines()
        assert line.startswith("Error: ")
        assert names in line


def test_eval(work):
    options = [f"--network={work}/network.safetensors", f"--ref={work}/ref.npz", f"--data={work}/real", "--batch=32"]
    metrics = "--metrics=fid130,is50,kid40_full,pr60"
    output = invoke("eval", *options, metrics, "--trials=2", "--seeds=7")
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [record["metric"] for record in records] == ["fid130", "is50", "kid40_full", "pr60"]
    assert records[0]["seeds"] == [7, 266]
    assert records[0]["network"] == "network.safetensors"
    assert len(records[0]["trials"]["values"]["fid"]) == 2
    assert np.isfinite([record["value"] for record in records]).all()


GUIDED = ["--guide={work}/other.safetensors", "--guidance=2", "--solver=euler", "--steps=2"]


@pytest.mark.parametrize("options", [[], ["--steps=3", "--S_churn=8"], GUIDED], ids=str)
def test_eval_equals_generate_then_calc(work, tmp_path, options):
    options = [option.format(work=work) for option in options]
    network, ref = f"--network={work}/network.safetensors", f"--ref={work}/ref.npz"
    done = CliRunner().invoke(
        generate.main, [network, f"--outdir={tmp_path}/made", "--seeds=0-99", "--device=cpu", *options]
    )
    assert done.exit_code == 0, done.output
    at_once = invoke("eval", network, ref, "--metrics=fid100", *options)
    from_files = invoke("calc", f"--images={tmp_path}/made", ref, "--num=100")
    records = [json.loads(output.strip().splitlines()[-1]) for output in (at_once, from_files)]
    assert records[0]["values"]["fid"] == records[1]["values"]["fid"]  # the same uint8 images in the same batches
    assert records[0].get("guide") == ("other.safetensors" if any("--guide=" in option for option in options) else None)


def test_data_alone_is_enough(work, tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    options = [f"--images={work}/fake", "--num=135"]
    data, detector = f"--data={work}/real", f"--detector={work}/detector.safetensors"
    outputs = [invoke("calc", *options, data, detector), invoke("calc", *options, data, detector)]
    outputs.append(invoke("calc", *options, f"--ref={work}/ref.npz"))
    records = [json.loads(output.strip().splitlines()[-1]) for output in outputs]
    assert records[0] == records[1]
    assert records[0]["value"] == records[2]["value"]
    assert records[0]["reference_source"] == "real"
    assert len(list((tmp_path / "references").iterdir())) == 1


def test_two_processes_give_the_numbers_of_one(work, tmp_path):
    options = [f"--network={work}/network.safetensors", f"--ref={work}/ref.npz", "--metrics=fid130,is50", "--batch=32"]
    log = tmp_path / "log.txt"
    code = forked.launch([str(ROOT / "fid.py"), "eval", *options, "--device=cpu"], log, processes=2).wait(600)
    two_say = log.read_text()
    assert code == 0, two_say
    one, two = (
        [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for output in (invoke("eval", *options), two_say)
    )
    assert len(one) == len(two) == 2
    for record, other in zip(one, two):
        assert record["values"] == pytest.approx(other["values"], rel=1e-9)
