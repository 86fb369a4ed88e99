"""Builds a distillation from a teacher and a config, ready for its next iteration; compares them with a saved state."""

import functools
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import batches, checkpoint, devices, distributed, precision, run_folder
from training.augment import EDM_MULTIPLIERS, AugmentPipe
from training.denoiser import DenoiserModule

from . import lora, memory
from .adversarial import RealImages, make_loss
from .config import COMMAND_LINE, FREE_ON_RESUME, ROUNDING, DistillationConfig, resolve, saved_options
from .distillation import Distillation, Networks
from .guidance import check_guidance
from .inputs import Inputs
from .state import DistillationState, SavedState


def build(
    inputs: Inputs,
    config: DistillationConfig,
    device: torch.device,
    saved: SavedState | None,
    override: bool,
    dropped: int = 0,
) -> Distillation:
    """The distillation of a run, new or resumed: as `prepare`, with its options compared to those of the state.

    saved: the state that it goes on from. override: whether options of the method may differ from the state's.
    dropped: images of trials, which the command line's length has on top of the config's.

    Errors: UserError when the options don't fit the teacher, the processes or the run that saved the state.
    """
    config = resolve(config, inputs.teacher, device)
    rules = resume_rules(config, override, dropped)
    former: dict[str, Any] = {} if saved is None else saved_options(saved.options, inputs.teacher, device)
    if saved is not None:
        asked = config.options()
        del asked["batch_gpu"]  # a run that doesn't give it takes the state's
        run_folder.refuse_changes(saved.path, former, asked, rules)
    distillation = prepare(inputs, config, device, saved)
    if saved is not None:
        current = checkpoint.setting(distillation.config.options(), device)
        there = {"options": former, "surroundings": saved.surroundings}
        run_folder.check_setting(saved.path, there, current, rules)
    return distillation


def resume_rules(config: DistillationConfig, override: bool = False, dropped: int = 0) -> run_folder.ResumeRules:
    """What a resumed distillation may change. dropped: as of `build`."""
    free = FREE_ON_RESUME
    if config.lr_decay == "none":  # without a decay the end changes nothing before it
        free = free | {"total_kimg"}
    rounding = ROUNDING
    if config.gan:  # its loss is a mean over --batch-gpu
        rounding = rounding - {"batch_gpu"}
    return run_folder.ResumeRules(free, rounding, override, COMMAND_LINE, {"total_kimg": dropped / 1000})


def prepare(
    inputs: Inputs,
    config: DistillationConfig,
    device: torch.device,
    resume: SavedState | checkpoint.StateFile | Path | None = None,
) -> Distillation:
    """A distillation that is ready for its next iteration, on any number of processes.

    inputs: its teacher and guide are moved to `device`, set to eval mode and frozen; with a half precision, weights
            that they would only cast are then stored in it.
    resume: a training state to go on from, or its path.
    Errors: UserError when options don't fit the teacher, the processes or the state.
    """
    config = resolve(config, inputs.teacher, device)
    teacher = inputs.teacher.to(device).eval().requires_grad_(False)
    warning = check_guidance(config.guidance, teacher, inputs.guide)
    if warning:
        distributed.print0(f"Warning: {warning}")
    hashes = inputs.weight_hashes(config)
    if config.augment and getattr(teacher, "augment_dim", 0) != AugmentPipe(**EDM_MULTIPLIERS).augment_dim:
        raise UserError(f"--augment={config.augment:g}: the teacher takes no augmentation labels; use --augment=0")
    state = DistillationState(teacher, config, device, inputs.start, hashes, inputs.moments)
    guide = None if inputs.guide is None else inputs.guide.to(device).eval().requires_grad_(False)
    networks = set_up_networks(teacher, state, config, device, guide)
    reals = None
    if config.gan and inputs.dataset is not None:
        reals = RealImages(inputs.dataset, teacher.label_dim, device)
    loss = make_loss(config, teacher, reals, networks.guide)
    if resume is not None:
        state.load(resume)
    build = functools.partial(Distillation, teacher, config, device, loss, state, networks)
    batch_gpu = config.batch_gpu or former_batch_gpu(state, config)
    if batch_gpu is not None:
        return build(batch_gpu)
    batch_gpu, peak = estimated_batch_gpu(teacher, config, device, guide)
    distillation = build(batch_gpu, peak)
    while not distillation.fits():
        smaller = next_smaller(distillation.batch_gpu, config.chunk)
        if smaller is None:
            break
        distillation = build(smaller)
    return distillation


def next_smaller(batch_gpu: int, chunk: int | None) -> int | None:
    """The largest proper divisor of --batch-gpu that --chunk divides; None if there is none."""
    fitting = [n for n in range(1, batch_gpu) if batch_gpu % n == n % (chunk or 1) == 0]
    return max(fitting, default=None)


def set_up_networks(
    teacher: DenoiserModule,
    state: DistillationState,
    config: DistillationConfig,
    device: torch.device,
    guide: DenoiserModule | None = None,
) -> Networks:
    """Sets precision, memory layout and compilation of the networks; none of it is part of the state."""
    networks = {"teacher": teacher, "fake_score": state.fake_score, "generator": state.generator}
    if guide is not None:
        networks["guide"] = guide
    assert config.precision is not None
    precision.set_up(config.precision, device)
    dtype = precision.DTYPES[config.precision]
    autocast_dtype = precision.compute_in(dtype, networks.values())
    for net in networks.values():
        if config.channels_last:
            devices.to_channels_last(net)
        if config.checkpoint:
            precision.checkpoint_blocks(net)
    if config.stores_half:
        for frozen in filter(None, (teacher, guide)):
            memory.store_teacher(frozen, dtype, lambda: precision.autocast(device, autocast_dtype))
        for net in (state.generator, state.fake_score):
            lora.store_bases(net, teacher)
    hooked = {"fake_score"} if config.gan else set()  # the discriminator's hooks don't work on a compiled network
    calls = {
        name: precision.Compiled(net, config.share_noise) if config.compile and name not in hooked else net
        for name, net in networks.items()
    }
    return Networks(**calls, autocast_dtype=autocast_dtype)


def former_batch_gpu(state: DistillationState, config: DistillationConfig) -> int | None:
    """--batch-gpu of the run in the loaded state, which its random draws depend on; None if it doesn't fit here."""
    former = state.setting.get("options", {}).get("batch_gpu")
    sound = type(former) is int and former > 0
    return former if sound and config.batch % (former * distributed.world_size()) == 0 else None


def estimated_batch_gpu(
    teacher: DenoiserModule, config: DistillationConfig, device: torch.device, guide: DenoiserModule | None
) -> tuple[int, float | None]:
    """`memory.fitting_batch_gpu` of process 0, for all processes, which must agree."""
    share = batches.split_batch(config.batch, None, distributed.world_size())[0]
    return distributed.from_process_0(memory.fitting_batch_gpu(teacher, config, share, device, guide))
