"""The one look of all figures: template, palette, frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType

from sd_lens.display.labels import plotly_text

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, MUTED, GRID = "#222222", "#B4BBC3", "#E9ECEF"
PART_COLOURS = {"attention": BLUE, "ffn": ORANGE, "block": INK, "before": MUTED}
PART_NAMES = {"attention": "attention", "ffn": "FFN", "block": "block", "before": "before the block"}
GROUP_COLOURS = {"initial": VERMILLION, "delimiter": ORANGE, "other": MUTED}
NEGLIGIBLE = 1e-3
"""Bars below this share of the largest have no number beside them: it would stand there without a bar."""
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


def frame(traces: Iterable[BaseTraceType], *, title: str, subtitle: str, x: str, y: str) -> go.Figure:
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


def count(n: int, thing: str) -> str:
    """A number of things: ``1 token``, ``12,000 tokens``."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


def percent(share: float) -> str:
    """A share in percent, as few digits as tell it from none and from all: ``0.02 %``, ``12 %``, ``99.9 %``."""
    if math.isnan(share):
        return "–"
    part = min(share, 1 - share)
    decimals = 0 if part <= 0 or part >= 0.095 else min(6, max(0, -math.floor(math.log10(100 * part))))
    return f"{100 * share:.{decimals}f} %"


def say_instead(figure: go.Figure, text: str) -> None:
    """Writes into the middle of a figure why there is nothing to see, and hides the axes' numbers."""
    figure.update_layout(
        annotations=[{"text": plotly_text(text), "showarrow": False, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}]
    )
    figure.update_xaxes(showticklabels=False, showgrid=False, ticks="")
    figure.update_yaxes(showticklabels=False, showgrid=False, ticks="")


def horizontal_bars(figure: go.Figure, names: Sequence[str], values: Sequence[float], *, per_name: int = 1) -> None:
    """Lays out horizontal bars from the top down, with room for the text beside them.

    Args:
        figure: The figure.
        names: What the bars are called, from the top down; each once.
        values: All that is drawn along x.
        per_name: How many bars share a name.
    """
    low, high = min([0.0, *values]), max([0.0, *values])
    span = (high - low) or 1.0
    left, right = (0.2 * span * (end > NEGLIGIBLE * span) for end in (-low, high))
    figure.update_xaxes(range=[low - left, high + (right or 0.02 * span)], zeroline=True, zerolinecolor=INK, zerolinewidth=1)
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=list(names),
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
        title=None,
    )
    height = max(60, len(names) * (12 + 14 * per_name))
    figure.update_layout(height=190 + height, bargap=0.25, legend_y=1 + 6 / height)


def level(figure: go.Figure, value: float, text: str, *, dash: str) -> None:
    """A line across the figure at a height of its logarithmic y-axis, named in the right margin."""
    line = {"color": INK, "width": 1.2, "dash": dash}
    figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=value, y1=value, line=line, layer="below")
    figure.add_annotation(
        x=1, xref="paper", xanchor="left", y=math.log10(value), text=text, align="left", showarrow=False, font={"size": 11}
    )
