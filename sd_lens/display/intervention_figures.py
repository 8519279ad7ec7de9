"""What removing the explosion subspace does, beside random controls."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch

from sd_lens.display.norm_figures import log_axis
from sd_lens.display.style import INK, MUTED, ORANGE, VERMILLION, count, frame, say_instead
from sd_lens.interventions.outcomes import Consequences, Outcome

_SIDES = {"trigger": "trigger side", "direction": "direction side", "both": "both sides"}
_PLACES = {"initial": "initial tokens", "delimiters": "delimiters", "everywhere": "all tokens"}
_LOOKS = {  # colour, symbol, how far below the middle of its row
    "ablate": (VERMILLION, "circle", -0.22),
    "mean ablate": (ORANGE, "diamond", 0.0),
    "random control": ("#7B858E", "line-ns-open", 0.22),
}
_NAMES = {"ablate": "ablated", "mean ablate": "mean-ablated", "random control": "random control, norm-matched"}


class _Panel(NamedTuple):
    """One measure, with its axis."""

    measure: str
    title: str
    tick_format: str = ""
    hover_format: str = ".3g"
    log: bool = False
    change: bool = False


_PANELS = (
    _Panel("peak_ratio", "largest ratio to the<br>others' median (log)", log=True),
    _Panel("loss", "change of loss<br>(nats per token)", hover_format=".4g", change=True),
    _Panel("kl", "KL to the untouched<br>(nats per token)"),
    _Panel("sink_rate", "sink rate<br>(share of heads)", ".0%", ".1%"),
)
_GAP = 0.045  # between panels, of the width


def consequence_panels(found: Consequences) -> go.Figure:
    """Peak ratio, loss, KL and sink rate for every side and place, one row each; random controls beside them, with their spread.

    Args:
        found: From `consequences`. Places where there was no token to edit are left out, and measures that are zero all over.
    """
    edited = [row for row in found.rows[1:] if row.n_tokens]
    places = list(dict.fromkeys((row.side, row.where) for row in edited))
    panels = [panel for panel in _PANELS if _tells(found, edited, panel)]
    traces: list[go.Scatter] = []
    for number, panel in enumerate(panels, start=1):
        for kind, (colour, symbol, below) in _LOOKS.items():
            rows = [row for row in edited if row.intervention == kind]
            if not rows:
                continue
            traces.append(
                go.Scatter(
                    x=[_value(found, row, panel) for row in rows],
                    y=[places.index((row.side, row.where)) + below for row in rows],
                    xaxis=f"x{number}" if number > 1 else "x",
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2 if "open" in symbol else 0}},
                    error_x={
                        "array": [_spread(row, panel) for row in rows],
                        "color": colour,
                        "thickness": 2,
                        "width": 0,
                        "visible": kind == "random control",
                    },
                    name=_NAMES[kind],
                    legendgroup=kind,
                    showlegend=number == 1,
                    customdata=[[_SIDES[row.side], _PLACES[row.where], row.n_tokens, _hover(row, panel)] for row in rows],
                    hovertemplate=f"%{{customdata[0]}}, %{{customdata[1]}} (%{{customdata[2]}}), {_NAMES[kind]}:<br>%{{customdata[3]}}<extra></extra>",
                )
            )
    about = f"{count(found.n_high, 'high-norm token')} of {count(found.n_tokens, 'token')}; lines: the untouched model"
    if found.controls:
        about += f"; controls: mean and standard deviation over {count(found.controls, 'seed')}"
    figure = frame(
        traces,
        title=f"What removing the explosion subspace of block {found.block} (rank {found.rank}) does to {found.model_name}",
        subtitle=about,
        x="",
        y="",
    )
    if not places:
        say_instead(figure, "there was no token to edit")
        return figure
    width = (1 - _GAP * (len(panels) - 1)) / len(panels)
    for number, panel in enumerate(panels, start=1):
        left = (number - 1) * (width + _GAP)
        values = [_value(found, row, panel) for row in (found.untouched, *edited)]
        ends = [value + side * _spread(row, panel) for value, row in zip(values[1:], edited, strict=True) for side in (-1, 1)]
        axis = _log_axis(values) if panel.log else {"range": _linear_range([*values, *ends]), "nticks": 4}
        axis |= {
            "tickangle": 0,
            "domain": [left, left + width],
            "anchor": "y",
            "title": {"text": panel.title, "font": {"size": 12}},
        }
        if panel.tick_format:
            axis["tickformat"] = panel.tick_format
        name = f"x{number}" if number > 1 else "x"
        figure.update_layout({f"xaxis{number if number > 1 else ''}": axis})
        before = values[0]
        figure.add_shape(
            type="line",
            xref=name,
            yref="paper",
            x0=before,
            x1=before,
            y0=0,
            y1=1,
            line={"color": INK, "width": 1.2, "dash": "dash"},
        )
    names = [f"{_PLACES[where]}, {_SIDES[side]}" for side, where in places]
    figure.update_yaxes(
        tickvals=list(range(len(places))), ticktext=names, range=[len(places) - 0.4, -0.6], showgrid=False, title=None
    )
    for line in range(1, len(places)):
        figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=line - 0.5, y1=line - 0.5, line={"color": MUTED, "width": 0.5})
    height = 52 * len(places)
    figure.update_layout(height=210 + height, margin_b=76, legend_y=1 + 6 / height)
    return figure


def _tells(found: Consequences, edited: list[Outcome], panel: _Panel) -> bool:
    """Whether a measure was taken and is not zero all over."""
    values = [getattr(row.measures, panel.measure) for row in (found.untouched, *edited)]
    return not math.isnan(values[0]) and any(values)


def _log_axis(values: list[float]) -> dict[str, Any]:
    """With no more ticks than a narrow panel has room for."""
    axis = log_axis(torch.tensor(values))
    stride = math.ceil(len(axis["tickvals"]) / 4)
    return axis | {name: axis[name][::stride] for name in ("tickvals", "ticktext")}


def _value(found: Consequences, row: Outcome, panel: _Panel) -> float:
    value = getattr(row.measures, panel.measure)
    return value - getattr(found.untouched.measures, panel.measure) if panel.change else value


def _spread(row: Outcome, panel: _Panel) -> float:
    """Zero where there is none to draw."""
    spread = 0.0 if row.spread is None else getattr(row.spread, panel.measure)
    return 0.0 if math.isnan(spread) else spread


def _hover(row: Outcome, panel: _Panel) -> str:
    value = getattr(row.measures, panel.measure)
    shown = f"{value:{panel.hover_format}}"
    if row.spread is None or math.isnan(getattr(row.spread, panel.measure)):
        return f"{panel.measure} {shown}"
    return f"{panel.measure} {shown} ± {getattr(row.spread, panel.measure):{panel.hover_format}}"


def _linear_range(values: list[float]) -> list[float]:
    """Zero is in the picture, so that lengths can be compared."""
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.08 * ((high - low) or 1.0)
    return [low - margin, high + margin]
