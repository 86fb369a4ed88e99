"""The pictures of a run over time as a video: what equal seeds look like while the generator learns."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import PIL.features
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from dnnlib import UserError, check_new_file, user_path, write_atomically
from dnnlib.errors import printable

from .embedded import GRID_COLUMNS, first_columns, frame_names, is_inside, open_picture

FORMATS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG"}  # of animated images, which Pillow writes
FILM = ".mp4"  # which the program ffmpeg writes
FILM_RATE = 25  # frames per second; a picture stays for several
MAX_FRAMES = 150
WIDTH = 512  # up to which pictures are enlarged, by a whole factor
WHOLE_MS, LAST_MS = 8000, 2000  # of the animation, and of its last frame in addition
LEAST_MS, MOST_MS = 60, 600  # of a frame
FOOT, MARGIN = 28, 8  # pixels: the line below the picture, and the space around what stands in it
FONT_SIZE = 14
GROUND, TEXT, TRACK, BAR = "#181c22", "#e3e8ee", "#343b44", "#58b0ea"  # the colours of the run's page


def check_place(destination: str) -> Path:
    """Where a video will be. Errors: UserError naming --video when it can't be written there, or in that format."""
    path = user_path(destination)
    if path.suffix.lower() not in (*FORMATS, FILM):
        raise UserError(f"--video={destination}: name a file that ends in {', '.join((*FORMATS, FILM))}")
    if path.suffix.lower() == FILM and shutil.which("ffmpeg") is None:
        raise UserError(f"--video={destination}: needs the program ffmpeg; install it, or name a .webp file")
    if path.suffix.lower() == ".webp" and not PIL.features.check("webp"):
        raise UserError(f"--video={destination}: this Pillow can't write WebP; name a .gif or .png file")
    check_new_file(path, "--video")
    return path


def write_video(run_dir: Path, path: Path, columns: int = GRID_COLUMNS) -> int:
    """Writes the pictures of a run's snapshots, oldest first, as a video; returns how many. Animated images repeat.

    columns: of the pictures. Below each stands how many thousands of images the network had seen. Of more than
    MAX_FRAMES, every second, third, … and the last are taken.
    Errors: UserError when there are fewer than two, or `path` can't be written.
    """
    names = [(kimg, name) for kimg, name in frame_names(run_dir) if is_inside(run_dir, name)]
    stride = -(-len(names) // MAX_FRAMES) or 1
    chosen = names[::-stride][::-1]
    found = [(kimg, open_picture(run_dir / name)) for kimg, name in chosen]
    shown = [(kimg, first_columns(picture, columns)) for kimg, picture in found if picture is not None]
    shown = [(kimg, picture) for kimg, picture in shown if picture.size == shown[-1][1].size]
    if len(shown) < 2:
        raise UserError(
            f"--video: {run_dir} holds too few pictures (fakes_*.png), since a video needs two; wait for a snapshot"
        )
    frames = [_frame(picture, kimg, shown[-1][0]) for kimg, picture in shown]
    each = min(max(WHOLE_MS // len(frames), LEAST_MS), MOST_MS)
    durations = [each] * (len(frames) - 1) + [each + LAST_MS]
    try:
        with write_atomically(path) as file:
            if path.suffix.lower() == FILM:
                _write_film(frames, durations, file)
            else:
                kind = FORMATS[path.suffix.lower()]
                options = {"quality": 85, "method": 4} if kind == "WEBP" else {}
                animation = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
                frames[0].save(file, format=kind, **animation, **options)
    except OSError as error:
        raise UserError(f"--video={path} can't be written ({error.strerror or error}); choose another place") from None
    return len(frames)


def _write_film(frames: Sequence[PIL.Image.Image], durations: Sequence[int], file: BinaryIO) -> None:
    """Writes MP4 by ffmpeg and the encoder that it takes for it. Errors: UserError with ffmpeg's words."""
    width, height = (size + size % 2 for size in frames[0].size)  # as its colours need
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-f", "rawvideo", "-pixel_format", "rgb24"]
    command += ["-video_size", f"{width}x{height}", "-framerate", str(FILM_RATE), "-i", "pipe:0"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as words:
        film = Path(folder, f"film{FILM}")
        command += ["-pix_fmt", "yuv420p", "-movflags", "+faststart", str(film)]
        ffmpeg = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=words)
        assert ffmpeg.stdin is not None
        with contextlib.suppress(BrokenPipeError), ffmpeg:  # where the pipe breaks, ffmpeg says why
            for frame, milliseconds in zip(frames, durations):
                whole = PIL.Image.new("RGB", (width, height), GROUND)
                whole.paste(frame)
                for _ in range(max(1, round(milliseconds * FILM_RATE / 1000))):
                    ffmpeg.stdin.write(whole.tobytes())
        if ffmpeg.returncode:
            words.seek(0)
            reason = printable(words.read(1000).decode("utf-8", "replace").strip().partition("\n")[0])
            raise UserError(f"--video: ffmpeg failed ({reason or ffmpeg.returncode}); name a .webp file")
        with film.open("rb") as written:
            shutil.copyfileobj(written, file)


def _frame(picture: PIL.Image.Image, kimg: float, last: float) -> PIL.Image.Image:
    """A picture, enlarged if it is small, above a line with the time in images and how far that is."""
    zoom = max(1, WIDTH // picture.width)
    width, height = zoom * picture.width, zoom * picture.height
    frame = PIL.Image.new("RGB", (width, height + FOOT), GROUND)
    frame.paste(picture.resize((width, height), PIL.Image.Resampling.NEAREST), (0, 0))
    draw, font = PIL.ImageDraw.Draw(frame), PIL.ImageFont.load_default(FONT_SIZE)
    middle = height + FOOT // 2
    draw.text((MARGIN, middle), f"{kimg:g} kimg", TEXT, font, anchor="lm")
    left = 2 * MARGIN + int(draw.textlength(f"{last:g}.000 kimg", font))
    draw.rectangle((left, middle - 2, width - MARGIN, middle + 1), TRACK)
    if kimg:
        draw.rectangle((left, middle - 2, left + (width - MARGIN - left) * kimg / last, middle + 1), BAR)
    return frame
