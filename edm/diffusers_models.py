"""Networks of the diffusers library as denoisers: a folder in its layout, or the name of one on the Hugging Face Hub.

A folder holds either a pipeline (model_index.json, the model in unet/ or transformer/, scheduler/) or a model alone
(config.json) with scheduler_config.json, scheduler/ or ../scheduler/. Weights are read from safetensors only, and
no code that a folder may hold is run. The library is imported when the first such network is built.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import persistence
from torch_utils.persistence import persistent_class
from torch_utils.untrusted import edm_pickle
from training.denoiser import SIGMA_DATA
from training.parameterisations import DiscreteTimes, FlowTimes, WrappedDenoiser

from . import latents, network_files
from .diffusers_folder import library, licence, read_config, weights
from .network_files import CONFIG_FILE, INDEX_FILE

SCHEDULER_FILE = "scheduler_config.json"
MAX_STEPS = 100_000
MODELS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}  # class: its folder in a pipeline
VAES = (latents.FOLDER, "vqvae", "movq")  # what pipelines call the folder of a VAE
LATENT_SIGMA_DATA = 1.0  # about the standard deviation of latents as such models scale them
OTHER_PARTS = {  # of a pipeline, and what its presence means
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
    """(channels, resolution) of a model's images. Errors: UserError when this project can't use such images."""
    channels, size = config.in_channels, config.sample_size
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int:
        raise UserError(f"its sample_size is {str(size)[:80]}; set it in config.json to the width of the square images")
    out_channels = channels if config.out_channels is None else config.out_channels
    if out_channels not in (channels, 2 * channels):
        raise UserError(
            f"it takes {channels} channels and answers {out_channels}; images with a condition aren't supported"
        )
    return channels, size


def _scheduler(config: dict[str, Any]) -> Any:
    """The library's scheduler of a configuration. Errors: UserError when it is of no Gaussian diffusion or flow."""
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


# --- reading a folder


def is_folder(path: str | Path) -> bool:
    """Whether a folder is in the library's layout, and not one that this project wrote for itself."""
    if (Path(path) / INDEX_FILE).is_file():
        return True
    try:
        config = read_config(Path(path) / CONFIG_FILE)
    except UserError:
        return False
    return "_sha256" not in config and ("_diffusers_version" in config or config.get("_class_name") in MODELS)


def read(path: Path) -> tuple[DiffusersDenoiser, dict[str, Any]]:
    """(denoiser, metadata) of a folder. Errors: UserError when it is damaged or not supported."""
    try:
        folder, scheduler, vae_folder = _parts(path)
        config = read_config(folder / CONFIG_FILE)
        metadata = config.pop("_metadata", {})
        model = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
        if model.get("_class_name") not in MODELS:  # before weights of another kind are looked for
            DiffusersDenoiser(model, {})
        state = {f"net.{name}": tensor for name, tensor in weights(folder).items()}
        settings: dict[str, Any] = {"model": model, "scheduler": read_config(scheduler)}
        if not edm_pickle.is_plain(settings):
            raise UserError("its configuration holds more than plain values")
        metadata = network_files.checked_metadata(metadata or {"kind": "teacher", **licence(path)}, path)
        if vae_folder is not None:
            settings["sigma_data"] = LATENT_SIGMA_DATA
            metadata["vae"] = latents.record_of(vae_folder)
        net = persistence.construct(DiffusersDenoiser, (), settings, state, path)
        if vae_folder is None and net.img_channels not in (1, 3):
            raise UserError(
                f"its {net.img_channels} channels are latents, but there is no VAE: put the folder of the one that it"
                f" was trained with as {latents.FOLDER}/ next to its own"
            )
        latents.check_channels(net, metadata)
        return network_files.checked(net, path), metadata
    except UserError as error:
        raise UserError(f"{path}: {error.message.removeprefix(f'{path}: ')}") from None


def _parts(path: Path) -> tuple[Path, Path, Path | None]:
    """(folder of the model, file of its scheduler's configuration, folder of its VAE if it has one)."""
    folder, named, vaes = path, [], [path / latents.FOLDER, path.resolve().parent / latents.FOLDER]
    if (path / INDEX_FILE).is_file():
        index = read_config(path / INDEX_FILE)
        parts = {name for name, value in index.items() if isinstance(value, list) and all(value)}
        for part, meaning in OTHER_PARTS.items():
            if part in parts:
                raise UserError(f"{path}: a {str(index.get('_class_name'))[:80]}: {meaning}")
        named = [path / name for name in VAES if name in parts]
        vaes = named
        found = [name for name in MODELS.values() if name in parts]
        if len(found) != 1:
            raise UserError(f"{path}: {INDEX_FILE} names neither a unet nor a transformer, or names both")
        folder = path / found[0] if (path / found[0] / CONFIG_FILE).is_file() else path
    vae = next((vae for vae in vaes if (vae / CONFIG_FILE).is_file()), None)
    if named and vae is None:
        raise UserError(f"{path}: {INDEX_FILE} names a VAE, but there is no {named[0].name}/{CONFIG_FILE}")
    places = [folder, folder / "scheduler", path / "scheduler", folder.resolve().parent / "scheduler"]
    for place in places:
        if (place / SCHEDULER_FILE).is_file():
            return folder, place / SCHEDULER_FILE, vae
    raise UserError(
        f"{path}: has no {SCHEDULER_FILE}, which says how noise was added in training: put the file of the scheduler"
        " that the model was trained with next to config.json"
    )


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
        raise UserError(f"--to=diffusers: the library has no pipeline of a {type(net.net).__name__} alone")
    if "vae" in metadata:
        raise UserError("--to=diffusers: the library has no pipeline of one step with a VAE; use .safetensors")
    level = metadata.get("init_sigma")
    pipeline = _teacher_pipeline(net) if level is None else _one_step_pipeline(net, level)
    with network_files.new_folder(path) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        config = read_config(folder / "unet" / CONFIG_FILE)
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
