"""The embedded text-to-image teacher and what measures its generators."""

import numpy as np
import pytest
import torch

from edm.metrics import ground_colour, picture_name
from edm.metrics.caption_template import template_beside
from edm.metrics.clip import ClipEncoder
from edm.sampler import generate_all
from edm.small_teachers import captions, pictures
from edm.text_encoders import read_prompts
from sid.guidance import parse_guidance
from sid.inputs import guided_teacher
from sid.recipes import TEXT_DEMO

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
from tiny_pipelines import teacher_of

pytestmark = pytest.mark.usefixtures("own_cache")
PROMPTS = {name: read_prompts(TEXT_DEMO / f"{name}.txt") for name in ("prompts", "held-out")}
CAPTIONS = template_beside(TEXT_DEMO / "prompts.txt")


@pytest.mark.skipif(not pictures.EMOJI_FONT.is_file(), reason="needs fonts-noto-color-emoji")
def test_the_prompts_are_those_of_the_font():
    source = captions.CaptionedEmoji(0, captions.DEMO_PICTURES)
    assert {name: source.captions(name == "held-out") for name in PROMPTS} == PROMPTS


@pytest.mark.skipif(not pictures.EMOJI_FONT.is_file(), reason="needs fonts-noto-color-emoji")
def test_the_evaluator_names_real_pictures_on_new_grounds():
    source = captions.CaptionedEmoji(0, captions.DEMO_PICTURES)
    drawn = [
        source.picture(index, ground, place)
        for index, name in enumerate(source.names)
        for ground in captions.GROUNDS
        if captions.is_held_out(name, ground)
        for place in captions.PLACES
    ]
    encoder = ClipEncoder(TEXT_DEMO / "clip")
    found = picture_name.NamedImages(encoder, PROMPTS["held-out"], CAPTIONS)
    found.append(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2), 0)
    assert (found.ranks(len(drawn), encoder) == 1).all()
    exchanged = picture_name.NamedImages(encoder, PROMPTS["held-out"][::-1], CAPTIONS)
    exchanged.values = found.values
    assert (exchanged.ranks(len(drawn), encoder) == 1).double().mean() < 0.2


def test_the_prompts_are_built_as_their_template_says():
    assert captions.template(captions.DEMO_PICTURES).record() == CAPTIONS.record()
    parts = [CAPTIONS.parts(prompt) for prompts in PROMPTS.values() for prompt in prompts]
    assert {part["name"] for part in parts} == set(CAPTIONS.names)
    assert {part["ground"] for part in parts} == set(CAPTIONS.grounds)
    assert {part["place"] for part in parts} == set(captions.PLACES)


def test_the_teacher_paints_the_colour_that_a_new_prompt_asks_for():
    chosen = PROMPTS["held-out"][::12]
    net = guided_teacher(teacher_of(TEXT_DEMO / "teacher", chosen), None, parse_guidance("long-short=2"))
    images = generate_all(net, range(len(chosen)), steps=6)
    asked = [chosen[n] for n in net.prompts.numbers_of_seeds(range(len(chosen)))]
    assert ground_colour.share_right(ground_colour.colours(images), asked, CAPTIONS) >= 1 - 1 / len(chosen)
