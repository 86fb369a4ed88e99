"""The animation of a run's pictures: its frames in order, their times, and what is no picture of the run."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dnnlib import UserError
from sid.report import video
from sid.report.__main__ import main
from sid.report.video import FOOT, LAST_MS, MAX_FRAMES


def make_run(folder, *kimg, size=(32, 16)):
    """A run whose picture after k kimg has the shade k."""
    folder.mkdir(exist_ok=True)
    Image.new("L", size, 0).save(folder / "fakes_init.png")
    for k in kimg:
        Image.new("L", size, k).save(folder / f"fakes_{k:06d}.png")
    return folder


def frames(path):
    """[(shade of the picture, width of the bar in pixels, milliseconds)] of an animation."""
    found = []
    with Image.open(path) as animation:
        for i in range(animation.n_frames):
            animation.seek(i)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            picture, line = pixels[:-FOOT], pixels[-FOOT // 2]
            assert np.ptp(picture) <= 4  # WebP loses a little
            bar = np.abs(line - [0x58, 0xB0, 0xEA]).max(axis=1) < 40
            found.append((picture.mean(), bar.sum(), animation.info["duration"]))
    return found


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
def test_every_picture_has_its_time_and_the_last_stays(tmp_path, suffix):
    run, path = make_run(tmp_path / "run", 40, 80, 160), tmp_path / f"new{suffix}"
    assert video.write_video(run, video.check_place(str(path))) == 4
    shades, bars, times = zip(*frames(path))
    assert shades == pytest.approx([0, 40, 80, 160], abs=2)
    assert bars[0] == 0
    assert np.array(bars[1:]) / bars[-1] == pytest.approx([0.25, 0.5, 1], abs=0.02)
    assert times[:-1] == (times[0],) * 3
    assert times[-1] == pytest.approx(times[0] + LAST_MS, abs=10)
    with Image.open(path) as animation:
        assert animation.size == (512, 256 + FOOT)  # enlarged by a whole factor
        assert animation.info["loop"] == 0


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_a_film_has_the_same_pictures_for_as_long(tmp_path):
    """Of an odd size, which MP4 doesn't have: the last column and line are the ground's."""
    run, path = make_run(tmp_path / "run", 40, 80, 160, size=(513, 51)), tmp_path / "new.mp4"
    assert video.write_video(run, video.check_place(str(path))) == 4
    command = ["ffmpeg", "-loglevel", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    width, height = 514, 51 + FOOT + 1
    found = np.frombuffer(data, np.uint8).reshape(-1, height, width, 3).astype(int)
    shades = found[:, 10:40, 10:500].mean(axis=(1, 2, 3))
    assert np.ptp(found[:, 10:40, 10:500], axis=(1, 2, 3)).max() <= 8
    expected = np.repeat([0, 40, 80, 160], [15, 15, 15, 65])  # 0.6 s each, and 2 s more for the last, at 25 per second
    assert shades == pytest.approx(expected, abs=3)
    assert path.read_bytes()[4:8] == b"ftyp"


def test_a_film_without_ffmpeg_or_by_one_that_fails(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 40)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^--video=x\.mp4: needs the program ffmpeg; install it, or name a \.webp file$"
    ):
        video.check_place("x.mp4")
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\necho Unknown encoder >&2\necho more >&2\nexit 3\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    path = video.check_place(str(tmp_path / "x.mp4"))
    with pytest.raises(UserError, match=r"^--video: ffmpeg failed \(Unknown encoder\); name a \.webp file$"):
        video.write_video(run, path)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["ffmpeg", "run"]


def test_of_many_pictures_the_last_is_among_those_taken(tmp_path):
    run = make_run(tmp_path / "run", *range(1, MAX_FRAMES + 52), size=(16, 8))
    count = video.write_video(run, tmp_path / "new.png")
    assert MAX_FRAMES // 2 < count <= MAX_FRAMES
    shades, _, times = zip(*frames(tmp_path / "new.png"))
    assert shades[-1] == MAX_FRAMES + 51
    assert sum(times) == pytest.approx(video.WHOLE_MS + LAST_MS, rel=0.05)


def test_what_is_no_picture_of_the_run_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", 40, 160)
    (run / "fakes_000050.png").write_text("no picture")
    (run / "fakes_000060.png").mkdir()
    Image.new("L", (64, 64)).save(run / "fakes_000070.png")  # of another size
    Image.new("L", (32, 16), 99).save(tmp_path / "secret.png")
    os.symlink("../secret.png", run / "fakes_000080.png")
    os.symlink("fakes_000090.png", run / "fakes_000090.png")
    assert video.write_video(run, tmp_path / "new.png") == 3
    assert [shade for shade, _, _ in frames(tmp_path / "new.png")] == [0, 40, 160]


def test_the_command(tmp_path):
    run = make_run(tmp_path / "run", 40)
    (run / "training_options.json").write_text("{}")
    (tmp_path / "taken.gif").touch()

    def ask(*options):
        done = CliRunner().invoke(main, [str(run), *options])
        return done.exit_code, done.output

    code, text = ask("--page-only", f"--video={tmp_path}/new.webp")
    assert (code, text.splitlines()[-1]) == (0, f"Video:     {tmp_path}/new.webp  (2 pictures)")
    wrong = {"new.avi": "ends in .webp", "taken.gif": "exists already", "nowhere/x.gif": "there is no folder"}
    for name, reason in wrong.items():
        code, text = ask("--page-only", f"--video={tmp_path}/{name}")
        assert (code, reason in text) == (2, True), text
    assert "leave one out" in ask("--serve", f"--video={tmp_path}/x.gif")[1]
    (run / "fakes_000040.png").unlink()
    assert "holds too few pictures" in ask("--page-only", f"--video={tmp_path}/x.gif")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.webp", "run", "taken.gif"]
