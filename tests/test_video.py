"""The animation of a run's pictures: its frames in order, their times, and what is no picture of the run."""

import os

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

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
        done = CliRunner().invoke(main, [str(run), "--page-only", *options])
        return done.exit_code, done.output

    code, text = ask(f"--video={tmp_path}/new.webp")
    assert (code, text.splitlines()[-1]) == (0, f"Video:     {tmp_path}/new.webp  (2 pictures)")
    for name, reason in (("new.mp4", "ends in .webp"), ("taken.gif", "exists already"), ("nowhere/x.gif", "exists")):
        code, text = ask(f"--video={tmp_path}/{name}")
        assert (code, reason in text) == (2, True), text
    assert "leave one out" in ask("--serve", f"--video={tmp_path}/x.gif")[1]
    (run / "fakes_000040.png").unlink()
    assert "holds too few pictures" in ask(f"--video={tmp_path}/x.gif")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.webp", "run", "taken.gif"]
