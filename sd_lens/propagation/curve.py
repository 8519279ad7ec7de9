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

_FEWEST = 3  # lengths that a power law is fitted to

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
        sizes: For every line the mean size of a representation by the same metric, which rounding is held against.
        edited: What was changed in the model's passes, None for nothing.
        shared: Whether beginnings that sequences share were run once.
    """

    model_name: str
    n_blocks: int
    probe: Mapping[str, Any]
    lengths: tuple[int, ...]
    values: Mapping[Line, Float[Tensor, "sample length part"]] = field(repr=False)
    equal: Mapping[tuple[str, LAYER], Bool[Tensor, "sample length"]] = field(repr=False)
    sizes: Mapping[Line, float] = field(default_factory=dict, repr=False)
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
        """The exponent with which the distance falls, fitted from its peak to where rounding takes over.

        That is the first length at which the distance is below the precision's machine epsilon times the size of a representation or, where
        the curve has a run in finer precision, at which the two runs' distances differ by more than a quarter.

        Args:
            dtype: Precision; None for the curve's first.
            metric: Metric; None for the curve's first. Chunks are averaged.
            layer: Layer; None for the curve's first.
            start: Smallest length to fit; None for the one with the largest mean distance.

        Returns:
            The fit; its exponent is NaN where fewer than three lengths are left to fit.

        Raises:
            ValueError: The curve has no such line, or no length is left.
        """
        line = self.line(dtype, metric=metric, layer=layer)
        distances = self.values[line].mean(-1)
        first = int(distances.mean(0).argmax()) if start is None else 0
        kept = [place for place, length in enumerate(self.lengths) if place >= first and (start is None or length >= start)]
        if not kept:
            raise ValueError(f"start: got {start}; allowed: up to {self.lengths[-1]}, the largest length")
        rounded = self._rounded(line).any(0)[kept]
        count = int(rounded.long().argmax()) if rounded.any() else len(kept)
        if count < _FEWEST:
            lengths = [self.lengths[place] for place in kept]
            return DecayFit(float("nan"), float("nan"), lengths[0], lengths[max(count - 1, 0)], 0)
        return fit_decay([self.lengths[place] for place in kept[:count]], distances[:, kept[:count]])

    def _rounded(self, line: Line) -> Bool[Tensor, "sample length"]:
        """Where a line's distances are made by rounding as much as by the difference."""
        dtype, layer, metric = line
        distances = self.values[line].mean(-1)
        if metric not in ABSOLUTE:
            return distances == 0
        rounded = distances <= torch.finfo(PRECISIONS[dtype]).eps * self.sizes.get(line, 1.0)
        finest = min(self.dtypes, key=lambda name: torch.finfo(PRECISIONS[name]).eps)
        if finest != dtype and (finest, layer, metric) in self.values:
            truth = self.values[finest, layer, metric].mean(-1)
            rounded |= (distances - truth).abs() > 0.25 * truth
        return rounded

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


def _pairs(values: Mapping[Line, Any]) -> str:
    pairs = dict.fromkeys((layer, metric) for _, layer, metric in values)
    return ", ".join(f"{metric!r} at {layer!r}" for layer, metric in pairs)
