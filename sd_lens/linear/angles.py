"""Angles between directions, in degrees and float64.

Singular vectors and eigenvectors have no sign, so angles are acute: between 0° and 90°. In float32 an angle below 0.03° cannot
be told from 0, hence float64 throughout.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def _unit(x: Tensor, name: str) -> Tensor:
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    if not bool((norm > 0).all()) or not bool(torch.isfinite(norm).all()):
        raise ValueError(f"{name}: got a zero or non-finite vector; allowed: vectors with a direction")
    return wide / norm


def acute_angle(
    a: Float[Tensor, "*#batch d"] | Complex[Tensor, "*#batch d"], b: Float[Tensor, "*#batch d"] | Complex[Tensor, "*#batch d"]
) -> Float[Tensor, "*broadcast"]:
    """Acute angle between vectors, or between the complex lines they span.

    Args:
        a: Vectors, real or complex.
        b: Vectors of the same width; broadcast against ``a``.

    Returns:
        Degrees between 0 and 90, float64: ``arccos |⟨a, b⟩| / (‖a‖‖b‖)``.

    Raises:
        ValueError: Widths differ, or a vector is zero or not finite.

    Example:
        >>> acute_angle(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])).item()
        45.0
    """
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"b: got width {b.shape[-1]}; allowed: the width of a, {a.shape[-1]}")
    x, y = _unit(a, "a"), _unit(b, "b").to(a.device)
    dtype = torch.promote_types(x.dtype, y.dtype)
    cosine = (x.to(dtype).conj() * y.to(dtype)).sum(-1)
    # Near 0° the arc cosine loses half of the digits; the sine (distance from the other's line) does not.
    sine = torch.linalg.vector_norm(y.to(dtype) - cosine.unsqueeze(-1) * x.to(dtype), dim=-1)
    return torch.rad2deg(torch.atan2(sine, cosine.abs()))


def mean_pairwise_angle(vectors: Float[Tensor, "n d"]) -> float:
    """Mean acute angle over all pairs of different rows, in degrees; NaN for fewer than two rows.

    Example:
        >>> round(mean_pairwise_angle(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])), 6)
        60.0
    """
    n = vectors.shape[0]
    if n < 2:
        return float("nan")
    unit = _unit(vectors, "vectors")
    rows, columns = torch.triu_indices(n, n, offset=1)
    cosine = (unit @ unit.T)[rows, columns].abs().clamp(max=1.0)
    return float(torch.rad2deg(torch.arccos(cosine)).mean())
