"""Theory in numbers: softmaxes, ratios, counts and one attention layer, over the length."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import torch

from sd_lens.display.norm_figures import log_axis
from sd_lens.display.style import BLUE, GREEN, INK, ORANGE, VERMILLION, count, frame, level
from sd_lens.propagation.count_collapse import CountingCollapse
from sd_lens.propagation.counting import RatioBlindness
from sd_lens.propagation.positions import POSITIONS, Positions
from sd_lens.propagation.softmaxes import SoftmaxVariation, alternating_total_variation
from sd_lens.propagation.synthetic import SyntheticCollapse

_COLOURS: dict[Positions, str] = {"nope": INK, "sinusoidal": ORANGE, "rope": BLUE, "alibi": GREEN}
_NOTHING = 1e-17
"""Where a distance of zero is drawn on a log axis: below what float64 can tell of elements of order 1."""


def softmax_variation(variation: SoftmaxVariation) -> go.Figure:
    """Total variation of two softmaxes over the length, log-log, beside its closed form and the alternating counterexample.

    Args:
        variation: From `softmax_total_variation`.
    """
    table = variation.to_dataframe()
    lengths = table["length"].tolist()
    traces = [
        *_band(lengths, table["min"].tolist(), table["max"].tolist(), VERMILLION),
        _line(lengths, table["mean"].tolist(), "sampled, mean over seeds", VERMILLION),
        _line(lengths, table["expected"].tolist(), "closed form", INK, dash="dash"),
    ]
    figure = frame(
        traces,
        title="A change of a fixed prefix is lost in a long softmax",
        subtitle=f"first {variation.changed:,} changed by up to {variation.size:g}; mean and range "
        f"of {count(len(variation.values), 'seed')}; line: 1010… against 0101…, the same at every length",
        x="length",
        y="total variation (log scale)",
    )
    alternating = alternating_total_variation(2)
    _log_log(figure, lengths, [*table["min"], *table["max"], *table["expected"], alternating])
    level(figure, alternating, f"1010… against<br>0101…: {alternating:.4f}", dash="dot")
    figure.update_layout(margin_r=120)
    return figure


def ratio_blindness(found: RatioBlindness) -> go.Figure:
    """Distance between a sequence and the same with many times as many of every token, for every mask and encoding.

    Args:
        found: From `ratio_blindness`. Of several ratios the largest distance is drawn; a distance of zero stands at the lower end.
    """
    largest: dict[tuple[Positions, bool], dict[int, float]] = {}
    for gap in found.gaps:
        over_times = largest.setdefault((gap.positions, gap.causal), {})
        over_times[gap.times] = max(gap.last, over_times.get(gap.times, 0.0))
    traces = []
    for (kind, causal), gaps in largest.items():
        name = f"{POSITIONS[kind]}, {'causal mask' if causal else 'no mask'}"
        drawn = [max(value, _NOTHING) for value in gaps.values()]
        line = _line(list(gaps), drawn, name, _COLOURS[kind], dash="solid" if causal else "dash")
        traces.append(
            line.update(customdata=list(gaps.values()), hovertemplate=f"{name}, %{{x}} times: %{{customdata:.3g}}<extra></extra>")
        )
    blind = "; ".join(found.blind()) or "none"
    figure = frame(
        traces,
        title="Which transformers see numbers, and which only ratios",
        subtitle=f"largest distance over {count(found.n_seeds, 'random model')} of {count(found.n_layers, 'layer')} and all ratios; "
        f"only ratios: {blind}",
        x="times as many tokens of each kind",
        y="distance of last tokens,<br>L∞ (log scale)",
    )
    times = sorted({gap.times for gap in found.gaps})
    _log_log(figure, times, [value for trace in traces for value in trace.y])
    figure.update_xaxes(tickvals=times, ticktext=[str(value) for value in times])
    # Eight settings fill more lines above the figure than there is room for.
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"})
    return figure


def counting_collapse(found: CountingCollapse) -> go.Figure:
    """Distances between n and n + 1 ones, a panel per precision: as computed, exact, and where rounding drowns them.

    Args:
        found: From `counting_collapse`. Distances of zero (equal to the bit) are not drawn.
    """
    table = found.to_dataframe()
    traces: list[go.Scatter] = []
    for number, dtype in enumerate(found.dtypes, start=1):
        for kind in found.positions:
            rows = table[(table["positions"] == kind) & (table["dtype"] == dtype)]
            counts, name = rows["count"].tolist(), POSITIONS[kind]
            lines = [
                _line(counts, _positive(rows["mean"].tolist()), name, _COLOURS[kind]),
                _line(counts, _positive(rows["exact"].tolist()), f"{name}, exact", _COLOURS[kind], dash="dash"),
                _line(counts, _positive(rows["rounding"].tolist()), f"{name}, rounding error", _COLOURS[kind], dash="dot"),
            ]
            lines[0].update(showlegend=number == 1)
            for line in lines[1:]:
                line.update(showlegend=False, line_width=1.2, mode="lines")
            axis = f"x{number}" if number > 1 else "x"
            traces += [line.update(xaxis=axis, legendgroup=kind) for line in lines]
    figure = frame(
        traces,
        title="How far n and n + 1 ones are apart to a transformer",
        subtitle=f"{found.end} stands behind them; mean over {count(found.distances.shape[2], 'random model')}; dashed: exact; dotted: rounding "
        "error, below which a distance says nothing of the count",
        x="",
        y="distance of last tokens,<br>L∞ (log scale)",
    )
    _log_log(figure, list(found.counts), table[["mean", "exact", "rounding"]].to_numpy().ravel().tolist())
    n_panels = len(found.dtypes)
    for number, dtype in enumerate(found.dtypes, start=1):
        begin, end = (number - 1) / n_panels, (number - 0.08) / n_panels
        axis = figure.layout["xaxis"].to_plotly_json() if number > 1 else {}
        domain = [begin, end if n_panels > 1 else 1.0]
        figure.update_layout(
            {f"xaxis{number if number > 1 else ''}": {**axis, "domain": domain, "title": {"text": f"n, ones ({dtype})"}}}
        )
    return figure


def synthetic_collapse(found: SyntheticCollapse) -> go.Figure:
    """Distance of one attention layer's last outputs when the last token is repeated, over the length, one line per encoding.

    Args:
        found: From `synthetic_collapse`. Distances of zero (equal to the bit) are not drawn.
    """
    table = found.to_dataframe()
    traces = []
    for kind in found.positions:
        rows = table[table["positions"] == kind]
        lengths, name = rows["length"].tolist(), f"{POSITIONS[kind]}, exponent {found.decay(kind).exponent:.2f}"
        traces += _band(lengths, _positive(rows["min"].tolist()), _positive(rows["max"].tolist()), _COLOURS[kind])
        traces.append(_line(lengths, _positive(rows["mean"].tolist()), name, _COLOURS[kind]))
        theory = _line(lengths, _positive(rows["expected"].tolist()), f"{POSITIONS[kind]}, expected", _COLOURS[kind], dash="dash")
        traces.append(theory.update(showlegend=False, line_width=1.2, mode="lines"))
    figure = frame(
        traces,
        title="How far one attention layer's last output moves when the last token is repeated",
        subtitle=f"random tokens, width {found.d_model}, {count(found.n_heads, 'head')}, {found.dtype}; mean and range of "
        f"{count(found.distances.shape[1], 'seed')}; dashed: theory",
        x="length",
        y="L1 distance (log scale)",
    )
    _log_log(figure, list(found.lengths), table[["min", "max", "expected"]].to_numpy().ravel().tolist())
    return figure


def _line(x: list[int], y: Sequence[float | None], name: str, colour: str, *, dash: str = "solid") -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"color": colour, "size": 5},
        hovertemplate=f"{name}, %{{x}}: %{{y:.4g}}<extra></extra>",
    )


def _band(x: list[int], low: Sequence[float | None], high: Sequence[float | None], colour: str) -> list[go.Scatter]:
    """The range over seeds, as an area behind a line."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    hidden = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    return [
        go.Scatter(x=x, y=low, **hidden),
        go.Scatter(x=x, y=high, fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.15)", **hidden),
    ]


def _positive(values: Sequence[float]) -> list[float | None]:
    """Values for a log axis; none where there is nothing to draw."""
    return [float(value) if value > 0 else None for value in values]


def _log_log(figure: go.Figure, x: Sequence[int], y: Sequence[float | None]) -> None:
    """Log axes that cover all values."""
    drawn = torch.tensor([float(value) for value in y if value is not None], dtype=torch.float64)
    across = log_axis(torch.tensor([float(value) for value in x], dtype=torch.float64))
    figure.update_layout(xaxis={**across, "tickangle": 0}, yaxis=log_axis(drawn))
