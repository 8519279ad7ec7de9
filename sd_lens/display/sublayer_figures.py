"""What the steps of explosion and decay blocks are made of."""

from __future__ import annotations

import plotly.graph_objects as go

from sd_lens.display.style import INK, PART_COLOURS, PART_NAMES, frame
from sd_lens.tracing.sublayers import PARTS, SublayerAttribution


def sublayer_bars(attribution: SublayerAttribution) -> go.Figure:
    """Projection on the defect direction before each block and what its sublayers add, stacked; a mark for the sum.

    Args:
        attribution: From `attribute_sublayers`; without blocks, the figure says so.
    """
    shares = attribution.shares
    blocks = [f"block {share.block}" for share in shares]
    traces: list[go.Bar | go.Scatter] = [
        go.Bar(
            x=blocks,
            y=[getattr(share, part) for share in shares],
            name=PART_NAMES[part],
            marker={"color": PART_COLOURS[part]},
            width=min(0.5, 0.2 * len(shares)),  # of one block alone no wall
            hovertemplate=f"%{{x}}, {PART_NAMES[part]}: %{{y:.4g}}<extra></extra>",
        )
        for part in PARTS
    ]
    traces.append(
        go.Scatter(
            x=blocks,
            y=[share.after for share in shares],
            name="after the block",
            mode="markers",
            marker={"color": INK, "symbol": "line-ew-open", "size": 26, "line": {"width": 2.5}},
            hovertemplate="after %{x}: %{y:.4g}<extra></extra>",
        )
    )
    tokens = f"{attribution.n_tokens} high-norm token{'s' * (attribution.n_tokens != 1)}"
    figure = frame(
        traces,
        title=f"What writes the norm in {attribution.model_name}",
        subtitle=f"projection on the direction of the high-norm tokens, mean of {tokens}",
        x="",
        y="projection (units of norm)",
    )
    figure.update_layout(barmode="relative", margin_b=40)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1)
    if not shares:
        figure.update_layout(
            annotations=[{"text": "no explosion or decay block", "showarrow": False, "xref": "paper", "yref": "paper"}]
        )
    return figure
