"""Lines over the length of a probe, with bands and with what is zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.display.labels import plotly_text
from sd_lens.display.norm_figures import log_axis
from sd_lens.display.style import count


class Drawn(NamedTuple):
    """One line to draw.

    Attributes:
        name: Its name.
        lengths: Its lengths.
        values: Distances.
        equal: Where the pairs are equal to the bit.
        colour: Its colour.
        dash: Its dash.
        symbol: Its symbol.
    """

    name: str
    lengths: tuple[int, ...]
    values: Float[Tensor, "sample length part"]
    equal: Bool[Tensor, "sample length"]
    colour: str
    dash: str = "solid"
    symbol: str = "circle"

    @property
    def flat(self) -> Float[Tensor, "length each"]:
        """All samples and chunks of every length."""
        return self.values.transpose(0, 1).flatten(1)


def over_lengths(
    lines: Sequence[Drawn], *, metric: str, epsilons: Iterable[float] = (), axes: tuple[str, str] = ("x", "y")
) -> tuple[list[go.Scatter], dict[str, Any]]:
    """Traces of lines with their bands and zeros, and the axis they need.

    Args:
        lines: What to draw.
        metric: What distances are measured by.
        epsilons: What has to be on the axis, too.
        axes: The axes drawn on.
    """
    whole = torch.cat([line.flat.flatten() for line in lines]).double()
    axis = log_axis(torch.cat([whole, torch.tensor(list(epsilons), dtype=torch.float64)]))
    zeros = any(bool((line.flat.mean(1) == 0).any()) for line in lines)
    if metric == "argmax":  # a share, most often of one pair
        axis, floor = {"type": "linear", "range": [-0.04, 1.04], "tickformat": ".0%"}, -math.inf
    else:
        low, high = axis["range"]
        if zeros:
            axis["range"] = [low - 0.06 * (high - low), high]
        floor = 10 ** axis["range"][0]
    on = {"xaxis": axes[0], "yaxis": axes[1]}
    traces = [trace for line in lines for trace in _traces(line, floor, on)]
    return traces, axis


def length_axis(lengths: Sequence[int]) -> dict[str, Any]:
    """A log axis of lengths.

    Args:
        lengths: The lengths.
    """
    axis = log_axis(torch.tensor(lengths, dtype=torch.float64))
    low, high = (math.log10(length) for length in (min(lengths), max(lengths)))
    margin = 0.04 * max(high - low, 0.5)
    kept = [value for value in axis["tickvals"] if float(value).is_integer()] or sorted(set(lengths))
    return axis | {
        "range": [low - margin, high + margin],
        "tickvals": kept,
        "ticktext": [f"{value:,.0f}" for value in kept],
        "title": {"text": "length of the sequence, in elements (log scale)"},
    }


def spread_of(lines: Sequence[Drawn]) -> str:
    """What lines and bands are over, for a subtitle; empty where there is one number each.

    Args:
        lines: The lines.
    """
    samples, _, parts = lines[0].values.shape
    over = [count(number, thing) for number, thing in ((parts, "head-sized chunk"), (samples, "sample")) if number > 1]
    return f"mean, and least to most, over {' and '.join(over)}" if over else ""


def _traces(line: Drawn, floor: float, on: dict[str, str]) -> list[go.Scatter]:
    """The band, the line and the zeros of one curve."""
    flat, lengths = line.flat.double(), list(line.lengths)
    mean, low, high = flat.mean(1), flat.amin(1), flat.amax(1)
    traces = []
    if flat.shape[1] > 1:
        edge = [max(value, floor) for value in low.tolist() + high.flip(0).tolist()]
        shared: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "hoverinfo": "skip", "showlegend": False}
        red, green, blue = (int(line.colour[place : place + 2], 16) for place in (1, 3, 5))
        colour = f"rgba({red},{green},{blue},0.16)"
        traces.append(go.Scatter(x=lengths + lengths[::-1], y=edge, fillcolor=colour, legendgroup=line.name, **shared, **on))
    name = plotly_text(line.name)
    logarithmic = math.isfinite(floor)
    known = torch.stack([low, high], dim=-1).tolist()
    traces.append(
        go.Scatter(
            x=lengths,
            y=[None if logarithmic and value == 0 else value for value in mean.tolist()],
            customdata=known,
            mode="lines+markers",
            line={"color": line.colour, "width": 2, "dash": line.dash},
            marker={"symbol": line.symbol, "size": 7},
            name=name,
            legendgroup=line.name,
            hovertemplate=f"<b>{name}</b><br>length %{{x:,}}: %{{y:.4g}}"
            + ("<br>from %{customdata[0]:.4g} to %{customdata[1]:.4g}" if flat.shape[1] > 1 else "")
            + "<extra></extra>",
            **on,
        )
    )
    same = line.equal.all(0)
    for chosen, what, symbol in ((same, "equal to the bit", "triangle-down"), (~same, "distance 0", "triangle-down-open")):
        where = [length for length, zero in zip(lengths, ((mean == 0) & chosen).tolist(), strict=True) if zero and logarithmic]
        if where:
            traces.append(
                go.Scatter(
                    x=where,
                    y=[floor] * len(where),
                    mode="markers",
                    marker={"symbol": symbol, "size": 11, "color": line.colour},
                    cliponaxis=False,
                    name=f"{name}: {what}",
                    legendgroup=line.name,
                    hovertemplate=f"<b>{name}</b><br>length %{{x:,}}: {what}<extra></extra>",
                    **on,
                )
            )
    return traces
