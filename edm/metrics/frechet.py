"""Fréchet distance between two Gaussians (FID: arXiv:1706.08500, eq. 6)."""

import numpy as np


def frechet_distance(mu: np.ndarray, sigma: np.ndarray, mu_ref: np.ndarray, sigma_ref: np.ndarray) -> float:
    """‖μ-μ'‖² + tr(Σ + Σ' - 2(ΣΣ')^½), in float64.

    mu, mu_ref: means [D]; sigma, sigma_ref: covariances [D, D], symmetric, possibly of deficient rank.

    With any R that has RRᵀ = Σ, ΣΣ' has the nonzero eigenvalues of the symmetric RᵀΣ'R: real and not negative
    (Σ^½Σ'Σ^½ is the case R = Σ^½). Those that rounding made negative are clipped. `sqrtm` of ΣΣ' has no such
    form: it goes complex when the rank is deficient.
    Errors: ValueError when the shapes don't agree, or a value isn't finite.
    """
    mu, sigma, mu_ref, sigma_ref = (np.asarray(a, dtype=np.float64) for a in (mu, sigma, mu_ref, sigma_ref))
    if not (mu.shape == mu_ref.shape and sigma.shape == sigma_ref.shape == mu.shape * 2):
        raise ValueError(f"shapes {mu.shape}, {sigma.shape} and {mu_ref.shape}, {sigma_ref.shape} don't agree")
    if not all(np.isfinite(a).all() for a in (mu, sigma, mu_ref, sigma_ref)):
        raise ValueError("a mean or a covariance holds NaN or infinity")
    root = _root(sigma)
    eigenvalues = np.linalg.eigvalsh(root.T @ sigma_ref @ root)
    trace_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    distance = np.square(mu - mu_ref).sum() + np.trace(sigma) + np.trace(sigma_ref) - 2 * trace_root
    return max(float(distance), 0.0)  # equal Gaussians may come out a rounding error below zero


def _root(sigma: np.ndarray) -> np.ndarray:
    """R with RRᵀ = Σ: the Cholesky factor, or for a deficient rank [D, rank], several times slower.

    Directions that are zero up to rounding are left out: a root would blow 1e-16 up to 1e-8 in each of them.
    """
    rounding = len(sigma) * np.finfo(np.float64).eps
    try:
        factor = np.linalg.cholesky(sigma)
        if np.square(factor.diagonal()).min() > rounding * sigma.diagonal().max():
            return factor
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(sigma)
    kept = values > rounding * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
