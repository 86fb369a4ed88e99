"""Files of generated images: each image is named by its seed, and threads don't change the bytes."""

import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import UserError
from edm.images import ENCODED_AHEAD, TITLE_PIXELS, image_writer, save_grid, save_titled_grids

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


@pytest.mark.parametrize(("columns", "zoom"), [(4, 16), (40, 1), (80, 1)])
def test_grids_of_small_images_are_enlarged(tmp_path, columns, zoom):
    save_grid(IMAGES[:80], tmp_path / "grid.png", columns)
    found = np.asarray(PIL.Image.open(tmp_path / "grid.png"))
    rows = 80 // columns
    assert found.shape == (rows * 8 * zoom, columns * 8 * zoom, 3)
    cells = found[::zoom, ::zoom].reshape(rows, 8, columns, 8, 3).transpose(0, 2, 4, 1, 3)
    assert np.array_equal(cells.reshape(80, 3, 8, 8), IMAGES[:80].numpy())
    assert np.array_equal(found, found[::zoom, ::zoom].repeat(zoom, axis=0).repeat(zoom, axis=1))


def test_each_grid_stands_under_its_title(tmp_path):
    gray, path = IMAGES[:8, :1], tmp_path / "page.png"
    save_titled_grids({"first": gray, "": 255 - gray}, path, columns=4)
    page = np.asarray(PIL.Image.open(path))
    save_grid(gray, tmp_path / "grid.png", columns=4)
    grid = np.asarray(PIL.Image.open(tmp_path / "grid.png"))[:, :, None]
    top, first, middle, second = np.split(page, np.cumsum([TITLE_PIXELS, len(grid), TITLE_PIXELS]))
    assert np.array_equal(first, grid.repeat(3, axis=2))
    assert np.array_equal(second, 255 - first)
    assert (top[0] == 255).all()
    assert top.min() < 50  # black letters
    assert (middle == 255).all()


def test_captions_stand_below_their_columns(tmp_path):
    """Each is wrapped to its column's width; all that is above is as without them."""
    gray, words = IMAGES[:4, :1], ["short", "a caption of so many words that it takes two lines", "", "."]
    for name, captions in (("plain", []), ("captioned", words)):
        save_titled_grids({"title": gray}, tmp_path / f"{name}.png", 4, captions)
    plain, page = (np.asarray(PIL.Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("plain", "captioned"))
    below = page[TITLE_PIXELS + page.shape[1] // 4 :]
    assert page.shape[1] == 2 * plain.shape[1]
    dark = [column < 128 for column in np.split(below, 4, axis=1)]
    assert [column.any() for column in dark] == [True, True, False, True]
    lines = [column.any(axis=1).astype(int) for column in dark]
    assert [int((np.diff(line) == 1).sum()) for line in lines[:2]] == [1, 2]
    assert not any(column[:, -2:].any() for column in dark)  # none runs into the next column


def test_images_of_more_channels_than_a_png_has(tmp_path):
    images = torch.tensor([10, 20, 30, 40, 50], dtype=torch.uint8).reshape(1, 5, 1, 1).expand(2, 5, 8, 8)
    save_grid(images, tmp_path / "grid.png")
    assert np.unique(np.asarray(PIL.Image.open(tmp_path / "grid.png"))).tolist() == [30]  # their mean
    with (
        pytest.raises(UserError, match=r"^images of 5 channels fit into no PNG"),
        image_writer(tmp_path / "n") as write,
    ):
        write(images[0], 0)
