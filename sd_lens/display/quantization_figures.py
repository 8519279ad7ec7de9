"""What eight bits cost: perplexity over sets of spared projections, beside full precision."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
import torch

from sd_lens.applications.quantization_result import DETECTED, QuantizationStudy, QuantizedRow
from sd_lens.display.labels import plotly_text
from sd_lens.display.norm_figures import log_axis
from sd_lens.display.quantization_words import block_of, excess, named_sets, perplexity, scheme_name, set_name
from sd_lens.display.style import BLUE, DECAY, EXPLOSION, INK, MUTED, ORANGE, SKY, count, frame, tick_step

_COLOURS = {  # the hue is the method's, the lightness the granularity's
    ("rtn", "per_tensor"): BLUE,
    ("rtn", "per_token"): SKY,
    ("smoothquant", "per_tensor"): ORANGE,
    ("smoothquant", "per_token"): "#F4D58F",
}
_LOG_SPAN = 2.0
"""Perplexities that span more than this factor are drawn on a log scale."""
_BAR, _ROW, _ROW_GAP, _PANEL_GAP = 17, 48, 12, 62  # pixels
_TEXT = 0.34  # of the width, beside the longest bar


def quantization_bars(study: QuantizationStudy) -> go.Figure:
    """Perplexity over sets of spared projections: bars from full precision's, and below them what sparing each block alone brings back.

    Args:
        study: From `quantization_study`.

    Returns:
        The figure. A dotted line is where a method stands with nothing spared; a dot to its left is a block worth sparing.
    """
    sets, blocks = named_sets(study), sorted({block for row in study.rows if (block := block_of(row.spared)) is not None})
    schemes = study.schemes
    named = max(_ROW, _BAR * len(schemes) + _ROW_GAP)
    alone = min(9 * len(schemes) + 8, max(9, 640 // max(1, len(blocks))))
    heights = (named * len(sets), alone * study.n_blocks if blocks else 0)
    total = sum(heights) + (_PANEL_GAP if blocks else 0)
    middle = (len(schemes) - 1) / 2
    shifts = {scheme: (place - middle) * _BAR / named for place, scheme in enumerate(schemes)}
    traces: list[Any] = [_bars(study, scheme, sets, shift, 0.86 * _BAR / named) for scheme, shift in shifts.items()]
    if blocks:
        traces += [_dots(study, scheme, (place - middle) * 0.7 / len(schemes)) for place, scheme in enumerate(schemes)]
    figure = frame(
        traces,
        title=f"Perplexity of {study.model_name} in eight bits",
        subtitle=_about(study),
        x="perplexity",
        y="",
    )
    axis = _axis(study)
    figure.update_layout(
        annotations=[
            number for scheme, shift in shifts.items() for number in _numbers(study, scheme, sets, shift, axis["type"] == "log")
        ],
        xaxis=axis | {"anchor": "y2" if blocks else "y"},
        yaxis={
            "domain": [1 - heights[0] / total, 1],
            "range": [len(sets) - 0.5, -0.5],
            "tickvals": list(range(len(sets))),
            "ticktext": [_label(study, name) for name in sets],
            "showgrid": False,
        },
        barmode="overlay",
        height=230 + total,
        margin_l=120,
        margin_t=164,  # two or three rows of the legend stand between the title and the first panel
        title={"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 18, "l": 12}},
        legend_y=1 + 8 / total,
    )
    if blocks:
        figure.update_layout(
            yaxis2={
                "domain": [0, heights[1] / total],
                "range": [study.n_blocks - 0.5, -0.5],
                "tickmode": "linear",
                "tick0": 0,
                "dtick": tick_step(study.n_blocks),
                "title": {"text": "block"},
                "showgrid": False,
                "anchor": "x",
            }
        )
        _head(figure, heights[1] / total)
        _shade(figure, study)
        for scheme in schemes:
            _upright(
                figure, study.row(*scheme).perplexity, ["y2"], {"color": _COLOURS.get(scheme, MUTED), "width": 1.5, "dash": "dot"}
            )
    panels = ["y", "y2"] if blocks else ["y"]
    _upright(figure, study.full.perplexity, panels, {"color": INK, "width": 1.5}, "full precision")
    if study.recommendation is not None:
        budget = study.recommendation.budget
        line = {"color": INK, "width": 1.2, "dash": "dash"}
        _upright(figure, study.full.perplexity * (1 + budget), panels, line, f"budget ({100 * budget:+g} %)")
    return figure


def _rows(study: QuantizationStudy, scheme: tuple[str, str]) -> list[QuantizedRow]:
    return [row for row in study.rows[1:] if (row.method, row.granularity) == scheme]


def _bars(study: QuantizationStudy, scheme: tuple[str, str], sets: tuple[str, ...], shift: float, width: float) -> go.Bar:
    """A method's bars, from full precision's perplexity."""
    rows = [row for row in _rows(study, scheme) if row.spared in sets]
    name, full = scheme_name(*scheme), study.full.perplexity
    return go.Bar(
        x=[row.perplexity - full for row in rows],
        base=full,
        y=[sets.index(row.spared) + shift for row in rows],
        orientation="h",
        width=width,
        marker={"color": _COLOURS.get(scheme, MUTED)},
        name=name,
        legendgroup=name,
        customdata=_hover(study, rows),
        hovertemplate="%{customdata}<extra></extra>",
    )


def _numbers(
    study: QuantizationStudy, scheme: tuple[str, str], sets: tuple[str, ...], shift: float, log: bool
) -> list[dict[str, Any]]:
    """What stands right of the bars, also of those that go to the left."""
    return [
        {
            "x": math.log10(x) if log else x,  # annotations take a logarithmic axis' exponents
            "y": sets.index(row.spared) + shift,
            "text": f"{perplexity(row)} ({excess(study, row)})",
            "xanchor": "left",
            "xshift": 3,
            "showarrow": False,
            "font": {"size": 12},
            "borderpad": 0,
            "bgcolor": "rgba(255,255,255,0.8)",
        }
        for row in _rows(study, scheme)
        if row.spared in sets
        for x in [max(row.perplexity, study.full.perplexity)]
    ]


def _dots(study: QuantizationStudy, scheme: tuple[str, str], shift: float) -> go.Scatter:
    """Each block alone: a dot, and the way to it from where nothing is spared."""
    rows = [row for row in _rows(study, scheme) if block_of(row.spared) is not None]
    name, nothing = scheme_name(*scheme), study.row(*scheme).perplexity
    colour = _COLOURS.get(scheme, MUTED)
    return go.Scatter(
        x=[row.perplexity for row in rows],
        y=[(block_of(row.spared) or 0) + shift for row in rows],
        yaxis="y2",
        mode="markers",
        marker={"color": colour, "size": 8},
        error_x={
            "symmetric": False,
            "array": [max(0.0, nothing - row.perplexity) for row in rows],
            "arrayminus": [max(0.0, row.perplexity - nothing) for row in rows],
            "color": colour,
            "thickness": 2,
            "width": 0,
        },
        name=name,
        legendgroup=name,
        showlegend=False,
        customdata=_hover(study, rows),
        hovertemplate="%{customdata}<extra></extra>",
    )


def _hover(study: QuantizationStudy, rows: list[QuantizedRow]) -> list[str]:
    return [
        f"<b>{scheme_name(row.method, row.granularity)}</b>, spared: {plotly_text(set_name(row.spared), 60)}"
        f"<br>perplexity {row.perplexity:.6g} ({excess(study, row)})"
        + "".join(f"<br>{plotly_text(name, 80)}" for name in row.names[:8])
        + (f"<br>and {len(row.names) - 8} more" if len(row.names) > 8 else "")
        for row in rows
    ]


def _label(study: QuantizationStudy, spared: str) -> str:
    """A set's name, and how many projections it spares."""
    names = next(row.names for row in study.rows[1:] if row.spared == spared)
    if not names:
        return "nothing spared"
    name = "explosion and<br>decay blocks" if spared == DETECTED else plotly_text(spared, 20)
    return f"{name}<br>({count(len(names), 'projection')})"


def _about(study: QuantizationStudy) -> str:
    how = "int8 kernels of torchao" if study.backend == "torchao" else "rounded floating-point numbers"
    about = f"weights and inputs of the blocks' projections, {how}; {count(study.n_tokens, 'token')}"
    alone = any(block_of(row.spared) is not None for row in study.rows)
    return about + ("; below: one block's down-projection spared, dotted: nothing spared" if alone else "")


def _axis(study: QuantizationStudy) -> dict[str, Any]:
    """From the least to the largest perplexity, with room for numbers on the right; zero is not in the picture, as bars begin at full precision."""
    values = [row.perplexity for row in study.rows]
    if study.recommendation is not None:
        values.append(study.full.perplexity * (1 + study.recommendation.budget))
    low, high = min(values), max(values)
    if high > _LOG_SPAN * low:
        axis = log_axis(torch.tensor(values, dtype=torch.float64))
        ends = math.log10(low), math.log10(high)
    else:
        axis, ends = {"type": "linear", "nticks": 8}, (low, high)
    span = (ends[1] - ends[0]) or 0.01 * ends[1]
    axis["range"] = [ends[0] - 0.06 * span, ends[1] + span * _TEXT / (1 - _TEXT)]
    return axis


def _head(figure: go.Figure, top: float) -> None:
    """Says what the lower panel shows, above it."""
    figure.add_annotation(
        x=0,
        xref="paper",
        xanchor="left",
        y=top,
        yref="paper",
        yanchor="bottom",
        yshift=6,
        text="one block's down-projection spared",
        showarrow=False,
        font={"size": 12},
    )


def _shade(figure: go.Figure, study: QuantizationStudy) -> None:
    """Marks explosion and decay blocks by their background."""
    for blocks, colour, name in (
        (study.explosion_blocks, EXPLOSION, "explosion block"),
        (study.decay_blocks, DECAY, "decay block"),
    ):
        for block in blocks:
            figure.add_shape(
                type="rect",
                xref="paper",
                x0=0,
                x1=1,
                yref="y2",
                y0=block - 0.5,
                y1=block + 0.5,
                fillcolor=colour,
                line_width=0,
                layer="below",
            )
        if blocks:
            marker = {"symbol": "square", "size": 12, "color": colour}
            figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, hoverinfo="skip")


def _upright(figure: go.Figure, x: float, panels: list[str], line: dict[str, Any], name: str = "") -> None:
    """A line at a perplexity, named in the legend."""
    for panel in panels:
        figure.add_shape(type="line", xref="x", x0=x, x1=x, yref=f"{panel} domain", y0=0, y1=1, line=line, layer="below")
    if name:
        figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name=name, hoverinfo="skip")
