"""The pictures of a run, made small enough to be part of its page."""

import base64
import dataclasses
import io
import re
import warnings
from pathlib import Path

import PIL.features
import PIL.Image

from dnnlib import open_plain

TEACHER_PICTURE, NEAREST_PICTURE, COMPARISON_PICTURE = "teacher.png", "nearest.png", "comparison.png"
CLUSTERS_PICTURE, PROMPTS_PICTURE, REALS_PICTURE = "clusters.png", "prompts.png", "reals.png"
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 1 << 26
MAX_WIDTH = 1024  # on the page
GRID_COLUMNS = 16  # of sid.report.pictures, which loads torch; a test compares
TRAINING_COLUMNS = 8  # of edm.training_report, which loads torch; a test compares
LEAST_COLUMNS = 4  # shown of a grid of large images
MAX_FRAMES = 32
FRAMES_BYTES, OTHER_BYTES = 1_300_000, 130_000  # of all pictures over time, of any other; base64 adds a third
HOPEFUL = 3  # times the limit: PNG files below may fit without loss
QUALITIES = (75, 50, 25)  # of lossy compression, until a picture is small enough
FRAME = r"fakes_(?:init|(\d{6,12})(?:\.(\d{3}))?)\.png"


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A picture in a page. uri: the data."""

    uri: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """A picture of a network's images after `kimg`."""

    kimg: float
    picture: Embedded


class PictureCache:
    """Reads and shrinks the pictures of a run's folder; each file once, as long as it stays the same."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._known: dict[tuple[str, int, int, int], Embedded | None] = {}

    def frames(self, columns: int = GRID_COLUMNS) -> list[Frame]:
        """The pictures over time, oldest first; of many, every second, fourth, … and the last.

        columns: as for `picture`.
        """
        names = frame_names(self._run_dir)
        stride = 1
        while len(names[::stride]) > MAX_FRAMES:  # a power of two, so that a growing run keeps those it has
            stride *= 2
        chosen = names[::stride]
        chosen += names[-1:] if names and chosen[-1] != names[-1] else []
        limit = FRAMES_BYTES // (MAX_FRAMES + 1) if len(names) > MAX_FRAMES // 2 else 2 * FRAMES_BYTES // MAX_FRAMES
        found = [(kimg, self.picture(name, columns, limit)) for kimg, name in chosen]
        return [Frame(kimg, picture) for kimg, picture in found if picture is not None]

    def picture(self, name: str, columns: int = 0, limit: int = OTHER_BYTES) -> Embedded | None:
        """A picture in at most `limit` bytes; None if there is none, or the file holds no picture.

        Links that lead out of the run's folder aren't followed: a page may be given to others.
        columns: of a grid, which may be cut to its first images; 0 for a picture of another kind.
        """
        path = self._run_dir / name
        try:
            if not is_inside(self._run_dir, name):
                return None
            status = path.stat()
            key = (name, status.st_mtime_ns, status.st_size, limit)
            if key not in self._known:
                self._known[key] = _read(path, limit, columns)
            return self._known[key]
        except OSError:
            return None


def is_inside(run_dir: Path, name: str) -> bool:
    """Whether a file is in the run's folder itself, and no link leads out of it."""
    try:
        return run_dir.resolve() in (run_dir / name).resolve().parents
    except (OSError, RuntimeError):  # the latter of links that lead in a circle
        return False


def frame_names(run_dir: Path) -> list[tuple[float, str]]:
    """(kimg, file name), oldest first."""
    matches = [re.fullmatch(FRAME, path.name) for path in run_dir.iterdir()] if run_dir.is_dir() else []
    return sorted((int(m[1] or 0) + int(m[2] or 0) / 1000, m[0]) for m in matches if m)


def open_picture(path: Path) -> PIL.Image.Image | None:
    """A run's PNG file in grey (mode L) or colour (RGB); None if it is large or holds no picture."""
    try:
        with open_plain(path, MAX_FILE_BYTES) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(file, formats=["PNG"]) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except Exception:  # Pillow raises errors of many kinds for what isn't a picture
        return None


def first_columns(grid: PIL.Image.Image, columns: int) -> PIL.Image.Image:
    """A grid of square images, cut to the columns that fit into MAX_WIDTH, and to rows in proportion."""
    if grid.width <= MAX_WIDTH or grid.width % columns:
        return grid
    cell = grid.width // columns
    shown = min(columns, max(LEAST_COLUMNS, MAX_WIDTH // cell))
    rows = max(1, grid.height // cell * shown // columns)
    return grid.crop((0, 0, shown * cell, min(grid.height, rows * cell)))


def _read(path: Path, limit: int, columns: int) -> Embedded | None:
    picture = open_picture(path)
    if picture is None:
        return None
    picture = first_columns(picture, columns) if columns else picture
    if picture.width > MAX_WIDTH or picture.height > 2 * MAX_WIDTH:
        picture.thumbnail((MAX_WIDTH, 2 * MAX_WIDTH), PIL.Image.Resampling.LANCZOS)
    hopeful = path.stat().st_size < HOPEFUL * limit
    kind, data = _encode(picture, limit, hopeful)
    while len(data) > limit and min(picture.size) > 16:
        picture = picture.reduce(2)
        kind, data = _encode(picture, limit, hopeful)
    if len(data) > limit:
        return None
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Embedded(uri, picture.width, picture.height)


def _encode(picture: PIL.Image.Image, limit: int, hopeful: bool) -> tuple[str, bytes]:
    """(kind, data): without loss if that fits into `limit` bytes, otherwise as well as fits, or the smallest.

    hopeful: whether it may fit without loss, which takes long to find out.
    """
    webp = PIL.features.check("webp")
    exact, lossy = ("webp", "webp") if webp else ("png", "jpeg")
    if hopeful:
        data = _saved(picture, exact, **({"lossless": True, "method": 2} if webp else {"optimize": True}))
        if len(data) <= limit:
            return exact, data
    data = b""
    for quality in QUALITIES:
        data = _saved(picture, lossy, quality=quality)
        if len(data) <= limit:
            break
    return lossy, data


def _saved(picture: PIL.Image.Image, kind: str, **options: bool | int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()
