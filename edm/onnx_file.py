"""Networks as ONNX files, which run without PyTorch and without this code: in onnxruntime, on phones, in browsers."""

import inspect
import json
import logging
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils.finiteness import first_non_finite
from torch_utils.persistence import one_line
from training.conditions import blank_condition
from training.decoder import LatentDecoder, PixelDecoder
from training.generator import Generator
from training.steps import Steps

SIGMA_MIN, SIGMA_MAX, PROBED_LEVELS = 0.002, 80.0, 8
MAX_BYTES = 2**31 - 2**24  # of weights: an ONNX file is one message, which holds 2 GiB
LARGEST_HALF = 65504.0  # the largest number in float16
EXAMPLES, MAX_IMAGES = 2, 1 << 30  # images in the traced call, and in any later one
# From 64 images, the diffusers library's layers copy an activation, for PyTorch alone; the file has no such limit.
MAX_IMAGES_OF_DIFFUSERS = 63


class _Images(torch.nn.Module):
    """Everything a generator does, from standard normal noise to 8-bit images.

    decoder: of its latents, which are decoded as part of the model; None for a generator of images.
    """

    inputs, output = ("z",), "images"

    def __init__(self, net: torch.nn.Module, steps: Steps, decoder: LatentDecoder | None):
        super().__init__()
        self.net, self._generator = net, Generator(net, steps)
        self.vae, self._decode = (None, None) if decoder is None else (decoder.vae, decoder.decode)

    def forward(self, z: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return self._images(z, (), condition)

    def _images(self, z: torch.Tensor, noise: Sequence[torch.Tensor], condition: torch.Tensor | None) -> torch.Tensor:
        draws = iter(noise)
        x = self._generator.sample(z, condition, lambda _: next(draws))
        return PixelDecoder.to_images(x if self._decode is None else self._decode(x))


class _ImagesOfFreshNoise(_Images):
    """A generator whose further steps draw noise: [N, steps - 1, C, H, W]."""

    inputs = ("z", "noise")

    def forward(self, z: torch.Tensor, noise: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return self._images(z, noise.unbind(dim=1), condition)


class _Denoiser(torch.nn.Module):
    """A denoiser of x [N, C, H, W] and sigma [N]."""

    inputs, output = ("x", "sigma"), "denoised"

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(x, sigma, condition)


def _function(
    net: Any, steps: Steps | None, decoder: LatentDecoder | None
) -> tuple[_Images | _Denoiser, list[torch.Tensor]]:
    """(what the model does, an example of its inputs without the condition)."""
    x = torch.zeros([EXAMPLES, net.img_channels, net.img_resolution, net.img_resolution])
    if steps is None:
        return _Denoiser(net), [x, torch.ones([EXAMPLES])]
    if len(steps) > 1 and steps.noise == "fresh":
        return _ImagesOfFreshNoise(net, steps, decoder), [x, torch.stack([x] * (len(steps) - 1), dim=1)]
    return _Images(net, steps, decoder), [x]


def condition_name(net: Any) -> str:
    """The model's input that says what to make an image of."""
    return "class_labels" if net.label_dim else "prompts"


def _condition(net: Any) -> torch.Tensor | None:
    """An example of a network's conditions: the first class, or zeros in place of prompts."""
    return torch.eye(net.label_dim)[[0] * EXAMPLES] if net.label_dim else blank_condition(net, EXAMPLES)


def can_trace() -> bool:
    """Whether this PyTorch is new enough."""
    return "dynamic_shapes" in inspect.signature(torch.onnx.export).parameters


@torch.no_grad()
def _check_finite(net: Any, steps: Steps | None, decoder: LatentDecoder | None) -> None:
    """Calls the network at the noise levels that matter, since the exported model checks nothing.

    Errors: UserError when a weight, an answer or an image isn't finite.
    """
    weight = first_non_finite(net)
    if weight is not None:
        raise UserError(f".onnx: {weight} holds NaN or infinity; take an earlier snapshot")
    draws = torch.Generator().manual_seed(0)
    z = torch.randn([EXAMPLES, net.img_channels, net.img_resolution, net.img_resolution], generator=draws)
    condition = _condition(net)
    for sigma in _noise_levels(net) if steps is None else steps.levels:
        answer = net(sigma * z, torch.full([EXAMPLES], float(sigma)), condition)
        if not answer.isfinite().all():
            raise UserError(f".onnx: the network's answer at noise level {sigma:g} is NaN or infinite; export another")
        if steps is not None and decoder is not None:
            decoder.to_images(answer)


def _noise_levels(net: Any) -> list[float]:
    """Noise levels over the range that samplers use (arXiv:2206.00364, Table 1), within the network's own range."""
    lowest, highest = max(SIGMA_MIN, float(net.sigma_min)), min(SIGMA_MAX, float(net.sigma_max))
    levels = torch.logspace(math.log10(lowest), math.log10(highest), PROBED_LEVELS)
    return net.round_sigma(levels.clamp(lowest, highest)).tolist()


def model_bytes(net: Any, header: dict[str, Any], decoder: LatentDecoder | None = None) -> bytes:
    """The file of a network in eval mode on the CPU, for any number N of images.

    A generator, known by the init_sigma in header['metadata'], takes z, standard normal [N, C, H, W], to images, uint8
    [N, C, H, W]; with several steps of fresh noise it also takes noise, standard normal [N, steps - 1, C, H, W]. Any
    other denoiser takes x [N, C, H, W] and sigma [N] to denoised [N, C, H, W]. With classes, both take class_labels
    [N, label_dim], one-hot; with prompts, both take prompts [N, prompt_dim], as the text encoders give them. The inputs
    are float32. A denoiser of latents takes and makes latents.
    header: plain values that go with the model. decoder: of a generator of latents; its VAE becomes part of the model.
    Errors: UserError when packages are missing or too old, the network can't be traced, or its weights or answers
    aren't finite.
    """
    _check_possible(net, decoder)
    steps = Steps.recorded(header["metadata"])
    function, example = _function(net, steps, decoder)
    inputs = dict(zip(function.inputs, example))
    condition = _condition(net)
    if condition is not None:
        inputs[condition_name(net)] = condition
    try:
        _check_finite(net, steps, decoder)
        model = _traced(function.eval(), inputs)
    except UserError:
        raise
    except Exception as error:  # of the tracer, on what a network of any class does
        reason = re.sub(r"\x1b\[\d+m", "", one_line(error))  # without colours
        raise UserError(
            f"{type(net).__name__} can't be made an ONNX model by PyTorch {torch.__version__}: {reason}"
        ) from None
    if any(tensor.type.tensor_type.shape.dim[0].dim_value for tensor in model.graph.input):
        raise UserError(
            f"{type(net).__name__} can't be made an ONNX model for any number of images: its forward method looks at"
            " how many there are; take that out"
        )
    _remove_traces(model.graph)
    model.metadata_props.add(key="network", value=json.dumps(header))
    return model.SerializeToString(deterministic=True)


def _check_possible(net: Any, decoder: LatentDecoder | None) -> None:
    """Errors: UserError when the weights are too large for one file, or packages are missing or too old."""
    parts = [net] if decoder is None else [net, decoder.vae]
    size = sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
    if size > MAX_BYTES:
        raise UserError(
            f".onnx: one file holds at most 2 GiB, and the weights have {size / 2**30:.2f}; save another way"
        )
    if not can_trace():
        raise UserError(f".onnx needs PyTorch 2.6 or newer, and this is {torch.__version__}")
    try:
        import onnxscript  # noqa: F401  which torch.onnx needs, as it needs onnx
    except ImportError:
        raise UserError(".onnx needs packages that are missing: pip install onnx onnxscript") from None


def _traced(function: _Images | _Denoiser, inputs: dict[str, torch.Tensor]) -> Any:
    """The ONNX model of a function of any number of images. inputs: an example by name, in the function's order."""
    of_diffusers = any(type(part).__module__.startswith("diffusers.") for part in function.modules())
    images = {0: torch.export.Dim("N", max=MAX_IMAGES_OF_DIFFUSERS if of_diffusers else MAX_IMAGES)}
    # Its warnings concern packages that these networks don't use.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            function,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=[function.output],
            dynamic_shapes=(images,) * len(inputs),
        )
    assert program is not None  # with dynamo=True
    return program.model_proto


def _remove_traces(graph: Any) -> None:
    """Removes the exporter's notes on each node: lines of code, and the paths on this machine that hold them."""
    del graph.value_info[:]
    for item in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        for name in ("doc_string", "metadata_props"):
            if name in item.DESCRIPTOR.fields_by_name:  # older ONNX has fewer
                item.ClearField(name)


def halve(path: Path) -> None:
    """Rewrites a file of `model_bytes` with its layers' weights in 16 bits; they become float32 when it is loaded.

    Biases, gains and constants stay as they are. Errors: UserError when a weight is too large for 16 bits.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        is_layers = sum(size > 1 for size in tensor.dims) >= 2  # biases and gains are vectors
        if tensor.data_type != onnx.TensorProto.FLOAT or not is_layers:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        if abs(values).max(initial=0) > LARGEST_HALF:
            raise UserError(f"--half: {name} holds a weight beyond {LARGEST_HALF:g}; leave the option out")
        tensor.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}_half"))
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]  # what uses a weight comes after its cast
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path.write_bytes(model.SerializeToString(deterministic=True))
