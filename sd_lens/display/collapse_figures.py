"""Collapse over the length: how far apart the last tokens of pairs are, in every precision, and with what may help."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
import torch

from sd_lens.display.collapse_words import DTYPE_COLOURS, layer_name, metric_axis
from sd_lens.display.length_lines import Drawn, length_axis, over_lengths, spread_of
from sd_lens.display.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, VERMILLION, frame, say_instead
from sd_lens.models.precision import PRECISIONS
from sd_lens.propagation.critical import critical_length
from sd_lens.propagation.curve import CollapseCurve
from sd_lens.propagation.mitigations import Mitigations, Setting
from sd_lens.propagation.pair_distances import ABSOLUTE

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
_SETTINGS = (INK, BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
_REACH = 100.0
"""A machine epsilon is on the axis where the shortest distance is at most so many times as large."""


def collapse_lines(curve: CollapseCurve, metric: str | None = None) -> go.Figure:
    """Distance over length, a line per precision and layer, with machine epsilons and critical lengths.

    Args:
        curve: From `collapse_curve`.
        metric: Which metric; None for the curve's first.

    Returns:
        The figure. Bands are from least to most over chunks and samples; distances of zero, which a log axis has no place for, stand
        at its lower edge.
    """
    _, _, metric = curve.line(metric=metric)
    places = [(dtype, layer) for dtype, layer, name in curve.lines if name == metric]
    layers = list(dict.fromkeys(layer for _, layer in places))
    lines = [
        Drawn(
            f"{dtype}, {layer_name(layer)}" if len(layers) > 1 else dtype,
            curve.lengths,
            curve.values[dtype, layer, metric],
            curve.equal[dtype, layer],
            DTYPE_COLOURS.get(dtype, MUTED),
            _DASHES[layers.index(layer) % len(_DASHES)],
            _SYMBOLS[layers.index(layer) % len(_SYMBOLS)],
        )
        for dtype, layer in places
    ]
    dtypes = list(dict.fromkeys(dtype for dtype, _ in places)) if metric in ABSOLUTE else []
    epsilons = {dtype: torch.finfo(PRECISIONS[dtype]).eps for dtype in dtypes}
    about = ["" if len(layers) > 1 else layer_name(layers[0]), _pairs(curve), spread_of(lines), curve.edited or ""]
    figure = _figure(lines, epsilons, title=f"{_probe(curve)} in {curve.model_name}", about=about, metric=metric)
    if dtypes:
        found = [(place, critical_length(curve, place[0], metric=metric, layer=place[1])) for place in places]
        _mark_critical(figure, [(dtype, at.below_epsilon, at.epsilon) for (dtype, _), at in found if at.below_epsilon])
    return figure


def mitigation_lines(mitigations: Mitigations, dtype: str | None = None) -> go.Figure:
    """Distance over length, a line per setting.

    Args:
        mitigations: From `mitigations`.
        dtype: Precision; None for the first.

    Returns:
        The figure; dashed lines are those of a sliding window that was left on.
    """
    curve = mitigations.settings[0].curve
    dtype, layer, metric = curve.line(dtype, metric=mitigations.metric, layer=mitigations.layer)
    every = list(dict.fromkeys(setting.separator_every for setting in mitigations.settings))
    lines = [
        Drawn(
            setting_name(mitigations, setting),
            mitigations.lengths,
            setting.curve.values[dtype, layer, metric],
            setting.curve.equal[dtype, layer],
            _SETTINGS[every.index(setting.separator_every) % len(_SETTINGS)],
            "solid" if setting.window is None else "dash",
            _SYMBOLS[every.index(setting.separator_every) % len(_SYMBOLS)],
        )
        for setting in mitigations.settings
    ]
    about = [layer_name(layer), dtype, spread_of(lines)]
    title = f"What helps against collapse in {mitigations.model_name} (probe {mitigations.name})"
    return _figure(lines, {dtype: torch.finfo(PRECISIONS[dtype]).eps}, title=title, about=about, metric=metric)


def setting_name(mitigations: Mitigations, setting: Setting) -> str:
    """What a setting is called.

    Args:
        mitigations: Of which it is one.
        setting: The setting.
    """
    windowed = any(one.window is not None for one in mitigations.settings)
    return str(setting) + (", window off" if windowed and setting.window is None else "")


def _figure(lines: list[Drawn], epsilons: dict[str, float], *, title: str, about: list[str], metric: str) -> go.Figure:
    whole = torch.cat([line.flat.flatten() for line in lines])
    positive = whole[whole > 0]
    least = float(positive.min()) if len(positive) else math.inf
    shown = {dtype: epsilon for dtype, epsilon in epsilons.items() if least <= _REACH * epsilon}
    below = [f"machine epsilon of {dtype}, {epsilons[dtype]:.3g}, is far below" for dtype in epsilons if dtype not in shown]
    traces, axis = over_lengths(lines, metric=metric, epsilons=shown.values())
    subtitle = "; ".join(text for text in (*about, *below) if text)
    figure = frame(traces, title=title, subtitle=subtitle, x="", y=metric_axis(metric))
    figure.update_layout(xaxis=length_axis(lines[0].lengths), yaxis=axis)
    for dtype, epsilon in shown.items():
        line = {"color": DTYPE_COLOURS.get(dtype, MUTED), "width": 1.5, "dash": "dot"}
        figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=epsilon, y1=epsilon, line=line, layer="below")
        place: dict[str, Any] = {"x": 1, "xref": "paper", "xanchor": "left", "y": math.log10(epsilon)}
        figure.add_annotation(**place, text=f"ε of<br>{dtype}", align="left", showarrow=False, font={"size": 11})
    if shown:
        figure.update_layout(margin_r=76)
    if not len(positive) and metric != "argmax":
        say_instead(figure, "all pairs are the same")
    return figure


def _mark_critical(figure: go.Figure, found: list[tuple[str, int, float]]) -> None:
    """A star where a line stays below its precision's epsilon from."""
    for dtype, length, epsilon in found:
        figure.add_scatter(
            x=[length],
            y=[epsilon],
            mode="markers",
            marker={"symbol": "star", "size": 14, "color": DTYPE_COLOURS.get(dtype, MUTED), "line": {"color": INK, "width": 1}},
            name=f"critical length of {dtype}: {length:,}",
            hovertemplate=f"below the machine epsilon of {dtype} from length {length:,} on<extra></extra>",
        )


def _probe(curve: CollapseCurve) -> str:
    return f"Collapse of the last token (probe {curve.probe['name']})"


def _pairs(curve: CollapseCurve) -> str:
    second = (
        "the same with its last element once more" if curve.probe["contrast"] == "repeated" else "the same with the digit changed"
    )
    every = curve.probe["separator_every"]
    return f"a sequence beside {second}" + (f", separator every {every}" if every else "")
