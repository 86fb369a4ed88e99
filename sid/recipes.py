"""Named settings, for `sid_train.py --recipe=NAME`, run_sid.sh and the benchmark.

A recipe is {option of sid_train.py, with _ for -: value}. It overrides the defaults, and options on the command line
override the recipe. This project hasn't rerun the trainings of the published recipes.
"""

from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_ASSETS = _HERE / "assets" if (_HERE / "assets").is_dir() else _HERE.parent / "assets"  # a wheel's, a checkout's
DEMO = _ASSETS / "fashion-mnist-16"  # folders of the embedded teachers
TEXT_DEMO = _ASSETS / "emoji-32"

# Common to the published trainings of SiD (arXiv:2404.04057).
_SID: dict[str, Any] = {
    "precond": "edm",
    "tmax": 800,
    "init_sigma": 2.5,
    "ls": 1,
    "lsg": 100,
    "snap": 50,
    "dump": 500,
    "metrics": "fid50k_full",
}
_CIFAR10: dict[str, Any] = {
    **_SID,
    "arch": "ddpmpp",
    "data_stat": "cifar10-32x32",
    "cres": [2, 2, 2],
    "alpha": 1.2,
    "batch": 256,
    "batch_gpu": 16,
    "lr": 1e-5,
    "glr": 1e-5,
    "fp16": False,
    "dropout": 0.13,
    "augment": 0.12,
    "ema": 0.5,
    "tick": 10,
}
_FACES: dict[str, Any] = {
    **_SID,
    "arch": "ddpmpp",
    "cond": False,
    "cres": [1, 2, 2, 2],
    "batch": 512,
    "batch_gpu": 32,
    "fp16": True,
    "dropout": 0.05,
    "augment": 0.15,
    "ema": 0.5,
    "tick": 10,
}
# SiDA (arXiv:2410.14919): SiD's settings with an adversarial loss from the images of --data, which the user names. Its
# BCE is a mean over the images of a process, so the batch per GPU is part of the method. gan_freeze, gan_start: kimg.
_SIDA: dict[str, Any] = {
    "gan": True,
    "alpha": 1.0,
    "lsd": 1,
    "lsg_gan": 0.01,
    "gan_freeze": 100,
    "gan_start": 200,
    "duration": 300,  # published: 200 to 300
}

# SiD of EDM2's latent teachers: the same settings for all sizes. The published generators went on with SiDA (--gan=1
# --lsd=100 --transfer=RUN, docs/teachers.md). psi's noise levels are those of EDM2's training.
_EDM2: dict[str, Any] = {
    **_SID,
    "data_stat": "img512",
    "cond": True,
    "alpha": 1.0,
    "uncertainty": True,
    "fake_sigma_schedule": "lognormal=-0.4,1",
    "batch": 2048,
    "lr": 5e-5,
    "glr": 5e-5,
    "fp16": True,
    "augment": 0,
    "ema": 2,
}


def _edm2(size: str, dropout: float, duration: float) -> dict[str, Any]:
    return {**_EDM2, "edm_model": f"edm2-img512-{size}", "dropout": dropout, "duration": duration}


# Text-to-image: SiD-LSG (arXiv:2406.01561) of Stable Diffusion, and four steps of flows (arXiv:2509.25127). The user
# names prompts by --prompts. The lengths of those for Stable Diffusion are this project's choice, and so are all
# settings of sdxl: those of Stable Diffusion, with the four steps that arXiv:2505.12674 made of SDXL.
_TEXT: dict[str, Any] = {
    "alpha": 1.0,
    "ls": 1,
    "lsg": 1,
    "lr": 1e-6,
    "glr": 1e-6,
    "augment": 0,
    "metrics": "none",
    "ema": 0.05,
}
_STABLE_DIFFUSION: dict[str, Any] = {
    **_TEXT,
    "init_sigma": 2.5017,  # time 625
    "sigma_schedule": "times=20,980",
    "fake_sigma_schedule": "times=20,980",
    "fake_score_weighting": "noise",
    "guidance": "long-short=1.5",  # also published: 2, 3, 4.5
    "batch": 512,
    "fp16": False,
    "duration": 10,
}
_TEXT_FLOW: dict[str, Any] = {
    **_TEXT,
    "steps": 4,
    "init_sigma": 999,  # the whole time of the flow
    "sigma_schedule": "lognormal=0.693,1.6",
    "fake_sigma_schedule": "lognormal=0.693,1.6",
    "fake_score_weighting": "prediction",
    "weighting": "time",
    "guidance": "long-short=4.5",
    "batch": 256,
    "precision": "bf16",
    "duration": 2,
}

# For any teacher, such as one of your own: measures the start and the noise levels, tries rates, goes on with the best,
# and goes back with lower rates if that fails. psi learns at theta's noise levels: at EDM's, theta drifts away if the
# brightness of images varies a lot.
_ANY: dict[str, Any] = {
    "init_noise": "moments",
    "init_sigma": "auto",
    "tmax": "auto",
    "trials": 0.2,
    "returns": 3,
    "alpha": 1.0,
    "fake_sigma_schedule": "karras",
    "share_noise": True,
    "augment": 0.0,
    "batch": 32,
    "optimizer": "muon",
    "lr": 0.02,
    "glr": 0.02,
    "lr_decay": "linear",
    "ema_rampup": 0.5,
    "duration": 0.02,
    "tick": 1,
    "snap": 4,
    "dump": 10,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10-uncond": {**_CIFAR10, "edm_model": "edm-cifar10-32x32-uncond-vp", "cond": False, "duration": 500},
    "cifar10-cond": {**_CIFAR10, "edm_model": "edm-cifar10-32x32-cond-vp", "cond": True, "duration": 800},
    "imagenet64-cond": {
        **_SID,
        "edm_model": "edm-imagenet-64x64-cond-adm",
        "arch": "adm",
        "data_stat": "imagenet-64x64",
        "cond": True,
        "cres": [1, 2, 3, 4],
        "alpha": 1.2,
        "batch": 8192,
        "batch_gpu": 16,
        "lr": 4e-6,
        "glr": 4e-6,
        "fp16": True,
        "dropout": 0.10,
        "augment": 0,
        "ema": 2,
        "tick": 20,
        "duration": 1000,
    },
    "ffhq64": {
        **_FACES,
        "edm_model": "edm-ffhq-64x64-uncond-vp",
        "data_stat": "ffhq-64x64",
        "alpha": 1.2,
        "lr": 1e-5,
        "glr": 1e-5,
        "g_beta1": 0.9,
        "duration": 500,
    },
    "afhq64-v2": {
        **_FACES,
        "edm_model": "edm-afhqv2-64x64-uncond-vp",
        "data_stat": "afhqv2-64x64",
        "alpha": 1.0,
        "lr": 5e-6,
        "glr": 5e-6,
        "duration": 500,
    },
}

RECIPES: dict[str, dict[str, Any]] = {
    **PUBLISHED,
    **{
        f"{name}-sida": {**PUBLISHED[name], **_SIDA, "batch_gpu": images}
        for name, images in {
            "cifar10-uncond": 32,
            "cifar10-cond": 32,
            "imagenet64-cond": 32,
            "ffhq64": 64,
            "afhq64-v2": 64,
        }.items()
    },
    "imagenet512-edm2-xs": _edm2("xs", 0, 200),
    "imagenet512-edm2-s": _edm2("s", 0, 200),
    "imagenet512-edm2-m": _edm2("m", 0.1, 200),
    "imagenet512-edm2-l": _edm2("l", 0.1, 200),
    "imagenet512-edm2-xl": _edm2("xl", 0.1, 200),
    "imagenet512-edm2-xxl": _edm2("xxl", 0.1, 100),
    "sd15": {**_STABLE_DIFFUSION, "edm_model": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
    "sd21": {**_STABLE_DIFFUSION, "edm_model": "stabilityai/stable-diffusion-2-1-base"},
    "sdxl": {**_STABLE_DIFFUSION, "edm_model": "stabilityai/stable-diffusion-xl-base-1.0", "steps": 4},
    "sd35-medium": {**_TEXT_FLOW, "edm_model": "stabilityai/stable-diffusion-3.5-medium"},
    "sana": {**_TEXT_FLOW, "edm_model": "Efficient-Large-Model/Sana_600M_512px_diffusers", "lr": 5e-6, "glr": 5e-6},
    "flux-dev": {**_TEXT_FLOW, "edm_model": "black-forest-labs/FLUX.1-dev"},
    "auto": {**_ANY, "edm_model": ""},  # which must be given
    "demo": {
        "edm_model": str(DEMO / "teacher.safetensors"),
        "data_stat": str(DEMO / "reference.npz"),
        "metrics": "fid5k",
        "metrics_batch": 250,
        "score_gradient": "off",
        "sigma_schedule": "lognormal",
        "share_noise": True,
        "batch": 32,
        "batch_gpu": 16,
        "lr": 4e-4,
        "glr": 4e-4,
        "lr_decay": "cosine",
        "ema_rampup": 0.5,
        "duration": 0.02,
        "tick": 1,
        "snap": 5,
        "dump": 10,
        "desc": "demo",
    },
    "demo-text": {
        **_ANY,
        "edm_model": str(TEXT_DEMO / "teacher"),
        "prompts": str(TEXT_DEMO / "prompts.txt"),
        "data_stat": str(TEXT_DEMO / "reference.npz"),
        "metrics": "fid500",
        "init_noise": "white",  # the only one that the diffusers library's pipelines know
        "trials": 0,
        "returns": 0,
        "guidance": "long-short=2",
        # FID is half of that with the levels of "auto", which are higher (docs/results.md).
        "sigma_schedule": "lognormal",
        "fake_sigma_schedule": "lognormal",
        "duration": 0.004,
        "snap": 1,
        "desc": "demo-text",
    },
}


def use(context: Any, _option: Any, name: str | None) -> None:
    """Callback of the option --recipe: makes the recipe's values the command's defaults."""
    if name is not None:
        context.default_map = {**(context.default_map or {}), **RECIPES[name]}
        context.meta["recipe"] = name
