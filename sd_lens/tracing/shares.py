"""The result of an attribution: parts, what they add up to, and what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sd_lens.tracing.components import Component

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Row:
    """What a row of an attribution is about: a group of tokens, or one token.

    Attributes:
        label: The group's name, or the token as text.
        group: The group that it is, or belongs to.
        n_tokens: How many tokens are averaged.
        prompt: The token's prompt; None for a group.
        pos: Its position there.
    """

    label: str
    group: str
    n_tokens: int
    prompt: int | None = None
    pos: int | None = None


@dataclass(frozen=True)
class Inside:
    """One FFN's part, split over its neurons or experts.

    Attributes:
        block: Its block.
        components: The neurons or experts, and last the FFN's biases.
        values: What each of them adds, averaged as the rows say.
        total: The FFN's own part, measured at its output.
    """

    block: int
    components: tuple[Component, ...]
    values: Float[Tensor, "row unit"]
    total: Float[Tensor, "row"]

    @property
    def kind(self) -> str:
        """``"neuron"`` or ``"expert"``."""
        return self.components[0].kind

    @property
    def residual(self) -> Float[Tensor, "row"]:
        """What the parts leave of the whole: rounding."""
        return self.total - self.values.sum(1)


@dataclass(frozen=True)
class Attribution:
    """A quantity of the stream, split over what wrote it.

    Attributes:
        model_name: The model.
        quantity: ``"norm"``: projection of the stream after ``block`` on the defect direction, in units of norm. ``"trigger"``:
            coefficient of the normalised stream that the block's FFN reads on what sets it off, no unit, at most ``√d``.
        block: The block.
        components: What the stream is the sum of.
        rows: What the rows are about: groups of tokens, or tokens.
        values: What each component adds, as a mean over the row's tokens.
        total: The quantity itself, measured at a hook point of its own.
        inside: FFNs split further, by block.
        vector: The unit vector that the stream is multiplied by.
        min_ratio: Least ratio of a high-norm token.
    """

    model_name: str
    quantity: str
    block: int
    components: tuple[Component, ...]
    rows: tuple[Row, ...]
    values: Float[Tensor, "row component"]
    total: Float[Tensor, "row"]
    inside: Mapping[int, Inside]
    vector: Float[Tensor, "d_model"]
    min_ratio: float

    @property
    def residual(self) -> Float[Tensor, "row"]:
        """What the parts leave of the whole: rounding, unless a hook of the caller's changes what attention writes."""
        return self.total - self.values.sum(1)

    @property
    def main(self) -> int:
        """The row with the largest quantity."""
        return int(self.total.abs().argmax())

    def row(self, which: int | str | None = None) -> int:
        """The number of a row.

        Args:
            which: Its number, or the label of a group or token (the first of that label); None for the row with the largest quantity.

        Raises:
            ValueError: There is no such row.
        """
        if which is None:
            return self.main
        labels = [row.label for row in self.rows]
        if isinstance(which, str) and which in labels:
            return labels.index(which)
        if isinstance(which, int) and -len(labels) <= which < len(labels):
            return which % len(labels)
        raise ValueError(f"row: got {which!r}; allowed: 0 to {len(labels) - 1}, or {', '.join(map(repr, labels[:5]))}")

    def top(self, k: int = 10, *, row: int | str | None = None, inside: int | None = None) -> pd.DataFrame:
        """The parts with the largest magnitude.

        Args:
            k: How many.
            row: Which row; default: the one with the largest quantity.
            inside: A block whose FFN was split further, to rank its neurons or experts; default: the components.

        Returns:
            Columns name, kind, block, index, value and share (of the whole quantity), largest first.

        Raises:
            ValueError: ``k`` is below 1, there is no such row, or the block's FFN was not split.
        """
        if k < 1:
            raise ValueError(f"k: got {k}; allowed: at least 1")
        number = self.row(row)
        components, values = self.components, self.values
        if inside is not None:
            if inside not in self.inside:
                split = ", ".join(map(str, self.inside)) or "none; ask for neurons=[block]"
                raise ValueError(f"inside: got {inside}; allowed: {split}")
            components, values = self.inside[inside].components, self.inside[inside].values
        frame = _frame(components, values[number], float(self.total[number]))
        order = frame.value.abs().sort_values(ascending=False, kind="stable").index[:k]
        return frame.loc[order].reset_index(drop=True)

    def part(self, kind: str, block: int | None = None, index: int | None = None, *, row: int | str | None = None) -> float:
        """What one component adds; the sum of its two parts where heads are split by their keys.

        Args:
            kind: See `Component`.
            block: Its block.
            index: Which head, neuron or expert.
            row: Which row; default: the one with the largest quantity.

        Raises:
            ValueError: There is no such component.
        """
        known = [(self.components, self.values), *((inner.components, inner.values) for inner in self.inside.values())]
        number = self.row(row)
        for components, values in known:
            columns = [i for i, c in enumerate(components) if (c.kind, c.block, c.index) == (kind, block, index)]
            if columns:
                return float(values[number, columns].sum())
        kinds = dict.fromkeys(component.kind for components, _ in known for component in components)
        raise ValueError(
            f"kind, block, index: got {(kind, block, index)}; allowed: one of the components, of kind {', '.join(kinds)}"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token or group and component, those inside of FFNs included: their FFN's part is in the table, too."""
        frames = []
        for number, row in enumerate(self.rows):
            total = float(self.total[number])
            pieces = [_frame(self.components, self.values[number], total)]
            pieces += [_frame(inner.components, inner.values[number], total) for inner in self.inside.values()]
            frame = pd.concat(pieces, ignore_index=True)
            for place, (name, value) in enumerate(vars(row).items()):
                frame.insert(place, name, [value] * len(frame))
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row per group or token: how many tokens, the quantity, what is left unexplained, and the largest part."""
        tops = [self.top(1, row=number).iloc[0] for number in range(len(self.rows))]
        frame = pd.DataFrame([vars(row) for row in self.rows])
        frame = frame.assign(total=self.total.tolist(), residual=self.residual.tolist())
        return frame.assign(largest=[top["name"] for top in tops], share=[top["share"] for top in tops])

    def plot(self, row: int | str | None = None, *, inside: int | None = None) -> Figure:
        """Bars of the largest parts of one row.

        Args:
            row: Which row; default: the one with the largest quantity.
            inside: A block whose FFN was split further, to show its neurons or experts.
        """
        from sd_lens.display.figures import attribution_bars

        return attribution_bars(self, row, inside=inside)

    def __repr__(self) -> str:
        number = self.main
        top = self.top(3, row=number)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(top["name"], top["share"], strict=True))
        where = f"after block {self.block}" if self.quantity == "norm" else f"of block {self.block}"
        label = f"{self.rows[number].label!r}" if self.rows[number].prompt is not None else self.rows[number].label
        return f"Attribution({self.model_name}, {self.quantity} {where}: {label} {float(self.total[number]):.4g} = {shares}, ...)"

    def _repr_html_(self) -> str:
        return self.plot()._repr_html_()


def _frame(components: Sequence[Component], values: Tensor, total: float) -> pd.DataFrame:
    numbers = values.double().numpy()
    return pd.DataFrame(
        {
            "name": [component.name for component in components],
            "kind": [component.kind for component in components],
            "block": pd.array([component.block for component in components], dtype="Int64"),
            "index": pd.array([component.index for component in components], dtype="Int64"),
            "keys": [component.keys for component in components],
            "value": numbers,
            "share": numbers / total if total else numbers * float("nan"),
        }
    )
