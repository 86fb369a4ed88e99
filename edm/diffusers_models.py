"""Networks of the diffusers library as denoisers: a folder in its layout, or the name of one on the Hugging Face Hub.

A folder holds either a pipeline (model_index.json, the model in unet/ or transformer/, scheduler/) or a model alone
(config.json) with scheduler_config.json, scheduler/ or ../scheduler/. Weights are read from safetensors only, and
no code that a folder may hold is run. The library is imported when the first such network is built.
"""

import copy
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import persistence
from torch_utils.persistence import persistent_class
from torch_utils.untrusted import edm_pickle
from torch_utils.untrusted.bounds import read_json
from training.denoiser import SIGMA_DATA
from training.parameterisations import DiscreteTimes, FlowTimes, WrappedDenoiser

from . import network_files
from .network_files import CONFIG_FILE, INDEX_FILE, read_tensors

SCHEDULER_FILE = "scheduler_config.json"
WEIGHTS_NAME = "diffusion_pytorch_model"
MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, MAX_STEPS = 16 << 20, 100_000, 100_000
INSTALL = "pip install 'sid-distillation[diffusers]', or pip install diffusers"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
MODELS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}  # class: its folder in a pipeline
OTHER_PARTS = {  # of a pipeline, and what its presence means
    "vae": "it makes latents for a VAE, which isn't supported yet",
    "vqvae": "it makes latents for a VAE, which isn't supported yet",
    "movq": "it makes latents for a VAE, which isn't supported yet",
    "text_encoder": "it is conditioned on text, which isn't supported yet",
}
FLOW_SCHEDULERS = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
SCHEDULERS = FLOW_SCHEDULERS | {
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler", "TCDScheduler"),
    "UniPCMultistepScheduler",
}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}
PREDICTIONS |= {"sample": "x0", "original_sample": "x0"}
NAMED = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # how every scheduler of a diffusion names them
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention layers


def library() -> Any:
    """The diffusers library. Errors: UserError when it isn't installed."""
    try:
        import diffusers  # pyright: ignore[reportMissingImports]  an optional package
    except ImportError:
        raise UserError(f"a network of the diffusers library needs it installed: {INSTALL}") from None
    return diffusers


@persistent_class
class DiffusersDenoiser(WrappedDenoiser):
    """The denoiser of a model of the diffusers library.

    model, scheduler: their configurations as the library's JSON files hold them, `_class_name` included.
    dropout:          of the model; None leaves it as the configuration says.
    nearest:          whether times are rounded to those of training instead of interpolated between them; always so
                      for an embedding table of times.
    null_class:       the index that stands for no class (attribute); None if the model has none.

    Errors: UserError when the model or the scheduler isn't supported, or the library isn't installed.
    """

    @staticmethod
    def import_library() -> None:
        """Imports what the constructor uses; `persistence.construct` calls it before it counts the constructor's steps.

        Errors: UserError when the library isn't installed.
        """
        for name in (*MODELS, "DDPMScheduler"):  # the library imports its modules when they are first used
            getattr(library(), name)

    checkpoint = False  # `torch_utils.precision.checkpoint_blocks` sets it: recompute activations

    def __init__(
        self,
        model: dict[str, Any],
        scheduler: dict[str, Any],
        dropout: float | None = None,
        nearest: bool = False,
        sigma_data: float = SIGMA_DATA,
    ):
        diffusers = library()
        name = model.get("_class_name")
        if name not in MODELS:
            raise UserError(f"its model is a {str(name)[:80]!r}; the supported classes are {' and '.join(MODELS)}")
        given = {} if dropout is None else {"dropout": dropout}
        net = getattr(diffusers, name).from_config({**model, **given})
        channels, resolution = _shape(net.config)
        embedding = net.config.get("time_embedding_type", "positional")
        if embedding not in ("positional", "learned"):
            raise UserError(f"its time embedding is {str(embedding)[:80]!r}, which isn't supported")
        is_dit = name == "DiTTransformer2DModel"
        if net.config.get("class_embed_type") is not None:
            raise UserError(f"its classes are embedded as {str(net.config.class_embed_type)[:80]!r}, not by a table")
        label_dim = (net.config.num_embeds_ada_norm if is_dit else net.config.num_class_embeds) or 0
        prediction, times = _times(scheduler, nearest or embedding == "learned")
        super().__init__(net, prediction, times, resolution, channels, int(label_dim), sigma_data)
        self.null_class = self.label_dim if is_dit else None
        for module in net.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # only guidance drops classes here

    def answer(self, x_s: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        net: Any = self.net
        if self.checkpoint and not net.is_gradient_checkpointing:
            net.enable_gradient_checkpointing()
        if not self.label_dim:
            return net(x_s, t, return_dict=False)[0]
        if class_labels is None:
            class_labels = x_s.new_zeros([len(x_s), self.label_dim])
        index = class_labels.argmax(dim=1)
        if self.null_class is not None:
            index = torch.where(class_labels.any(dim=1), index, self.null_class)
        return net(x_s, timestep=t, class_labels=index, return_dict=False)[0]


def _shape(config: Any) -> tuple[int, int]:
    """(channels, resolution) of a model's images. Errors: UserError when they aren't images as they are used here."""
    channels, size = config.in_channels, config.sample_size
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int:
        raise UserError(f"its sample_size is {str(size)[:80]}; set it in config.json to the width of the square images")
    out_channels = channels if config.out_channels is None else config.out_channels
    if channels not in (1, 3) or out_channels not in (channels, 2 * channels):
        raise UserError(
            f"it takes {channels} channels and answers {out_channels}; only images of 1 or 3 channels are supported,"
            " not the latents of a VAE or images with a condition"
        )
    return channels, size


def _scheduler(config: dict[str, Any]) -> Any:
    """The library's scheduler of a configuration. Errors: UserError when it isn't of a Gaussian diffusion or flow."""
    name, steps = config.get("_class_name"), config.get("num_train_timesteps", 1000)
    if name not in SCHEDULERS or config.get("timestep_type", "discrete") != "discrete":
        raise UserError(
            f"its scheduler is a {str(name)[:80]!r}, which doesn't say how DDPM or a flow added noise; in"
            f" {SCHEDULER_FILE}, give the scheduler that it was trained with, such as DDPMScheduler"
        )
    if type(steps) is not int or not 3 <= steps <= MAX_STEPS:
        raise UserError(f"its scheduler's num_train_timesteps is {str(steps)[:80]}, not a number from 3 to {MAX_STEPS}")
    return getattr(library(), name).from_config(config)


def _scheduler_of(net: Any) -> Any:
    return _scheduler(net.init_kwargs["scheduler"])


def _times(config: dict[str, Any], nearest: bool) -> tuple[str, DiscreteTimes | FlowTimes]:
    """(prediction, times) of a scheduler's configuration, as `WrappedDenoiser` takes them."""
    scheduler = _scheduler(config)
    steps = scheduler.config.num_train_timesteps
    named = scheduler.config.get("prediction_type", "epsilon")
    if type(scheduler).__name__ in FLOW_SCHEDULERS or named == "flow_prediction":
        return "flow", FlowTimes(scale=steps, t_min=1 / steps, t_max=1 - 1 / steps)
    if named not in PREDICTIONS:
        raise UserError(f"its prediction_type is {str(named)[:80]!r}, none of {', '.join(PREDICTIONS)}")
    signal = scheduler.alphas_cumprod.to(torch.float64)
    return PREDICTIONS[named], DiscreteTimes(((1 - signal) / signal).sqrt(), nearest)


# --- the Hugging Face Hub


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether `source` could be the name of a repository on the Hub, owner/name."""
    return HUB_NAME.fullmatch(str(source)) is not None and Path(source).suffix not in network_files.WRITTEN


def fetch(name: str) -> Path:
    """The local folder of a model on the Hub: downloaded if need be, or as it lies in the library's cache.

    Errors: UserError when it can't be had.
    """
    library()
    import huggingface_hub as hub  # pyright: ignore[reportMissingImports]  comes with diffusers

    files = ["*.json", "*.safetensors", "README.md"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[*files, *(f"*/{file}" for file in files)]))
    except Exception as error:  # of many kinds: offline, absent, gated, no space
        reason = persistence.one_line(error, 200)
        raise UserError(
            f"{name}: no such file or folder here, and the Hugging Face Hub doesn't give it ({type(error).__name__}:"
            f" {reason}); check the name; without internet, name a folder, or fill the library's cache (HF_HOME)"
        ) from None


# --- reading a folder


def is_folder(path: str | Path) -> bool:
    """Whether a folder is in the library's layout, and not one that this project wrote for itself."""
    if (Path(path) / INDEX_FILE).is_file():
        return True
    try:
        config = _config(Path(path) / CONFIG_FILE)
    except UserError:
        return False
    return "_sha256" not in config and ("_diffusers_version" in config or config.get("_class_name") in MODELS)


def read(path: Path) -> tuple[DiffusersDenoiser, dict[str, Any]]:
    """(denoiser, metadata) of a folder. Errors: UserError when it is damaged or not supported."""
    try:
        folder, scheduler = _parts(path)
        config = _config(folder / CONFIG_FILE)
        metadata = config.pop("_metadata", {})
        model = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
        if model.get("_class_name") not in MODELS:  # before weights of another kind are looked for
            DiffusersDenoiser(model, {})
        state = {f"net.{_current_name(name)}": tensor for name, tensor in _weights(folder).items()}
        settings = {"model": model, "scheduler": _config(scheduler)}
        if not edm_pickle.is_plain(settings):
            raise UserError("its configuration holds more than plain values")
        net = persistence.construct(DiffusersDenoiser, (), settings, state, path)
        metadata = network_files.checked_metadata(metadata or {"kind": "teacher", **_licence(path)}, path)
        return network_files.checked(net, path), metadata
    except UserError as error:
        raise UserError(f"{path}: {error.message.removeprefix(f'{path}: ')}") from None


def _parts(path: Path) -> tuple[Path, Path]:
    """(folder of the model, file of its scheduler's configuration)."""
    folder = path
    if (path / INDEX_FILE).is_file():
        index = _config(path / INDEX_FILE)
        parts = {name for name, value in index.items() if isinstance(value, list) and all(value)}
        for part, meaning in OTHER_PARTS.items():
            if part in parts:
                raise UserError(f"{path}: a {str(index.get('_class_name'))[:80]}: {meaning}")
        found = [name for name in MODELS.values() if name in parts]
        if len(found) != 1:
            raise UserError(f"{path}: {INDEX_FILE} names no model as unet or transformer, or both")
        folder = path / found[0] if (path / found[0] / CONFIG_FILE).is_file() else path
    places = [folder, folder / "scheduler", path / "scheduler", folder.resolve().parent / "scheduler"]
    for place in places:
        if (place / SCHEDULER_FILE).is_file():
            return folder, place / SCHEDULER_FILE
    raise UserError(
        f"{path}: has no {SCHEDULER_FILE}, which says how noise was added in training: put the file of the scheduler"
        " that the model was trained with next to config.json"
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path, MAX_CONFIG_BYTES, MAX_CONFIG_VALUES)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{path}: can't be read as a configuration of the diffusers library") from None
    if type(config) is not dict:
        raise UserError(f"{path}: is not a configuration of the diffusers library")
    return config


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder, in one file or several."""
    for suffix in ("", ".fp16", ".non_ema"):
        if (folder / f"{WEIGHTS_NAME}{suffix}.safetensors").is_file():
            return read_tensors(folder / f"{WEIGHTS_NAME}{suffix}.safetensors")[1]
    index = folder / f"{WEIGHTS_NAME}.safetensors.index.json"
    if index.is_file():
        names = _config(index).get("weight_map")
        files = set(names.values()) if isinstance(names, dict) else set()
        if not files or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(file)) for file in files):
            raise UserError(f"{index}: names no .safetensors files")
        return {name: tensor for file in sorted(files) for name, tensor in read_tensors(folder / file)[1].items()}
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder}: its weights are pickled ({pickled[0]}), and opening that could run code: save the model again"
            " with save_pretrained(folder, safe_serialization=True)"
        )
    raise UserError(f"{folder}: has no {WEIGHTS_NAME}.safetensors")


def _current_name(name: str) -> str:
    """The name that the library gives a weight today; attention layers had others before."""
    *parents, layer, kind = ["", "", *name.split(".")]
    return name if layer not in FORMER_NAMES else ".".join([*filter(None, parents), FORMER_NAMES[layer], kind])


def _licence(path: Path) -> dict[str, str]:
    """The licence in the head of a model card, README.md, if it tells one."""
    for place in (path, path.resolve().parent):
        try:
            with open(place / "README.md", encoding="utf-8", errors="replace") as file:
                head = re.match(r"---\n(.*?)\n---", file.read(100_000), re.DOTALL)
        except OSError:
            continue
        found = re.search(r"^license: *([\w.-]{1,80}) *$", head[1], re.MULTILINE) if head else None
        if found:
            return {"licence": found[1]}
    return {}


# --- writing a pipeline


def write(net: Any, path: Path, metadata: dict[str, Any]) -> None:
    """Writes a denoiser of the library's classes as a pipeline of the library, in a new folder that appears whole.

    A one-step generator becomes a `ConsistencyModelPipeline`, which calls it once, at the noise level in its metadata;
    another denoiser a pipeline of many steps.
    Errors: UserError when the network has no counterpart in the library, or `path` is there already.
    """
    if type(net) is not DiffusersDenoiser:
        raise UserError(
            f"--to=diffusers: a {type(net).__name__} isn't a network of the diffusers library; that is for teachers"
            " that came from it, and what was distilled from them. Save others as .safetensors"
        )
    if type(net.net).__name__ != "UNet2DModel":
        raise UserError(f"--to=diffusers: the library has no pipeline of a {type(net.net).__name__} without a VAE")
    level = metadata.get("init_sigma")
    pipeline = _teacher_pipeline(net) if level is None else _one_step_pipeline(net, level)
    with network_files.new_folder(path) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        config = _config(folder / "unet" / CONFIG_FILE)
        text = json.dumps({**config, "_metadata": metadata}, indent=2)
        (folder / "unet" / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _one_step_pipeline(net: DiffusersDenoiser, level: float) -> Any:
    """One Euler step from `level` to 0, which starts at level * z and scales the model's input.

    The scheduler starts at its last time, a whole number; so `level` becomes that of the next time, and the schedule
    ends there. What the model embeds at that time becomes what it embedded at the generator's time.
    """
    if not isinstance(net.times, DiscreteTimes):
        raise UserError(
            f"--to=diffusers: no pipeline of the library starts a flow at noise level {level:g}; use .safetensors"
        )
    if net.times.nearest:
        raise UserError("--to=diffusers: the pipelines call a model at times that aren't whole; use .safetensors")
    diffusers = library()
    time = net.times.time(torch.tensor([level], dtype=torch.float64))
    last = max(2, math.ceil(time.item()))
    arguments = _betas(net)
    betas = torch.tensor(arguments["trained_betas"][:last])  # float32, as the scheduler's
    signal = (1 - betas).cumprod(dim=0)[-1].double().item()
    arguments |= {"trained_betas": [*betas.tolist(), 1 - 1 / (1 + level**2) / signal], "num_train_timesteps": last + 1}
    model = _without_variance(net)
    first: Any = model.time_embedding.linear_1
    difference = model.time_proj(time.float()) - model.time_proj(torch.tensor([float(last)]))
    first.bias.data += first.weight.data @ difference[0]
    scheduler = diffusers.EulerDiscreteScheduler(**arguments, timestep_spacing="trailing")
    return diffusers.ConsistencyModelPipeline(unet=model, scheduler=scheduler)


def _teacher_pipeline(net: DiffusersDenoiser) -> Any:
    diffusers = library()
    scheduler = _scheduler_of(net)
    is_flow = not isinstance(net.times, DiscreteTimes)
    if net.label_dim and is_flow:
        raise UserError("--to=diffusers: the library has no pipeline of a flow with classes; use .safetensors")
    if net.label_dim:  # the other pipelines take no classes
        scheduler = diffusers.EulerDiscreteScheduler(**_betas(net))
        return diffusers.ConsistencyModelPipeline(unet=_without_variance(net), scheduler=scheduler)
    if not is_flow and not isinstance(scheduler, diffusers.DDPMScheduler):
        scheduler = diffusers.DDPMScheduler(**_betas(net))
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    return diffusers.DDPMPipeline(copy.deepcopy(net.net) if learned else _without_variance(net), scheduler)


def _betas(net: DiffusersDenoiser) -> dict[str, Any]:
    """The arguments with which any scheduler of a diffusion adds noise as that of the network does."""
    betas = _scheduler_of(net).betas
    prediction = NAMED[net.prediction]
    return {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "prediction_type": prediction}


def _without_variance(net: DiffusersDenoiser) -> Any:
    """The model alone, without the channels that predict a variance."""
    model: Any = net.net
    if model.config.out_channels == net.img_channels:
        return copy.deepcopy(model)
    state = model.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = state[name][: net.img_channels]
    fewer = type(model).from_config({**model.config, "out_channels": net.img_channels})
    fewer.load_state_dict(state)
    return fewer
