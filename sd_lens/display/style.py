"""The one look of all figures: template, palette, frame."""

from __future__ import annotations

from collections.abc import Iterable

import plotly.graph_objects as go

from sd_lens.display.labels import plotly_text

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, MUTED, GRID = "#222222", "#B4BBC3", "#E9ECEF"
PART_COLOURS = {"attention": BLUE, "ffn": ORANGE, "block": INK, "before": MUTED}
PART_NAMES = {"attention": "attention", "ffn": "FFN", "block": "block", "before": "before the block"}
EXPLOSION, DECAY = "#F7D9C6", "#CFE5F2"
"""Background of explosion and decay blocks."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"

_AXIS = {
    "showline": True,
    "linecolor": "#8A929A",
    "gridcolor": GRID,
    "zeroline": False,
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": "#8A929A",
    "automargin": True,
    "title": {"standoff": 10},
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": INK},
        "title": {"font": {"size": 16}, "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 12}},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": [BLUE, ORANGE, GREEN, VERMILLION, PURPLE, INK],
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "white", "font": {"color": INK}},
        "margin": {"l": 64, "r": 24, "t": 124, "b": 56},
        "height": 440,
    }
)


def frame(traces: Iterable[go.Scatter | go.Bar | go.Heatmap], *, title: str, subtitle: str, x: str, y: str) -> go.Figure:
    """A figure in the common style.

    Args:
        traces: What to draw.
        title: Its title, plain text.
        subtitle: A line below it: what is shown, what is left out.
        x: Title of the horizontal axis, with its unit.
        y: Title of the vertical axis, with its unit.
    """
    figure = go.Figure(list(traces))
    figure.update_layout(
        template=TEMPLATE,
        title={"text": plotly_text(title), "subtitle": {"text": plotly_text(subtitle)}},
        xaxis_title_text=x,
        yaxis_title_text=y,
    )
    return figure


def tick_step(n_blocks: int) -> int:
    """Every how many blocks one is numbered."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100) if n_blocks / step <= 26 or step == 100)


def block_axis(figure: go.Figure, n_blocks: int) -> None:
    """Numbers the blocks along x, every one where there is room."""
    figure.update_xaxes(tickmode="linear", tick0=0, dtick=tick_step(n_blocks), range=[-0.6, n_blocks - 0.4], showgrid=False)


def shade_blocks(figure: go.Figure, explosion: Iterable[int], decay: Iterable[int]) -> None:
    """Marks explosion and decay blocks by their background, and says so in the legend."""
    for blocks, colour, name in ((explosion, EXPLOSION, "explosion block"), (decay, DECAY, "decay block")):
        chosen = list(blocks)
        for block in chosen:
            figure.add_vrect(x0=block - 0.5, x1=block + 0.5, fillcolor=colour, line_width=0, layer="below")
        if chosen:
            marker = {"symbol": "square", "size": 12, "color": colour}
            figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, hoverinfo="skip")
