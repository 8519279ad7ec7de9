"""How information gets to the last token of a model: what `propagation_overview` found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch

from sd_lens.models.precision import PRECISIONS
from sd_lens.propagation.answers import Answers
from sd_lens.propagation.consequences import PropagationConsequences
from sd_lens.propagation.critical import CriticalLength, critical_length
from sd_lens.propagation.curve import CollapseCurve
from sd_lens.propagation.mitigations import Mitigations
from sd_lens.propagation.pair_distances import ABSOLUTE
from sd_lens.propagation.sensitivity_result import Sensitivity
from sd_lens.propagation.squashing_result import SquashingBound, Which

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Propagation:
    """How information gets to a model's last token.

    Attributes:
        model_name: The model.
        d_model: Its width.
        n_blocks: Its blocks.
        curve: Distance of the last tokens of a probe's pairs, over the length.
        sensitivity: What the last token of a prompt feels of every token; None where gradients cannot be taken.
        bound: The over-squashing bound on it; None where weights or attention patterns cannot be read.
        mitigations: The curve with what may help; None where it was not asked for or cannot be had.
        consequences: Curve and sensitivity without the explosion subspace; None likewise.
        answers: The model's answers to the probe; None likewise.
        missing: Why something that was asked for is None, by its name.
        notes: What has to be known to read it.
    """

    model_name: str
    d_model: int
    n_blocks: int
    curve: CollapseCurve
    sensitivity: Sensitivity | None
    bound: SquashingBound | None
    mitigations: Mitigations | None
    consequences: PropagationConsequences | None
    answers: Answers | None
    missing: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def critical_lengths(self) -> tuple[CriticalLength, ...]:
        """Critical lengths by the first metric that a machine epsilon can be held against, in every precision and layer; empty without one.

        Behind those of each precision's own run stand those that hold the distances of the finest run against the epsilons of coarser ones.
        """
        metric = next((name for name in self.curve.metrics if name in ABSOLUTE), None)
        if metric is None:
            return ()
        places = [(dtype, layer) for dtype, layer, name in self.curve.lines if name == metric]
        finest = min(self.curve.dtypes, key=_epsilon)
        own = [critical_length(self.curve, dtype, metric=metric, layer=layer) for dtype, layer in places]
        held = [
            critical_length(self.curve, dtype, measured=finest, metric=metric, layer=layer)
            for dtype, layer in places
            if _epsilon(dtype) > _epsilon(finest)
        ]
        return (*own, *held)

    @property
    def correlation(self) -> dict[Which, float]:
        """Spearman's rank correlation over tokens of either bound with the true sensitivity; without those that cannot be had."""
        if self.bound is None or self.sensitivity is None:
            return {}
        found = {which: float(self.bound.correlation(self.sensitivity, which=which)[0]) for which in get_args(Which)}
        return {which: value for which, value in found.items() if not math.isnan(value)}

    def to_dataframe(self) -> pd.DataFrame:
        """The collapse curve's rows."""
        return self.curve.to_dataframe()

    def plot(self, metric: str | None = None) -> go.Figure:
        """The collapse curve; sensitivity, bound and the rest have a ``plot()`` of their own.

        Args:
            metric: Which metric; None for the curve's first.
        """
        return self.curve.plot(metric)

    def __repr__(self) -> str:
        parts = [self.curve, self.sensitivity, self.bound, self.mitigations, self.consequences, self.answers]
        return f"Propagation({', '.join(repr(part) for part in parts if part is not None)})"


def _epsilon(dtype: str) -> float:
    return torch.finfo(PRECISIONS[dtype]).eps
