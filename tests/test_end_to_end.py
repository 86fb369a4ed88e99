"""The whole way at tiny size: images -> data set -> teacher -> one-step generator -> pictures -> FID."""

import json

import numpy as np
import PIL.Image
from click.testing import CliRunner

import fid
import sid_train
from edm import dataset_tool, generate, train
from edm.metrics.detector import save_detector
from edm.metrics.small_classifier import SmallClassifier
from sid import OneStepGenerator

NETWORK = ["--cbase=8", "--cres=1,2", "--blocks=1", "--attn=4", "--dropout=0", "--augment=0"]
TINY = [*NETWORK, "--workers=0", "--device=cpu"]


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_images_to_fid(tmp_path):
    source, rng = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    for i in range(40):
        PIL.Image.fromarray(rng.integers(0, 256, [12, 12], dtype=np.uint8)).save(source / f"{i}.png")
    data, teacher_dir, run_dir = tmp_path / "data.zip", tmp_path / "teacher", tmp_path / "distilled"
    run(dataset_tool.main, f"--source={source}", f"--dest={data}", "--resolution=8x8")
    run(train.main, f"--data={data}", f"--outdir={teacher_dir}", "--nosubdir", *TINY, "--batch=20", "--duration=4e-5")
    teacher = teacher_dir / "network-snapshot-000000.040.safetensors"

    detector, reference = tmp_path / "detector.safetensors", tmp_path / "reference.npz"
    arguments = {"img_resolution": 8, "img_channels": 1, "num_classes": 3, "width": 4}
    save_detector(SmallClassifier(**arguments), detector, arguments)
    run(fid.main, "ref", f"--data={data}", f"--detector={detector}", f"--dest={reference}", "--device=cpu")
    output = run(
        sid_train.main,
        f"--edm_model={teacher}",
        f"--outdir={run_dir}",
        "--nosubdir",
        f"--data_stat={reference}",
        "--metrics=fid32",
        "--batch=20",
        "--batch-gpu=10",
        "--duration=4e-5",
        "--tick=0.02",
        "--snap=2",
        "--device=cpu",
    )
    lines = [line for line in output.splitlines() if line.startswith("0.0")]
    assert [("FID" in line, "100%" in line) for line in lines] == [(True, False), (False, False), (True, True)]
    assert f"Metrics     fid32 against {reference}" in output.replace("\n            ", " ")

    generator = run_dir / "network-snapshot-000000.040.safetensors"
    files = {path.name for path in run_dir.iterdir()}
    logs = {"training_options.json", "log.txt", "stats.jsonl", "metric-fid32.jsonl", "index.html"}
    assert logs | {"fakes_init.png", "fakes_000000.040.png", "training-state-000000.040.pt", generator.name} <= files
    recorded = json.loads((run_dir / "training_options.json").read_text())
    assert recorded["arguments"][:3] == [f"--edm_model={teacher}", f"--outdir={run_dir}", "--nosubdir"]
    assert '<strong class="badge finished">' in (run_dir / "index.html").read_text()
    for line in (run_dir / "stats.jsonl").read_text().splitlines():
        assert all(np.isfinite(value) for value in json.loads(line).values())

    images = tmp_path / "images"
    run(generate.main, f"--network={generator}", f"--outdir={images}", "--seeds=0-31", "--device=cpu")
    made = OneStepGenerator.from_pretrained(generator, device="cpu")(32)
    first = np.asarray(PIL.Image.open(images / "00000" / "img00000003.png"))
    assert np.array_equal(first, made[3, 0].numpy())
    scored = run(fid.main, "calc", f"--images={images}", f"--ref={reference}", "--num=32", "--device=cpu")
    assert "fid32" in scored
