"""Information propagation with and without the explosion subspace, and answers to probes."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
import torch

from sd_lens.display.collapse_words import layer_name, metric_axis
from sd_lens.display.labels import plotly_text, visible
from sd_lens.display.length_lines import Drawn, length_axis, over_lengths
from sd_lens.display.norm_figures import log_axis
from sd_lens.display.style import BLUE, INK, MUTED, VERMILLION, count, frame
from sd_lens.propagation.answers import Answers
from sd_lens.propagation.collapse import FINAL
from sd_lens.propagation.consequences import ABLATED, UNTOUCHED, PropagationConsequences

_LOOKS = {UNTOUCHED: (INK, "circle"), ABLATED: (VERMILLION, "diamond")}
_CONTROL = ("#7B858E", "square")
_LEFT, _RIGHT = (0.0, 0.46), (0.56, 1.0)
_NAMED = 32
"""Up to so many tokens are named below."""


def propagation_panels(consequences: PropagationConsequences, dtype: str | None = None) -> go.Figure:
    """Collapse curves of a model with and without its explosion subspace, and beside them what the last token feels.

    Args:
        consequences: From `propagation_consequences`.
        dtype: Precision of the curves; None for the first.

    Returns:
        The figure; the panel of sensitivities is left out where there are none.
    """
    first = consequences.curves[UNTOUCHED]
    dtype, layer, metric = first.line(dtype, metric=consequences.metric, layer=FINAL)
    lines = [
        Drawn(run, curve.lengths, curve.values[dtype, layer, metric], curve.equal[dtype, layer], *_colour(run), *_dash(run))
        for run, curve in consequences.curves.items()
    ]
    traces, axis = over_lengths(lines, metric=metric)
    felt = consequences.sensitivities
    if felt:
        traces += [_felt(consequences, run) for run in felt]
    about = (
        f"{consequences.side} side{'s' * (consequences.side == 'both')} of rank {consequences.rank} in block {consequences.block}, all tokens; "
        f"left: probe {first.probe['name']}, {layer_name(layer)}, {dtype}"
        + ("; right: a text, the model's own precision" if felt else "")
    )
    figure = frame(
        traces,
        title=f"Information propagation in {consequences.model_name} without its explosion subspace",
        subtitle=about,
        x="",
        y=metric_axis(metric),
    )
    figure.update_layout(xaxis=length_axis(first.lengths), yaxis=axis)
    if felt:
        figure.update_xaxes(domain=_LEFT)
        figure.update_layout(**_felt_axes(consequences))
        figure.update_yaxes(anchor="x", selector={"anchor": None})
    return figure


def _colour(run: str) -> tuple[str]:
    return (_LOOKS.get(run, _CONTROL)[0],)


def _dash(run: str) -> tuple[str, str]:
    return ("solid" if run in _LOOKS else "dot", _LOOKS.get(run, _CONTROL)[1])


def _felt(consequences: PropagationConsequences, run: str) -> go.Scatter:
    """Sensitivity to every token, of one run."""
    felt = consequences.sensitivities[run]
    n = felt.position + 1
    colour, symbol = _LOOKS.get(run, _CONTROL)
    return go.Scatter(
        x=list(range(n)),
        y=[value or None for value in felt.frobenius[0, :n].tolist()],
        customdata=[plotly_text(visible(text), 40) for text in felt.texts[:n]],
        xaxis="x2",
        yaxis="y2",
        mode="lines+markers",
        line={"color": colour, "width": 1.5, "dash": "solid" if run in _LOOKS else "dot"},
        marker={"symbol": symbol, "size": 7},
        name=run,
        legendgroup=run,
        showlegend=False,
        hovertemplate=f"<b>%{{customdata}}</b> at position %{{x}}<br>{run}: %{{y:.4g}}<extra></extra>",
    )


def _felt_axes(consequences: PropagationConsequences) -> dict[str, Any]:
    felt = next(iter(consequences.sensitivities.values()))
    n = felt.position + 1
    step = math.ceil(n / _NAMED)
    named = list(range(0, n, step))
    values = torch.stack([one.frobenius[0, :n] for one in consequences.sensitivities.values()])
    high = felt.high_norm[:n]
    texts = [plotly_text(visible(felt.texts[pos]), 12) for pos in named]
    marked = [f"<b>{text}</b>" if high[pos] else text for pos, text in zip(named, texts, strict=True)]
    title = "token" + (" (bold: high norm)" if bool(high.any()) else "")
    return {
        "xaxis2": {
            "domain": _RIGHT,
            "anchor": "y2",
            "range": [-0.6, n - 0.4],
            "tickvals": named,
            "ticktext": marked,
            "tickangle": -90 if len(named) > 8 else 0,
            "tickfont": {"size": 11},
            "showgrid": False,
            "title": {"text": title},
        },
        "yaxis2": log_axis(values) | {"anchor": "x2", "title": {"text": "sensitivity of the last token (log scale)"}},
    }


def answer_curves(answers: Answers) -> go.Figure:
    """Share of right answers over the length, and how far answers are off.

    Args:
        answers: From `answer_probes`.

    Returns:
        The figure. Lengths without any answer have no error.
    """
    table = answers.summary()
    lengths = table["length"].tolist()
    asked = list(zip(table["n"].tolist(), table["n_answered"].tolist(), strict=True))

    def line(column: str, name: str, colour: str, **more: Any) -> go.Scatter:
        return go.Scatter(
            x=lengths,
            y=[None if math.isnan(value) else value for value in table[column].astype(float).tolist()],
            customdata=asked,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": more.pop("dash", "solid")},
            marker={"size": 7},
            name=name,
            hovertemplate=f"length %{{x:,}}: {name} %{{y:.4g}}<br>%{{customdata[1]}} answers to %{{customdata[0]}} asked<extra></extra>",
            **more,
        )

    below = {"xaxis": "x2", "yaxis": "y2"}
    traces = [
        line("accuracy", "share of right answers", BLUE),
        line("mean_absolute_error", "mean absolute error", VERMILLION, **below),
    ]
    if answers.by == "generation":  # of generated numbers one may be anything
        traces.append(line("median_absolute_error", "median absolute error", MUTED, dash="dash", **below))
    how = (
        f"the most probable of {count(len(answers.candidates), 'candidate')}"
        if answers.by == "logits"
        else "the first number of the text generated"
    )
    figure = frame(
        traces,
        title=f"Answers of {answers.model_name} to the probe {answers.probe['name']}",
        subtitle=f"{how}; {count(len(answers.rows), 'sequence')}",
        x="",
        y="share of right answers",
    )
    axis = length_axis(lengths)
    figure.update_layout(
        xaxis=axis | {"domain": _LEFT},
        yaxis={"range": [-0.04, 1.04], "tickformat": ".0%"},
        xaxis2=axis | {"domain": _RIGHT, "anchor": "y2"},
        yaxis2={"rangemode": "tozero", "anchor": "x2", "title": {"text": "absolute error"}},
    )
    return figure
