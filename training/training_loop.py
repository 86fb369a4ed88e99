"""Trains a denoiser on images."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import checkpoint, distributed, misc
from torch_utils.training_stats import Collector, TickLog
from torch_utils.updates import Updater, ema_beta, lr_factor, update_ema


@dataclasses.dataclass
class TrainingConfig:
    """Numbers of a training run. Images are counted in thousands (kimg) where a name says so."""

    total_kimg: float = 200_000
    batch: int = 512  # images per update, all processes together
    batch_gpu: int | None = None  # images per process and round; None: no accumulation
    lr: float = 1e-3
    lr_rampup_kimg: float = 10_000
    lr_decay: str = "none"  # none, linear or cosine, over total_kimg
    ema_halflife_kimg: float = 500
    ema_rampup_ratio: float | None = 0.05
    loss_scaling: float = 1.0
    kimg_per_tick: float = 50
    snapshot_ticks: int = 50
    state_ticks: int = 500
    seed: int = 0
    workers: int = 1


def training_loop(
    config: TrainingConfig,
    net: torch.nn.Module,
    dataset: torch.utils.data.Dataset,
    loss: Callable,
    augment_pipe: Callable | None,
    run_dir: Path,
    device: torch.device,
    save_snapshot: Callable[[torch.nn.Module, int], None],
    resume: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """Trains `net` and returns the moving average of its weights.

    dataset: items are (uint8 image [C, H, W], float32 label [label_dim]).
    save_snapshot: called on process 0 as save_snapshot(ema, nimg) every `snapshot_ticks` ticks and at the end.
    resume: the training state to go on from, as `load_state` gives it.
    """
    batch_gpu, rounds = misc.split_batch(config.batch, config.batch_gpu, distributed.world_size())
    net.train().requires_grad_(True).to(device)
    if augment_pipe is None:
        freeze_augment_mapping(net)
    distributed.broadcast_module(net)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    updater = Updater.adam("network", net, config.lr, beta1=0.9)
    parts = {"net": net, "ema": ema, "updater": updater}
    for name, part in parts.items() if resume else ():
        _restore(name, part, resume[name])
    nimg, tick, elapsed_sec = (resume["nimg"], resume["tick"], resume["elapsed_sec"]) if resume else (0, 0, 0.0)

    batches = _endless_batches(dataset, batch_gpu, config, device, nimg)
    collector, log = Collector(), TickLog(run_dir, device, elapsed_sec)
    log.resume_clock(nimg)
    total_img = int(config.total_kimg * 1000)
    next_tick_img = nimg + config.kimg_per_tick * 1000
    while nimg < total_img:
        for r in range(rounds):
            images, labels = next(batches)
            misc.seed_at(config.seed, nimg + (r * distributed.world_size() + distributed.rank()) * batch_gpu)
            value = loss(net, images, labels, augment_pipe)
            collector.report("Loss/loss", value)
            (value.sum() * (config.loss_scaling / config.batch)).backward()
        factor = lr_factor(nimg, total_img, config.lr_rampup_kimg * 1000, config.lr_decay)
        collector.report("Gradient/norm", updater.step(factor))
        updater.check(nimg)
        update_ema(ema, net, ema_beta(config.batch, nimg, config.ema_halflife_kimg * 1000, config.ema_rampup_ratio))
        nimg += config.batch
        if nimg < next_tick_img and nimg < total_img:
            continue
        tick += 1
        next_tick_img = nimg + config.kimg_per_tick * 1000
        log.tick(tick, nimg, collector.collect())
        done = nimg >= total_img
        if distributed.rank() == 0 and (done or tick % config.snapshot_ticks == 0):
            save_snapshot(ema, nimg)
        if distributed.rank() == 0 and (done or tick % config.state_ticks == 0):
            counters = {"nimg": nimg, "tick": tick, "elapsed_sec": log.elapsed_sec}
            state = {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save_state(checkpoint.state_path(run_dir, nimg), {**state, **counters})
        log.resume_clock(nimg)
    return ema


def load_state(path: Path, net: torch.nn.Module) -> dict[str, Any]:
    """The training state at `path`. Errors: UserError when it is none, or that of another network than `net`."""
    state = checkpoint.load_state(path)
    if not {"net", "ema", "updater"} <= state.keys():
        raise UserError(f"--resume={path}: not the state of a teacher; name a training-state-*.pt of edm.train")
    expected = {k: v.shape for k, v in net.state_dict().items()}
    for name in ("net", "ema"):
        weights = state[name] if isinstance(state[name], dict) else {}
        if {k: getattr(v, "shape", None) for k, v in weights.items()} == expected:
            continue
        raise UserError(f"--resume={path}: its network is another; give the --data, --arch, … it was started with")
    return state


def _restore(name: str, part: Any, state: Any) -> None:
    try:
        part.load_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--resume: the {name} of that training state doesn't fit this run ({reason})") from None


def freeze_augment_mapping(net: torch.nn.Module) -> None:
    """Where no augmentation labels come, their mapping gets no gradient: exclude it from training."""
    for name, parameter in net.named_parameters():
        if name.endswith("map_augment.weight"):
            parameter.requires_grad_(False)


def _endless_batches(
    dataset: torch.utils.data.Dataset, batch_gpu: int, config: TrainingConfig, device: torch.device, nimg: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(images [batch_gpu, C, H, W] float32 in [-1, 1], labels [batch_gpu, label_dim]) on `device`, for ever."""
    sampler = misc.InfiniteSampler(
        len(dataset), distributed.rank(), distributed.world_size(), seed=config.seed, start=nimg
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_gpu,
        sampler=sampler,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=config.workers > 0,
    )
    for images, labels in loader:
        yield images.to(device, non_blocking=True).to(torch.float32) / 127.5 - 1, labels.to(device, non_blocking=True)
