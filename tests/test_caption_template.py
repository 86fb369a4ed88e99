"""How captions are built, and the file that says it."""

import json
import random

import pytest
from hostile import mutate

from dnnlib import UserError
from edm.metrics.caption_template import CaptionTemplate, read_template, template_beside
from edm.metrics.evaluate import captions_for

RECORD = {
    "template": "Photo: {name} on {ground} ground, {place}.",
    "names": ["a red apple", "a ship on a stand"],
    "grounds": {"a blue": [50, 90, 200]},
}


def test_captions_are_taken_apart_and_put_together():
    captions = CaptionTemplate(**RECORD)
    for parts in (
        {"name": "a red apple", "ground": "a blue", "place": "left"},
        {"name": "a ship on a stand", "ground": "no", "place": "on the left"},
    ):
        assert captions.parts(captions.caption(parts)) == parts
    assert CaptionTemplate("{name}").parts("a, {b}") == {"name": "a, {b}"}


@pytest.mark.parametrize(
    "caption",
    [
        "a red apple on a blue ground, left.",
        "Photo: a red apple on a blue ground, left",
        "Photo: a red apple on a blue ground, .",
        "Photo:  on a blue ground, left.",
        "Photo: a red apple, left.",
        ".",
        "",
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(UserError, match=r"^--metrics: '.* isn't like 'Photo: {name} on {ground} ground, {place}\.'"):
        CaptionTemplate(**RECORD).parts(caption)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "a picture"}, "needs slots"),
        ({"template": "{name}{ground}"}, "text between"),
        ({"template": "{name}, {ground}, {name}"}, "each once"),
        ({"template": "on {ground} ground"}, "no {name}"),
        ({"template": "a {name}"}, "no {ground}"),
        ({"template": None}, "expected string"),
        ({"names": "apple"}, "several texts"),
        ({"names": ["a", "a"]}, "different texts"),
        ({"names": ["a", 3]}, "different texts"),
        ({"names": [{}]}, "hash"),
        ({"grounds": {"a blue": [50, 90]}}, "red, green and blue"),
        ({"grounds": {"a blue": [50, 90, 256]}}, "from 0 to 255"),
        ({"grounds": {"a blue": "abc"}}, "whole numbers"),
        ({"grounds": ["a blue"]}, "list"),
        ({"ground": {}}, "ground"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, changes, words):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(RECORD | changes))
    with pytest.raises(UserError, match=rf"captions\.json: doesn't describe how prompts are built \(.*{words}"):
        template_beside(tmp_path / "prompts.txt")


def test_a_missing_file_is_named_where_a_metric_needs_it(tmp_path):
    prompts = str(tmp_path / "prompts.txt")
    assert captions_for(["fid50", "clip5"], prompts) is None
    for metric in ("ground5", "name5"):
        with pytest.raises(UserError, match=r"captions\.json is missing"):
            captions_for(["fid50", metric], prompts)


def test_damaged_files_are_read_or_refused(tmp_path):
    path, rng, good = tmp_path / "captions.json", random.Random(0), json.dumps(RECORD).encode()
    messages = []
    path.write_bytes(good)
    assert read_template(path).record() == RECORD
    for _ in range(300):
        path.write_bytes(mutate(rng, good, good))
        try:
            assert isinstance(read_template(path), CaptionTemplate)
        except UserError as error:
            messages.append(error.message)
    assert len(messages) > 30
    assert not any("\n" in message for message in messages)
