"""PNG files and grids of uint8 images [N, C, H, W], C 1 to 4; grids show images of more channels by their mean."""

import contextlib
import functools
import io
import math
import os
import textwrap
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from dnnlib import UserError, write_atomically
from torch_utils import distributed

MOST_CHANNELS = 4  # of a PNG
GRID_PIXELS = 512  # width to which grids of small images are enlarged
TITLE_PIXELS = 24  # height of a title's line
CAPTIONED_PIXELS = 1024  # width of grids with captions
CAPTION_LINE, CAPTION_CHARACTER = 16, 7  # pixels
ENCODED_AHEAD = 256  # images that are encoded or waiting to be written, at most


def to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """One uint8 image [C, H, W]. Errors: UserError when it has more channels than a PNG."""
    if len(image) > MOST_CHANNELS:
        raise UserError(f"images of {len(image)} channels fit into no PNG; --grid shows their mean")
    array = image.permute(1, 2, 0).cpu().numpy()
    return PIL.Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def make_grid(images: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """[N, C, H, W] -> one image [C, rows H, columns W], row by row; empty places are black."""
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = images.new_zeros(rows * columns, c, h, w)
    cells[:n] = images
    return cells.reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def save_grid(images: torch.Tensor, path: str | os.PathLike, columns: int | None = None) -> None:
    """Writes uint8 images [N, C, H, W] as one PNG, row by row, small ones enlarged.

    Errors: OSError when it can't be written.
    """
    with write_atomically(path) as file:
        _visible_grid(images, columns).save(file, format="PNG")


def save_titled_grids(
    grids: Mapping[str, torch.Tensor], path: str | os.PathLike, columns: int, captions: Sequence[str] = ()
) -> None:
    """Writes {title: uint8 images [N, C, H, W]} as one PNG: grids below each other, each under its title.

    captions: one for each column, below all grids.
    Errors: OSError when it can't be written.
    """
    pictures = [
        _visible_grid(images, columns, CAPTIONED_PIXELS if captions else GRID_PIXELS) for images in grids.values()
    ]
    width = max(picture.width for picture in pictures)
    lines = [textwrap.wrap(caption, width // columns // CAPTION_CHARACTER) for caption in captions]
    foot = CAPTION_LINE * max(map(len, lines), default=0)
    page = PIL.Image.new("RGB", (width, sum(TITLE_PIXELS + picture.height for picture in pictures) + foot), "white")
    draw, top = PIL.ImageDraw.Draw(page), 0
    font, small_font = PIL.ImageFont.load_default(size=14), PIL.ImageFont.load_default(size=12)
    for title, picture in zip(grids, pictures):
        draw.text((4, top + TITLE_PIXELS // 2), title, "black", font, anchor="lm")
        page.paste(picture, (0, top + TITLE_PIXELS))
        top += TITLE_PIXELS + picture.height
    for column, caption in enumerate(lines):
        place = (column * width // columns + 2, top)
        draw.multiline_text(place, "\n".join(caption), "black", small_font, spacing=2)
    with write_atomically(path) as file:
        page.save(file, format="PNG")


def _visible_grid(images: torch.Tensor, columns: int | None, width: int = GRID_PIXELS) -> PIL.Image.Image:
    if images.shape[1] > MOST_CHANNELS:
        images = images.float().mean(1, keepdim=True).round().to(torch.uint8)
    grid = to_pil(make_grid(images, columns))
    zoom = max(1, width // grid.width)
    return grid.resize((zoom * grid.width, zoom * grid.height), PIL.Image.Resampling.NEAREST)


@contextlib.contextmanager
def image_writer(dest: str | os.PathLike) -> Iterator[Callable[[torch.Tensor, int], None]]:
    """Yields write(image uint8 [C, H, W], seed) into a folder, or a zip by the suffix; names sort by seed.

    Images are encoded by threads while the next ones are made. A zip appears once it is whole; in a folder each file
    does.
    Errors: UserError when `dest` holds something already or can't be written.
    """
    dest = Path(dest)
    is_zip = dest.suffix == ".zip"
    if distributed.from_process_0(_is_taken(dest, is_zip) if distributed.rank() == 0 else None):
        raise UserError(f"--outdir={dest} exists already and isn't empty; remove it or choose another name")
    if is_zip and distributed.world_size() > 1:
        raise UserError(f"--outdir={dest}: several processes can't write one zip; give a folder")
    with contextlib.ExitStack() as stack:
        try:
            dest.parent.mkdir(parents=True, exist_ok=True)
            put = stack.enter_context(zip_writer(dest)) if is_zip else functools.partial(_write_file, dest)
        except OSError as error:
            raise UserError(f"--outdir={dest} can't be written: {error.strerror}; choose another place") from None

        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        # In order, so that a zip's bytes don't depend on the threads.
        coming: deque[tuple[int, Future[bytes]]] = deque()

        def put_first() -> None:
            seed, data = coming.popleft()
            put(f"{seed // 1000:05d}/img{seed:08d}.png", data.result())

        def write(image: torch.Tensor, seed: int) -> None:
            coming.append((seed, pool.submit(_encode, image)))
            if len(coming) > ENCODED_AHEAD:
                put_first()

        yield write
        while coming:
            put_first()


def _is_taken(dest: Path, is_zip: bool) -> bool:
    """Whether `path` holds something that must not be mixed with images: anything except hidden files in a folder."""
    if is_zip or not dest.is_dir():
        return os.path.lexists(dest)
    return any(not path.name.startswith(".") for path in dest.iterdir())


def _encode(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "png")
    return buffer.getvalue()


def _write_file(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(data)


@contextlib.contextmanager
def zip_writer(dest: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yields write(name, data) into an uncompressed zip that appears once it is whole; equal input, equal bytes."""
    with write_atomically(dest) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, data: bytes) -> None:
            info = zipfile.ZipInfo(name)  # of 1980-01-01: the time of the run must not show in the bytes
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, data)

        yield write
