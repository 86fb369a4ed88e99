"""Prompts: how they are drawn and dropped, the files that hold them, the networks that need them."""

import math

import pytest
import torch
from tiny import CPU, tiny_config, tiny_teacher

from dnnlib import UserError
from edm import text_encoders, zoo
from sid.run import distil
from training.conditions import Prompts, conditions_of

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
from tiny_pipelines import teacher_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")


def test_prompts_are_drawn_and_dropped():
    """Every prompt is as likely; as many seeds as there are prompts have each once; dropping gives the null."""
    rows = torch.arange(12.0).reshape(4, 3)
    prompts = Prompts(rows.numpy(), torch.full([3], -1.0), ["a", "b", "c", "d"])
    torch.manual_seed(0)
    counts = (prompts.draw(4000)[:, 0] / 3).long().bincount(minlength=4)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(750)
    numbers = prompts.numbers_of_seeds(range(8))
    assert sorted(numbers[:4]) == [0, 1, 2, 3]
    assert numbers[4:] == numbers[:4] != [0, 1, 2, 3]
    assert torch.equal(prompts.of_seeds(range(4), CPU, None), rows[numbers[:4]])
    assert Prompts(rows, prompts.null(1)[0], list("abcd"), in_order=True).numbers_of_seeds([2, 5]) == [2, 1]
    dropped = prompts.drop(rows.repeat(500, 1), 0.1)
    share = (dropped == -1).all(dim=1).float().mean()
    assert abs(share - 0.1) < 0.04
    assert torch.equal(dropped[dropped[:, 0] >= 0].unique(dim=0), rows)
    assert prompts.drop(rows, 0) is rows
    assert prompts.groups(rows) is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"caf\xe9", "no text in UTF-8"),
        ("a.txt", b"x" * 20_000, "line 1 has 20000 characters"),
        ("a.jsonl", b'{"prompt": "a"}\n{"words": 1}\n', 'line 2 is no JSON object with a "prompt"'),
        ("a.jsonl", b"[[[", "line 1 is no JSON object"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        text_encoders.read_prompts(tmp_path / name)


def test_files_of_prompts(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n\r\n  ein Hund auf der Straße \n".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "two\\nlines"}\n{"prompt": "b", "text": "c"}\n')
    assert text_encoders.read_prompts(tmp_path / "a.txt") == ["a cat", "ein Hund auf der Straße"]
    assert text_encoders.read_prompts(tmp_path / "a.jsonl") == ["two lines", "b"]
    with pytest.raises(UserError, match="no file of prompts"):
        text_encoders.read_prompts(tmp_path)


def test_long_prompts_are_named(text_pipelines, capsys):
    teacher_of(text_pipelines["stable_diffusion"], ["dogs", "a prompt of many letters, which are its tokens here"])
    assert "1 of 2 prompts are longer than the 16 tokens" in capsys.readouterr().err


def test_prompts_and_networks_that_do_not_fit(text_pipelines, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("dogs")
    with pytest.raises(UserError, match="makes no images of prompts"):
        distil(tiny_teacher(), tiny_config(), tmp_path / "run", prompts=str(prompts))
    net = zoo.load_denoiser(text_pipelines["stable_diffusion"])
    with pytest.raises(UserError, match="name some with --prompts=FILE"):
        distil(net, tiny_config(augment=0), tmp_path / "run")
    with pytest.raises(UserError, match="give some with --prompts=FILE"):
        conditions_of(net)
