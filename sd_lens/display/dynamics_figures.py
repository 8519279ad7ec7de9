"""A defect direction over the checkpoints of a training run: norm ratio above, angles below."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
import torch

from sd_lens.applications.stability import CheckpointState, DirectionStability
from sd_lens.display.labels import plotly_text
from sd_lens.display.norm_figures import log_axis
from sd_lens.display.style import BLUE, EXPLOSION, INK, MUTED, ORANGE, VERMILLION, count, frame

_LOG_SPAN = 50
"""Steps that span more than this factor are drawn on a log scale, as training runs save more often in the beginning."""
_UPPER, _LOWER = [0.6, 1.0], [0.0, 0.46]
_ANGLES = (
    ("others_angle_to_last_deg", "other tokens’ angle to the last", {"color": MUTED, "width": 2, "dash": "dot"}),
    ("angle_to_previous_deg", "angle to the previous", {"color": BLUE, "width": 2, "dash": "dash"}),
    ("angle_to_last_deg", "angle to the last", {"color": VERMILLION, "width": 3}),
)
_WHAT = {"norm": "largest norm", "same": "norm of the tokens followed"}


def direction_stability(found: DirectionStability) -> go.Figure:
    """Norm ratios (log scale) and angles over training; the checkpoints from the emergence on have a coloured background.

    Args:
        found: From `direction_stability`.

    Returns:
        The figure. Checkpoints stand at their steps where all are known, else one after the other under their names.
    """
    states = found.states
    places, axis = _places(states)
    names = [plotly_text(_full_name(state)) for state in states]
    traces = [
        _line(places, [state.max_ratio for state in states], names, _WHAT["norm"], {"color": INK, "width": 3}, "%{y:.3g} × median"),
    ]
    if found.n_vectors:
        ratios = [state.ratio for state in states]
        traces.append(_line(places, ratios, names, _WHAT["same"], {"color": ORANGE, "width": 2}, "%{y:.3g} × median, mean"))
    for column, name, line in _ANGLES:
        angles = [getattr(state, column) for state in states]
        if not all(map(math.isnan, angles)):
            traces.append(_line(places, angles, names, name, line, "%{y:.1f}°").update(yaxis="y2"))
    figure = frame(
        traces,
        title=f"How the defect direction of {found.model_name} comes about",
        subtitle=_about(found),
        x="training step" if axis["type"] != "category" else "checkpoint",
        y="norm / others’ median<br>(log scale)",
    )
    ratios = torch.tensor([[state.max_ratio, state.ratio] for state in states] + [[found.min_ratio] * 2])
    figure.update_layout(xaxis=axis, yaxis=log_axis(ratios))
    _across(figure, found.min_ratio, "y", f"high norm:<br>{found.min_ratio:g} ×")
    if found.n_vectors:
        _add_angle_panel(figure, found)
    _mark_emergence(figure, found, places, axis)
    return figure


def _add_angle_panel(figure: go.Figure, found: DirectionStability) -> None:
    """Makes room for the angles below the norms."""
    angles = {"domain": _LOWER, "title": {"text": "angle (degrees)"}, "range": [-4, _top(found)], "dtick": 30, "anchor": "x"}
    # Five names need two lines: below the panels they leave the title alone.
    legend = {"y": -0.16, "yanchor": "top"}
    figure.update_layout(
        height=640, legend=legend, margin={"t": 84, "b": 116}, xaxis_anchor="y2", yaxis_domain=_UPPER, yaxis2=angles
    )
    _across(figure, found.chance_deg[0], "y2", "random<br>directions")


def _places(states: tuple[CheckpointState, ...]) -> tuple[list[Any], dict[str, Any]]:
    """Where the checkpoints stand along x, and the axis."""
    steps = [state.step for state in states if state.step is not None]
    wide = len(steps) == len(states) and steps[-1] > _LOG_SPAN * max(steps[0], 1)
    if len(steps) < len(states) or (wide and steps[0] == 0):
        labels = [plotly_text(state.name, 24) for state in states]
        if len(set(labels)) < len(labels):
            labels = [f"{label} ({place})" for place, label in enumerate(labels)]
        return labels, {"type": "category", "categoryorder": "array", "categoryarray": labels}
    return list(steps), {"type": "log" if wide else "linear"}


def _full_name(state: CheckpointState) -> str:
    return state.label if state.step is None else f"{state.label} (step {state.step:,})"


def _line(x: list[Any], y: list[float], names: list[str], name: str, line: dict[str, Any], value: str) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=[None if math.isnan(one) else one for one in y],
        customdata=names,
        name=name,
        mode="lines+markers",
        line=line,
        marker={"size": 7},
        hovertemplate=f"<b>%{{customdata}}</b><br>{name}: {value}<extra></extra>",
    )


def _about(found: DirectionStability) -> str:
    if not found.n_vectors:
        return f"{count(found.n_tokens, 'token')} of {count(found.n_prompts, 'prompt')}; no high-norm token in the last checkpoint"
    when = "" if found.emergence is None else f"; shaded: from the emergence on ({found.emergence.name})"
    return f"angles of the mean of {count(found.n_vectors, 'residual vector')} of the last checkpoint’s high-norm tokens{when}"


def _top(found: DirectionStability) -> float:
    """Angles above 90° are rare: there is room for them only where there are any."""
    angles = [getattr(state, column) for state in found.states for column, *_ in _ANGLES]
    return max([96.0, *(angle + 6 for angle in angles if not math.isnan(angle))])


def _across(figure: go.Figure, value: float, axis: str, text: str) -> None:
    """A line across one of the two panels, named in the right margin."""
    line = {"color": INK, "width": 1.2, "dash": "dot"}
    figure.add_shape(type="line", xref="paper", yref=axis, x0=0, x1=1, y0=value, y1=value, line=line, layer="below")
    height = math.log10(value) if axis == "y" else value
    figure.add_annotation(
        x=1, xref="paper", xanchor="left", y=height, yref=axis, text=text, align="left", showarrow=False, font={"size": 11}
    )
    figure.update_layout(margin_r=84)


def _mark_emergence(figure: go.Figure, found: DirectionStability, places: list[Any], axis: dict[str, Any]) -> None:
    """A coloured background from the emergence to the end."""
    at = found.emergence
    if at is None:
        return
    place = found.states.index(at)
    # On a category axis shapes count categories.
    ends = (place, len(places) - 1) if axis["type"] == "category" else (places[place], places[-1])
    if ends[0] == ends[1]:
        figure.add_shape(
            type="line",
            xref="x",
            yref="paper",
            x0=ends[0],
            x1=ends[0],
            y0=0,
            y1=1,
            line={"color": EXPLOSION, "width": 8},
            layer="below",
        )
        return
    figure.add_shape(
        type="rect",
        xref="x",
        yref="paper",
        x0=ends[0],
        x1=ends[1],
        y0=0,
        y1=1,
        fillcolor=EXPLOSION,
        opacity=0.6,
        line_width=0,
        layer="below",
    )
