"""Files of generated images: each image is named by its seed, and threads don't change the bytes."""

import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import UserError
from edm.images import ENCODED_AHEAD, image_writer

IMAGES = torch.randint(
    256, [ENCODED_AHEAD + 44, 3, 8, 8], dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def write_all(dest, first_seed=900):
    with image_writer(dest) as write:
        for i, image in enumerate(IMAGES):
            write(image, first_seed + i)


def test_every_image_lies_under_its_seed(tmp_path):
    write_all(tmp_path / "made")
    assert len(list((tmp_path / "made").rglob("*.png"))) == len(IMAGES)
    for i in (0, 99, 100, len(IMAGES) - 1):
        seed = 900 + i
        with PIL.Image.open(tmp_path / f"made/{seed // 1000:05d}/img{seed:08d}.png") as image:
            assert np.array_equal(np.asarray(image), IMAGES[i].permute(1, 2, 0).numpy())


def test_a_zip_is_in_order_and_the_same_each_time(tmp_path):
    for name in ("a.zip", "b.zip"):
        write_all(tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    names = zipfile.ZipFile(tmp_path / "a.zip").namelist()
    assert len(names) == len(IMAGES)
    assert names == sorted(names)


def test_a_generator_that_fails_leaves_no_zip(tmp_path):
    writer = image_writer(tmp_path / "a.zip")
    writer.__enter__()(IMAGES[0], 0)
    assert not writer.__exit__(RuntimeError, RuntimeError("no more images"), None)
    assert not list(tmp_path.iterdir())


def test_images_are_not_mixed_with_others(tmp_path):
    dest = tmp_path / "made"
    dest.mkdir()
    (dest / ".DS_Store").touch()
    write_all(dest)
    before = sorted(dest.rglob("*"))
    with pytest.raises(UserError, match="isn't empty"):
        write_all(dest, first_seed=5000)
    assert sorted(dest.rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        write_all(tmp_path / "file")
