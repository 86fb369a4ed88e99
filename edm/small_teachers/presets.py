"""The small teachers: their pictures, and training lengths that work for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import pictures


@dataclass(frozen=True)
class SmallTeacher:
    """What it takes to make a teacher.

    source           yields its pictures at a given size in pixels
    has_classes      whether the teacher is conditioned on the classes; its detector learns them either way
    kimg             length of the training
    """

    source: Callable[[int], Iterator[pictures.Picture]]
    resolution: int
    has_classes: bool
    kimg: float


TEACHERS = {
    "fashion": SmallTeacher(pictures.fashion, 16, False, 150),
    "fashion-classes": SmallTeacher(pictures.fashion, 16, True, 150),
    "digits": SmallTeacher(pictures.digits, 8, True, 200),
    "letters": SmallTeacher(pictures.letters, 16, True, 120),
    "emoji": SmallTeacher(pictures.emoji, 16, False, 150),
    "icons": SmallTeacher(pictures.icons, 24, False, 120),
    "crops": SmallTeacher(pictures.crops, 32, False, 80),
}
