"""Which input tokens the bound leaves the last one to feel, over depth."""

from __future__ import annotations

import plotly.graph_objects as go
import torch

from sd_lens.display.labels import plotly_text, visible
from sd_lens.display.style import BLUE, VERMILLION, count, frame, percent, tick_step
from sd_lens.propagation.squashing_result import SquashingBound

_FLOOR = 1e-4
_NAMED = 48
"""Up to so many positions are named by their tokens."""
_MAP, _SIDE = (0.0, 0.66), (0.72, 1.0)


def squashing_heatmap(bound: SquashingBound) -> go.Figure:
    """Each position's share of the bound, for the stream entering every block, and beside it the first token's share.

    Args:
        bound: From `squashing_bound`.
    """
    n = bound.position + 1
    shares = bound.shares[:, :n]
    tokens = [plotly_text(visible(text), 24) for text in bound.texts[:n]]
    blocks = list(range(bound.n_blocks, -1, -1))  # of depth 0, 1, ...: what leaves the last block first
    known = torch.stack([shares, bound.token_shares[:, :n], bound.log10_bound[:, :n], bound.log10_bounds("token")[:, :n]], dim=-1)
    heatmap = go.Heatmap(
        x=list(range(n)),
        y=blocks,
        z=shares.clamp(min=_FLOOR).log10().numpy(),
        customdata=known.numpy(),
        text=[tokens] * len(blocks),
        colorscale="Cividis",
        zmin=torch.tensor(_FLOOR).log10().item(),
        zmax=0,
        colorbar={
            "title": {"text": "share (log)"},
            "tickvals": [-4, -3, -2, -1, 0],
            "ticktext": ["≤ 0.01 %", "0.1 %", "1 %", "10 %", "100 %"],
            "thickness": 14,
            "outlinewidth": 0,
        },
        hovertemplate="<b>%{text}</b> (position %{x}), entering block %{y}<br>share of the bound: %{customdata[0]:.3%}, bound 10^%{customdata[2]:.2f}"
        "<br>with each token's constants: %{customdata[1]:.3%}, 10^%{customdata[3]:.2f}<extra></extra>",
    )
    lines = [
        go.Scatter(
            x=values[:, 0].numpy(),
            y=blocks,
            xaxis="x2",
            yaxis="y2",
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"symbol": symbol, "size": 7},
            name=name,
            hovertemplate="entering block %{y}: %{x:.3%}<extra>" + name + "</extra>",
        )
        for values, colour, symbol, name in (
            (bound.token_shares, BLUE, "diamond", "first token's share, each token's constants"),
            (bound.shares, VERMILLION, "circle", "first token's share, the theorem's constants"),
        )
    ]
    about = (
        f"heads: {bound.heads}; {_constants(bound)}; all {count(bound.n_blocks, 'block')} leave the first of {count(n, 'token')} "
        f"{percent(bound.first_column())}"
    )
    figure = frame(
        [heatmap, *lines],
        title=f"What position {bound.position} can feel in {bound.model_name}, by the over-squashing bound",
        subtitle=about if bound.intervention is None else f"{about}; {bound.intervention}",
        x="input token" if n <= _NAMED else "position",
        y="stream entering block",
    )
    span = [bound.n_blocks + 0.5, -0.5]
    figure.update_xaxes(domain=_MAP, showgrid=False, range=[-0.52, n - 0.48])
    if n <= _NAMED:
        figure.update_xaxes(tickmode="array", tickvals=list(range(n)), ticktext=tokens, tickangle=-60 if n > 8 else 0)
    figure.update_yaxes(tickmode="linear", tick0=0, dtick=tick_step(2 * bound.n_blocks), showgrid=False, range=span)
    figure.update_layout(
        xaxis2={
            "domain": _SIDE,
            "anchor": "y2",
            "range": [-0.03, 1.03],
            "tickformat": ".0%",
            "title": {"text": "first token's share"},
        },
        yaxis2={"anchor": "x2", "matches": "y", "showticklabels": False},
        height=max(440, min(900, 250 + 16 * bound.n_blocks)),
    )
    return figure


def _constants(bound: SquashingBound) -> str:
    if not bound.given:
        return "constants measured"
    return f"{', '.join(bound.given)} given"
