"""How fast a distance falls with the length: the exponent of a power law, fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class DecayFit:
    """A power law ``distance ∝ length^(-exponent)``, fitted to logarithms by least squares.

    Attributes:
        exponent: Mean of the exponents fitted to single runs; NaN where fewer than two distances are above 0.
        standard_error: Standard error of that mean over runs. Distances of one run hang together (one length's sequence is the beginning of
            the next one's), so that the fit's own residuals would promise too much; they are used only where there is one run. NaN where
            there is nothing to tell it from.
        start: Smallest length fitted.
        stop: Largest.
        n_runs: How many runs.
    """

    exponent: float
    standard_error: float
    start: int
    stop: int
    n_runs: int

    def __str__(self) -> str:
        return f"{self.exponent:.3f} ± {self.standard_error:.3f}"


def fit_decay(lengths: Sequence[int], distances: Float[Tensor, "run length"], *, start: int | None = None) -> DecayFit:
    """The exponent with which distances fall.

    Args:
        lengths: Lengths, ascending.
        distances: One row per run (a seed, say). Distances of 0 and NaN are left out.
        start: Smallest length to fit; default: all.

    Returns:
        The fit.

    Raises:
        ValueError: No length is left to fit.

    Example:
        >>> import torch
        >>> fit = fit_decay([10, 100, 1000], torch.tensor([[0.4, 0.04, 0.004], [0.7, 0.07, 0.007]]))
        >>> round(fit.exponent, 3), round(fit.standard_error, 3)
        (1.0, 0.0)
    """
    first = lengths[0] if start is None else start
    used = torch.tensor([length >= first for length in lengths])
    if not used.any():
        raise ValueError(f"start: got {start}; allowed: up to {lengths[-1]}, the largest length")
    kept = [length for length in lengths if length >= first]
    x = torch.tensor(kept, dtype=torch.float64).log()
    slopes, errors = [], []
    for run in distances.double()[:, used]:
        there = run > 0
        if int(there.sum()) < 2:
            continue
        slope, error = _line(x[there], run[there].log())
        slopes.append(-slope)
        errors.append(error)
    if not slopes:
        return DecayFit(math.nan, math.nan, kept[0], kept[-1], 0)
    each = torch.tensor(slopes, dtype=torch.float64)
    error = errors[0] if len(slopes) == 1 else float(each.std() / math.sqrt(len(slopes)))
    return DecayFit(float(each.mean()), error, kept[0], kept[-1], len(slopes))


def _line(x: Float[Tensor, "point"], y: Float[Tensor, "point"]) -> tuple[float, float]:
    """Slope of the least-squares line, and its standard error from the residuals (NaN of two points)."""
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / (x * x).sum())
    if len(x) < 3:
        return slope, math.nan
    variance = float(((y - slope * x) ** 2).sum()) / (len(x) - 2)
    return slope, math.sqrt(variance / float((x * x).sum()))
