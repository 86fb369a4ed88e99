"""Image files of every kind are decoded to what a viewer shows, or refused in one line."""

import io

import numpy as np
import pytest
from PIL import Image

from dnnlib import UserError
from training.dataset import ImageFolderDataset, decode_image

RNG = np.random.default_rng(0)
UPRIGHT = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
# How a camera stores an upright picture under each value of EXIF's orientation (TIFF 6.0, tag 274).
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: np.rot90(UPRIGHT, 2).transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


def encoded(image, kind, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))).save(
        file, kind, **options
    )
    return file.getvalue()


def decoded(data):
    return np.array(decode_image(data, "x"))


def refused(data):
    with pytest.raises(UserError) as error:
        decode_image(data, "--data=x: 0.png")
    assert error.value.message.startswith("--data=x: 0.png is not a usable image: ")
    assert "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif, **({"lossless": True, "exact": True} if kind == "webp" else {})}
    assert np.array_equal(decoded(encoded(STORED[orientation], kind, **options)), UPRIGHT)


def test_damaged_exif_leaves_the_image_as_it_is():
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0", b"\xff" * 20):
        assert np.array_equal(decoded(encoded(UPRIGHT, "png", exif=exif)), UPRIGHT)


def test_transparent_pixels_show_the_white_page():
    image = np.concatenate([UPRIGHT, np.full((6, 4, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(decoded(encoded(image, "png")), UPRIGHT)
    image[:3, :, 3] = 0
    image[3, :, 3] = 51  # a fifth
    result = decoded(encoded(image, "png"))
    assert (result[:3] == 255).all()
    assert np.abs(result[3].astype(int) - np.round(204 + UPRIGHT[3] / 5)).max() <= 1
    assert np.array_equal(result[4:], UPRIGHT[4:])


def test_transparent_gray_stays_gray():
    image = np.stack([UPRIGHT[..., 0], np.where(np.arange(6) < 3, 0, 255)[:, None].repeat(4, 1)], axis=2)
    result = decoded(encoded(image.astype(np.uint8), "png"))
    assert result.shape == (6, 4)
    assert (result[:3] == 255).all()
    assert np.array_equal(result[3:], UPRIGHT[3:, :, 0])


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_transparent_colours_of_a_palette(kind):
    image = Image.fromarray(np.uint8([[0, 1], [2, 1]]), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert decoded(encoded(image, kind)).tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]]
    result = decoded(encoded(image, kind, transparency=1))
    assert result.tolist() == [[[255, 0, 0], [255] * 3], [[0, 0, 255], [255] * 3]]


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7))])
def test_a_transparent_colour_without_palette(mode, key):
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), 9 if mode == "L" else (9, 9, 9))
    result = decoded(encoded(image, "png", transparency=key))
    assert result.reshape(1, 2, -1)[0, :, 0].tolist() == [255, 9]


def test_cmyk():
    plain = np.repeat(np.uint8([[[255, 0, 0]], [[0, 0, 255]]]), 16, axis=0).repeat(32, axis=1)
    result = decoded(encoded(Image.fromarray(plain).convert("CMYK"), "jpeg", quality=100))
    assert np.abs(result.astype(int) - plain).max() <= 4


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_several_pictures_in_one_file(kind):
    frames = [Image.fromarray(UPRIGHT), Image.fromarray(255 - UPRIGHT)]
    assert "several pictures" in refused(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_a_photo_with_a_preview_is_the_photo():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (200, 10)]
    assert (decoded(encoded(frames[0], "mpo", save_all=True, append_images=frames[1:])) == 200).all()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits(mode):
    assert "8 bits" in refused(encoded(Image.new(mode, (4, 4)), "tiff"))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "ppm", "tiff"])
def test_truncated_files(kind):
    image = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(image, kind)
    decoded(data)
    refused(data[: len(data) * 2 // 3])
    refused(b"")


SUFFIXES = {
    **dict.fromkeys(["jpg", "JPEG", "jfif", "JPE"], "jpeg"),
    **dict.fromkeys(["png", "PNG", "apng"], "png"),
    **dict.fromkeys(["tif", "TIFF"], "tiff"),
    **dict.fromkeys(["bmp", "dib"], "bmp"),
    **dict.fromkeys(["ppm", "pnm"], "ppm"),
    "gif": "gif",
    "webp": "webp",
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffixes(tmp_path, suffix):
    (tmp_path / f"0.{suffix}").write_bytes(encoded(UPRIGHT[:4], SUFFIXES[suffix]))
    assert ImageFolderDataset(tmp_path)[0][0].shape == (3, 4, 4)


@pytest.mark.parametrize("suffix", ["heic", "AVIF", "jp2", "tga"])
def test_images_in_formats_that_are_not_read(tmp_path, suffix):
    (tmp_path / "0.png").write_bytes(encoded(UPRIGHT[:4], "png"))
    (tmp_path / f"1.{suffix}").write_bytes(b"x")
    with pytest.raises(UserError, match=f"1.{suffix} is an image in a format that isn't read"):
        ImageFolderDataset(tmp_path)
