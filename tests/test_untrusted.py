"""Every foreign file is read, or refused in one line, within ten seconds and a gigabyte."""

import functools
import io
import json
import os
import threading
import warnings
import zipfile
from pathlib import Path

import bombs
import forked
import hostile
import numpy as np
import pytest
import torch
from PIL import Image

from dnnlib import UserError, open_plain
from edm import zoo
from edm.metrics.detector import load_detector
from sid.sweep.plan import load_plan
from torch_utils import checkpoint, persistence
from torch_utils.untrusted import bounds, images
from torch_utils.untrusted.state_file import read_state
from training.dataset import decode_image

ROOT = Path(__file__).resolve().parents[1]
MAX_SECONDS, MAX_MEGABYTES = 10, 1000


def test_bombs_are_refused_in_ten_seconds_and_a_gigabyte(tmp_path):
    folder = tmp_path / "bombs"
    folder.mkdir()
    bombs.make(folder)
    output = forked.run([ROOT / "tests" / "bombs.py", "read", folder], tmp_path)
    found = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert [what for what, *_ in found] == sorted(os.listdir(folder))
    assert not [what for what, message, *_ in found if message is None or "\n" in message]
    assert not [line for line in found if line[2] > MAX_SECONDS or line[3] > MAX_MEGABYTES]


@pytest.mark.parametrize("what", bombs.slow_images())
def test_the_clock_ends_what_counting_does_not(monkeypatch, what):
    monkeypatch.setattr(bounds, "MAX_SECONDS", 0.2)
    with pytest.raises(UserError, match="takes too long to read"):
        decode_image(bombs.slow_images()[what], "x")


# --- plain files


def ends(load, *args):
    """The message of load's UserError; fails if it still waits after a minute."""
    messages = []

    def run():
        try:
            load(*args)
        except UserError as error:
            messages.append(error.message)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    (message,) = messages
    assert "\n" not in message
    return message


def network_folder(path, odd):
    path.mkdir()
    for name in ("config.json", "network.safetensors"):
        if odd != name:
            (path / name).write_text('{"_class_name": "Toy"}')
    return path / odd, zoo.load_network, path


def odd_places(folder):
    """{what: (where something odd is put, reader, its argument)}."""
    (folder / "images").mkdir()
    hostile.write_images(folder / "images")
    (folder / "x.toml").write_text('include = "other.toml"\n')
    return {
        "config": network_folder(folder / "one", "config.json"),
        "weights": network_folder(folder / "two", "network.safetensors"),
        "labels": (folder / "images" / "dataset.json", hostile.load_images, folder / "images"),
        "state": (folder / "x.pt", checkpoint.load_state, folder / "x.pt"),
        "included": (folder / "other.toml", load_plan, folder / "x.toml"),
        "sweep": (folder / "y.toml", load_plan, folder / "y.toml"),
        "network": (folder / "x.pkl", zoo.load_network, folder / "x.pkl"),
        "source": (folder / "x.gz", hostile.load_source, folder / "x.gz"),
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "folder"])
def test_files_that_are_not_plain_are_refused(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    for odd, load, argument in odd_places(tmp_path).values():
        if kind == "pipe":
            os.mkfifo(odd)
        elif kind == "folder":
            odd.mkdir()
        else:
            odd.symlink_to("/dev/zero" if kind == "device" else tmp_path / "pipe")
        ends(load, argument)


def test_plain_files_are_opened(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with open_plain(tmp_path / "link", max_bytes=3) as file:
        assert file.read() == b"abc"
    with pytest.raises(OSError, match="larger than"):
        open_plain(tmp_path / "x", max_bytes=2)


# --- states


def equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert getattr(ours, "_metadata", None) == getattr(theirs, "_metadata", None)
        for key in ours:
            equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            equal(one, other)
    else:
        assert ours == theirs


def test_states_are_read_as_torch_reads_them(tmp_path):
    shared = torch.arange(24, dtype=torch.float32)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    value = {
        "net": torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict(),
        "laid out": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parts": [shared[2:10].reshape(2, 4), shared.reshape(4, 6).T, shared],
        "repeated": torch.ones(1).expand(5, 3),
        "types": [torch.tensor([0, 1, 2]).to(dtype) for dtype in dtypes],
        "empty": (torch.empty(0), torch.empty(0, 3), torch.tensor(2.5)),
        "plain": {1: None, "a": True, "b": 2.5, "long": 1 << 70, "text": "ψ" * 300, "nested": [(1, ("x",)), []]},
    }
    torch.save(value, tmp_path / "x.pt")
    equal(read_state(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True))
    assert read_state(tmp_path / "x.pt")["net"]._metadata[""] == {"version": 1}


def test_states_share_memory_where_they_did(tmp_path):
    whole = torch.zeros(4)
    torch.save([whole, whole[1:3]], tmp_path / "x.pt")
    whole, part = read_state(tmp_path / "x.pt")
    whole += 1
    assert part.tolist() == [1, 1]


@pytest.mark.parametrize("extra", ["archive/data.pkl", "other/data.pkl"])
def test_states_with_a_part_twice_are_refused(tmp_path, extra):
    path = tmp_path / "training-state-000001.pt"
    checkpoint.save_state(path, {"nimg": 1, "tick": 1, "elapsed_sec": 0.0})
    with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
        warnings.simplefilter("ignore")
        folder = archive.namelist()[0].split("/")[0]
        parts = [(name, archive.read(name)) for name in archive.namelist()]
        with zipfile.ZipFile(tmp_path / "y.pt", "w") as other:
            for name, data in [*parts, (extra.replace("archive", folder), b"\x80\x02}.")]:
                other.writestr(name, data)
    with pytest.raises(UserError, match="twice"):
        checkpoint.load_state(tmp_path / "y.pt")


# --- arguments of constructors


@persistence.persistent_class
class Keeps(torch.nn.Module):
    """Keeps its arguments, and multiplies two of them."""

    def __init__(self, sizes, name, factor=1, number=2):
        super().__init__()
        self.sizes, self.name, self.product = sizes, name, factor * number


def test_arguments_stay_ordinary():
    net = persistence.construct(Keeps, ([1, (2, 3)], "a"), {"factor": 3}, {}, "file")
    assert net.product == 6
    for value, kind in ((net.sizes, list), (net.sizes[1], tuple), (net.name, str), (net.init_args[0], list)):
        assert type(value) is kind


@pytest.mark.parametrize("factor", [[1], (1,), "x"])
def test_arguments_are_not_repeated(factor):
    for arguments in ({"factor": factor, "number": 1 << 40}, {"factor": 1 << 40, "number": factor}):
        with pytest.raises(UserError, match="stands where a number is needed"):
            persistence.construct(Keeps, ([], ""), arguments, {}, "file")


# --- good files stay good


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def good_images():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8))
    blank, exif = Image.new("RGB", (3000, 3000)), Image.Exif()
    exif[0x010E] = "a description" * 1000
    thumbnail = encoded(noise.resize((64, 64)), "JPEG")
    png = encoded(noise, "PNG")
    start, length = png.index(b"IDAT") - 4, int.from_bytes(png[png.index(b"IDAT") - 4 :][:4], "big")
    pixels = png[start + 8 : start + 8 + length]
    pieces = b"".join(bombs.chunk(b"IDAT", pixels[i : i + 64]) for i in range(0, len(pixels), 64))
    return {
        "progressive": encoded(noise, "JPEG", progressive=True, quality=95),
        "large": encoded(blank, "JPEG", progressive=True),
        "with a description": encoded(noise, "JPEG", exif=exif),
        "with a thumbnail": encoded(noise, "JPEG", exif=exif.tobytes() + thumbnail),
        "with a film behind it": encoded(noise, "JPEG") + np.random.default_rng(1).bytes(3_000_000),
        "many chunks": png[:start] + pieces + png[start + 12 + length :],
        "as text": b"P3 100 100 255 # a comment\n" + b"1 2 3 " * 10_000,
        **{kind: encoded(noise, kind) for kind in ("PNG", "WEBP", "BMP", "PPM", "TIFF")},
        "TIFF, packed": encoded(noise, "TIFF", compression="tiff_lzw"),
    }


@pytest.mark.parametrize("what", good_images())
def test_good_images_are_read(what):
    data = good_images()[what]
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(image.convert("RGB"))
    assert np.array_equal(np.array(decode_image(data, "x").convert("RGB")), expected)


def test_scans_are_counted_by_their_pixels():
    images.open_image(bombs.progressive(500, side=64), ["JPEG"], 1 << 26).load()
    with pytest.raises(bounds.Refused, match="scans"):
        images.open_image(bombs.progressive(500, side=4000), ["JPEG"], 1 << 26)


def test_json_is_read_up_to_its_bounds():
    value = {"a": [1, 2.5, -3e10, "x,[{", None], "b": {}}
    assert bounds.parse_json(json.dumps(value)) == value
    assert bounds.parse_json(json.dumps(value).encode("utf-16")) == value
    for text in ("[" * 100_000, "1" * 100, "1." + "1" * 100, json.dumps([[]] * 1000)):
        with pytest.raises(bounds.Refused):
            bounds.parse_json(text, max_values=100)


# --- programs


class Program(torch.nn.Module):
    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        return x.to(torch.float32).mean([2, 3])


def test_a_program_that_the_user_names_runs_with_a_warning(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Program()).save(str(tmp_path / "x.pt"))
    load_detector(tmp_path / "x.pt")
    output = capsys.readouterr()
    assert "Warning" in output.err
    assert "program" in output.err
    assert not output.out


def test_a_sweep_file_alone_starts_no_program(tmp_path):
    path = tmp_path / "x.toml"
    common = 'edm_model = "x.pkl"\nmetrics = "fid5k"\ndata_stat = "ref.npz"\n'
    for detector in ("x.pt", "https://example.org/x.pt", "x.safetensors.pt"):
        path.write_text(f'[common]\n{common}detector = "{detector}"\n[settings.one]\n')
        with pytest.raises(UserError, match=r"program .*--detector="):
            load_plan(str(path))
        assert load_plan(str(path), detector).runs[0].recorded["detector"] == detector
    for detector in ("x.safetensors", "inception-2015-12-05"):
        path.write_text(f'[common]\n{common}detector = "{detector}"\n[settings.one]\n')
        assert load_plan(str(path)).runs
