"""What training doesn't need leaves its memory: text encoders are freed, and VAEs go to the CPU."""

import weakref

import pytest
import torch
from tiny import tiny_config

from edm import text_encoders, zoo
from sid.distillation import Distillation
from sid.run import distil
from training.decoder import LatentDecoder, PixelDecoder

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
from tiny_pipelines import TEXTS

pytestmark = pytest.mark.usefixtures("own_cache")


def test_training_has_neither_text_encoders_nor_the_vae(text_pipelines, tmp_path, monkeypatch):
    """At every iteration, with pictures before it and after it."""
    encoders, alive, events = [], [], []
    load, iteration, to_images, leave = (
        *(text_encoders.TextEncoder.__init__, Distillation.iteration),
        *(LatentDecoder.to_images, LatentDecoder.leave_device),
    )

    def loading(self, *arguments):
        load(self, *arguments)
        modules = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        encoders.extend(weakref.ref(part) for module in modules for part in module.modules())

    def training(self):
        alive.append(sum(part() is not None for part in encoders))
        events.append("train")
        iteration(self)

    monkeypatch.setattr(text_encoders.TextEncoder, "__init__", loading)
    monkeypatch.setattr(Distillation, "iteration", training)
    monkeypatch.setattr(LatentDecoder, "to_images", lambda self, x: events.append("decode") or to_images(self, x))
    monkeypatch.setattr(LatentDecoder, "leave_device", lambda self: events.append("leave") or leave(self))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS), encoding="utf-8")
    config = tiny_config(total_kimg=0.024, snapshot_ticks=1, augment=0, guidance="long=1.5")
    distil(zoo.load_denoiser(text_pipelines["stable_diffusion"]), config, tmp_path / "run", prompts=str(prompts))
    assert len(encoders) > 10
    assert alive == [0, 0, 0]
    assert events.count("decode") >= 4
    where = [event for event in events if event != "train"]
    assert where[-1] == "decode"  # of the last snapshot
    for number, event in enumerate(events):
        if event == "train":
            assert events[number - 1] == "leave"


@pytest.mark.parametrize(("device", "moves"), [("meta", ["cpu"]), ("cpu", [])])
def test_a_vae_leaves_a_device(device, moves):
    class Vae:
        moved = []  # noqa: RUF012

        def parameters(self):
            return iter([torch.empty(1, device=device)])

        def to(self, place):
            self.moved.append(place)

    LatentDecoder(Vae(), 1.0).leave_device()
    assert Vae.moved == moves
    PixelDecoder().leave_device()
