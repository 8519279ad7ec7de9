"""Critical lengths: from where on two inputs are the same to a model at a precision; and a curve summed up in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from sd_lens.models.precision import PRECISIONS, dtype_name
from sd_lens.propagation.curve import LAYER, CollapseCurve
from sd_lens.propagation.pair_distances import ABSOLUTE


@dataclass(frozen=True)
class CriticalLength:
    """From which length on a model cannot tell the pairs apart; None where it can at all lengths measured.

    Attributes:
        dtype: Precision.
        measured: Precision of the distances that are held against its epsilon.
        layer: Layer.
        metric: Metric.
        epsilon: The dtype's machine epsilon.
        below_epsilon: First length from which on every pair's distance (every chunk's) is below it.
        equal: First length at which the two representations of every pair, run in ``dtype``, are the same to the bit; None too where the
            curve was not run in it. Where sequences share nothing (`CollapseCurve.shared`) the two of a pair may be rounded differently,
            and seldom are.
        longest: Longest length measured.
    """

    dtype: str
    measured: str
    layer: LAYER
    metric: str
    epsilon: float
    below_epsilon: int | None
    equal: int | None
    longest: int

    def __str__(self) -> str:
        below = "never below" if self.below_epsilon is None else "below"
        since = "" if self.below_epsilon is None else f" from length {self.below_epsilon}"
        equal = "never equal to the bit" if self.equal is None else f"equal to the bit at length {self.equal}"
        measured = "" if self.measured == self.dtype else f" (as computed in {self.measured})"
        return f"{self.dtype}: {below} {self.epsilon:.3g}{measured}{since}, {equal} (up to length {self.longest})"


def critical_length(
    curve: CollapseCurve,
    dtype: str | torch.dtype | None = None,
    *,
    measured: str | torch.dtype | None = None,
    metric: str | None = None,
    layer: LAYER | None = None,
) -> CriticalLength:
    """The length from which on two inputs are the same to a model at a precision.

    Distances of a run in low precision may stay above its epsilon for ever: what is left is rounding, whose steps are larger than the
    epsilon where entries are larger than 1. ``measured="float32"`` holds the distance without that rounding against the epsilon.

    Args:
        curve: From `collapse_curve`.
        dtype: Precision; None for the curve's first.
        measured: Precision of the run whose distances are taken; None for that one itself.
        metric: Metric; None for the first that a machine epsilon can be held against.
        layer: Layer; None for the first of that metric.

    Returns:
        Both lengths: where the distance stays below the dtype's machine epsilon (Barbero et al., Transformers need glasses!, 2024, theorem 4.2), and
        where nothing is left of it.

    Raises:
        ValueError: The curve has no such line, or its metric is no distance that a machine epsilon can be held against.

    Example:
        >>> import sd_lens
        >>> curve = sd_lens.collapse_curve(sd_lens.load("tiny"), lengths=[1, 8, 64], dtypes=["bfloat16"])
        >>> sd_lens.critical_length(curve).epsilon
        0.0078125
    """
    if metric is None:
        metric = next((name for name in curve.metrics if name in ABSOLUTE), None)
    if metric not in ABSOLUTE:
        got = f"{metric!r}, which is" if metric else f"a curve of {', '.join(curve.metrics)}, which are"
        raise ValueError(f"metric: got {got} on another scale than a machine epsilon; allowed: {', '.join(map(repr, ABSOLUTE))}")
    if measured is None:
        line = curve.line(dtype, metric=metric, layer=layer)
        name = line[0]
    else:
        line = curve.line(measured, metric=metric, layer=layer)
        name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype or curve.dtypes[0]
        if name not in PRECISIONS:
            raise ValueError(f"dtype: got {name!r}; allowed: {', '.join(PRECISIONS)}")
    epsilon = torch.finfo(PRECISIONS[name]).eps
    below = (curve.values[line] < epsilon).flatten(2).all(2).all(0)
    stays = below.flip(0).long().cumprod(0).flip(0).bool()
    equal = curve.equal.get((name, line[1]))
    return CriticalLength(
        name,
        *line,
        epsilon,
        _first(curve.lengths, stays),
        None if equal is None else _first(curve.lengths, equal.all(0)),
        curve.lengths[-1],
    )


def summary(curve: CollapseCurve, dtype: str, *, metric: str, layer: LAYER, start: int | None = None) -> dict[str, Any]:
    """One line of a curve in numbers: mean distance at both ends, critical lengths, decay; what tables of several curves are made of.

    Args:
        curve: The curve.
        dtype: Precision.
        metric: Metric, one that a machine epsilon can be held against.
        layer: Layer.
        start: Smallest length that the decay is fitted to; None for the curve's peak.
    """
    means = curve.values[dtype, layer, metric].flatten(2).mean(2).mean(0)
    critical = critical_length(curve, dtype, metric=metric, layer=layer)
    decay = curve.decay(dtype, metric=metric, layer=layer, start=start)
    return {
        "dtype": dtype,
        "shortest": means[0].item(),
        "longest": means[-1].item(),
        "below_epsilon": critical.below_epsilon,
        "equal": critical.equal,
        "exponent": decay.exponent,
        "exponent_error": decay.standard_error,
        "fitted_from": decay.start,
        "fitted_to": decay.stop,
    }


def peak(curve: CollapseCurve, *, metric: str, layer: LAYER) -> int:
    """The length with the largest mean distance in a curve's first precision.

    Args:
        curve: The curve.
        metric: Metric.
        layer: Layer.
    """
    means = curve.values[curve.dtypes[0], layer, metric].mean((0, 2))
    return curve.lengths[int(means.argmax())]


def _first(lengths: tuple[int, ...], true: Bool[Tensor, "length"]) -> int | None:
    return next((length for length, holds in zip(lengths, true.tolist(), strict=True) if holds), None)
