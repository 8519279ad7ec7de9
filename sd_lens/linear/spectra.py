"""Leading singular triplets, and the eigenpair nearest a direction, of maps known by their products only.

Both solvers are Krylov methods written for torch tensors, so that on an accelerator every vector stays there: scipy's, which could
do the same, take each product through the host's memory. The tests hold them against dense decompositions and against scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from sd_lens.linear.angles import acute_angle
from sd_lens.linear.maps import DenseMap, LinearMap


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


# Relative to the largest of its kind, what rounding leaves of a product that is zero.
_ROUNDING = {torch.float64: 1e-13}
_FLOAT32_ROUNDING = 1e-6
# Relative to the largest, eigenvalues that count as zero.
_NULL = 1e-5


def _rounding(linear_map: LinearMap) -> float:
    return _ROUNDING.get(linear_map.like.dtype, _FLOAT32_ROUNDING)


class _Basis:
    """Orthonormal float64 vectors, one added at a time, where the map's products are computed."""

    def __init__(self, like: Tensor, d: int, generator: torch.Generator):
        self._rows = torch.empty(16, d, dtype=torch.float64, device=like.device)
        self._generator = generator
        self.n = 0

    @property
    def rows(self) -> Tensor:
        return self._rows[: self.n]

    def orthogonal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What of a vector is orthogonal to the basis, and its coefficients on it."""
        coefficients = x.new_zeros(self.n)
        for _ in range(2):  # once more restores orthogonality that the first pass lost to rounding
            overlap = self.rows @ x
            x = x - overlap @ self.rows
            coefficients += overlap
        return x, coefficients

    def add(self, x: Tensor) -> None:
        """Adds a unit vector."""
        if self.n == len(self._rows):
            self._rows = torch.cat([self._rows, torch.empty_like(self._rows)])
        self._rows[self.n] = x
        self.n += 1

    def random(self) -> Tensor:
        """A seeded unit vector orthogonal to the basis."""
        x = torch.randn(self._rows.shape[1], generator=self._generator, dtype=torch.float64).to(self._rows.device)
        x, _ = self.orthogonal(x)
        return x / torch.linalg.vector_norm(x)


def leading_singular(
    linear_map: LinearMap | Float[Tensor, "d d"], k: int = 1, *, tol: float | Sequence[float] | None = None, seed: int = 0
) -> SingularTriplets:
    """The ``k`` largest singular values of a map, with their vectors.

    Lanczos bidiagonalisation with full reorthogonalisation (Golub, Kahan 1965), grown until the triplets have converged: it needs one
    product with the map and one with its transpose per step, 4 steps where the largest singular value stands out, some 50 where the
    gap is weak. A singular value's error is at most its triplet's residual and usually the residual's square over the gap. Each
    pair's sign is chosen so that the entry of ``u`` with the largest magnitude is positive.

    Args:
        linear_map: The map, or a square matrix.
        k: How many triplets.
        tol: Residual ``‖Mᵀu − σv‖`` to reach, relative to σ; one number, or one per triplet. Default: 1e-6 for maps that compute in
            float32, 1e-10 in float64.
        seed: Seeds the starting vector.

    Returns:
        The triplets, float64, on the map's device.

    Raises:
        ValueError: ``k`` is not between 1 and d_model, a tolerance is not positive, or the map's products are not finite.

    Example:
        >>> from sd_lens.linear.linearize import linearize
        >>> from sd_lens.models.loading import weights_of
        >>> from sd_lens.models.planted import planted
        >>> truth = planted()
        >>> u, s, v = leading_singular(linearize(weights_of(truth.model)[truth.explosion_block]).ffn)
        >>> round(float(acute_angle(u[:, 0], truth.direction)), 1), round(float(acute_angle(v[:, 0], truth.trigger)), 1)
        (0.0, 0.0)
    """
    linear_map = _as_map(linear_map)
    d = linear_map.d_model
    if not 1 <= k <= d:
        raise ValueError(f"k: got {k}; allowed: 1 to d_model = {d}")
    tolerances = _tolerances(tol, k, linear_map.like.dtype)
    generator = torch.Generator().manual_seed(seed)
    left, right = (_Basis(linear_map.like, d, generator) for _ in range(2))
    right.add(right.random())
    rounding = _rounding(linear_map)
    diagonal: list[float] = []
    above: list[float] = []
    scale, check_at = 0.0, k
    while True:
        # One more column of M V = U B, with B upper bidiagonal, and what is left of Mᵀ U = V Bᵀ.
        u, _ = left.orthogonal(_product(linear_map.mv, right.rows[-1], linear_map.like))
        size = float(torch.linalg.vector_norm(u))
        if not math.isfinite(size):
            raise ValueError("linear_map: got products that are NaN or infinite; allowed: a map of finite weights")
        scale = max(scale, size)
        known = size <= rounding * scale  # the map sends this vector into what is spanned already
        diagonal.append(0.0 if known else size)
        left.add(left.random() if known else u / size)
        v, _ = right.orthogonal(_product(linear_map.rmv, left.rows[-1], linear_map.like))
        rest = float(torch.linalg.vector_norm(v))
        scale = max(scale, rest)
        n = left.n
        closed = n == d or rest <= rounding * scale
        if (closed and n >= k) or n >= check_at:
            p, s, qt = torch.linalg.svd(_bidiagonal(diagonal, above))
            if closed or bool((rest * p[-1, :k].abs() <= tolerances * s[:k]).all()):
                break
            check_at = n + max(1, n // 8)
        above.append(0.0 if closed else rest)
        right.add(right.random() if closed else v / rest)
    p, s, q = p[:, :k].to(left.rows.device), s[:k].to(left.rows.device), qt.mT[:, :k].to(left.rows.device)
    u, v = left.rows.mT @ p, right.rows[:n].mT @ q
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return SingularTriplets(u * sign, s, v * sign)


def _as_map(given: LinearMap | Tensor) -> LinearMap:
    return DenseMap(given) if isinstance(given, Tensor) else given


def _tolerances(tol: float | Sequence[float] | None, k: int, dtype: torch.dtype) -> Tensor:
    if tol is None:
        tol = 1e-10 if dtype == torch.float64 else 1e-6
    given = [tol] * k if isinstance(tol, float | int) else list(tol)
    if len(given) != k or not all(number > 0 for number in given):
        raise ValueError(f"tol: got {tol}; allowed: a positive number, or {k} of them, one per triplet")
    return torch.tensor(given, dtype=torch.float64)


def _bidiagonal(diagonal: list[float], above: list[float]) -> Tensor:
    square = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    return square + torch.diag(torch.tensor(above, dtype=torch.float64), diagonal=1) if above else square


def _product(multiply, x: Tensor, like: Tensor) -> Tensor:
    return multiply(x.to(like.dtype)).double()


@dataclass(frozen=True)
class Eigenpair:
    """An eigenpair ``M x = λ x``.

    Attributes:
        value: The eigenvalue. Maps of blocks are not symmetric, so it may be one of a complex pair: the one with the positive
            imaginary part.
        vector: The unit eigenvector, complex; real up to rounding where the eigenvalue is.
        angle_deg: Acute angle between the direction asked for and the complex line of the vector, degrees.
        residual: ``‖M x − λ x‖``; compare it with ``|λ|``.
        converged: Whether the residual is as small as was asked for. Where it is not, value and vector are not to be relied on: either no
            eigenvector is near the direction, or its eigenvalue lies among many others, which a Krylov space does not tell apart.
    """

    value: complex
    vector: Complex[Tensor, "d"]
    angle_deg: float
    residual: float
    converged: bool = True

    def balance(self, norm: float) -> float:
        """``Re λ · √d / norm``: −1 where a block cancels a residual vector of this norm along the eigenvector.

        The map acts on the normalised stream, whose norm is √d, so an eigenvalue λ writes λ√d along the eigenvector.

        Args:
            norm: Norm of the residual vector as it enters the block.

        Raises:
            ValueError: The norm is not positive.
        """
        if not norm > 0:
            raise ValueError(f"norm: got {norm}; allowed: a positive number")
        return self.value.real * math.sqrt(self.vector.shape[0]) / norm


# Nearer than this to the direction (degrees), a converged eigenvector is taken at once.
_SURELY_NEAREST = 5.0
# Up to this angle it is taken once a space of this size, and twice the size it was found in, holds no nearer one; farther, a nearer one may
# still come up as long as the space grows.
_NEAR = 60.0
_CONFIRMED = 16


def eigen_nearest(
    linear_map: LinearMap | Float[Tensor, "d d"],
    direction: Float[Tensor, "d"],
    *,
    method: Literal["krylov", "dense"] = "krylov",
    tol: float = 1e-5,
    max_krylov: int = 384,
) -> Eigenpair:
    """The eigenpair whose eigenvector makes the smallest acute angle with a direction.

    Arnoldi's method from the direction: the Krylov space it spans holds a nearby eigenvector after some ten products. Of a
    complex pair the eigenvalue, the vector and the angle to the vector's complex line, ``arccos |⟨x, d⟩|``, are kept whole (Wang et
    al. keep real parts). Where no eigenvector is near, or its eigenvalue lies inside the cloud of the others, the space grows to
    ``max_krylov``, and `Eigenpair.converged` tells whether what was found then is an eigenpair; ``method="dense"`` finds any. Eigenvalues of zero (1e-5 of the largest) are
    passed over as long as there is another: any vector of a map's null space is an eigenvector, and attention with grouped heads has
    a wide one.

    Args:
        linear_map: The map ``M``, or a square matrix.
        direction: The direction of interest.
        method: ``"krylov"``, or ``"dense"`` for the decomposition of the whole matrix, d_model² numbers, as a second opinion.
        tol: Residual to reach, relative to the eigenvalue; rounding of the products is allowed for.
        max_krylov: Largest dimension of the Krylov space.

    Returns:
        The eigenpair, with its true residual (recomputed by products).

    Raises:
        ValueError: ``direction`` has another width than the map, or is zero or not finite; an option is not one of those allowed.

    Example:
        >>> from sd_lens.linear.linearize import linearize
        >>> from sd_lens.models.loading import weights_of
        >>> from sd_lens.models.planted import planted
        >>> truth = planted()
        >>> update = linearize(weights_of(truth.model)[truth.decay_block]).update
        >>> round(eigen_nearest(update, truth.direction).value.real, 2)
        -60.0
    """
    linear_map = _as_map(linear_map)
    d = linear_map.d_model
    if tuple(direction.shape) != (d,):
        raise ValueError(f"direction: got shape {tuple(direction.shape)}; allowed: ({d},), the map's width")
    unit = direction.double().to(linear_map.like.device)
    norm = torch.linalg.vector_norm(unit)
    if not bool(torch.isfinite(norm)) or float(norm) == 0:
        raise ValueError("direction: got a zero or non-finite vector; allowed: a vector with a direction")
    if method not in ("krylov", "dense"):
        raise ValueError(f"method: got {method!r}; allowed: 'krylov', 'dense'")
    if max_krylov < 1 or tol <= 0:
        raise ValueError(f"max_krylov, tol: got {max_krylov}, {tol}; allowed: at least 1, and a positive number")
    unit = unit / norm
    if method == "dense":
        values, vectors = torch.linalg.eig(linear_map.to_dense().double())
        cosine = (unit.to(vectors.dtype) @ vectors).abs()
        scale = float(values.abs().max())
        index = int((cosine * (values.abs() > _NULL * scale) if scale > 0 else cosine).argmax())
        return _finish(linear_map, unit, complex(values[index].item()), vectors[:, index], scale, tol)
    return _arnoldi(linear_map, unit, tol, min(max_krylov, d))


def _arnoldi(linear_map: LinearMap, unit: Tensor, tol: float, size: int) -> Eigenpair:
    basis = _Basis(linear_map.like, len(unit), torch.Generator())
    hessenberg = unit.new_zeros(size + 1, size)
    basis.add(unit)
    rounding = _rounding(linear_map)
    check_at = min(4, size)
    first: tuple[int, complex] | None = None  # where the pair in question was found, and its value
    while True:
        step = basis.n - 1
        product, coefficients = basis.orthogonal(_product(linear_map.mv, basis.rows[step], linear_map.like))
        beta = float(torch.linalg.vector_norm(product))
        hessenberg[: step + 1, step] = coefficients
        hessenberg[step + 1, step] = beta
        n = basis.n
        last = n == size or beta <= rounding * (float(torch.linalg.vector_norm(coefficients)) + beta)
        if last or n >= check_at:
            found = _nearest_ritz(hessenberg[: n + 1, :n].cpu())
            converged = found.residual <= _reached(found.value, found.scale, tol, rounding)
            if not converged or first is None or abs(found.value - first[1]) > 1e-3 * abs(found.value):
                first = (n, found.value) if converged else None
            confirmed = first is not None and n >= max(_CONFIRMED, 2 * first[0]) and found.angle_deg < _NEAR
            if last or (converged and (confirmed or found.angle_deg < _SURELY_NEAREST)):
                break
            check_at = n + max(2, n // 4)
        basis.add(product / beta)
    vector = found.weights.to(unit.device) @ basis.rows.to(torch.complex128)
    return _finish(linear_map, unit, found.value, vector, found.scale, tol)


def _reached(value: complex, scale: float, tol: float, rounding: float) -> float:
    """The residual that is small enough for an eigenvalue, in a map whose largest is ``scale``."""
    return tol * abs(value) + rounding * scale


class _Ritz(NamedTuple):
    """A Ritz pair: its weights on the basis, its residual, and the magnitude of the largest Ritz value."""

    value: complex
    weights: Tensor
    angle_deg: float
    residual: float
    scale: float


def _nearest_ritz(hessenberg: Tensor) -> _Ritz:
    """The Ritz pair nearest the starting vector, of those whose value is not zero."""
    values, vectors = torch.linalg.eig(hessenberg[:-1])
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
    scale = float(values.abs().max())
    residuals = float(hessenberg[-1, -1]) * vectors[-1].abs()
    # The basis is orthonormal and begins with the direction: the first weight of a unit Ritz vector is the cosine.
    cosine = vectors[0].abs()
    acting = values.abs() > _NULL * scale
    cosine = cosine * acting if bool(acting.any()) else cosine
    index = int(cosine.argmax())
    angle = math.degrees(math.acos(min(1.0, float(cosine[index]))))
    return _Ritz(complex(values[index].item()), vectors[:, index], angle, float(residuals[index]), scale)


def _finish(linear_map: LinearMap, unit: Tensor, value: complex, vector: Tensor, scale: float, tol: float) -> Eigenpair:
    vector = vector / torch.linalg.vector_norm(vector)
    if value.imag < 0:  # of a pair, either would do
        value, vector = value.conjugate(), vector.conj()
    overlap = vector @ unit.to(vector.dtype)
    if overlap.abs() > 0:
        vector = vector * overlap.conj().sgn()  # the phase in which it points along the direction
    real = _product(linear_map.mv, vector.real, linear_map.like)
    imaginary = _product(linear_map.mv, vector.imag, linear_map.like) if vector.imag.any() else torch.zeros_like(real)
    residual = float(torch.linalg.vector_norm(torch.complex(real, imaginary) - value * vector))
    return Eigenpair(
        value,
        vector,
        float(acute_angle(unit, vector)),
        residual,
        residual <= 10 * _reached(value, scale, tol, _rounding(linear_map)),
    )
