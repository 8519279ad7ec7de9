"""Who wrote a quantity of the stream: its largest parts as bars, for one group of tokens or for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.display.labels import number, visible
from sd_lens.display.style import (
    BLUE,
    GREEN,
    GROUP_COLOURS,
    INK,
    MUTED,
    NEGLIGIBLE,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    count,
    frame,
    horizontal_bars,
)
from sd_lens.tracing.groups import GROUPS
from sd_lens.tracing.shares import Attribution

KIND_COLOURS = {
    "embed": GREEN,
    "pos_embed": PURPLE,
    "head": BLUE,
    "bias": SKY,
    "ffn": ORANGE,
    "neuron": VERMILLION,
    "expert": VERMILLION,
    "ffn_bias": ORANGE,
}
KIND_NAMES = {
    "embed": "embedding",
    "pos_embed": "positions",
    "head": "attention head",
    "bias": "attention bias",
    "ffn": "FFN",
    "neuron": "neuron",
    "expert": "expert",
    "ffn_bias": "FFN bias",
}
_AXES = {"norm": "projection on the defect direction (units of norm)", "trigger": "coefficient on the trigger direction (no unit)"}


@dataclass(frozen=True)
class _Bar:
    """One bar: what it is of, and what it adds."""

    name: str
    kind: str
    value: float


def attribution_bars(
    attribution: Attribution, row: int | str | None = None, *, inside: int | None = None, k: int = 15
) -> go.Figure:
    """Bars of the largest parts of one row, largest first, the rest in one bar; a line for what they add up to.

    Args:
        attribution: From `attribute_norm` or `attribute_trigger`.
        row: Which row; default: the one with the largest quantity.
        inside: A block whose FFN was split further, to rank its neurons or experts; default: the components.
        k: How many parts have a bar of their own.

    Raises:
        ValueError: There is no such row, the block's FFN was not split, or ``k`` is below 1.
    """
    _require_bars(k)
    chosen = attribution.row(row)
    total = float(attribution.total[chosen])
    attribution.top(1, row=chosen, inside=inside)  # refuses a block whose FFN was not split
    split = attribution if inside is None else attribution.inside[inside]
    shown, rest = _largest(split.values[chosen].unsqueeze(0), k)
    parts = zip((split.components[part] for part in shown), split.values[chosen, shown].tolist(), strict=True)
    bars = [_Bar(part.name, part.kind, value) for part, value in parts]
    if rest:
        bars.append(_Bar(f"{len(rest)} others", "others", float(split.values[chosen, rest].double().sum())))
    whole = total if inside is None else float(attribution.inside[inside].total[chosen])
    whole_name = "all parts together" if inside is None else f"the whole FFN of block {inside}"
    label = _labeller([*(bar.value for bar in bars), whole])
    traces: list[go.Bar | go.Scatter] = []
    for kind in dict.fromkeys(bar.kind for bar in bars):
        of_kind = [bar for bar in bars if bar.kind == kind]
        traces.append(
            go.Bar(
                x=[bar.value for bar in of_kind],
                y=[bar.name for bar in of_kind],
                orientation="h",
                name=KIND_NAMES.get(kind, "all others"),
                marker={"color": KIND_COLOURS.get(kind, MUTED)},
                customdata=[_share(bar.value, total) for bar in of_kind],
                text=[label(bar.value, total) for bar in of_kind],
                textposition="auto",
                cliponaxis=False,
                hovertemplate="<b>%{y}</b>: %{x:.4g}<br>%{customdata} of the whole<extra></extra>",
            )
        )
    traces.append(
        go.Scatter(
            x=[whole, whole],
            y=[bars[0].name, bars[-1].name],
            mode="lines",
            line={"color": INK, "width": 1.5, "dash": "dash"},
            name=f"{whole_name}: {number(whole)}",
            hovertemplate=f"{whole_name}: %{{x:.4g}}<extra></extra>",
        )
    )
    ranking = "" if inside is None else f"{attribution.inside[inside].kind} ranking; "
    about = f"mean of {count(attribution.rows[chosen].n_tokens, 'token')}; " if attribution.rows[chosen].prompt is None else ""
    left = float((attribution if inside is None else attribution.inside[inside]).residual[chosen])
    figure = frame(
        traces,
        title=_title(attribution, chosen, inside),
        subtitle=f"{ranking}{about}{_drawn(len(shown), len(split.components))}; left unexplained: {number(left, 1)}",
        x=_AXES[attribution.quantity],
        y="part",
    )
    horizontal_bars(figure, [bar.name for bar in bars], [*(bar.value for bar in bars), whole])
    return figure


def attribution_groups(attribution: Attribution, k: int = 12) -> go.Figure:
    """The largest parts of initial, delimiter and other tokens side by side, below what they add up to.

    Args:
        attribution: From `attribute_norm` or `attribute_trigger`; single tokens are averaged by their group.
        k: How many parts are shown: those largest in any group.

    Raises:
        ValueError: ``k`` is below 1.
    """
    _require_bars(k)
    groups = [name for name in GROUPS if any(row.group == name for row in attribution.rows)]
    weights = torch.tensor([[row.n_tokens * (row.group == name) for row in attribution.rows] for name in groups]).double()
    sizes = weights.sum(1, keepdim=True)
    means = weights / sizes @ attribution.values.double()
    totals = weights / sizes @ attribution.total.double().unsqueeze(1)
    shown, rest = _largest(means, k)
    names = ["all together", *(attribution.components[part].name for part in shown), *([f"{len(rest)} others"] if rest else [])]
    drawn = torch.cat([totals, means[:, shown], *([means[:, rest].sum(1, keepdim=True)] if rest else [])], dim=1)
    label = _labeller(drawn.flatten().tolist())
    traces = []
    for group, values, size in zip(groups, drawn.tolist(), sizes.flatten().tolist(), strict=True):
        traces.append(
            go.Bar(
                x=values,
                y=names,
                orientation="h",
                name=f"{group} tokens ({size:.0f})",
                marker={"color": GROUP_COLOURS[group]},
                customdata=[_share(value, values[0]) for value in values],
                text=[label(value) for value in values],
                textposition="outside",
                textfont={"size": 11},
                cliponaxis=False,
                hovertemplate=f"<b>%{{y}}</b>, {group} tokens: %{{x:.4g}}<br>%{{customdata}} of the whole<extra></extra>",
            )
        )
    what = "What writes the norm of" if attribution.quantity == "norm" else f"What sets off the FFN of block {attribution.block} at"
    where = f" after block {attribution.block}" if attribution.quantity == "norm" else ""
    kinds = " and ".join(filter(None, [", ".join(groups[:-1]), groups[-1]]))
    figure = frame(
        traces,
        title=f"{what} {kinds} tokens in {attribution.model_name}{where}",
        subtitle=f"means over the tokens of each group; {_drawn(len(shown), len(attribution.components))}",
        x=_AXES[attribution.quantity],
        y="part",
    )
    horizontal_bars(figure, names, drawn.flatten().tolist(), per_name=len(groups))
    figure.add_hline(y=0.5, line={"color": MUTED, "width": 1})
    return figure


def _title(attribution: Attribution, chosen: int, inside: int | None) -> str:
    row = attribution.rows[chosen]
    tokens = f"{row.group} tokens"
    if row.prompt is not None:
        tokens = f"“{visible(row.label)}” (position {row.pos} of prompt {row.prompt})"
    if inside is None:
        what = "What writes the norm" if attribution.quantity == "norm" else f"What sets off the FFN of block {attribution.block}"
    else:
        units = f"Which {attribution.inside[inside].kind}s of block {inside}"
        what = (
            f"{units} write the norm" if attribution.quantity == "norm" else f"{units} set off the FFN of block {attribution.block}"
        )
    if attribution.quantity == "norm":
        return f"{what} of {tokens} in {attribution.model_name} after block {attribution.block}"
    return f"{what} at {tokens} in {attribution.model_name}"


def _largest(values: Float[Tensor, "row part"], k: int) -> tuple[list[int], list[int]]:
    """The parts with the largest magnitude in any row, largest first, and the rest in order; a rest of one is no rest."""
    order = values.abs().amax(0).argsort(descending=True, stable=True).tolist()
    if len(order) <= k + 1:
        return order, []
    return order[:k], sorted(order[k:])


def _drawn(shown: int, parts: int) -> str:
    return f"the {shown} largest of {parts} parts" if shown < parts else f"all {parts} parts"


def _share(value: float, total: float) -> str:
    return f"{number(100 * value / total, 3)} %" if total else "–"


def _labeller(values: Sequence[float]) -> Callable[..., str]:
    """Writes what stands beside a bar: its value, where asked its share of a whole, and nothing where no bar can be seen."""
    largest = max(map(abs, values), default=0.0)
    decimals = max(0, 3 - math.floor(math.log10(largest))) if largest else 0

    def label(value: float, total: float | None = None) -> str:
        if abs(value) < NEGLIGIBLE * largest or not value:
            return ""
        text = f"{value:.{decimals}f}"
        return (text if not total else f"{text} ({100 * value / total:.1f} %)").replace("-", "−")

    return label


def _require_bars(k: int) -> None:
    if k < 1:
        raise ValueError(f"k: got {k}; allowed: at least 1")
