import gc
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes that tests start
IN_FORKS = ["pytest", "torch._dynamo", "edm.metrics.evaluate", "sid.prepare"]  # what most of them need
multiprocessing.set_forkserver_preload(IN_FORKS)


def pytest_configure(config):
    """What goes into the user's cache goes into a folder of this session, also in the processes that tests start."""
    folder = tempfile.mkdtemp()
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["DNNLIB_CACHE_DIR"] = folder


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run it with --slow"))


def pytest_collection_finish():
    """Takes all that the test modules have loaded out of the garbage collector's sight, which makes it quicker."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Forks the server of the processes that tests start, if this process has torch to pass on."""
    if "torch" in sys.modules and sys.platform == "linux":  # elsewhere, a fork without exec isn't safe
        for module in IN_FORKS:
            importlib.import_module(module)
        forked.serve_forks_of_this_process()


def slow_ones(cases, *slow):
    """Cases for parametrize, those named marked slow."""
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twelve images with three classes: the class is the brightness of the upper half."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    labels = []
    for i in range(12):
        pixels = rng.integers(0, 40, [8, 8], dtype=np.uint8)
        pixels[:4] += np.uint8(80 * (i % 3))
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        labels.append([f"{i:02d}.png", i % 3])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A folder of the module's own takes what would go into the cache, for tests that tell what is there already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNNLIB_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def text_pipelines(tmp_path_factory):
    """{kind: the folder of a tiny text-to-image pipeline of the diffusers library}; tests leave them as they are."""
    import tiny_pipelines

    return tiny_pipelines.save_all(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """The folder of a tiny VAE of the diffusers library. Tests leave this and the next three as they are."""
    import tiny_latents

    return tiny_latents.save_vae(tmp_path_factory.mktemp("vae") / "toy")


@pytest.fixture(scope="session")
def latent_pipeline(tmp_path_factory):
    """The folder of a tiny DiT of latents with its VAE."""
    import tiny_latents

    return tiny_latents.save_pipeline(tmp_path_factory.mktemp("pipelines") / "dit")


@pytest.fixture(scope="session")
def latent_images(tmp_path_factory):
    """Images that `vae` can encode."""
    import tiny_latents

    return tiny_latents.save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def encoded_images(tmp_path_factory, latent_images, vae):
    """A data set of the latents of `latent_images`."""
    from edm import dataset_tool

    path = tmp_path_factory.mktemp("encoded") / "latents.safetensors"
    dataset_tool.convert(latent_images, path, vae=str(vae))
    return path
