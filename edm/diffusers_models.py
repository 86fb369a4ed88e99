"""Networks of the diffusers library as denoisers. The library is imported when the first such network is built."""

from typing import Any

import torch

from dnnlib import UserError
from torch_utils.persistence import persistent_class
from training.denoiser import SIGMA_DATA
from training.parameterisations import DiscreteTimes, FlowTimes, WrappedDenoiser

from .diffusers_folder import SCHEDULER_FILE, build, library

MAX_STEPS = 100_000
MODELS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}  # class: its folder in a pipeline
LATENT_SIGMA_DATA = 1.0  # about the standard deviation of latents as such models scale them
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


class LibraryDenoiser(WrappedDenoiser):
    """The denoiser of a model of the diffusers library; what its kinds have in common."""

    supported: tuple[str, ...] = ()  # classes of the library's models
    checkpoint = False  # `torch_utils.precision.checkpoint_blocks` sets it: recompute activations

    @classmethod
    def import_library(cls) -> None:
        """Imports what the constructor uses; `persistence.construct` calls it before it counts the constructor's steps.

        Errors: UserError when the library isn't installed.
        """
        for name in (*cls.supported, "DDPMScheduler"):  # the library imports its modules when they are first used
            getattr(library(), name)

    def model(self) -> Any:
        """The library's model, set up to be called."""
        net: Any = self.net
        if self.checkpoint and not net.is_gradient_checkpointing:
            net.enable_gradient_checkpointing()
        return net


@persistent_class
class DiffusersDenoiser(LibraryDenoiser):
    """The denoiser of a model of the diffusers library.

    model, scheduler: their configurations as the library's JSON files hold them, `_class_name` included.
    dropout:          of the model; None leaves it as the configuration says.
    nearest:          whether times are rounded to those of training instead of interpolated between them; always so
                      for an embedding table of times.
    null_class:       the index that stands for no class (attribute); None if the model has none.

    Errors: UserError when the model or the scheduler isn't supported, or the library isn't installed.
    """

    supported = tuple(MODELS)

    def __init__(
        self,
        model: dict[str, Any],
        scheduler: dict[str, Any],
        dropout: float | None = None,
        nearest: bool = False,
        sigma_data: float = SIGMA_DATA,
    ):
        library()
        name = model.get("_class_name")
        if name not in MODELS:
            raise UserError(
                f"its model is a {str(name)[:80]!r}; the supported classes are {' and '.join(MODELS)}, and in"
                " text-to-image pipelines those of Stable Diffusion 1 to 3, FLUX.1 and SANA; wrap another yourself"
                " (docs/own-networks.md)"
            )
        given = {} if dropout is None else {"dropout": dropout}
        net = build(name, {**model, **given})
        channels, resolution = shape_of(net.config)
        embedding = net.config.get("time_embedding_type", "positional")
        if embedding not in ("positional", "learned"):
            raise UserError(
                f"its time embedding is {str(embedding)[:80]!r}, which isn't supported; wrap it yourself"
                " (docs/own-networks.md)"
            )
        is_dit = name == "DiTTransformer2DModel"
        if net.config.get("class_embed_type") is not None:
            raise UserError(
                f"its classes are embedded as {str(net.config.class_embed_type)[:80]!r}, not by a table; wrap it"
                " yourself (docs/own-networks.md)"
            )
        label_dim = (net.config.num_embeds_ada_norm if is_dit else net.config.num_class_embeds) or 0
        prediction, times = times_of(scheduler, nearest or embedding == "learned")
        super().__init__(net, prediction, times, resolution, channels, int(label_dim), sigma_data)
        self.null_class = self.label_dim if is_dit else None
        for module in net.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # only guidance drops classes here

    def answer(self, x_s: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        net = self.model()
        if not self.label_dim:
            return net(x_s, t, return_dict=False)[0]
        if class_labels is None:
            class_labels = x_s.new_zeros([x_s.shape[0], self.label_dim])
        index = class_labels.argmax(dim=1)
        if self.null_class is not None:
            index = torch.where(class_labels.any(dim=1), index, self.null_class)
        return net(x_s, timestep=t, class_labels=index, return_dict=False)[0]


def shape_of(config: Any) -> tuple[int, int]:
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


def scheduler_of(net: Any) -> Any:
    """The library's scheduler that says how noise was added in the training of a `DiffusersDenoiser`."""
    return _scheduler(net.init_kwargs["scheduler"])


def times_of(config: dict[str, Any], nearest: bool) -> tuple[str, DiscreteTimes | FlowTimes]:
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
