"""How much one position's output depends on the tokens before it: bars for one source, a heat map for several."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.display.labels import plotly_text, visible
from sd_lens.display.norm_figures import log_axis, log_ticks
from sd_lens.display.style import INK, SKY, VERMILLION, count, frame, percent, say_instead, tick_step
from sd_lens.propagation.sensitivity_result import Sensitivity

MAX_TICKS = 64
"""So many tokens are named below; of more, every second, third, ... and those that are marked."""
_SINK = {"symbol": "diamond", "size": 9, "color": INK}
_HIGH = {"symbol": "circle", "size": 9, "color": VERMILLION}
_NAMES = {"frobenius": "Frobenius norm", "spectral": "spectral norm"}


def sensitivity_figure(sensitivity: Sensitivity) -> go.Figure:
    """Norms of Jacobians, token by token, on a log scale; high-norm tokens and attention sinks are marked.

    Args:
        sensitivity: From `sensitivity`.

    Returns:
        Bars where there is one source, with spectral norms as strokes and standard errors as error bars; else a heat map, sources
        against tokens.
    """
    kind = "frobenius" if not bool(sensitivity.frobenius.isnan().all()) else "spectral"
    values = getattr(sensitivity, kind)[:, : sensitivity.position + 1]
    one = len(sensitivity.sources) == 1
    figure = _bars(sensitivity, values[0], kind) if one else _map(sensitivity, values, kind)
    named = _named(sensitivity)
    texts = [plotly_text(visible(sensitivity.texts[pos]), 12) for pos in named]
    figure.update_xaxes(
        tickvals=named,
        ticktext=texts,
        tickangle=-90 if len(named) > 8 else 0,
        showgrid=False,
        tickfont={"size": 11},
        range=[-0.6, values.shape[1] - 0.4],
    )
    if not bool((values > 0).any()):
        say_instead(figure, "the output depends on none of these tokens")
    return figure


def _bars(sensitivity: Sensitivity, values: Float[Tensor, "pos"], kind: str) -> go.Figure:
    high = sensitivity.high_norm[: len(values)]
    hover = _hover(sensitivity)[0]
    estimated = sensitivity.method != "exact"
    traces: list[go.Bar | go.Scatter] = []
    for chosen, colour, name in ((~high, SKY, "other tokens"), (high, VERMILLION, "high-norm tokens")):
        where = chosen.nonzero().flatten().tolist()
        if not where:
            continue
        error = {"type": "data", "array": sensitivity.standard_error[0, where].tolist(), "color": INK, "thickness": 1, "width": 2}
        traces.append(
            go.Bar(
                x=where,
                y=values[where].tolist(),
                customdata=hover[where],
                marker_color=colour,
                name=name,
                error_y=error if estimated else None,
                hovertemplate=_TEMPLATE,
            )
        )
    largest = sensitivity.spectral[0, : len(values)]
    if kind == "frobenius" and not bool(largest.isnan().all()):
        marker = {"symbol": "line-ew-open", "size": 9, "color": INK, "line": {"width": 2}}
        traces.append(
            go.Scatter(
                x=list(range(len(values))),
                y=largest.tolist(),
                mode="markers",
                marker=marker,
                name="spectral norm",
                hoverinfo="skip",
            )
        )
    sinks = sensitivity.sinks[: len(values)].nonzero().flatten().tolist()
    top = torch.cat([values, largest.nan_to_num()])
    low, up = (float(x) for x in log_axis(top)["range"])
    if sinks:
        above = [10 ** min(up, math.log10(max(float(values[pos]), 10**low)) + 0.06 * (up - low)) for pos in sinks]
        traces.append(go.Scatter(x=sinks, y=above, mode="markers", marker=_SINK, name="attention sink", hoverinfo="skip"))
    figure = frame(
        traces,
        title=_title(sensitivity),
        subtitle=_about(sensitivity),
        x="token",
        y=f"{_NAMES[kind]} of the Jacobian (log scale)",
    )
    # Bars end at the bottom wherever it is, so it stands well below the shortest.
    axis = log_axis(top)
    axis["range"] = [low - 0.25 * (up - low), up]
    figure.update_yaxes(**axis)
    figure.update_layout(barmode="overlay", bargap=0.2)
    return figure


def _map(sensitivity: Sensitivity, values: Float[Tensor, "source pos"], kind: str) -> go.Figure:
    logs = torch.where(values > 0, values, torch.nan).log10()
    finite = logs[logs.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    ticks = log_ticks(low, high)
    rows, n = values.shape
    traces: list[go.Heatmap | go.Scatter] = [
        go.Heatmap(
            x=list(range(n)),
            y=list(range(rows)),
            z=logs.numpy(),
            customdata=_hover(sensitivity),
            colorscale="Cividis",
            zmin=low,
            zmax=max(high, low + 1e-6),
            colorbar={
                "title": {"text": f"{_NAMES[kind].split()[0]}<br>norm (log)"},
                "tickvals": [math.log10(value) for value in ticks],
                "ticktext": [f"{value:g}" for value in ticks],
                "thickness": 14,
                "outlinewidth": 0,
            },
            hovertemplate=_TEMPLATE,
        )
    ]
    for marks, marker, name, shift in (
        (sensitivity.high_norm, _HIGH, "high-norm token", 0.0),
        (sensitivity.sinks, _SINK, "attention sink", 0.45),
    ):
        where = marks[:n].nonzero().flatten().tolist()
        if where:
            y = [rows - 0.1 + shift] * len(where)
            traces.append(go.Scatter(x=where, y=y, mode="markers", marker=marker, name=name, hoverinfo="skip"))
    figure = frame(
        traces, title=_title(sensitivity), subtitle=_about(sensitivity), x="token", y="with respect to the input of block"
    )
    step = tick_step(2 * rows)
    figure.update_yaxes(
        tickvals=list(range(0, rows, step)),
        ticktext=list(map(str, sensitivity.sources[::step])),
        range=[-0.5, rows + 0.7],
        showgrid=False,
    )
    figure.update_layout(height=230 + max(130, min(420, 30 * rows)))
    return figure


_TEMPLATE = "<b>%{customdata[0]}</b> at position %{x}%{customdata[1]}<br>%{customdata[2]}<extra></extra>"


def _hover(sensitivity: Sensitivity) -> np.ndarray:
    """Token, marks and numbers of every source and token, as text."""
    n = sensitivity.position + 1
    columns = [
        getattr(sensitivity, name)[:, :n].tolist() for name in ("frobenius", "standard_error", "spectral", "share", "relative")
    ]
    rows = []
    for row in range(len(sensitivity.sources)):
        cells = []
        for pos in range(n):
            marks = [
                name
                for marked, name in ((sensitivity.high_norm, "high-norm token"), (sensitivity.sinks, "attention sink"))
                if marked[pos]
            ]
            token = plotly_text(visible(sensitivity.texts[pos]), 40)
            numbers = _numbers(*(column[row][pos] for column in columns), exact=sensitivity.method == "exact")
            cells.append([token, "".join(f", {mark}" for mark in marks), numbers])
        rows.append(cells)
    return np.array(rows, dtype=object)


def _numbers(frobenius: float, error: float, spectral: float, share: float, relative: float, *, exact: bool) -> str:
    parts = []
    if not math.isnan(frobenius):
        spread = "" if exact else f" ± {error:.2g}"
        parts.append(f"Frobenius norm {frobenius:.4g}{spread}, {percent(share)} of the squares")
        parts.append(f"times the vector's length {relative:.4g}")
    if not math.isnan(spectral):
        parts.append(f"spectral norm {spectral:.4g}")
    return "<br>".join(parts)


def _named(sensitivity: Sensitivity) -> list[int]:
    """Positions named below: all, or those marked and some between them that do not touch these."""
    n = sensitivity.position + 1
    gap = math.ceil(n / MAX_TICKS)
    marked = (sensitivity.high_norm | sensitivity.sinks)[:n].nonzero().flatten().tolist()
    named: list[int] = []
    for pos in [n - 1, *marked, *range(0, n, gap)]:
        if all(abs(pos - other) >= gap for other in named):
            named.append(pos)
    return sorted(named)


def _title(sensitivity: Sensitivity) -> str:
    under = "" if sensitivity.intervention is None else f" ({sensitivity.intervention})"
    return f"What position {sensitivity.position} still feels of each token in {sensitivity.model_name}{under}"


def _about(sensitivity: Sensitivity) -> str:
    by = f", with respect to the input of block {sensitivity.sources[0]}" if len(sensitivity.sources) == 1 else ""
    how = "exact" if sensitivity.method == "exact" else f"estimated from {count(sensitivity.n_products, 'random probe')}"
    share = float(sensitivity.share[0][sensitivity.high_norm].sum())
    high = int(sensitivity.high_norm[: sensitivity.position + 1].sum())
    part = (
        ""
        if len(sensitivity.sources) > 1 or not high or math.isnan(share)
        else f"; {count(high, 'high-norm token')}: {percent(share)} of the squares"
    )
    return f"Jacobian of the {sensitivity.of_name}{by}, {how}{part}"
