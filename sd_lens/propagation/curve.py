"""A collapse curve: how far apart the last tokens of pairs are, over the length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.models.precision import PRECISIONS, dtype_name
from sd_lens.propagation.decay import DecayFit, fit_decay
from sd_lens.propagation.pair_distances import ABSOLUTE

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

LAYER = int | str
"""A block, whose output is meant, ``"final"`` (after the final norm) or ``"logits"``."""

_NOISE = 4  # machine epsilons that rounding alone makes of entries of a normalised representation, which are of the order of 1 to 4

Line = tuple[str, LAYER, str]
"""Dtype, layer and metric of one line of a curve."""


@dataclass(frozen=True, eq=False)
class CollapseCurve:
    """Distances between the last tokens of a probe's pairs.

    Attributes:
        model_name: The model.
        n_blocks: Its blocks.
        probe: The probe, as `Probe.records` describes it.
        lengths: Lengths of the pairs' first sequences, in content elements, ascending.
        values: For every dtype, layer and metric the distances; parts are head-sized chunks for metrics ``*_heads`` and one else.
        equal: For every dtype and layer, whether the two representations are the same to the bit.
        edited: What was changed in the model's passes, None for nothing.
        shared: Whether beginnings that sequences share were run once.
    """

    model_name: str
    n_blocks: int
    probe: Mapping[str, Any]
    lengths: tuple[int, ...]
    values: Mapping[Line, Float[Tensor, "sample length part"]] = field(repr=False)
    equal: Mapping[tuple[str, LAYER], Bool[Tensor, "sample length"]] = field(repr=False)
    edited: str | None = None
    shared: bool = True

    @property
    def lines(self) -> tuple[Line, ...]:
        """Dtype, layer and metric of every line."""
        return tuple(self.values)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The precisions the model was run in."""
        return tuple(dict.fromkeys(dtype for dtype, _, _ in self.values))

    @property
    def layers(self) -> tuple[LAYER, ...]:
        """The layers, logits included."""
        return tuple(dict.fromkeys(layer for _, layer, _ in self.values))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics."""
        return tuple(dict.fromkeys(metric for _, _, metric in self.values))

    def line(self, dtype: str | torch.dtype | None = None, *, metric: str | None = None, layer: LAYER | None = None) -> Line:
        """The first line of this kind; what is None may be any.

        Args:
            dtype: Precision.
            metric: Metric.
            layer: Layer.

        Raises:
            ValueError: The curve has no such line.
        """
        wanted = {
            "dtype": dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype,
            "layer": layer,
            "metric": metric,
        }
        for line in self.values:
            if all(value is None or value == part for value, part in zip(wanted.values(), line, strict=True)):
                return line
        had = {"dtype": self.dtypes, "layer": self.layers, "metric": self.metrics}
        for name, value in wanted.items():
            if value is not None and value not in had[name]:
                raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, had[name]))}")
        raise ValueError(f"metric: got {metric!r} at layer {layer!r}; allowed: {_pairs(self.values)}")

    def decay(
        self,
        dtype: str | torch.dtype | None = None,
        *,
        metric: str | None = None,
        layer: LAYER | None = None,
        start: int | None = None,
    ) -> DecayFit:
        """The exponent with which the distance falls, fitted from its peak on to the lengths at which it is above four machine epsilons.

        Below that what is left is rounding, which falls by no law.

        Args:
            dtype: Precision; None for the curve's first.
            metric: Metric; None for the curve's first. Chunks are averaged.
            layer: Layer; None for the curve's first.
            start: Smallest length to fit; None for the one with the largest mean distance.

        Raises:
            ValueError: The curve has no such line, or no length is left.
        """
        line = self.line(dtype, metric=metric, layer=layer)
        distances = self.values[line].mean(-1)
        if start is None:
            start = self.lengths[int(distances.mean(0).argmax())]
        if line[2] in ABSOLUTE:
            distances = distances.masked_fill(distances <= _NOISE * torch.finfo(PRECISIONS[line[0]]).eps, torch.nan)
        return fit_decay(self.lengths, distances, start=start)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per length, dtype, layer and metric: mean, min and max over samples and chunks, and whether all pairs are equal to the bit."""
        import pandas as pd

        return pd.DataFrame(self.rows(), columns=["length", "dtype", "layer", "metric", "mean", "min", "max", "equal"])

    def rows(self) -> list[dict[str, Any]]:
        """The same as dictionaries."""
        rows = []
        for (dtype, layer, metric), values in self.values.items():
            equal = self.equal[dtype, layer].all(0).tolist()
            flat = values.transpose(0, 1).flatten(1)
            low, mean, high = flat.amin(1).tolist(), flat.mean(1).tolist(), flat.amax(1).tolist()
            for number, length in enumerate(self.lengths):
                rows.append(
                    {
                        "length": length,
                        "dtype": dtype,
                        "layer": layer,
                        "metric": metric,
                        "mean": mean[number],
                        "min": low[number],
                        "max": high[number],
                        "equal": equal[number],
                    }
                )
        return rows

    def plot(self, metric: str | None = None) -> go.Figure:
        """Distance over length, one line per dtype and layer, with machine epsilons and critical lengths.

        Args:
            metric: Which metric; None for the curve's first.
        """
        from sd_lens.display.figures import collapse_lines

        return collapse_lines(self, metric)

    def __repr__(self) -> str:
        line = self.lines[0]
        first, last = (self.values[line][:, place].mean().item() for place in (0, -1))
        edited = f", {self.edited}" if self.edited else ""
        return (
            f"CollapseCurve({self.probe['name']} on {self.model_name}{edited}: {line[2]} at {line[1]} in {line[0]} "
            f"{first:.3g} at length {self.lengths[0]}, {last:.3g} at {self.lengths[-1]})"
        )


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
            curve was not run in it.
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
        below, equal = ("none" if length is None else str(length) for length in (self.below_epsilon, self.equal))
        measured = "" if self.measured == self.dtype else f" (as computed in {self.measured})"
        return f"{self.dtype}: below {self.epsilon:.3g}{measured} from length {below}, equal to the bit at {equal} (up to {self.longest})"


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


def summary(curve: CollapseCurve, dtype: str, *, metric: str, layer: LAYER) -> dict[str, Any]:
    """One line of a curve in numbers: mean distance at both ends, critical lengths, decay; what tables of several curves are made of.

    Args:
        curve: The curve.
        dtype: Precision.
        metric: Metric, one that a machine epsilon can be held against.
        layer: Layer.
    """
    means = curve.values[dtype, layer, metric].flatten(2).mean(2).mean(0)
    critical = critical_length(curve, dtype, metric=metric, layer=layer)
    decay = curve.decay(dtype, metric=metric, layer=layer)
    return {
        "dtype": dtype,
        "shortest": means[0].item(),
        "longest": means[-1].item(),
        "below_epsilon": critical.below_epsilon,
        "equal": critical.equal,
        "exponent": decay.exponent,
        "exponent_error": decay.standard_error,
    }


def _first(lengths: tuple[int, ...], true: Bool[Tensor, "length"]) -> int | None:
    return next((length for length, holds in zip(lengths, true.tolist(), strict=True) if holds), None)


def _pairs(values: Mapping[Line, Any]) -> str:
    pairs = dict.fromkeys((layer, metric) for _, layer, metric in values)
    return ", ".join(f"{metric!r} at {layer!r}" for layer, metric in pairs)
