"""What the rest of the model does with high-norm tokens, and what repetition does to a token."""

from __future__ import annotations

import math

import plotly.graph_objects as go
import torch

from sd_lens.display.labels import plotly_text, visible
from sd_lens.display.norm_figures import log_axis
from sd_lens.display.style import MUTED, VERMILLION, count, frame, level, percent, tick_step
from sd_lens.tracing.repetition import SHARES, RepeatedTokens
from sd_lens.tracing.sinks import SinkAttention

MAX_LINES = 60
MAX_NAMES = 8
_OUTLINE = "#FF3D00"
_REACH, _BELOW = (f"{verb} {percent(SHARES[0])}" for verb in ("reach", "stay below"))
_NOTHING = "after a first token without a high norm"


def sink_heatmap(sinks: SinkAttention) -> go.Figure:
    """Attention that each head of each block pays to high-norm tokens, sink heads outlined.

    Args:
        sinks: From `sink_attention`; where it found no high-norm token, what heads pay to its position is shown.
    """
    to_high = sinks.n_queries > 0
    values = sinks.to_high if to_high else sinks.alpha
    blocks, heads = values.shape
    known = [sinks.alpha, sinks.sink_share, *((sinks.to_high, sinks.to_other, sinks.to_self, sinks.ratio) if to_high else ())]
    hover = f"to position {sinks.key}: %{{customdata[0]:.1%}}, a sink in %{{customdata[1]:.0%}} of the prompts"
    if to_high:
        hover += (
            "<br>to high-norm tokens: %{customdata[2]:.1%}<br>to all others before: %{customdata[3]:.1%}<br>to itself: %{customdata[4]:.1%}"
            "<br>one high-norm token gets %{customdata[5]:.3g} × what another gets"
        )
    heatmap = go.Heatmap(
        x=list(range(heads)),
        y=list(range(blocks)),
        z=values.numpy(),
        customdata=torch.stack(known, dim=-1).numpy(),
        colorscale="Cividis",
        zmin=0,
        zmax=1,
        colorbar={"title": {"text": "attention"}, "tickformat": ".0%", "thickness": 14, "outlinewidth": 0},
        hovertemplate=f"block %{{y}}, head %{{x}}<br>{hover}<extra></extra>",
    )
    marked = sinks.sink_heads
    outline = go.Scatter(
        x=[x for _, head in marked for x in (*(head + side for side in (-0.5, 0.5, 0.5, -0.5, -0.5)), None)],
        y=[y for block, _ in marked for y in (*(block + side for side in (-0.5, -0.5, 0.5, 0.5, -0.5)), None)],
        mode="lines",
        line={"color": _OUTLINE, "width": 2 if blocks * heads < 1500 else 1},
        name=f"sink heads: they pay position {sinks.key} more than {percent(sinks.epsilon)} of their attention",
        showlegend=bool(marked),
        hoverinfo="skip",
    )
    rate = f"sink rate {percent(sinks.sink_rate)} (ε = {sinks.epsilon:g}, position {sinks.key}, first {sinks.T} tokens)"
    if to_high:
        title = f"Attention paid to high-norm tokens in {sinks.model_name}"
        about = f"{count(sinks.n_high, 'high-norm token')}, mean of {count(sinks.n_queries, 'later token')}; {rate}"
    else:
        title = f"Attention paid to position {sinks.key} in {sinks.model_name}"
        none = "no high-norm token with others to compare" if sinks.n_high else "there is no high-norm token"
        about = f"{none}; mean of {count(sinks.n_prompts, 'prompt')}; {rate}"
    figure = frame([heatmap, outline], title=title, subtitle=about, x="head", y="block")
    figure.update_xaxes(tickmode="linear", tick0=0, dtick=tick_step(heads), showgrid=False, range=[-0.52, heads - 0.48])
    figure.update_yaxes(tickmode="linear", tick0=0, dtick=tick_step(2 * blocks), showgrid=False, range=[-0.52, blocks - 0.48])
    height = max(200, min(720, 50 + 16 * blocks))
    figure.update_layout(height=180 + height, legend_y=1 + 6 / height)
    return figure


def repetition_curves(repeated: RepeatedTokens) -> go.Figure:
    """Norm of the n-th repeat of each token, relative to the first token's, on log axes.

    Args:
        repeated: From `repeated_tokens`; of many tokens, those that come nearest are drawn in any case.
    """
    ratios = repeated.ratios
    n_ids, n = ratios.shape
    reached = repeated.reached(SHARES[0])
    counted = ratios[:, 0 if repeated.prefix else 1 :]  # without anything before the run, its first token is the first
    order = counted.amax(1).argsort(descending=True, stable=True).tolist()
    drawn = order if n_ids <= MAX_LINES else [order[round(i * (n_ids - 1) / (MAX_LINES - 1))] for i in range(MAX_LINES)]
    high = repeated.first_is_high
    names = [_REACH if reached[row] is not None else _BELOW if high[row] else _NOTHING for row in range(n_ids)]
    traces = [_curve(repeated, row, names[row]) for row in reversed(drawn)]
    for seen in {trace.name: trace for trace in traces}.values():
        seen.showlegend = True
    n_reached = sum(value is not None for value in reached)
    if not any(high):
        about = "the first token itself has no high norm here, so there is nothing to reach"
    else:
        about = f"{n_reached} of {count(n_ids, 'token')} reach {percent(SHARES[0])}"
        if n_reached:
            about += f", the earliest after {min(value for value in reached if value is not None)} repeats"
    if len(drawn) < n_ids:
        about += f"; {len(drawn)} are drawn"
    figure = frame(
        traces,
        title=f"What repetition does to a token in {repeated.model_name}",
        subtitle=f"norm after block {repeated.block}; {about}",
        x="n-th time in a row (log scale)",
        y="of the first token's norm (log scale)",
    )
    axis = log_axis(torch.cat([ratios.flatten(), torch.tensor([SHARES[0], 1.2])]))
    figure.update_yaxes(**axis)
    figure.update_yaxes(ticktext=[f"{100 * value:g} %" for value in axis["tickvals"]])
    ticks = [2**power for power in range(int(math.log2(n)) + 1)]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=list(map(str, ticks)), range=[-0.03, math.log10(n) + 0.03])
    level(figure, 1.0, "first token", dash="dash")
    _name_ends(figure, repeated, drawn[:MAX_NAMES], axis["range"])
    figure.update_layout(margin_r=110)
    return figure


def _curve(repeated: RepeatedTokens, row: int, name: str) -> go.Scatter:
    token = plotly_text(visible(repeated.texts[row]), 40)
    return go.Scatter(
        x=list(range(1, repeated.norms.shape[1] + 1)),
        y=repeated.ratios[row].numpy(),
        customdata=repeated.norms[row].numpy(),
        mode="lines",
        line={"color": VERMILLION if name == _REACH else MUTED, "width": 1.8},
        name=name,
        legendgroup=name,
        showlegend=False,
        hovertemplate=f"<b>{token}</b> (id {repeated.ids[row]}), time %{{x}}: norm %{{customdata:.4g}}"
        "<br>%{y:.3g} × the first token's<extra></extra>",
    )


def _name_ends(figure: go.Figure, repeated: RepeatedTokens, rows: list[int], span: list[float]) -> None:
    """Names lines where they end on the right, those that leave room for it."""
    height = span[1] - span[0]
    taken = [0.0]  # where the first token's line is named
    for row in rows:
        at = math.log10(max(float(repeated.ratios[row, -1]), 10 ** span[0]))
        if all(abs(at - other) > 0.065 * height for other in taken):
            taken.append(at)
            text = plotly_text(visible(repeated.texts[row]), 12)
            figure.add_annotation(x=1, xref="paper", xanchor="left", y=at, text=text, showarrow=False, font={"size": 11})
