"""What a run prints: the block at its start, the line of a tick, in 80 columns whatever the values."""

import itertools
import math

import pytest
import torch

from torch_utils import run_lines
from torch_utils.run_lines import COLUMNS, duration_text, figure_text, kimg_text, rate_text, start_block, tick_line


def test_a_tick_line_says_what_one_looks_for():
    values = {"distance": 0.02314, "FID": 16.8}
    line = tick_line(1024, 20_000, 1000, 0.0512, 25.04, 6720, values)
    assert line == " 1.0/20.0 kimg   5%   25.0 img/s   1h 52m left  distance 0.02314  FID 16.80"


RATES = [None, 0.0123, 25, 98_765]
LEFT = [None, 0, 59.6, 86_399, 123 * 86_400 + 25_000, 1e9]
NIMG = [0, 8, 999_999_744, 1_000_000_000]
VALUES = [-1.234567e-5, 0.5, 123.456, 1e30, math.nan, math.inf]


def test_a_tick_line_fits_80_columns():
    names = ("distance", "FID", "is50k", "kid50k_full", "pr50k3_full precision", "pr50k3_full recall")
    for rate, left, nimg, value in itertools.product(RATES, LEFT, NIMG, VALUES):
        text = tick_line(nimg, 10**9, 50, nimg / 1e9, rate, left, dict.fromkeys(names, value))
        assert all(len(line) <= COLUMNS for line in text.split("\n")), text
        assert text.split().count(figure_text(value)) == len(names), text  # nothing is left out
        assert f"{nimg / 1000:.3f}/1000000.000" in text.split(), text


def test_the_longest_published_run_takes_one_line():
    line = tick_line(1_000_000_000, 1_000_000_000, 50_000, 1.0, 98_765, 99 * 86_400, {"distance": 0.1234, "FID": 123.4})
    assert "\n" not in line
    assert len(line) <= COLUMNS


def test_columns_stay_in_place():
    lines = [tick_line(n * 1000, 10_000, 1000, n / 10, 24.0 + n, 60.0 * (10 - n)) for n in range(11)]
    assert {line.index("kimg") for line in lines} == {lines[0].index("kimg")}
    assert len(set(map(len, lines))) == 1


def test_only_the_end_is_100_percent():
    assert " 99%" in tick_line(9_999, 10_000, 1, 0.9999)
    assert "100%" in tick_line(10_000, 10_000, 1, 1.0)


@pytest.mark.parametrize(
    ("nimg", "step", "expected"),
    [(20, 20, "0.020"), (1024, 1000, "1.0"), (120, 100, "0.12"), (200_000_000, 50_000, "200000"), (0, 8, "0.000")],
)
def test_kimg_shows_each_step(nimg, step, expected):
    assert kimg_text(nimg, step) == expected
    assert kimg_text(nimg + step, step) != expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (3599.6, "1h 00m"),
        (18_540, "5h 09m"),
        (86_400, "1d 00h"),
        (1e7, "115d 17h"),
    ],
)
def test_durations_have_two_units(seconds, expected):
    assert duration_text(seconds) == expected


def test_figures():
    assert [figure_text(v) for v in (1.9234, 183.14, 1234.4, 0.3, math.nan)] == [
        "1.923",
        "183.1",
        "1234",
        "0.3000",
        "nan",
    ]
    assert [rate_text(v) for v in (0.31234, 25.04, 99.96, 1234.4)] == ["0.312", "25.0", "100", "1234"]


def test_a_start_block_is_aligned_and_leaves_out_what_isnt_there():
    text = start_block({"Teacher": "word " * 30, "Data": None, "Run folder": "runs/00000-demo"})
    lines = text.split("\n")
    assert all(len(line) <= COLUMNS for line in lines)
    assert "Data" not in text
    assert lines[-1] == "Run folder  runs/00000-demo"
    assert {len(line) - len(line.lstrip()) for line in lines[1:-1]} == {len("Run folder  ")}


def test_a_start_block_keeps_paths_whole_and_shows_control_codes():
    path = "/a-long-folder" * 10
    assert path in start_block({"Run folder": path})
    assert start_block({"Data": "a\x1b[31m\nb"}) == "Data  a\\x1b[31m\\nb"
    assert "secret" not in start_block({"Teacher": "https://me:secret@host/net.pkl"})


def test_networks_are_counted():
    assert run_lines.network_text(torch.nn.Linear(9, 10)) == "Linear, 0.1k parameters"
    assert run_lines.network_text(torch.nn.Linear(999, 2000)) == "Linear, 2M parameters"


def test_lengths(monkeypatch):
    assert run_lines.length_text(20, 32, 1, 5) == "20 kimg (625 updates), a line every 1 kimg, a snapshot every 5"
    assert run_lines.length_text(0.02, 8, 50, 50) == "0.02 kimg (3 updates)"
    assert run_lines.length_text(4, 32, 1, 5).endswith("a snapshot at the end")
    assert run_lines.batch_text(32, 32) == "32 images, at once"
    assert run_lines.batch_text(32, 16) == "32 images in 2 rounds of 16"
    monkeypatch.setattr(run_lines.distributed, "world_size", lambda: 2)
    assert run_lines.batch_text(32, 16) == "32 images, 16 on each process"
    assert run_lines.batch_text(64, 16) == "64 images in 2 rounds of 16 on each process"


def test_paths_inside_the_current_folder_are_short(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_lines.path_text(tmp_path / "runs") == "runs"
    assert run_lines.path_text("edm-cifar10-32x32-uncond-vp") == "edm-cifar10-32x32-uncond-vp"
    assert run_lines.path_text("https://host/x.pkl") == "https://host/x.pkl"
    assert run_lines.path_text("/elsewhere/x") == "/elsewhere/x"
