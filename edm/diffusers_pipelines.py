"""Networks as pipelines of the diffusers library, which make the same images of the same noise.

A one-step generator answers p z - q F(b z, t) for standard normal noise z, where F is the model inside (`OneStep`).
The library's pipelines compute the same with other numbers:

    pipeline                                       starts at   model's input            result
    ConsistencyModelPipeline, LDMPipeline (Euler)  s z         s z / sqrt(1 + s^2)      s z - s F
    StableDiffusionPipeline, …XLPipeline (Euler)   the same
    DiTPipeline (DDIM), epsilon                    z           z                        (z - sqrt(1 - A) F) / sqrt(A)
    DiTPipeline (DDIM), v                          z           z                        sqrt(A) z - sqrt(1 - A) F

What differs goes into the weights: the input's factor into the first layer, the output's into the last, and the time,
which is a whole number in pipelines, into the bias of the time embedding. Several steps are in `edm.diffusion_steps`,
pipelines for prompts in `edm.text_pipelines`.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import persistence
from training import moments
from training.dit import EPS, DiTDenoiser, time_features
from training.parameterisations import DiscreteTimes, WrappedDenoiser
from training.steps import Steps

from . import latents, network_files
from .diffusers_folder import library, read_config
from .diffusers_models import MODELS, DiffusersDenoiser, scheduler_of
from .diffusers_reader import PIPELINE_ONLY
from .diffusion_steps import diffusion_steps
from .network_files import CONFIG_FILE
from .one_step import ADVICE, NAMED, OneStep, ending_at, refuse_whole_times, set_times
from .text_families import MODEL_FOLDERS
from .text_models import TextDenoiser
from .text_pipelines import pipeline_of_prompts

SHORTEST = 3  # times of a schedule of which only the last is used; fewer aren't read here again
MIN_DISTANCE = 1e-3  # of p from 1, where DDIM's schedules have no noise


def write(net: Any, path: Path) -> str:
    """Writes a denoiser of the library's classes as a pipeline of the library, in a new folder that appears whole.

    A generator becomes a pipeline that calls it at the noise levels in its metadata; another denoiser one of many
    steps. Returns how to call the pipeline from Python.
    Errors: UserError when the library has no pipeline for the network, or `path` is there already.
    """
    if type(net) not in (DiffusersDenoiser, DiTDenoiser, TextDenoiser):
        raise UserError(
            f"--to=diffusers: {type(net).__name__} isn't a class of the diffusers library; that is for teachers"
            f" of its classes, DiT and SiT, and what was distilled from them; {ADVICE}"
        )
    moments.refuse(net, "--to=diffusers", "the library's pipelines know")
    metadata, vae = net.metadata, _vae(net)
    steps = Steps.of(net)
    part = "transformer" if type(net) is DiTDenoiser else {**MODELS, **MODEL_FOLDERS}[type(net.net).__name__]
    make = {
        ("unet", False): _pipeline_of_images,
        ("unet", True): _pipeline_of_latents,
        ("transformer", True): _pipeline_of_transformer,
    }.get((part, vae is not None))
    if isinstance(net, TextDenoiser):
        changes, (pipeline, call) = {PIPELINE_ONLY: True}, pipeline_of_prompts(net, steps, vae)
    elif make is None:
        raise UserError(f"--to=diffusers: DiTPipeline, the library's only one for a DiT, needs a VAE; {ADVICE}")
    else:
        pipeline, call, changes = make(net, steps, vae)
    with network_files.new_folder(path) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        config = read_config(folder / part / CONFIG_FILE)
        values = {name: value for name, value in {**metadata, **changes}.items() if name not in ("vae", "text")}
        text = json.dumps({**config, "_metadata": values}, indent=2)
        (folder / part / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return f"{type(pipeline).__name__}: pipeline({call})"


def _is_flow_of_prompts(net: Any) -> bool:
    """Whether a network is a flow of prompts, such as Stable Diffusion 3."""
    return isinstance(net, TextDenoiser) and net.times.is_flow


def _vae(net: Any) -> Any:
    """The VAE of a network, with its scale in its own configuration, as pipelines use it; None without one."""
    decoder = latents.decoder_by(net.metadata, net)
    if decoder is None:
        return None
    record, vae = net.metadata["vae"], copy.deepcopy(decoder.vae).cpu()
    scales, shifts = (record[key] if isinstance(record[key], list) else [record[key]] for key in ("scale", "shift"))
    takes_shift = _is_flow_of_prompts(net)
    if (any(shifts) and not takes_shift) or len({*scales}) > 1 or len({*shifts}) > 1:
        raise UserError(
            "--to=diffusers: this pipeline of the library has one scale for all channels of latents and"
            f" {'one' if takes_shift else 'no'} shift, and this network has others; {ADVICE}"
        )
    values = {"scaling_factor": scales[0], "shift_factor": float(shifts[0]) if takes_shift else None}
    values |= {"latents_mean": None, "latents_std": None}
    vae.register_to_config(**{name: value for name, value in values.items() if name in vae.config})
    return vae


def _pipeline_of_images(net: DiffusersDenoiser, steps: Steps | None, _vae: None) -> tuple[Any, str, dict[str, Any]]:
    pipelines, classes = library(), "class_labels=[...], " if net.label_dim else ""
    if steps is not None:
        model, scheduler, changes, arguments = _steps_of_unet(net, steps)
        call = f"{classes}batch_size=..." + (f", {arguments}" if len(steps) > 1 else "")
        return pipelines.ConsistencyModelPipeline(model, scheduler), call, changes
    scheduler = scheduler_of(net)
    is_flow = not isinstance(net.times, DiscreteTimes)
    if net.label_dim and is_flow:
        raise UserError(f"--to=diffusers: the library has no pipeline of a flow with classes; {ADVICE}")
    if net.label_dim:  # the other pipelines take no classes
        scheduler = pipelines.EulerDiscreteScheduler(**_betas(net))
        pipeline = pipelines.ConsistencyModelPipeline(_without_variance(net), scheduler)
        return pipeline, f"{classes}batch_size=..., num_inference_steps=...", {}
    if not is_flow and not isinstance(scheduler, pipelines.DDPMScheduler):
        scheduler = pipelines.DDPMScheduler(**_betas(net))
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    model = copy.deepcopy(net.net) if learned else _without_variance(net)
    return pipelines.DDPMPipeline(model, scheduler), "batch_size=..., num_inference_steps=...", {}


def _pipeline_of_latents(net: DiffusersDenoiser, steps: Steps | None, vae: Any) -> tuple[Any, str, dict[str, Any]]:
    pipelines = library()
    if net.label_dim:
        raise UserError(f"--to=diffusers: the library's pipeline of a UNet2DModel and a VAE takes no classes; {ADVICE}")
    if steps is not None:
        model, scheduler, changes, arguments = _steps_of_unet(net, steps)
        if arguments.startswith("timesteps"):
            raise UserError(
                "--to=diffusers: LDMPipeline takes no list of times, which fresh noise needs; distil with"
                f" --steps-noise=ddim, or {ADVICE}"
            )
        return pipelines.LDMPipeline(vae, model, scheduler), f"batch_size=..., {arguments}", changes
    _refuse_flow(net, "LDMPipeline")
    scheduler = pipelines.DDIMScheduler(**_betas(net), clip_sample=False)
    return pipelines.LDMPipeline(vae, _without_variance(net), scheduler), "batch_size=..., num_inference_steps=...", {}


def _pipeline_of_transformer(net: WrappedDenoiser, steps: Steps | None, vae: Any) -> tuple[Any, str, dict[str, Any]]:
    pipelines = library()
    if steps is not None:
        if len(steps) > 1:
            _refuse_steps(steps, "a DiT")
        model, scheduler = _ddim_step(net, steps.levels[0])
        call = "class_labels=[...], num_inference_steps=1, guidance_scale=1"
        return pipelines.DiTPipeline(model, vae, scheduler), call, {PIPELINE_ONLY: True}
    _refuse_flow(net, "DiTPipeline")
    if isinstance(net, DiTDenoiser):
        raise UserError(f"--to=diffusers: the library's DiT embeds times otherwise, so only a generator fits; {ADVICE}")
    scheduler = pipelines.DDIMScheduler(**_betas(net), clip_sample=False)
    call = "class_labels=[...], num_inference_steps=..., guidance_scale=1"
    return pipelines.DiTPipeline(copy.deepcopy(net.net), vae, scheduler), call, {}


def _refuse_flow(net: WrappedDenoiser, pipeline: str) -> None:
    if not isinstance(net.times, DiscreteTimes):
        raise UserError(f"--to=diffusers: the library's {pipeline} can't run a scheduler of flows; {ADVICE}")


def _refuse_steps(steps: Steps, of: str) -> None:
    raise UserError(f"--to=diffusers: the library has no pipeline for {len(steps)} steps of {of}; {ADVICE}")


def _steps_of_unet(net: DiffusersDenoiser, steps: Steps) -> tuple[Any, Any, dict[str, Any], str]:
    """(model, scheduler, changes of the metadata, arguments of the pipeline) for the steps of a generator."""
    if len(steps) == 1:
        return *_euler_step(net, steps.levels[0]), "num_inference_steps=1"
    refuse_whole_times(net)
    if not isinstance(net.times, DiscreteTimes):
        _refuse_steps(steps, "a flow without prompts")
    model = _without_variance(net)
    scheduler, arguments = diffusion_steps(net, steps, model)
    return model, scheduler, {PIPELINE_ONLY: True}, arguments


# --- one step


def _euler_step(net: DiffusersDenoiser, level: float) -> tuple[Any, Any, dict[str, Any]]:
    """(model, scheduler, changes of the metadata) for one Euler step from the last noise level s of a schedule to 0.

    s is the generator's own level, and the schedule up to it that of its teacher. A flow becomes a prediction of the
    noise at s = b, which has the same result.
    """
    refuse_whole_times(net)
    step, model, prediction = OneStep(net, level), _without_variance(net), net.prediction
    if isinstance(net.times, DiscreteTimes):
        start, last = level, max(SHORTEST - 1, math.ceil(step.t))
        betas = torch.tensor(_betas(net)["trained_betas"][:last])
    else:
        start, last, prediction = step.p, SHORTEST - 1, "epsilon"
        betas = _rising_betas(start, last)
        _scale_input(model, math.sqrt(1 + start**2))
    set_times(model, [step.t], [last])
    arguments = ending_at(betas, 1 / (1 + start**2))
    scheduler = library().EulerDiscreteScheduler(
        **arguments, prediction_type=NAMED[prediction], timestep_spacing="trailing"
    )
    return model, scheduler, {"init_sigma": start}


def _ddim_step(net: WrappedDenoiser, level: float) -> tuple[Any, Any]:
    """(model, scheduler) for one step of DDIM that starts at plain noise."""
    refuse_whole_times(net)
    step, last = OneStep(net, level), SHORTEST - 1
    model: Any = transformer_of_library(net) if isinstance(net, DiTDenoiser) else copy.deepcopy(net.net)
    if net.prediction == "x0":
        named, signal, output = "sample", 0.5, 1.0  # any schedule
    elif abs(step.p - 1) < MIN_DISTANCE:
        raise UserError(f"--to=diffusers: DiTPipeline can't start at noise level {level:g}; {ADVICE}")
    elif step.p > 1:
        named, signal = "epsilon", step.p**-2
        output = step.q * math.sqrt(signal / (1 - signal))
    else:
        named, signal = "v_prediction", step.p**2
        output = step.q / math.sqrt(1 - signal)
    _scale_input(model, step.b)
    for parameter in model.proj_out_2.parameters():
        parameter.data *= output
    set_times(model, [step.t], [last], time_features if isinstance(net, DiTDenoiser) else None)
    arguments = ending_at(_rising_betas(math.sqrt(1 / signal - 1), last), signal)
    scheduler = library().DDIMScheduler(
        **arguments, prediction_type=named, timestep_spacing="trailing", clip_sample=False
    )
    return model, scheduler


def _scale_input(model: Any, factor: float) -> None:
    """Multiplies a model's input by a factor. Errors: UserError when its first layer can't do that."""
    blocks = [*(model.config.get("down_block_types") or ()), *(model.config.get("up_block_types") or ())]
    if model.config.get("center_input_sample") or any(block.startswith("Skip") for block in blocks):
        raise UserError(f"--to=diffusers: this UNet2DModel also uses its input past the first layer; {ADVICE}")
    first = model.conv_in if hasattr(model, "conv_in") else model.pos_embed.proj
    first.weight.data *= factor


def _rising_betas(sigma: float, number: int) -> torch.Tensor:
    """The betas of a schedule whose noise levels rise evenly to `sigma`, float32."""
    signal = 1 / (1 + torch.linspace(0, sigma, number + 2, dtype=torch.float64)[:-1] ** 2)
    return (1 - signal[1:] / signal[:-1]).float()


# --- the published DiT and SiT as the library's class

TRANSFORMER_NAMES = {  # of weights in training/dit.py: in the library; {i} is the number of a block
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
    "blocks.{i}.attn.proj": "transformer_blocks.{i}.attn1.to_out.0",
    "blocks.{i}.mlp.fc1": "transformer_blocks.{i}.ff.net.0.proj",
    "blocks.{i}.mlp.fc2": "transformer_blocks.{i}.ff.net.2",
    "blocks.{i}.adaLN_modulation.1": "transformer_blocks.{i}.norm1.linear",
    "t_embedder.mlp.0": "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table",
}


def transformer_of_library(net: DiTDenoiser) -> Any:
    """A DiTTransformer2DModel with the weights of a DiT or SiT. It embeds times with slightly other frequencies.

    Errors: UserError when the library's class has no such network.
    """
    transformer: Any = net.net
    blocks, own = transformer.blocks, transformer.state_dict()
    width, num_heads = blocks[0].attn.proj.in_features, blocks[0].attn.num_heads
    model = library().DiTTransformer2DModel(
        sample_size=net.img_resolution,
        in_channels=net.img_channels,
        out_channels=transformer._out_channels,
        patch_size=transformer._patch_size,
        num_layers=len(blocks),
        num_attention_heads=num_heads,
        attention_head_dim=width // num_heads,
        num_embeds_ada_norm=net.label_dim,
        norm_num_groups=1,
        norm_eps=EPS,
    )
    same = model.pos_embed.pos_embed.shape == own["pos_embed"].shape
    if not same or not torch.allclose(model.pos_embed.pos_embed, own["pos_embed"], atol=1e-4):
        raise UserError(f"--to=diffusers: the library's DiT has other embeddings of positions; {ADVICE}")
    state = {}
    for i in range(len(blocks)):
        for old, new in TRANSFORMER_NAMES.items():
            old, new = old.format(i=i), new.format(i=i)
            state |= {name.replace(old, new): own[name] for name in (f"{old}.weight", f"{old}.bias") if name in own}
        for kind in ("weight", "bias"):
            for letter, value in zip("qkv", own[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)):
                state[f"transformer_blocks.{i}.attn1.to_{letter}.{kind}"] = value
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"--to=diffusers: the library's DiT has other layers ({persistence.one_line(error, 120)}); {ADVICE}"
        ) from None
    return model


# --- parts of both


def _betas(net: WrappedDenoiser) -> dict[str, Any]:
    """The arguments that make any diffusion scheduler add noise as the network's own does."""
    betas = scheduler_of(net).betas
    prediction = NAMED[net.prediction]
    return {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "prediction_type": prediction}


def _without_variance(net: DiffusersDenoiser) -> Any:
    """The UNet2DModel alone, without the channels that predict a variance."""
    model: Any = net.net
    if model.config.out_channels == net.img_channels:
        return copy.deepcopy(model)
    state = model.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = state[name][: net.img_channels]
    fewer = type(model).from_config({**model.config, "out_channels": net.img_channels})
    fewer.load_state_dict(state)
    return fewer
