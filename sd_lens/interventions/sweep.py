"""What patching a subspace does, cell by cell: the result of `sd_lens.interventions.patching.patch_sweep`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class PatchSweep:
    """A metric of corrupted runs with the component in a subspace taken from the clean run, one cell after the other.

    All values are in the metric's unit: ``"loss"`` and ``"kl"`` in nats per token, ``"logit_diff"`` in logits, ``"peak_norm"`` as the
    stream's norm, ``"sink_rate"`` as a share of heads.

    Attributes:
        model_name: The model.
        metric: What the metric is called.
        side: ``"trigger"`` or ``"direction"``.
        over: What is patched in a block at a time: one ``"position"``, or one ``"head"``.
        blocks: Blocks, in rows.
        indices: Positions or heads, in columns.
        tokens: The corrupted token at each position; None where prompts differ in it, and for heads.
        clean_tokens: The clean one.
        clean: The metric of the clean run.
        corrupted: The metric of the corrupted run.
        values: The metric with each cell patched.
        control_mean: Its mean over random displacements of the same length, NaN without any.
        control_std: Its standard deviation over them, NaN with fewer than two.
        n_controls: How many random displacements there were for each cell.
        n_prompts: Pairs of prompts that the metric is of.
        rank: Singular vectors that span the subspace.
        subspace_block: The block whose subspace it is; None for each block's own.
    """

    model_name: str
    metric: str
    side: Literal["trigger", "direction"]
    over: Literal["position", "head"]
    blocks: tuple[int, ...]
    indices: tuple[int, ...]
    tokens: tuple[str | None, ...]
    clean_tokens: tuple[str | None, ...]
    clean: float
    corrupted: float
    values: Float[Tensor, "block index"]
    control_mean: Float[Tensor, "block index"]
    control_std: Float[Tensor, "block index"]
    n_controls: int
    n_prompts: int
    rank: int
    subspace_block: int | None

    @property
    def effect(self) -> Float[Tensor, "block index"]:
        """What each patch changes of the corrupted run's metric."""
        return self.values - self.corrupted

    @property
    def control_effect(self) -> Float[Tensor, "block index"]:
        """What random displacements of the same length change of it, on average: damage."""
        return self.control_mean - self.corrupted

    @property
    def recovered(self) -> Float[Tensor, "block index"]:
        """Effects as shares of what lies between the corrupted and the clean run's metric; NaN where nothing does."""
        gap = self.clean - self.corrupted
        return self.effect / (gap if gap else math.nan)

    @property
    def z(self) -> Float[Tensor, "block index"]:
        """How many of the controls' standard deviations lie between each value and the controls' mean; NaN where there is no spread."""
        spread = torch.where(self.control_std > 0, self.control_std, torch.nan)
        return (self.values - self.control_mean) / spread

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: block, position (with token and clean_token) or head, value, effect, recovered, control, control_std, z."""
        rows, columns = self.values.shape
        frame = pd.DataFrame({"block": self.blocks}).loc[lambda known: known.index.repeat(columns)].reset_index(drop=True)
        frame[self.over] = list(self.indices) * rows
        if self.over == "position":
            for name, texts in (("token", self.tokens), ("clean_token", self.clean_tokens)):
                frame[name] = pd.Series(list(texts) * rows, dtype=object)  # strings of their own would make None a number
        numbers = {
            "value": self.values,
            "effect": self.effect,
            "recovered": self.recovered,
            "control": self.control_mean,
            "control_std": self.control_std,
            "z": self.z,
        }
        return frame.assign(**{name: column.flatten().numpy() for name, column in numbers.items()})

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` cells with the largest effect, by magnitude.

        Raises:
            ValueError: ``k`` is below 1.
        """
        if k < 1:
            raise ValueError(f"k: got {k}; allowed: at least 1")
        return self.to_dataframe().sort_values("effect", key=abs, ascending=False, kind="stable").head(k).reset_index(drop=True)

    def plot(self) -> Figure:
        """Effects over blocks and positions or heads, above those of the random controls in the same colours."""
        from sd_lens.display.figures import patch_heatmap

        return patch_heatmap(self)

    def __repr__(self) -> str:
        most = self.top(1).iloc[0]
        index, share = int(most[self.over]), most.recovered
        token = f" {most.token!r}" if self.over == "position" and most.token is not None else ""
        much = "" if math.isnan(share) else f", {share:.0%} of the way to the clean run"
        return (
            f"PatchSweep({self.model_name}, {self.metric}, {self.side} side: {len(self.blocks)} blocks × {len(self.indices)} "
            f"{self.over}s, largest effect {most.effect:.3g} at block {int(most.block)}, {self.over} {index}{token}{much})"
        )
