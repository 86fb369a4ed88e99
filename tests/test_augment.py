"""AugmentPipe against the parity numbers and against closed forms of the transforms that its labels name."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from training import augment
from training.augment import EDM_MULTIPLIERS, AugmentPipe

DATA = Path(__file__).parent / "data"
SIDE = 32
FILTER_ERROR = 0.03  # sym6 is not symmetric: what is turned moves by a tenth of a pixel; blobs peak at 1


def blob(z):
    """A smooth picture by complex pixel coordinates about the centre, near 0 where mirrored edges would show."""
    return np.exp(-(((z.real - 1.5) / 3.5) ** 2) - ((z.imag + 1) / 3) ** 2)


def grid():
    axis = np.arange(SIDE) - (SIDE - 1) / 2
    return axis[None, :] + 1j * axis[:, None]


def blobs(n):
    return torch.from_numpy(blob(grid())).float().expand(n, 2, SIDE, SIDE)


def difference(images, expected):
    """Largest deviation of [N, 2, H, W] images from [N, H, W] arrays."""
    return np.abs(images.numpy() - np.stack(expected)[:, None]).max()


@pytest.mark.parametrize("seed", [51, 52, 53])
def test_parity(seed):
    options = json.loads((DATA / "index.json").read_text())["augment.npz"]
    reference = np.load(DATA / "augment.npz")
    torch.manual_seed(seed)
    images, labels = AugmentPipe(**options)(torch.from_numpy(reference["images"]))
    for name, value in {"images": images, "labels": labels}.items():
        expected = reference[f"seed{seed}/{name}"]
        assert np.abs(value.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_flips_are_exact_and_labelled():
    x = torch.randn(64, 3, 5, 4)
    torch.manual_seed(0)
    images, labels = AugmentPipe(xflip=1, yflip=1)(x)
    for image, original, (horizontal, vertical) in zip(images, x, labels):
        axes = [axis for axis, bit in ((2, horizontal), (1, vertical)) if bit]
        assert torch.equal(image, original.flip(axes))
    assert len(labels.unique(dim=0)) == 4


def test_no_transform_draws_nothing():
    x = torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    images, labels = AugmentPipe(p=1)(x)
    assert images is x
    assert labels.shape == (2, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_p_zero_changes_nothing():
    # The wavelet is orthogonal: its two filters reconstruct what isn't moved.
    x = torch.randn(4, 3, 9, 9)
    images, labels = AugmentPipe(p=0, **EDM_MULTIPLIERS | {"xflip": 1})(x)
    assert torch.allclose(images, x, atol=1e-5)
    assert torch.equal(labels, torch.zeros(4, 9))


def test_whole_pixel_shift_shows_the_mirrored_continuation():
    x = torch.randn(1, 3, 8, 8)
    shift = augment._translation(torch.tensor([-3.0]), torch.tensor([2.0]))
    mirrored = torch.nn.functional.pad(x, (3, 3, 3, 3), mode="reflect")
    assert torch.allclose(augment._warp(x, shift), mirrored[:, :, 5:13, 0:8], atol=1e-5)


def test_scale_label_names_the_zoom():
    torch.manual_seed(0)
    images, labels = AugmentPipe(scale=1)(blobs(6))
    assert difference(images, [blob(grid() / 2 ** (0.2 * w)) for (w,) in labels.tolist()]) < FILTER_ERROR


def test_rotation_label_names_the_angle():
    torch.manual_seed(0)
    images, labels = AugmentPipe(rotate_frac=1)(blobs(6))
    assert torch.allclose((labels + torch.tensor([1.0, 0.0])).norm(dim=1), torch.ones(6))
    expected = [blob(grid() * (cos_minus_1 + 1 + 1j * sin)) for cos_minus_1, sin in labels.tolist()]
    assert difference(images, expected) < FILTER_ERROR


def test_translation_label_names_the_shift():
    torch.manual_seed(0)
    images, labels = AugmentPipe(translate_frac=1, translate_frac_std=0.05)(blobs(6))
    assert difference(images, [blob(grid() - 0.05 * SIDE * (x + 1j * y)) for x, y in labels.tolist()]) < FILTER_ERROR


def test_anisotropy_stretches_along_the_drawn_axis():
    torch.manual_seed(0)
    w, axis = torch.randn(6), (2 * torch.rand(6) - 1) * math.pi
    torch.manual_seed(0)
    images, labels = AugmentPipe(aniso=1, aniso_rotate_prob=1)(blobs(6))
    assert torch.allclose(labels, torch.stack([w * axis.cos(), w * axis.sin()], dim=1))
    expected = []
    for w_i, axis_i in zip(w.tolist(), axis.tolist()):
        turned, s = grid() * np.exp(1j * axis_i), 2 ** (0.2 * w_i)
        expected.append(blob((turned.real / s + 1j * turned.imag * s) * np.exp(-1j * axis_i)))
    assert difference(images, expected) < FILTER_ERROR


def test_frequencies():
    torch.manual_seed(0)
    _, labels = AugmentPipe(p=0.12, **EDM_MULTIPLIERS)(torch.zeros(4000, 1, 2, 2))
    used = (labels != 0).double().mean(dim=0).numpy()
    # xflip always draws, and half of the draws are 0; yflip does with p.
    assert np.allclose(used, [0.5, 0.06, *[0.12] * 4, used[6], *[0.12] * 2], atol=0.03)
    assert used[6] == pytest.approx(0.06, abs=0.02)  # the axis of half of the stretches is turned


@pytest.mark.parametrize(("off", "dim"), [([], 9), (["xflip"], 8), (["aniso"], 7), (["scale", "rotate_frac"], 6)])
def test_augment_dim(off, dim):
    pipe = AugmentPipe(p=0.5, **EDM_MULTIPLIERS | dict.fromkeys(off, 0))
    images, labels = pipe(torch.zeros(3, 1, 16, 12))
    assert images.shape == (3, 1, 16, 12)
    assert pipe.augment_dim == labels.shape[1] == dim


def test_remembers_its_arguments():
    assert AugmentPipe(p=0.12, **EDM_MULTIPLIERS).init_kwargs == {"p": 0.12, **EDM_MULTIPLIERS}


def test_the_source_stands_alone():
    # Snapshots embed it, and other tools execute it there.
    tree = ast.parse(Path(augment.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"math", "torch", "torch.nn.functional", "torch_utils.persistence"}
