"""Norms of one prompt's tokens over the blocks, as lines and as a heat map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.display.labels import plotly_text, visible
from sd_lens.display.style import INK, MUTED, ORANGE, VERMILLION, frame, tick_step
from sd_lens.tracing.trace import MIN_RATIO, NormTrace

MAX_MUTED = 60
"""So many ordinary tokens are drawn as lines; more would be a grey area and a slow page."""
MAX_TICKS = 64
"""So many tokens are named below a heat map."""


@dataclass(frozen=True)
class _Prompt:
    """One prompt's part of a trace, ready to draw."""

    norms: Float[Tensor, "point pos"]
    ratios: Float[Tensor, "point pos"]
    high: Bool[Tensor, "pos"]
    tokens: list[str]

    @classmethod
    def of(cls, trace: NormTrace, prompt: int, min_ratio: float) -> _Prompt:
        norms = trace.of_prompt(prompt)
        chosen = trace.prompt == prompt
        tokens = [visible(text) for text in trace.texts_of(prompt)]
        return cls(norms, trace.ratios[:, chosen], trace.high_norm(min_ratio)[:, chosen].any(0), tokens)


def point_labels(trace: NormTrace) -> list[str]:
    """Names of a trace's points: the embedding, then the blocks."""
    return ["embed", *map(str, range(len(trace.norms) - 1))]


def _numbered(labels: list[str]) -> list[str]:
    """The labels that there is room for on an axis, beside the embedding's, which is a word."""
    step = tick_step(2 * (len(labels) - 1))
    return labels[:1] + labels[1 if step == 1 else 1 + step :: step]


def norm_lines(trace: NormTrace, prompt: int = 0, *, min_ratio: float = MIN_RATIO) -> go.Figure:
    """Norms over blocks, one line per token of a prompt, on a log scale.

    Args:
        trace: The trace.
        prompt: Which of its prompts.
        min_ratio: Tokens with this multiple of the median stand out.

    Returns:
        The figure; of a long prompt it shows the high-norm tokens and some of the others, and says so.
    """
    part = _Prompt.of(trace, prompt, min_ratio)
    labels = point_labels(trace)
    high = part.high.nonzero().flatten().tolist()
    others = _some((~part.high).nonzero().flatten().tolist(), MAX_MUTED)
    traces = [_line(part, labels, pos, MUTED, "other tokens") for pos in others]
    traces.append(_reference(trace, labels))
    initial, later = [p for p in high if p == 0], [p for p in high if p > 0]
    for group, colour, name in ((later, ORANGE, "later high-norm tokens"), (initial, VERMILLION, "initial high-norm token")):
        traces += [_line(part, labels, pos, colour, name) for pos in group]
    for seen in {trace.name: trace for trace in reversed(traces)}.values():
        seen.showlegend = True
    left_out = len(part.tokens) - len(high) - len(others)
    shown = f"{len(others)} of {len(others) + left_out} other tokens are drawn" if left_out else "all tokens are drawn"
    figure = frame(
        traces,
        title=f"Norms of prompt {prompt} in {trace.model_name}",
        subtitle=f"{len(high)} high-norm token{'s' * (len(high) != 1)}; {shown}",
        x="after block",
        y="norm (log scale)",
    )
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=labels, tickvals=_numbered(labels), tickangle=0, showgrid=False
    )
    figure.update_yaxes(**log_axis(part.norms))
    for group, shift in ((initial, 12), (later, -12)):
        _name_strongest(figure, part, group, shift)
    if not high:
        _name_strongest(figure, part, list(range(len(part.tokens))), 12)
    return figure


def _some(items: list[int], most: int) -> list[int]:
    """At most so many, evenly spread from the first to the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _line(part: _Prompt, labels: list[str], pos: int, colour: str, name: str) -> go.Scatter:
    token = plotly_text(part.tokens[pos], 40)
    return go.Scatter(
        x=labels,
        y=part.norms[:, pos].tolist(),
        customdata=part.ratios[:, pos].tolist(),
        mode="lines",
        line={"color": colour, "width": 1 if colour == MUTED else 2},
        opacity=0.7 if colour == MUTED else 1.0,
        name=name,
        legendgroup=name,
        showlegend=False,
        hovertemplate=f"<b>{token}</b> at position {pos}<br>after block %{{x}}: norm %{{y:.4g}}<br>%{{customdata:.3g}} × median<extra></extra>",
    )


def _reference(trace: NormTrace, labels: list[str]) -> go.Scatter:
    return go.Scatter(
        x=labels,
        y=trace.reference.tolist(),
        mode="lines",
        line={"color": INK, "width": 1.5, "dash": "dash"},
        name="median",
        showlegend=False,
        hovertemplate="median of all prompts' tokens but the first<br>after block %{x}: %{y:.4g}<extra></extra>",
    )


def _name_strongest(figure: go.Figure, part: _Prompt, positions: list[int], shift: int) -> None:
    """Writes the token that stands out most, after a block, where it does."""
    if not positions:
        return
    ratios = part.ratios[1:, positions].nan_to_num(nan=0.0, posinf=0.0)
    block, column = divmod(int(ratios.argmax()), len(positions))
    point, pos = block + 1, positions[column]
    norm = float(part.norms[point, pos])
    if ratios[block, column] <= 0:
        return
    text = f"<b>{plotly_text(part.tokens[pos], 16)}</b> at {pos}"
    figure.add_annotation(
        x=point, y=math.log10(norm), text=text, showarrow=False, yshift=shift, font={"size": 12}, bgcolor="rgba(255,255,255,0.75)"
    )


def log_axis(norms: Tensor) -> dict[str, Any]:
    """A log axis that covers all norms with a margin, and has ticks also where they span less than a decade."""
    logs = norms[norms.isfinite() & (norms > 0)].double().log10()
    low, high = (float(logs.min()), float(logs.max())) if len(logs) else (0.0, 1.0)
    margin = 0.06 * max(high - low, 0.1)
    values = log_ticks(low, high)
    return {
        "type": "log",
        "range": [low - margin, high + 2 * margin],  # more above, where tokens are named
        "tickvals": values,
        "ticktext": [f"{value:g}" for value in values],
    }


def log_ticks(low: float, high: float) -> list[float]:
    """Round values from ``10**low`` to ``10**high``: powers of ten, and steps between them where these are few."""
    span = high - low
    steps = [1] if span > 3 else [1, 3] if span > 1.6 else [1, 2, 5] if span > 0.7 else [1, 1.5, 2, 3, 4, 5, 6, 8]
    stride = max(1, math.ceil(span / 9))
    powers = range(math.floor(low), math.ceil(high) + 1, stride)
    margin = 0.06 * max(span, 0.1)
    return [step * 10.0**p for p in powers for step in steps if low - margin <= math.log10(step) + p <= high + margin]


def norm_heatmap(trace: NormTrace, prompt: int = 0, *, min_ratio: float = MIN_RATIO) -> go.Figure:
    """Norms of a prompt's tokens after every block, as colours on a log scale.

    Args:
        trace: The trace.
        prompt: Which of its prompts.
        min_ratio: Tokens with this multiple of the median are named below in any case.

    Returns:
        The figure, tokens in columns and blocks in rows from the bottom up.
    """
    part = _Prompt.of(trace, prompt, min_ratio)
    labels = point_labels(trace)
    logs = torch.where(part.norms > 0, part.norms.double(), torch.nan).log10()
    finite = logs[logs.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    ticks = log_ticks(low, high)
    heatmap = go.Heatmap(
        x=list(range(len(part.tokens))),
        y=labels,
        z=logs.numpy(),
        customdata=_hover(part),
        colorscale="Cividis",
        zmin=low,
        zmax=max(high, low + 1e-6),
        colorbar={
            "title": {"text": "norm<br>(log)"},
            "tickvals": [math.log10(value) for value in ticks],
            "ticktext": [f"{value:g}" for value in ticks],
            "thickness": 14,
            "outlinewidth": 0,
        },
        hovertemplate="<b>%{customdata[0]}</b> at position %{x}<br>after block %{y}: norm %{customdata[1]}"
        "<br>%{customdata[2]} × median<extra></extra>",
    )
    named = _named(part)
    figure = frame(
        [heatmap],
        title=f"Norms of prompt {prompt} in {trace.model_name}",
        subtitle="every token after every block"
        + ("" if len(named) == len(part.tokens) else f"; {len(named)} of {len(part.tokens)} tokens are named"),
        x="token",
        y="after block",
    )
    texts = [plotly_text(part.tokens[pos], 12) for pos in named]
    figure.update_xaxes(
        tickvals=named, ticktext=texts, tickangle=-90 if len(named) > 8 else 0, showgrid=False, tickfont={"size": 11}
    )
    figure.update_yaxes(type="category", tickvals=_numbered(labels), showgrid=False)
    return figure


def _hover(part: _Prompt) -> np.ndarray:
    """Token, norm and ratio of every cell. Rounded text: it is a third of the size of the numbers."""
    tokens = np.array([plotly_text(token, 40) for token in part.tokens], dtype=object)
    cells = [
        [[token, f"{norm:.4g}", f"{ratio:.3g}"] for token, norm, ratio in zip(tokens, norms, ratios, strict=True)]
        for norms, ratios in zip(part.norms.tolist(), part.ratios.tolist(), strict=True)
    ]
    return np.array(cells, dtype=object)


def _named(part: _Prompt) -> list[int]:
    """Positions named below a heat map: all, or the high-norm tokens and some between them that do not touch these."""
    n_tokens = len(part.tokens)
    if n_tokens <= MAX_TICKS:
        return list(range(n_tokens))
    gap = math.ceil(n_tokens / MAX_TICKS)
    named: list[int] = []
    by_norm = part.norms.max(0).values.argsort(descending=True).tolist()
    for pos in [p for p in by_norm if part.high[p]] + list(range(0, n_tokens, gap)):
        if all(abs(pos - other) >= gap for other in named):
            named.append(pos)
    return sorted(named)
