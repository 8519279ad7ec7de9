"""Leading singular triplets, and the eigenpair nearest a direction, of maps known by their products only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float
from scipy.sparse.linalg import svds
from torch import Tensor

from sd_lens.linear.angles import acute_angle
from sd_lens.linear.maps import LinearMap


class SingularTriplets(NamedTuple):
    """Leading singular triplets, largest first.

    Attributes:
        u: Left singular vectors in columns: where the map sends.
        s: Singular values.
        v: Right singular vectors in columns: what the map answers to most.
    """

    u: Float[Tensor, "d k"]
    s: Float[Tensor, "k"]
    v: Float[Tensor, "d k"]


def leading_singular(linear_map: LinearMap, k: int = 1, *, seed: int = 0) -> SingularTriplets:
    """The ``k`` largest singular values of a map, with their vectors (ARPACK on its products).

    Each pair's sign is chosen so that the entry of ``u`` with the largest magnitude is positive: runs agree to the bit.

    Args:
        linear_map: The map.
        k: How many triplets.
        seed: Seeds the starting vector.

    Returns:
        The triplets, float64, on the map's device.

    Raises:
        ValueError: ``k`` is not between 1 and d_model.

    Example:
        >>> from sd_lens.linear.maps import linearize
        >>> from sd_lens.models.loading import weights_of
        >>> from sd_lens.models.planted import planted
        >>> truth = planted()
        >>> u, s, v = leading_singular(linearize(weights_of(truth.model)[truth.explosion_block]).ffn)
        >>> round(float(acute_angle(u[:, 0], truth.direction)), 1), round(float(acute_angle(v[:, 0], truth.trigger)), 1)
        (0.0, 0.0)
    """
    d = linear_map.d_model
    if not 1 <= k <= d:
        raise ValueError(f"k: got {k}; allowed: 1 to d_model = {d}")
    if k >= d - 1:  # ARPACK needs room for one vector more than it returns
        u, s, vt = np.linalg.svd(linear_map.to_dense().double().cpu().numpy())
    else:
        start = np.random.default_rng(seed).standard_normal(d)
        if not linear_map.mv(torch.from_numpy(start).to(linear_map.like)).any():  # ARPACK cannot start on a map that is zero
            basis = torch.eye(d, k, dtype=torch.float64, device=linear_map.like.device)
            return SingularTriplets(basis, torch.zeros(k, dtype=torch.float64, device=basis.device), basis.clone())
        options: dict[str, Any] = {"v0": start, "tol": 1e-10, "maxiter": 50 * d}
        found: Any = svds(linear_map.as_linear_operator(), k=k, **options)
        u, s, vt = found
    order = np.argsort(-s)[:k]
    u, s, v = u[:, order], s[order], vt[order].T
    sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(k)])
    device = linear_map.like.device
    return SingularTriplets(*(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (u * sign, s, v * sign)))


@dataclass(frozen=True)
class Eigenpair:
    """An eigenpair ``M x = λ x``.

    Attributes:
        value: The eigenvalue. Maps of blocks are not symmetric, so it may be one of a complex pair.
        vector: The unit eigenvector, complex; real up to rounding where the eigenvalue is.
        angle_deg: Acute angle between the direction asked for and the complex line of the vector, degrees.
        residual: ``‖M x − λ x‖``; compare it with ``|λ|``.
    """

    value: complex
    vector: Complex[Tensor, "d"]
    angle_deg: float
    residual: float

    def balance(self, norm: float) -> float:
        """``Re λ · √d / norm``: −1 where a block cancels a residual vector of this norm along the eigenvector.

        The map acts on the normalised stream, whose norm is √d, so an eigenvalue λ writes λ√d along the eigenvector.

        Args:
            norm: Norm of the residual vector as it enters the block.
        """
        return self.value.real * math.sqrt(self.vector.shape[0]) / norm


# Enough for every model measured so far; a Krylov space this large costs less than a pass over a large block's weights.
_KRYLOV = 48


def eigen_nearest(linear_map: LinearMap, direction: Float[Tensor, "d"], *, tol: float = 1e-5, max_krylov: int = 384) -> Eigenpair:
    """The eigenpair whose eigenvector makes the smallest acute angle with a direction.

    Arnoldi's method from the direction: the Krylov space it spans holds a nearby eigenvector after a few products. It grows
    until the nearest Ritz pair's residual is below ``tol`` times the largest Ritz value; read ``residual`` where it reached
    ``max_krylov`` first. Where the nearest eigenvector is almost orthogonal to the direction (beyond 70°), another one that is
    hardly farther away may be found in its place.

    Args:
        linear_map: The map ``M``.
        direction: The direction of interest.
        tol: Residual to reach, relative to the largest Ritz value.
        max_krylov: Largest dimension of the Krylov space.

    Returns:
        The eigenpair, with its true residual (recomputed by one product).

    Raises:
        ValueError: ``direction`` has another width than the map, or is zero or not finite.

    Example:
        >>> from sd_lens.linear.maps import linearize
        >>> from sd_lens.models.loading import weights_of
        >>> from sd_lens.models.planted import planted
        >>> truth = planted()
        >>> update = linearize(weights_of(truth.model)[truth.decay_block]).update
        >>> round(eigen_nearest(update, truth.direction).value.real, 2)
        -60.0
    """
    d = linear_map.d_model
    if tuple(direction.shape) != (d,):
        raise ValueError(f"direction: got shape {tuple(direction.shape)}; allowed: ({d},), the map's width")
    unit = direction.double().to(linear_map.like.device)
    norm = torch.linalg.vector_norm(unit)
    if not bool(torch.isfinite(norm)) or float(norm) == 0:
        raise ValueError("direction: got a zero or non-finite vector; allowed: a vector with a direction")
    unit = unit / norm
    size = min(max_krylov, d)
    basis = torch.zeros(size + 1, d, dtype=torch.float64, device=unit.device)
    hessenberg = torch.zeros(size + 1, size, dtype=torch.float64)
    basis[0] = unit
    best: tuple[complex, Tensor] | None = None
    for step in range(size):
        product = _product(linear_map, basis[step])
        known = basis[: step + 1]
        coefficients = torch.zeros(step + 1, dtype=torch.float64, device=unit.device)
        for _ in range(2):  # once more restores orthogonality that the first pass lost to rounding
            overlap = known @ product
            product = product - overlap @ known
            coefficients += overlap
        beta = float(torch.linalg.vector_norm(product))
        hessenberg[: step + 1, step] = coefficients.cpu()
        hessenberg[step + 1, step] = beta
        exhausted = beta <= 1e-12 * float(coefficients.abs().max() + 1e-300)
        last = exhausted or step == size - 1
        if last or (step + 1) % _KRYLOV == 0:
            value, weights, estimate = _nearest_ritz(hessenberg[: step + 2, : step + 1])
            best = value, weights.to(unit.device) @ known.to(torch.complex128)
            if last or estimate <= tol:
                break
        basis[step + 1] = product / beta
    assert best is not None
    return _finish(linear_map, unit, *best)


def _product(linear_map: LinearMap, x: Tensor) -> Tensor:
    return linear_map.mv(x.to(linear_map.like.dtype)).double()


def _nearest_ritz(hessenberg: Tensor) -> tuple[complex, Tensor, float]:
    """The Ritz pair nearest the starting vector, its weights on the basis, and its relative residual."""
    square = hessenberg[:-1]
    values, vectors = torch.linalg.eig(square)
    # The basis is orthonormal and begins with the direction: the first weight of a unit Ritz vector is the cosine.
    index = int(vectors[0].abs().argmax())
    weights = vectors[:, index] / torch.linalg.vector_norm(vectors[:, index])
    value = complex(values[index].item())
    scale = float(values.abs().max()) + 1e-300
    return value, weights, float(hessenberg[-1, -1] * weights[-1].abs()) / scale


def _finish(linear_map: LinearMap, unit: Tensor, value: complex, vector: Tensor) -> Eigenpair:
    vector = vector / torch.linalg.vector_norm(vector)
    vector = vector * (vector @ unit.to(vector.dtype)).conj().sgn()  # the phase in which it points along the direction
    product = _product(linear_map, vector.real) + 1j * _product(linear_map, vector.imag)
    residual = float(torch.linalg.vector_norm(product - value * vector))
    return Eigenpair(value, vector, float(acute_angle(unit, vector)), residual)
