"""The teacher's own samples: the same on all processes, and kept for the next run."""

import math

import pytest
import safetensors.torch
from tiny import equal, on_two_processes, tiny_config, tiny_teacher

from dnnlib import UserError
from sid.inputs import Inputs, guided_teacher
from sid.teacher_samples import NUM_IMAGES, teacher_samples
from torch_utils import distributed


def samples_of_a_teacher():
    return list(teacher_samples(tiny_teacher().eval()))


def test_two_processes_make_the_samples_of_one(tmp_path):
    first, second = on_two_processes(samples_of_a_teacher, tmp_path)
    alone = samples_of_a_teacher()
    assert alone[0].shape == alone[1].shape == (NUM_IMAGES, 1, 8, 8)
    assert equal(dict(enumerate(first)), dict(enumerate(alone)))
    assert equal(dict(enumerate(second)), dict(enumerate(alone)))


def test_samples_that_are_not_finite_end_all_processes(tmp_path):
    said = on_two_processes(error_of_samples, tmp_path)
    assert said[0] == said[1]
    assert "holds NaN or infinity" in said[0]


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The folder in which samples of teachers are kept."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("sid.teacher_samples.NUM_IMAGES", 8)
    monkeypatch.setattr("sid.teacher_samples.BATCH", 4)
    monkeypatch.setattr("sid.teacher_samples.STEPS", 3)
    return tmp_path / "cache" / "teacher-samples"


def samples_of(teacher, **changes):
    config = tiny_config(**changes)
    return teacher_samples(guided_teacher(teacher, None, config.guidance), Inputs(teacher).identity(config))


def test_samples_are_kept_for_the_next_run(kept, monkeypatch):
    teacher = tiny_teacher().eval()
    first = samples_of(teacher)
    (file,) = kept.iterdir()
    monkeypatch.setattr("sid.teacher_samples._make", None)  # whoever makes some now fails
    assert all(a.equal(b) for a, b in zip(samples_of(teacher), first, strict=True))
    for text in [
        b"",
        b"{}",
        file.read_bytes()[:-9],
        safetensors.torch.save({"made": first[0][:4], "images": first[1]}),
    ]:
        file.write_bytes(text)
        with pytest.raises(TypeError):
            samples_of(teacher)


def test_samples_of_another_teacher_are_not_taken(kept):
    teacher = tiny_teacher().eval()
    first = samples_of(teacher)[0]
    teacher.metadata = {"classes": "1"}
    second = samples_of(teacher)[0]
    assert not second.equal(first)
    guided = samples_of(teacher, guidance="long=3")[0]
    assert not guided.equal(second)
    del teacher.metadata["classes"]
    assert samples_of(teacher)[0].equal(first)
    assert len(list(kept.iterdir())) == 3


def test_samples_that_changed_code_makes_no_more_are_not_taken(kept, monkeypatch):
    teacher = tiny_teacher().eval()
    first = samples_of(teacher)[0]
    forward = type(teacher).forward
    monkeypatch.setattr(type(teacher), "forward", lambda self, *args, **options: -forward(self, *args, **options))
    assert not samples_of(teacher)[0].equal(first)
    monkeypatch.setattr(type(teacher), "forward", forward)
    assert samples_of(teacher)[0].equal(first)


def test_many_large_samples_are_not_kept(kept, monkeypatch):
    monkeypatch.setattr("sid.teacher_samples.KEPT_BYTES", 8 * 64 * 5 - 1)
    samples_of(tiny_teacher().eval())
    assert not kept.exists()


def error_of_samples():
    """Of a teacher that makes none on the second process."""
    teacher = tiny_teacher().eval()
    if distributed.rank() == 1:
        next(teacher.parameters()).data.fill_(math.nan)
    with pytest.raises(UserError) as error:
        teacher_samples(teacher)
    return str(error.value.message)
