"""Settings of edm.train by name, for `--preset=NAME`: {option, with _ for -: value}. Other options override them."""

from typing import Any

PRESET = "preset"  # in a context's meta: the preset that the command line names

# Meant to be EDM2's published trainings (arXiv:2312.02696), which this project hasn't rerun. A test compares networks,
# dropout, lengths and averages with the published files. Rates, and the noise levels of the 64x64 networks, haven't
# been compared with the paper's tables. The rate falls with the inverse square root of the images seen, from
# `lr_constant` kimg on: 70 000 or 35 000 batches.
_EDM2: dict[str, Any] = {
    "arch": "edm2",
    "cond": True,
    "cres": [1, 2, 3, 4],
    "blocks": 3,
    "attn": [16, 8],
    "augment": 0.0,
    "batch": 2048,
    "lr_rampup": 10_000,
    "lr_decay": "sqrt",
    "beta2": 0.99,
    "fp16": True,
}
_IMG512: dict[str, Any] = {**_EDM2, "lr_constant": 70_000 * 2.048, "p_mean": -0.4, "p_std": 1.0}
_IMG64: dict[str, Any] = {**_EDM2, "lr_constant": 35_000 * 2.048, "p_mean": -0.8, "p_std": 1.6}


def _sized(
    common: dict[str, Any], cbase: int, dropout: float, lr: float, mimg: float, ema_std: float
) -> dict[str, Any]:
    """mimg: length of the training. ema_std: width of the moving average that was best."""
    return {**common, "cbase": cbase, "dropout": dropout, "lr": lr, "duration": mimg, "ema_std": ema_std}


PRESETS: dict[str, dict[str, Any]] = {
    "edm2-img512-xs": _sized(_IMG512, 128, 0.0, 0.0120, 2147.483, 0.135),
    "edm2-img512-s": _sized(_IMG512, 192, 0.0, 0.0100, 2147.483, 0.130),
    "edm2-img512-m": _sized(_IMG512, 256, 0.1, 0.0090, 2147.483, 0.100),
    "edm2-img512-l": _sized(_IMG512, 320, 0.1, 0.0080, 1879.048, 0.085),
    "edm2-img512-xl": _sized(_IMG512, 384, 0.1, 0.0070, 1342.177, 0.085),
    "edm2-img512-xxl": _sized(_IMG512, 448, 0.1, 0.0065, 939.524, 0.070),
    "edm2-img64-s": _sized(_IMG64, 192, 0.0, 0.0100, 1073.741, 0.075),
    "edm2-img64-m": _sized(_IMG64, 256, 0.1, 0.0090, 2147.483, 0.060),
    "edm2-img64-l": _sized(_IMG64, 320, 0.1, 0.0080, 1073.741, 0.040),
    "edm2-img64-xl": _sized(_IMG64, 384, 0.1, 0.0070, 671.088, 0.040),
    # For a few thousand small images on a CPU. docs/ablations.md compares the rate with a quarter of it.
    "small": {
        "arch": "ddpmpp",
        "cbase": 16,
        "cres": "auto",
        "blocks": 1,
        "attn": "auto",
        "dropout": 0.0,
        "augment": 0.0,
        "batch": 64,
        "lr": 8e-3,
        "lr_decay": "cosine",
        "ema": 0.01,
        "duration": 0.12,
        "workers": 0,
    },
    # Likewise with EDM2's network; measured in docs/teachers.md.
    "edm2-small": {
        **_EDM2,
        "cond": False,
        "cbase": 16,
        "cres": [1, 2],
        "blocks": 1,
        "attn": "none",
        "dropout": 0.0,
        "batch": 64,
        "lr": 0.01,
        "lr_rampup": None,
        "lr_decay": "cosine",
        "duration": 0.2,
        "ema_std": 0.1,
        "workers": 0,
        "fp16": False,
    },
}


def use(context: Any, _option: Any, name: str | None) -> None:
    """Callback of the option --preset: makes the preset's values the command's defaults."""
    if name is not None:
        context.default_map = {**(context.default_map or {}), **PRESETS[name]}
        context.meta[PRESET] = name
