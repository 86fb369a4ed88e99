"""The small teachers: their pictures, and networks and training lengths that work for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import pictures


@dataclass(frozen=True)
class SmallTeacher:
    """What it takes to make a teacher.

    source           yields its pictures at a given size in pixels
    has_classes      whether the teacher is conditioned on the classes; its detector learns them either way
    cres, attn       the network's channel multipliers and the resolutions with attention, as `edm.train` takes them
    kimg             length of the training
    """

    source: Callable[[int], Iterator[pictures.Picture]]
    resolution: int
    has_classes: bool
    cres: str
    attn: int
    kimg: float


TEACHERS = {
    "fashion": SmallTeacher(pictures.fashion, 16, False, "1,2,2", 8, 150),
    "fashion-classes": SmallTeacher(pictures.fashion, 16, True, "1,2,2", 8, 150),
    "digits": SmallTeacher(pictures.digits, 8, True, "1,2", 4, 200),
    "letters": SmallTeacher(pictures.letters, 16, True, "1,2,2", 8, 120),
    "emoji": SmallTeacher(pictures.emoji, 16, False, "1,2,2", 8, 150),
    "icons": SmallTeacher(pictures.icons, 24, False, "1,2,2", 6, 120),
    "crops": SmallTeacher(pictures.crops, 32, False, "1,2,2,2", 8, 80),
}

# Options of edm.train for every teacher. With 16 channels and this learning rate, training takes minutes on a CPU.
TRAINING = (
    *("--arch=ddpmpp", "--cbase=16", "--blocks=1", "--dropout=0", "--augment=0"),
    *("--batch=64", "--lr=2e-3", "--lr-rampup=5", "--lr-decay=cosine", "--ema=0.01", "--workers=0", "--tick=10"),
)
