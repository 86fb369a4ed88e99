"""Score identity Distillation (arXiv:2404.04057): a diffusion model becomes a one-step generator, without data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generator import OneStepGenerator
    from .loss import SiDLoss
    from .run import distil

__version__ = "0.1.0"
__all__ = ["OneStepGenerator", "SiDLoss", "__version__", "distil"]


def __getattr__(name: str) -> Any:
    """Loads torch only when something that needs it is asked for."""
    if name == "OneStepGenerator":
        from .generator import OneStepGenerator

        return OneStepGenerator
    if name == "SiDLoss":
        from .loss import SiDLoss

        return SiDLoss
    if name == "distil":
        from .run import distil

        return distil
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
