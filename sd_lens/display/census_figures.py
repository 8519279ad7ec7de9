"""Which dimensions and which single weights carry the large norm."""

from __future__ import annotations

import plotly.graph_objects as go
import torch

from sd_lens.display.labels import number, plotly_text, visible
from sd_lens.display.norm_figures import log_axis
from sd_lens.display.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    block_axis,
    count,
    frame,
    horizontal_bars,
    percent,
    say_instead,
)
from sd_lens.tracing.census import MassiveActivation, MassiveActivations
from sd_lens.tracing.super_weights import SuperWeight, SuperWeights

MAX_NAMED = 6
MAX_LINES = 60
_COLOURS = (VERMILLION, BLUE, ORANGE, GREEN, PURPLE, SKY)


def massive_activations_figure(census: MassiveActivations) -> go.Figure:
    """Magnitude of each dimension's largest massive activation over the blocks; triangles point to the sign.

    Args:
        census: From `massive_activations`; if it found none, the figure says so.
    """
    dims = [int(dim) for dim in census.dimensions()["dim"]]
    entries: dict[tuple[int, int], list[MassiveActivation]] = {}
    for row in census.rows:
        entries.setdefault((row.dim, row.block), []).append(row)
    largest = {at: max(rows, key=lambda row: abs(row.value)) for at, rows in entries.items()}
    traces = []
    for rank, dim in reversed(list(enumerate(dims[:MAX_LINES]))):
        line = [largest.get((dim, block)) for block in range(census.n_blocks)]
        named = rank < MAX_NAMED
        traces.append(
            go.Scatter(
                x=list(range(census.n_blocks)),
                y=[None if row is None else abs(row.value) for row in line],
                customdata=[None if row is None else _massive(row, len(entries[dim, row.block])) for row in line],
                mode="lines+markers",
                line={"color": _COLOURS[rank] if named else MUTED, "width": 2 if named else 1},
                marker={
                    "symbol": ["triangle-down" if row is not None and row.value < 0 else "triangle-up" for row in line],
                    "size": 10 if named else 6,
                },
                name=f"{dim}" if named else "others",
                legendgroup=None if named else "others",
                legendrank=1000 + rank,
                showlegend=rank <= MAX_NAMED,
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    drawn = f"{len(dims):,} dimensions" if len(dims) <= MAX_LINES else f"the first {MAX_LINES} of {len(dims):,} dimensions"
    where = f"of {drawn if len(dims) != 1 else 'one dimension'} the largest after each block; ▲ positive, ▼ negative"
    kept = "" if census.n_found == len(census.rows) else f" (the largest {len(census.rows):,} are looked at)"
    figure = frame(
        traces,
        title=f"Massive activations of {census.model_name}: {census.criteria}",
        subtitle=f"{census.n_found:,} in {count(census.n_tokens, 'token')}{kept}" + (f"; {where}" if dims else ""),
        x="after block",
        y="magnitude (log scale)",
    )
    block_axis(figure, census.n_blocks)
    figure.update_layout(legend_title={"text": "dimension", "font": {"size": 13}})
    if not dims:
        say_instead(figure, "no massive activation")
        return figure
    values = torch.tensor([*(abs(row.value) for row in largest.values()), *([census.min_value] if census.min_value > 0 else [])])
    figure.update_yaxes(**log_axis(values))
    if census.min_value > 0:
        figure.add_hline(y=census.min_value, line={"color": INK, "width": 1, "dash": "dash"}, layer="below")
    return figure


def _massive(row: MassiveActivation, n: int) -> str:
    token = plotly_text(visible(row.token), 40)
    return (
        f"dimension {row.dim} after block {row.block}: {number(row.value)}, {number(row.times_median, 3)} × the median"
        f"<br>at <b>{token}</b>, position {row.pos} of prompt {row.prompt}<br>{count(n, 'massive activation')} here"
    )


def super_weight_bars(super_weights: SuperWeights, k: int = 20) -> go.Figure:
    """What each candidate writes by itself, beside all that its dimension gets at the same token.

    Args:
        super_weights: From `super_weights`; if it found none, the figure says so.
        k: How many candidates at most, the largest first.

    Raises:
        ValueError: ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k: got {k}; allowed: at least 1")
    rows = super_weights.rows[:k]
    names = [_name(row) for row in rows]
    own = [row.share * row.output for row in rows]
    whole = [row.output for row in rows]
    texts = [percent(row.share) for row in rows]
    longer = [abs(part) > abs(of) for part, of in zip(own, whole, strict=True)]  # where other weights write against it
    looks = {"orientation": "h", "y": names, "textposition": "outside", "cliponaxis": False}
    traces = [
        go.Bar(
            x=whole,
            name="all that the FFN writes to the dimension there",
            marker={"color": MUTED},
            text=["" if over else text for text, over in zip(texts, longer, strict=True)],
            hovertemplate="%{y}: all that the FFN writes there: %{x:.4g}<extra></extra>",
            **looks,
        ),
        go.Bar(
            x=own,
            name="this weight × its activation, and its share",
            marker={"color": VERMILLION},
            width=0.4,
            text=[text if over else "" for text, over in zip(texts, longer, strict=True)],
            customdata=[_hover(row) for row in rows],
            hovertemplate="%{customdata}<extra></extra>",
            **looks,
        ),
    ]
    blocks = ", ".join(map(str, super_weights.blocks))
    looked = f"FFN{'s' * (len(super_weights.blocks) != 1)} of block {blocks}" if blocks else "no block makes a large norm"
    found = f"{count(len(super_weights.rows), 'candidate')}{f', {k} are shown' if len(super_weights.rows) > k else ''}"
    figure = frame(
        traces,
        title=f"Super-weight candidates of {super_weights.model_name}",
        subtitle=f"{looked}; {found}: single weights that make {percent(super_weights.min_share)} of a spike or more",
        x="contribution to the stream (units of norm)",
        y="weight",
    )
    horizontal_bars(figure, names, [*own, *whole])
    figure.update_layout(barmode="overlay")
    if not rows:
        say_instead(figure, "no super weight" if blocks else "no super weight: no block makes a large norm")
    return figure


def _name(row: SuperWeight) -> str:
    expert = "" if row.expert is None else " shared expert " if row.expert == "shared" else f"E{row.expert}"
    return f"L{row.block}{expert}N{row.neuron} → dimension {row.dim}"


def _hover(row: SuperWeight) -> str:
    lines = [
        f"<b>{plotly_text(row.tl)}</b>",
        *([plotly_text(row.hf)] if row.hf else []),
        f"weight {number(row.weight)} × activation {number(row.activation)} "
        f"at <b>{plotly_text(visible(row.token), 40)}</b>, position {row.pos} of prompt {row.prompt}",
        f"{percent(row.share)} of what the dimension gets, which is {percent(row.energy)} of the output's squared length",
        f"a candidate at {count(row.n_tokens, 'token')}",
    ]
    return "<br>".join(lines)
