"""Reference numbers in tests/data and the networks they were made with (tests/data/index.json describes them)."""

import json
from pathlib import Path

import numpy as np
import torch

from training import networks

DATA = Path(__file__).parent / "data"
INDEX = json.loads((DATA / "index.json").read_text())
TOLERANCE = 1e-5  # max|a-b| / max|b|, as index.json says


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / name) as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def seeded_network(name: str, weights_seed: int | None = None) -> torch.nn.Module:
    """The network of `network-<name>.npz` with weights by index.json's weights_rule, in eval mode."""
    entry = INDEX[f"network-{name}.npz"]
    net = getattr(networks, entry["class_name"])(**entry["init_kwargs"])
    return seed_weights(net, weights_seed or entry["weights_seed"])


def seed_weights(net: torch.nn.Module, weights_seed: int) -> torch.nn.Module:
    """The same network with weights by index.json's weights_rule, in eval mode."""
    rng = np.random.RandomState(weights_seed)
    state = net.state_dict()
    for key in sorted(state):
        tensor = state[key]
        w = rng.standard_normal(tensor.shape).astype(np.float32)
        if key.endswith("resample_filter") or key == "u":
            continue
        if key.endswith("freqs"):
            w = 16 * w
        elif tensor.ndim >= 2:
            w = w * 0.5 / np.sqrt(tensor.numel() / tensor.shape[0])
        elif "norm" in key and key.endswith("weight"):
            w = 1 + 0.05 * w
        else:
            w = 0.05 * w
        tensor.copy_(torch.as_tensor(w))
    return net.eval().requires_grad_(False)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    actual, expected = actual.detach().double(), expected.double()
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error < tolerance, f"relative error {error:.2e}"
