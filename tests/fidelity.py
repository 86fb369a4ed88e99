"""Metrics of torch-fidelity (Apache-2.0) on the features of data/metrics.npz, as an oracle.

    pip install --no-deps torch-fidelity && python tests/fidelity.py

writes data/torch_fidelity.json, so that tests have its numbers also where it isn't installed. The package asks for
torchvision, which its metrics' arithmetic doesn't use: only the files that hold that are loaded here.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

DATA = Path(__file__).parent / "data"
RECORDED = DATA / "torch_fidelity.json"


def installed():
    return importlib.util.find_spec("torch_fidelity") is not None


def metric_file(name):
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(importlib.util.find_spec("torch_fidelity").submodule_search_locations)
    with mock.patch.dict(sys.modules, {"torch_fidelity": package, "torch_fidelity.utils": mock.MagicMock()}):
        return importlib.import_module(f"torch_fidelity.metric_{name}")


def numbers():
    """{metric: value}; generated features come first in torch-fidelity."""
    data = np.load(DATA / "metrics.npz")
    a, b, low = (torch.from_numpy(data[f"features_{name}"]).double() for name in ("a", "b", "low"))
    fid, isc, kid, prc = (metric_file(name) for name in ("fid", "isc", "kid", "prc"))
    moments = {name: fid.fid_features_to_statistics(x) for name, x in (("a", a), ("b", b), ("low", low))}
    values = {
        "fid": fid.fid_statistics_to_metric(moments["a"], moments["b"], verbose=False),
        "fid_low": fid.fid_statistics_to_metric(moments["low"], moments["b"], verbose=False),
        "is": isc.isc_features_to_metric(torch.from_numpy(data["probs"]).double().log(), splits=10, shuffle=False),
        "kid": kid.kid_features_to_metric(b, a, kid_subsets=100, kid_subset_size=200, rng_seed=0, verbose=False),
        "pr": prc.prc_features_to_metric(b[:300, :8], a[:280, :8], prc_neighborhood=3, verbose=False),
    }
    return {f"{name}.{key}": float(value) for name, result in values.items() for key, value in result.items()}


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(numbers(), indent=2) + "\n")
    print(RECORDED.read_text())
