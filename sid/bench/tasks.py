"""What is timed: a training step, one-step sampling, the detector. `make_task` builds one from a plain description."""

import dataclasses
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from edm.metrics.detector import Detector, load_detector, save_detector
from edm.metrics.small_classifier import SmallClassifier
from edm.sampler import generate_images
from sid.config import DistillationConfig
from sid.inputs import Inputs
from sid.prepare import prepare
from training.denoiser import DenoiserModule
from training.steps import INIT_SIGMA

from .measure import PhaseClock
from .modes import Mode
from .published_step import PublishedStep
from .recipes import RECIPES, build_network

PHASES = {  # methods that both kinds of step have, disjoint in time; what else an iteration does is the rest
    "generate": "generate",
    "fake_score": "_backward_fake_score",
    "generator": "_backward_generator",
    "updates": "_update",
}


class Task(ABC):
    """One repeatable piece of work on `images` images. clock: measures the time of its phases."""

    images: int
    precision = "fp32"
    compiled = False

    def __init__(self, device: torch.device):
        self.device = device
        self.clock = PhaseClock(device)

    @abstractmethod
    def __call__(self) -> None: ...


class StepTask(Task):
    """A training step, in a mode. config: the recipe's, batch included; the mode's overrides come on top."""

    def __init__(self, teacher: DenoiserModule, config: DistillationConfig, mode: Mode, device: torch.device):
        super().__init__(device)
        config = dataclasses.replace(config, **mode.overrides)
        self.images, self.compiled = config.batch, config.compile
        if mode.published:
            self.step = PublishedStep(teacher, config, device)
        else:
            self.step = prepare(Inputs(teacher), config, device)
        self.precision = self.step.config.precision
        for name, method in PHASES.items():
            self.clock.watch(name, self.step, method)

    def __call__(self) -> None:
        self.step.iteration()


class SamplingTask(Task):
    """Images from the generator in one evaluation, up to uint8 on the CPU."""

    def __init__(self, generator: DenoiserModule, images: int, device: torch.device):
        super().__init__(device)
        self.generator, self.images = generator.to(device).eval(), images
        self.precision = "fp16" if generator.use_fp16 and device.type != "cpu" else "fp32"
        self.generator.metadata = {"init_sigma": INIT_SIGMA}

    def __call__(self) -> None:
        for _ in generate_images(self.generator, range(self.images), batch=self.images):
            pass


class MetricsTask(Task):
    """Features of images from a detector."""

    def __init__(self, detector: Detector, shape: tuple[int, int, int], images: int):
        super().__init__(detector.device)
        self.detector, self.images = detector, images
        self.batch = torch.randint(256, [images, *shape], dtype=torch.uint8)

    def __call__(self) -> None:
        self.detector.features(self.batch).cpu()


def make_config(job: dict[str, Any]) -> DistillationConfig:
    """The recipe's configuration with the job's batch."""
    recipe = RECIPES[job["recipe"]]
    sizes = {"batch": job["batch"] or recipe.batch, "batch_gpu": job["batch_gpu"] or recipe.config["batch_gpu"]}
    return DistillationConfig(**{**recipe.config, **sizes})


def make_step(job: dict[str, Any], device: torch.device) -> StepTask:
    """A training step of the job's recipe, in its mode. Errors: UserError."""
    return StepTask(build_network(RECIPES[job["recipe"]]), make_config(job), job["mode"], device)


def make_task(job: dict[str, Any], device: torch.device) -> Task:
    """job: what, recipe, batch, batch_gpu, eval_batch, detector and, for a step, mode. Errors: UserError."""
    if job["what"] == "step":
        return make_step(job, device)
    recipe = RECIPES[job["recipe"]]
    net = build_network(recipe)
    if job["what"] == "sampling":
        return SamplingTask(net, job["eval_batch"], device)
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    source = job["detector"] or recipe.detector
    detector = load_detector(source, device) if source else random_detector(shape, device)
    detector.check(*shape[:2])
    return MetricsTask(detector, shape, job["eval_batch"])


def random_detector(shape: tuple[int, int, int], device: torch.device) -> Detector:
    """A small classifier with random weights for images [C, H, W]: no file, so no download."""
    kwargs = {"img_channels": shape[0], "img_resolution": shape[1], "num_classes": 10}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random-detector.safetensors"
        save_detector(SmallClassifier(**kwargs), path, kwargs)
        return load_detector(path, device)
