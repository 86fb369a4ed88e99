"""The generator's objectives, one row of a table each.

docs/method.md derives them. They are written with denoisers: the forms in noise predictions times sigma^2, with
sigma eps = x_t - f and sigma n = x_t - x_g. x_g is the generator's image, x_t = x_g + sigma n, and f_phi, f_psi are
the predictions of teacher and fake score for x_t. All tensors are [N, C, H, W], and so is the result, before weighting.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from dnnlib import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTINGS = ("omega", "sigma", "time", "none")


def l1(x_g: "Tensor", x_t: "Tensor", f_phi: "Tensor", f_psi: "Tensor", alpha: float = 0.0) -> "Tensor":
    """|f_phi - f_psi|^2: the Fisher divergence itself."""
    return (f_phi - f_psi).square()


def l2(x_g: "Tensor", x_t: "Tensor", f_phi: "Tensor", f_psi: "Tensor", alpha: float = 0.0) -> "Tensor":
    """(f_phi - f_psi)(f_phi - x_g): one factor projected."""
    return (f_phi - f_psi) * (f_phi - x_g)


def sid(x_g: "Tensor", x_t: "Tensor", f_phi: "Tensor", f_psi: "Tensor", alpha: float) -> "Tensor":
    """L2 - alpha L1 (SiD eq. 23; its weight is eq. 24)."""
    difference = f_phi - f_psi
    return difference * ((f_phi - x_g) - alpha * difference)


def cross(x_g: "Tensor", x_t: "Tensor", f_phi: "Tensor", f_psi: "Tensor", alpha: float = 0.0) -> "Tensor":
    """|eps_phi - n|^2 + |eps_psi|^2 - |n|^2: only the cross term of L1 projected."""
    return (f_phi - x_g).square() + (x_t - f_psi).square() - (x_t - x_g).square()


def full(x_g: "Tensor", x_t: "Tensor", f_phi: "Tensor", f_psi: "Tensor", alpha: float = 0.0) -> "Tensor":
    """|eps_phi|^2 - 2 eps_phi n + eps_psi n: every term with psi projected."""
    noise = x_t - x_g
    return (x_t - f_phi).square() - 2 * (x_t - f_phi) * noise + (x_t - f_psi) * noise


def diff_instruct(x_g: "Tensor", x_t: "Tensor", f_phi: "Tensor", f_psi: "Tensor", alpha: float = 0.0) -> "Tensor":
    """(f_psi - f_phi) x_g, both stopped: the reverse KL divergence's direction (Diff-Instruct, arXiv:2305.18455)."""
    return (f_psi - f_phi).detach() * x_g


def less_l1(terms: Callable) -> Callable:
    """The objective minus alpha L1, as SiD's is L2 - alpha L1."""

    def difference(x_g: "Tensor", x_t: "Tensor", f_phi: "Tensor", f_psi: "Tensor", alpha: float) -> "Tensor":
        return terms(x_g, x_t, f_phi, f_psi) - alpha * l1(x_g, x_t, f_phi, f_psi)

    return difference


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table.

    terms            called as terms(x_g, x_t, f_phi, f_psi, alpha)
    weighting        the weighting this objective was published with, one of WEIGHTINGS
    has_alpha        whether alpha is part of it
    passes_scores    whether its gradient passes through both score networks
    projected        u(x_t) times a projected factor, so that u may be detached or come from another distance
    for_study        it destroys a generator according to its closed form (docs/method.md, table of gradients)
    """

    terms: Callable
    weighting: str = "omega"
    has_alpha: bool = False
    passes_scores: bool = True
    projected: bool = False
    for_study: bool = False


OBJECTIVES = {
    "sid": Objective(sid, has_alpha=True, projected=True),
    "l2": Objective(l2, projected=True),
    "diff-instruct": Objective(diff_instruct, weighting="none", passes_scores=False),
    "diff-instruct-l1": Objective(less_l1(diff_instruct), has_alpha=True),
    "dmd": Objective(diff_instruct, passes_scores=False),
    "l1": Objective(l1, for_study=True),
    "cross": Objective(cross, for_study=True),
    "full": Objective(full, for_study=True),
    "cross-l1": Objective(less_l1(cross), has_alpha=True, for_study=True),
    "full-l1": Objective(less_l1(full), has_alpha=True, for_study=True),
}
PROJECTED = [name for name, objective in OBJECTIVES.items() if objective.projected]


def check_objective(name: str, weighting: str | None, huber: float | None, score_gradient: bool) -> Objective:
    """The objective with the given weighting, or its own for None.

    Errors: UserError naming the option that doesn't fit.
    """
    for option, value, known in (("objective", name, OBJECTIVES), ("weighting", weighting, (None, *WEIGHTINGS))):
        if value not in known:
            raise UserError(f"--{option}={value}: not one of {', '.join(filter(None, known))}")
    if name == "dmd" and weighting not in (None, "omega"):
        raise UserError(f"--weighting={weighting}: dmd is defined with omega; --objective=diff-instruct takes others")
    objective = OBJECTIVES[name]
    if not objective.projected and huber is not None:
        raise UserError(f"--huber={huber:g}: {name} has no such form; use --objective={' or '.join(PROJECTED)}")
    if not objective.projected and not score_gradient:
        raise UserError(f"--score-gradient: {name} needs on; --objective={' or '.join(PROJECTED)} works without")
    return dataclasses.replace(objective, weighting=weighting or objective.weighting)
