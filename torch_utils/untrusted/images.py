"""Opens image files of strangers with Pillow: what decoding would take is bounded before, or while, it is read."""

import io
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from .bounds import Budget, Refused

MAX_SCANNED_PIXELS = 1 << 30  # by all scans of a JPEG, of which encoders make about ten
MIN_SCAN_BYTES = 10
MAX_THUMBNAILS = 4
MAX_PARTS = 50_000  # chunks or segments of a file; one of 67 million pixels in PNG's usual chunks has 25 000
MAX_EXIF_BYTES = 1 << 16  # its entries may overlap, so that memory grows with the square
MAX_PLAIN_BYTES = 1 << 24  # of PPM and its kin as text, which is read number by number
MAX_COMMENTS = 100  # there
MAX_TIFF_VALUES = 1 << 20  # of one entry: offsets of strips or tiles
MAX_TIFF_TAGS = 1000
SMALL_BYTES = 1 << 16  # so much can't do harm, except by a JPEG's scans
JPEG, SCAN = b"\xff\xd8", b"\xff\xda"
SCAN_HEADER = re.compile(rb"\xff\xda\x00[\x06-\x0c][\x01-\x04]")  # its length, and its number of components
PLAIN_MAGIC = (b"P1", b"P2", b"P3")
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within JPEG's compressed data


def open_image(data: bytes, formats: Sequence[str], max_pixels: int) -> Image.Image:
    """`Image.open` of a file's bytes; nothing is decoded yet.

    Errors: Refused when reading or decoding would take too much; also later, while the image is decoded; what Pillow
    raises on broken files.
    """
    if len(data) <= SMALL_BYTES:
        file = io.BytesIO(data)
    else:
        file = _Watched(data)
        _check(data)
    image = Image.open(file, formats=list(formats))
    try:
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise Refused(f"has {image.width}x{image.height} pixels, which are too many")
        if image.format == "TIFF" and _tile_pixels(image) > max_pixels:
            raise Refused("has tiles of too many pixels")
        if data.startswith(JPEG):
            _check_scans(data, pixels)
    except BaseException:
        image.close()
        raise
    return image


class _Watched(io.BytesIO):
    """A file in memory that refuses to be read for too long, or much more often than once."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self._budget, self._left = Budget(values=10 * MAX_PARTS + len(data)), 8 * len(data) + (1 << 20)

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._left -= len(data)
        if self._left < 0:
            raise Refused("reads the same bytes again and again")
        self._budget.spend(1 + len(data) // 64)  # so that the clock is looked at for every block
        return data


def _check(data: bytes) -> None:
    """Raises Refused for what Pillow would not survive; broken files are left to it."""
    if data.startswith(JPEG):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_chunks(data, 8, "big", 12, b"eXIf")
    elif data.startswith(b"RIFF"):
        _check_chunks(data, 12, "little", 8, b"EXIF")
    elif data.startswith((b"II", b"MM")):
        _check_tiff(data)
    elif data.startswith(PLAIN_MAGIC) and (len(data) > MAX_PLAIN_BYTES or data.count(b"#") > MAX_COMMENTS):
        raise Refused("is a text of pixels that is too long or has too many comments; save it as a PNG")


def _check_jpeg(data: bytes) -> None:
    """Counts the segments before the first scan, and the bytes of Exif in them."""
    at, exif = 2, 0
    for _ in range(MAX_PARTS):
        marker = data[at : at + 2]
        if len(marker) < 2 or marker == SCAN:
            return
        if marker[0] != 0xFF or marker[1] in (0, 1, 0xFF) or 0xD0 <= marker[1] <= 0xD8:  # stuffing, or junk
            found = MARKER.search(data, at + 1)
            if found is None:
                return
            at = found.start()
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        exif += length if data.startswith(b"Exif", at + 4) else 0
        if exif > MAX_EXIF_BYTES:
            raise Refused(f"has more than {MAX_EXIF_BYTES >> 10} KiB of Exif data")
        at += 2 + max(2, length)
    raise Refused(f"has more than {MAX_PARTS} segments")


def _check_scans(data: bytes, pixels: int) -> None:
    """Raises Refused if a JPEG's scans go over too many pixels in all; the thumbnails of cameras count too."""
    most = len(data) // MIN_SCAN_BYTES
    if most * pixels > MAX_SCANNED_PIXELS:  # else there's no need to count
        scans = data.count(SCAN)
        if scans > MAX_THUMBNAILS and scans * pixels > MAX_SCANNED_PIXELS:
            scans = len(SCAN_HEADER.findall(data))
            if scans * pixels > MAX_SCANNED_PIXELS:
                raise Refused(f"has {scans} scans, which are too many")


def _check_chunks(data: bytes, at: int, order: Any, overhead: int, exif: bytes) -> None:
    """Counts the chunks of a PNG or WebP, and the bytes of Exif in them."""
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            return
        head = data[at : at + 8]
        name, number = (head[4:], head[:4]) if order == "big" else (head[:4], head[4:])
        length = int.from_bytes(number, order)
        if name == exif and length > MAX_EXIF_BYTES:
            raise Refused(f"has more than {MAX_EXIF_BYTES >> 10} KiB of Exif data")
        at += overhead + length + (length & 1 if order == "little" else 0)
    raise Refused(f"has more than {MAX_PARTS} chunks")


def _check_tiff(data: bytes) -> None:
    """Counts the entries of a TIFF's first directory, and the values of each."""
    order: Any = "little" if data.startswith(b"II") else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    big = number(2, 2) == 43
    start, count_bytes, entry_bytes, value_bytes = (number(8, 8), 8, 20, 8) if big else (number(4, 4), 2, 12, 4)
    entries = number(start, count_bytes)
    if entries > MAX_TIFF_TAGS:
        raise Refused(f"has more than {MAX_TIFF_TAGS} tags")
    for i in range(entries):
        at = start + count_bytes + i * entry_bytes
        is_bytes = number(at + 2, 2) in (1, 2, 6, 7)
        if not is_bytes and number(at + 4, value_bytes) > MAX_TIFF_VALUES:
            raise Refused("has a tag with too many values")


def _tile_pixels(image: Any) -> int:
    width, height = (image.tag_v2.get(tag, 1) for tag in (322, 323))
    return width * height if isinstance(width, int) and isinstance(height, int) else 0
