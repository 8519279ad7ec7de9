"""The two pathways of a text's token ids side by side: what each does first, by itself, and where it stands."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch

from sd_lens.display.labels import plotly_text, visible
from sd_lens.display.norm_figures import log_axis
from sd_lens.display.style import BLUE, INK, MUTED, VERMILLION, count, frame
from sd_lens.tracing.delimiters import PATHWAYS, TokenPathways

_LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "initial_norm": ("alone at position 0", {"color": VERMILLION, "symbol": "circle", "size": 14}),
    "no_attention_norm": ("alone, without attention", {"color": BLUE, "symbol": "diamond", "size": 9}),
    "mean_norm": (
        "in the text, after the first position",
        {"color": INK, "symbol": "line-ns-open", "size": 12, "line": {"width": 2.5}},
    ),
}
_WORDS = {"self": "by itself", "initial": "at position 0", "context": "through context"}


def pathway_table_figure(pathways: TokenPathways, k: int = 24) -> go.Figure:
    """One row per token id with a high norm: its norm alone, alone without attention, and in the text.

    Args:
        pathways: From `token_pathways`; where no id has a high norm, the most frequent ones are shown.
        k: How many ids at most, shared evenly between the ways in which ids get their norm.

    Raises:
        ValueError: ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k: got {k}; allowed: at least 1")
    high = pathways.high()
    rows = _shared_out(high, k) if len(high) else pathways.rows.head(min(k, 12))
    y = list(range(len(rows)))
    norms = rows[list(_LOOKS)]
    ends = norms.agg(["min", "max"], axis=1)
    texts = [plotly_text(visible(token), 24) for token in rows.token]
    traces = [
        go.Scatter(  # one stroke per id from its smallest norm to its largest
            x=[value for low, high in ends.itertuples(index=False) for value in (low, high, None)],
            y=[value for row in y for value in (row, row, None)],
            mode="lines",
            line={"color": MUTED, "width": 2},
            showlegend=False,
            hoverinfo="skip",
        )
    ]
    for column, (name, marker) in _LOOKS.items():
        values = norms[column]
        traces.append(
            go.Scatter(
                x=[None if value != value else value for value in values.tolist()],
                y=y,
                mode="markers",
                marker=marker,
                name=name,
                text=texts,
                customdata=[[f"{value / pathways.reference:.3g}", id] for value, id in zip(values, rows.id, strict=True)],
                hovertemplate=f"<b>%{{text}}</b> (id %{{customdata[1]}}), {name}<br>"
                "norm %{x:.4g}, %{customdata[0]} × the ordinary<extra></extra>",
            )
        )
    if len(high):
        shown = "" if len(rows) == len(high) else f", {len(rows)} are shown"
        about = f"{count(len(high), 'token id')} with a high norm in the text{shown}; on the right how, and in how many places"
    else:
        about = f"no token id has a high norm in the text; the {len(rows)} most frequent of {len(pathways.rows)} are shown"
    figure = frame(
        traces,
        title=f"Which token ids of {pathways.model_name} have a high norm, and how they get it",
        subtitle=about,
        x=f"norm after block {pathways.block} (log scale)",
        y="token",
    )
    high_from = pathways.min_ratio * pathways.reference
    drawn = torch.tensor(norms.to_numpy(dtype=float)).flatten()
    axis = log_axis(torch.cat([drawn, torch.tensor([pathways.reference, high_from]).double()]))
    figure.update_xaxes(**axis)
    figure.update_yaxes(tickvals=y, ticktext=texts, range=[len(y) - 0.4, -1.4], showgrid=False, title=None)
    levels = ((pathways.reference, "ordinary", "dot"), (high_from, f"{pathways.min_ratio:g} × ordinary", "dash"))
    for value, text, dash in levels:
        figure.add_vline(x=value, line={"color": INK, "width": 1, "dash": dash}, layer="below")
        figure.add_annotation(x=math.log10(value), y=-1, text=text, showarrow=False, font={"size": 11}, bgcolor="white")
    for row, at in zip(rows.itertuples(), y, strict=True):
        figure.add_annotation(
            x=1,
            xref="paper",
            xanchor="left",
            y=at,
            text=_beside(row),
            align="left",
            showarrow=False,
            font={"size": 11},
        )
    height = 24 * (len(y) + 2)
    figure.update_layout(height=190 + height, margin_r=160, legend_y=1 + 6 / height)
    return figure


def _shared_out(high: pd.DataFrame, k: int) -> pd.DataFrame:
    """At most so many rows, by pathway: each has an even share of the places, and what one leaves the others take."""
    parts = [high[high.pathway == name] for name in PATHWAYS if (high.pathway == name).any()]
    taken = [0] * len(parts)
    while sum(taken) < min(k, len(high)):
        for number, part in enumerate(parts):
            if taken[number] < len(part) and sum(taken) < k:
                taken[number] += 1
    return pd.concat([part.head(n) for part, n in zip(parts, taken, strict=True)])


def _beside(row: Any) -> str:
    """How an id gets its norm, and in how many places of the text it has it."""
    places = f"{row.high_initial + row.high_later} of {count(int(row.n), 'place')}"
    return f"{_WORDS[row.pathway]}: {places}" if row.pathway in _WORDS else places
