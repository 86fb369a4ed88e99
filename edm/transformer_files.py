"""Checkpoints of DiT and SiT as their authors publish them: .pt files of weights, read without running any of it."""

import re
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import persistence
from torch_utils.untrusted.state_file import read_state
from training.denoiser import SIGMA_DATA
from training.dit import FREQUENCIES, KINDS, DiTDenoiser

from . import latents, network_files
from .diffusers_models import LATENT_SIGMA_DATA

FIRST_WEIGHT = "x_embedder.proj.weight"
PARTS = ("ema", "model", "state_dict")  # of a training's checkpoint, the first of them that is there
PROBES, MIN_SIMILARITY = 4, 0.6  # noise images that distinguish DiT from SiT, and the least cosine that decides
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width, of the sizes S, B, L and XL
VAE_ADVICE = "such as stabilityai/sd-vae-ft-mse of the Hugging Face Hub"


def weights_of(path: Path) -> dict[str, torch.Tensor] | None:
    """The weights of a checkpoint in DiT's layout, or of the average in that of a training; None for other files.

    Errors: UserError when the file can't be read, or holds code.
    """
    try:
        state = read_state(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: check the file name") from None
    except Exception as error:  # of damaged data, and of what isn't plain values and tensors
        raise UserError(
            f"{path}: not weights alone, or damaged ({persistence.one_line(error, 120)}); in PyTorch, save the state"
            " dict of the network again: torch.save(net.state_dict(), file)"
        ) from None
    if not isinstance(state, dict):
        return None
    state = next((state[part] for part in PARTS if isinstance(state.get(part), dict)), state)
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    sound = FIRST_WEIGHT in state and all(isinstance(value, torch.Tensor) for value in state.values())
    return state if sound else None


def read(path: Path, state: dict[str, torch.Tensor]) -> tuple[DiTDenoiser, dict[str, Any]]:
    """(denoiser, metadata) of a checkpoint's weights. Errors: UserError when they don't fit, or a VAE is missing."""
    arguments = shapes_of(path, state)
    kind = kind_by_name(path)
    if kind is None:
        kind = kind_by_answers(_build("dit", arguments, state, path).net)
    if kind is None:
        raise UserError(
            f"{path}: DiT or SiT? Its answers to noise fit neither: let the file's name begin with DiT- or SiT-"
        )
    metadata: dict[str, Any] = {"kind": "teacher"}
    if arguments["img_channels"] not in (1, 3):
        nearby = path.resolve().parent / latents.FOLDER
        if not (nearby / network_files.CONFIG_FILE).is_file():
            raise UserError(
                f"{path}: its {arguments['img_channels']} channels are latents: put the folder of the VAE that it was"
                f" trained with as {latents.FOLDER}/ next to it, {VAE_ADVICE}"
            )
        metadata["vae"] = latents.record_of(nearby)
    arguments["sigma_data"] = LATENT_SIGMA_DATA if "vae" in metadata else SIGMA_DATA
    net = _build(kind, arguments, state, path)
    try:
        latents.check_channels(net, metadata)
    except UserError as error:
        raise UserError(f"{path}: {error.message}") from None
    return net, metadata


def _build(kind: str, arguments: dict[str, Any], state: dict[str, torch.Tensor], path: Path) -> DiTDenoiser:
    state = {f"net.{name}": value for name, value in state.items()}
    net = persistence.construct(DiTDenoiser, (), {"kind": kind, **arguments}, state, path)
    return network_files.checked(net, path)


def kind_by_name(path: Path) -> str | None:
    """'dit' or 'sit' by the name of the file or of its folders; None if they tell neither or both."""
    for name in (path.stem, *(parent.name for parent in path.resolve().parents)):
        found = {kind for kind in KINDS if re.search(rf"(?<![a-z]){kind}(?![a-z])", name.lower())}
        if len(found) == 1:
            return found.pop()
    return None


@torch.no_grad()
def kind_by_answers(net: Any) -> str | None:
    """'dit' or 'sit' by what a `training.dit.Transformer` answers to noise z; None if neither fits.

    A DiT predicts the noise: z, at time 999. A SiT predicts the image less the noise: about -z, at time 0.
    """
    side = round(net.pos_embed.shape[1] ** 0.5) * net.x_embedder.proj.kernel_size[0]
    channels, no_class = net.x_embedder.proj.in_channels, net.y_embedder.embedding_table.num_embeddings - 1
    z = torch.randn([PROBES, channels, side, side], generator=torch.Generator().manual_seed(0))
    condition = torch.full([PROBES], no_class)
    answers = [net(z, torch.full([PROBES], time), condition)[:, :channels] for time in (999.0, 0.0)]
    late, early = (torch.cosine_similarity(answer.flatten(), z.flatten(), dim=0).item() for answer in answers)
    is_dit, is_sit = late > MIN_SIMILARITY, early < -MIN_SIMILARITY
    return None if is_dit == is_sit else "dit" if is_dit else "sit"


def shapes_of(path: Path, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of `DiTDenoiser` that the shapes of the weights tell. Errors: UserError."""
    unknown = UserError(f"{path}: not the weights of a DiT or SiT with classes, as they are published")
    try:
        width, channels, patch_size, _ = state[FIRST_WEIGHT].shape
        side = round(state["pos_embed"].shape[1] ** 0.5)
        classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        outputs = state["final_layer.linear.weight"].shape[0] // patch_size**2
        times = state["t_embedder.mlp.0.weight"].shape[1]
        mlp_width = state["blocks.0.mlp.fc1.weight"].shape[0]
    except (LookupError, ValueError, ZeroDivisionError):
        raise unknown from None
    if times != 2 * FREQUENCIES or classes < 1:
        raise unknown
    if width not in HEADS and width % 64:
        raise UserError(
            f"{path}: doesn't tell how many attention heads its {width} channels have; build"
            " training.dit.DiTDenoiser in Python, load the weights into its net and save it by edm.zoo.save_network"
        )
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return {
        "img_resolution": side * patch_size,
        "img_channels": channels,
        "label_dim": classes,
        "width": width,
        "depth": depth,
        "num_heads": HEADS.get(width, width // 64),
        "patch_size": patch_size,
        "mlp_width": mlp_width,
        "out_channels": outputs,
    }
