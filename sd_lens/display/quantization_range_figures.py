"""How far what projections work with reaches, and how well eight bits keep it: where single tokens spoil the range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
import torch

from sd_lens.applications.calibration import ProjectionRange
from sd_lens.applications.quantization_result import QuantizationStudy
from sd_lens.display.labels import plotly_text
from sd_lens.display.norm_figures import log_axis
from sd_lens.display.quantization_words import scheme_name
from sd_lens.display.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    block_axis,
    frame,
    say_instead,
    shade_blocks,
    tick_step,
)
from sd_lens.models.projections import DOWN


class _Role(NamedTuple):
    """What a kind of projection is called, and its colour."""

    name: str
    colour: str


_ROLES = {
    DOWN: _Role("down-projection", VERMILLION),
    "q": _Role("queries", BLUE),
    "k": _Role("keys", SKY),
    "v": _Role("values", PURPLE),
    "qkv": _Role("queries, keys, values", BLUE),
    "o": _Role("attention output", GREEN),
    "gate": _Role("gate", "#8A929A"),
    "in": _Role("up-projection", ORANGE),
    "unembed": _Role("unembedding", INK),
}
_SYMBOLS = {"rtn": "circle", "smoothquant": "diamond-open"}
_METHODS = {"rtn": "RTN", "smoothquant": "SmoothQuant"}
_HEIGHT, _GAP = 200, 24  # pixels


def quantization_ranges(study: QuantizationStudy) -> go.Figure:
    """Ranges of inputs and weights, and token-wise SQNR, of every projection over the blocks.

    Args:
        study: From `quantization_study`.

    Returns:
        The figure. Each line goes from the typical largest magnitude (of a token's input, of an output's weights) to the largest of all: where it is long,
        few tokens or outputs set the step for all others. Down-projections are drawn thick.
    """
    granularities = list(dict.fromkeys(granularity for _, granularity in study.schemes))
    figure = frame(
        [],
        title=f"What the projections of {study.model_name} work with",
        subtitle="lines: from the typical token's (output's) largest magnitude to the largest of all; SQNR: mean over tokens, low: much is lost",
        x="block",
        y="",
    )
    if not study.ranges:
        say_instead(figure, "ranges were not measured")
        return figure
    roles = _roles(study.ranges)
    at = {role: 0.0 if len(roles) == 1 else -0.34 + 0.68 * place / (len(roles) - 1) for place, role in enumerate(_across(roles))}
    n_panels = 2 + len(granularities)
    total = n_panels * _HEIGHT + (n_panels - 1) * _GAP
    for role in roles:
        chosen = [one for one in study.ranges if one.role == role]
        places = [(study.n_blocks if one.block is None else one.block) + at[role] for one in chosen]
        figure.add_trace(_reach(role, chosen, places, "y", _input_hover, "input"))
        figure.add_trace(_reach(role, chosen, places, "y2", _weight_hover, "weight"))
        for number, granularity in enumerate(granularities, start=3):
            for method in dict.fromkeys(method for method, other in study.schemes if other == granularity):
                figure.add_trace(_errors(role, chosen, places, f"y{number}", method, granularity))
    _explain_symbols(figure, study)
    inputs = torch.tensor([[one.input_max, one.input_typical] for one in study.ranges])
    weights = torch.tensor([[one.weight_max, one.weight_typical] for one in study.ranges])
    axes = [
        log_axis(inputs) | {"title": {"text": "input<br>(log scale)"}},
        log_axis(weights) | {"title": {"text": "weight<br>(log scale)"}},
    ]
    decibels = _decibel_range(study)
    axes += [
        {"range": decibels, "title": {"text": f"SQNR (dB),<br>{granularity.replace('_', '-')}"}} for granularity in granularities
    ]
    for number, axis in enumerate(axes):
        top = 1 - number * (_HEIGHT + _GAP) / total
        axis |= {"domain": [max(0.0, top - _HEIGHT / total), top], "anchor": "x"}
        figure.update_layout({f"yaxis{number + 1 if number else ''}": axis})
    outside = any(one.block is None for one in study.ranges)
    block_axis(figure, study.n_blocks + outside)
    shade_blocks(figure, study.explosion_blocks, study.decay_blocks)
    figure.update_shapes(yref="paper")  # across all panels
    # Two or three rows of the legend stand between the title and the first panel.
    figure.update_layout(
        height=240 + total,
        margin_t=172,
        title={"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 18, "l": 12}},
        xaxis_anchor=f"y{n_panels}",
        legend={"y": 1 + 8 / total, "itemsizing": "constant"},
    )
    if outside:
        _name_last(figure, study.n_blocks)
    return figure


def _roles(ranges: Sequence[ProjectionRange]) -> list[str]:
    """The roles there are: the down-projection first in the legend, then the known ones, then others."""
    there = dict.fromkeys(one.role for one in ranges)
    return [role for role in _ROLES if role in there] + [role for role in there if role not in _ROLES]


def _across(roles: Sequence[str]) -> list[str]:
    """The roles from left to right in a block, in the order in which they run: the down-projection last."""
    return [role for role in roles if role != DOWN] + [role for role in roles if role == DOWN]


def _look(role: str) -> _Role:
    return _ROLES.get(role, _Role(plotly_text(role, 24), MUTED))


def _reach(
    role: str,
    chosen: Sequence[ProjectionRange],
    places: Sequence[float],
    axis: str,
    hover: Callable[[ProjectionRange], str],
    what: str,
) -> go.Scatter:
    """From the typical to the largest magnitude, with a dot at the largest."""
    largest = [getattr(one, f"{what}_max") for one in chosen]
    typical = [getattr(one, f"{what}_typical") for one in chosen]
    look, down = _look(role), role == DOWN
    return go.Scatter(
        x=list(places),
        y=largest,
        yaxis=axis,
        mode="markers",
        marker={"color": look.colour, "size": 9 if down else 4},
        error_y={
            "symmetric": False,
            "array": [0.0] * len(chosen),
            "arrayminus": [high - low for high, low in zip(largest, typical, strict=True)],
            "color": look.colour,
            "thickness": 4 if down else 1.2,
            "width": 0,
        },
        name=look.name,
        legendgroup=role,
        showlegend=what == "input",
        customdata=[hover(one) for one in chosen],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _errors(
    role: str, chosen: Sequence[ProjectionRange], places: Sequence[float], axis: str, method: str, granularity: str
) -> go.Scatter:
    """Token-wise SQNR of one method."""
    key, look, down = f"{method}, {granularity}", _look(role), role == DOWN
    return go.Scatter(
        x=list(places),
        y=[one.token_sqnr_db[key] for one in chosen],
        yaxis=axis,
        mode="markers",
        marker={
            "color": look.colour,
            "size": 10 if down else 5,
            "symbol": _SYMBOLS.get(method, "x"),
            "line": {"color": look.colour, "width": 1.5},
        },
        name=f"{look.name}, {scheme_name(method, granularity)}",
        legendgroup=role,
        showlegend=False,
        customdata=[
            f"<b>{_name(one)}</b><br>{scheme_name(method, granularity)}: {one.token_sqnr_db[key]:.1f} dB, mean over tokens"
            f"<br>{one.sqnr_db[key]:.1f} dB over all"
            for one in chosen
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _name(one: ProjectionRange) -> str:
    return plotly_text(f"{one.name} ({one.part})" if one.part else one.name, 80)


def _input_hover(one: ProjectionRange) -> str:
    times = f"× {one.input_max / one.input_typical:.3g}" if one.input_typical else "–"
    return f"<b>{_name(one)}</b><br>largest input {one.input_max:.4g}<br>typical token's {one.input_typical:.4g} ({times})"


def _weight_hover(one: ProjectionRange) -> str:
    times = f"× {one.weight_max / one.weight_typical:.3g}" if one.weight_typical else "–"
    return f"<b>{_name(one)}</b><br>largest weight {one.weight_max:.4g}<br>typical output's {one.weight_typical:.4g} ({times})"


def _explain_symbols(figure: go.Figure, study: QuantizationStudy) -> None:
    """Names the symbols of methods in the legend, where there is more than one."""
    methods = list(dict.fromkeys(method for method, _ in study.schemes))
    for method in methods if len(methods) > 1 else ():
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"symbol": _SYMBOLS.get(method, "x"), "size": 9, "color": INK, "line": {"color": INK, "width": 1.5}},
            name=_METHODS.get(method, method),
            hoverinfo="skip",
        )


def _decibel_range(study: QuantizationStudy) -> list[float]:
    """One for all panels; zero, where the error is as large as the answer, is in the picture."""
    values = [value for one in study.ranges for value in one.token_sqnr_db.values()]
    return [min(0.0, *values) - 2, max(values) + 3]


def _name_last(figure: go.Figure, n_blocks: int) -> None:
    """The place right of the last block is the unembedding's."""
    ticks = [*range(0, n_blocks, tick_step(n_blocks)), n_blocks]
    figure.update_xaxes(tickmode="array", tickvals=ticks, ticktext=[*map(str, ticks[:-1]), "un-<br>embed"])
