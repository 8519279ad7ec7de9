"""Scans of a vocabulary: every token id in one place, and several places side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.display.labels import plotly_text, visible
from sd_lens.display.naming import Named, name_points
from sd_lens.display.norm_figures import log_axis
from sd_lens.display.style import INK, PURPLE, SKY, VERMILLION, count, frame, level, percent
from sd_lens.tracing.vocabulary_scan import VocabularyScan

MAX_POINTS = 2000
"""So many ids of a kind are drawn at most: those with the most extreme values, and evenly spread ones of the others."""
MAX_IN_COLUMN = 1200
"""The same where several scans stand in columns."""
MAX_EXTREME = 30
"""So many ids with the largest values, and with the smallest. More would look like a crowd of their own."""
MAX_RANDOM = 400
PLACES = {"initial": "alone at position 0", "no_attention": "alone, without attention", "second": "after a random other id"}
UNTRAINED = "#DDE1E5"


def scan_scatter(scan: VocabularyScan, k: int = 10, *, x: Literal["id", "coefficient"] = "id") -> go.Figure:
    """The norm of every token id, random embeddings beside them, the largest named.

    Args:
        scan: From `scan_vocabulary`; of a large vocabulary a sample is drawn that leaves out nothing extreme.
        k: How many ids are named, as far as there is room.
        x: What they are drawn over: ``"id"``, or ``"coefficient"``, what the block's FFN is set off by.

    Raises:
        ValueError: ``k`` is negative, or there is nothing of this name to draw over.
    """
    _require_names(k)
    if x not in ("id", "coefficient"):
        raise ValueError(f"x: got {x!r}; allowed: 'id', 'coefficient'")
    if x == "coefficient" and bool(scan.coefficients.isnan().all()):
        raise ValueError("x: got 'coefficient' of a scan without coefficients (see its notes); allowed: 'id'")
    across = (scan.ids if x == "id" else scan.coefficients).double()
    drawn_by = [scan.norms] if x == "id" else [scan.norms, across]
    traces: list[go.Scatter | go.Box] = []
    places, heights = [], [scan.norms, torch.tensor([scan.reference, scan.min_ratio * scan.reference])]
    for chosen, name, colour in _kinds(scan):
        drawn, n = _sample(chosen, *drawn_by, most=MAX_POINTS), int(chosen.sum())
        places.append(drawn)
        if n:
            size = 7 if colour == VERMILLION and n < MAX_POINTS // 2 else 4
            traces.append(_dots(scan, drawn, across[drawn], scan.norms[drawn], f"{name} ({n:,})", colour, size))
    if scan.control is not None:
        heights.append(scan.control)
        traces.append(_beside(scan.control))
    shown_ids = torch.cat(places)
    n_drawn = len(shown_ids)
    shown = "all are drawn" if n_drawn == len(scan.ids) else f"{n_drawn:,} are drawn, among them the extreme ones"
    random = "" if scan.control is None else f", {percent(scan.control_share)} of random embeddings"
    figure = frame(
        traces,
        title=f"{count(len(scan.ids), 'token id')} of {scan.model_name}, each {PLACES[scan.pathway]}",
        subtitle=f"{_exploding(scan)} explode{random}{'' if scan.explosion_found else '; the prompts show no explosion'}; {shown}",
        x="token id" if x == "id" else f"coefficient of the FFN's input in block {scan.block} (no unit)",
        y=f"norm after block {scan.block} (log scale)",
    )
    axis, span = log_axis(torch.cat(heights)), _span(across)
    figure.update_yaxes(**axis)
    figure.update_xaxes(range=span, showgrid=x != "id", domain=[0, 1 if scan.control is None else 0.88])
    figure.update_layout(height=480)
    if scan.control is not None:
        figure.update_layout(xaxis2={"domain": [0.9, 1], "anchor": "y", "showgrid": False, "ticks": ""})
    _levels(figure, scan.reference, scan.min_ratio)
    points = [Named(float(across[place]), float(scan.norms[place].log10()), text) for place, text in _first(scan, k)]
    name_points(figure, points, x=span, y=tuple(axis["range"]), crowd=[(across[shown_ids], scan.norms[shown_ids].log10())])
    return figure


def scan_pathways(scans: Iterable[VocabularyScan], k: int = 4) -> go.Figure:
    """Several scans of a model in columns: how far the ids' norms reach in each place, the largest named.

    Args:
        scans: From `scan_vocabulary`, of one model.
        k: How many ids are named in each column, as far as there is room.

    Raises:
        ValueError: ``k`` is negative, there is no scan, or they are of different models.
    """
    _require_names(k)
    columns = list(scans)
    kinds = sorted({(scan.model_name, scan.min_ratio) for scan in columns})
    if len(kinds) != 1:
        of = ", ".join(f"{name} with a ratio of {ratio:g}" for name, ratio in kinds) or "none"
        raise ValueError(f"scans: got {of}; allowed: one or more scans of one model with one least ratio")
    model, min_ratio = kinds[0]
    traces: list[go.Scatter] = []
    points: list[Named] = []
    crowd: list[tuple[Tensor, Tensor]] = []
    ratios, left_out = [torch.tensor([1.0, min_ratio])], 0
    for number, scan in enumerate(columns):
        at = number - 0.12 + 0.5 * _jitter(len(scan.ids))
        for chosen, name, colour in _kinds(scan)[1:]:
            drawn = _sample(chosen, scan.norms, most=MAX_IN_COLUMN)
            crowd.append((at[drawn], scan.ratios[drawn].log10()))
            left_out += int(chosen.sum()) - len(drawn)
            size = 7 if colour == VERMILLION and len(drawn) < MAX_IN_COLUMN // 2 else 4
            if len(drawn):
                traces.append(_dots(scan, drawn, at[drawn], scan.ratios[drawn], name, colour, size))
        if scan.control is not None:
            ratios.append(scan.control / scan.reference)
            thinned = _thinned(ratios[-1], MAX_RANDOM)
            traces.append(
                go.Scatter(
                    x=(number + 0.33 + 0.16 * _jitter(len(thinned))).numpy(),
                    y=thinned.numpy(),
                    mode="markers",
                    marker={"color": PURPLE, "size": 3, "opacity": 0.6},
                    name="random embeddings",
                    hovertemplate="a random embedding: %{y:.3g} × the ordinary norm<extra></extra>",
                )
            )
        ratios.append(scan.ratios)
        points += [Named(float(at[place]), float(scan.ratios[place].log10()), text) for place, text in _first(scan, k)]
    sampled = f"; {left_out:,} ordinary dots are left out" if left_out else ""
    for trace in traces:
        trace.update(legendgroup=trace.name, showlegend=False)
    for seen in {trace.name: trace for trace in reversed(traces)}.values():
        seen.showlegend = True
    figure = frame(
        traces,
        title=f"Which token ids of {model} explode where",
        subtitle=f"every dot is a token id, in one and the same place with all others; the largest are named{sampled}",
        x="",
        y="× the ordinary norm (log scale)",
    )
    axis, span = log_axis(torch.cat(ratios)), (-0.5, len(columns) - 0.5)
    labels = [f"<b>{PLACES[scan.pathway]}</b><br>{_exploding(scan)}<br>after block {scan.block}" for scan in columns]
    figure.update_yaxes(**axis)
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=labels, range=span, showgrid=False, ticks="")
    figure.update_layout(height=500)
    _levels(figure, 1.0, min_ratio)
    name_points(figure, points, x=span, y=tuple(axis["range"]), crowd=crowd, width=700.0)
    return figure


def _span(values: Float[Tensor, "id"]) -> tuple[float, float]:
    """The range of an axis, with a margin."""
    finite = values[values.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    margin = 0.02 * (high - low) or 1.0
    return low - margin, high + margin


def _kinds(scan: VocabularyScan) -> list[tuple[Bool[Tensor, "id"], str, str]]:
    """Which ids are drawn alike, their name and colour; the last on top."""
    exploding = scan.trained & (scan.ratios >= scan.min_ratio)
    return [
        (~scan.trained, "untrained ids", UNTRAINED),
        (scan.trained & ~exploding, "other ids", SKY),
        (exploding, f"ids with {scan.min_ratio:g} × the ordinary norm or more", VERMILLION),
    ]


def _dots(
    scan: VocabularyScan,
    places: Int[Tensor, "drawn"],
    x: Float[Tensor, "drawn"],
    y: Float[Tensor, "drawn"],
    name: str,
    colour: str,
    size: int,
) -> go.Scatter:
    """Some of the ids as dots, each with all that the scan knows of it."""
    columns = [scan.ids, scan.norms, scan.ratios, scan.coefficients]
    hover = "<b>%{text}</b> (id %{customdata[0]})<br>norm %{customdata[1]:.4g}, %{customdata[2]:.3g} × the ordinary"
    if not bool(scan.coefficients.isnan().all()):
        hover += "<br>coefficient %{customdata[3]:.3g}"
    texts = [plotly_text(visible(text), 40) for text in scan.texts(scan.ids[places].tolist())]
    if scan.others is not None:
        others = scan.texts(scan.others[places].tolist())
        texts = [f"{text}</b> after <b>{plotly_text(visible(other), 40)}" for text, other in zip(texts, others, strict=True)]
    return go.Scatter(
        x=x.numpy(),
        y=y.numpy(),
        text=texts,
        customdata=torch.stack([column[places].float() for column in columns], dim=1).numpy(),
        mode="markers",
        marker={"color": colour, "size": size, "opacity": 1 if size > 4 else 0.75},
        name=name,
        hovertemplate=f"{hover}<extra></extra>",
    )


def _beside(control: Float[Tensor, "sample"]) -> go.Box:
    """Norms of random embeddings as a box with its points, in a narrow panel of its own."""
    drawn = _thinned(control, MAX_RANDOM)
    return go.Box(
        y=drawn.numpy(),
        x=["random<br>embeddings"] * len(drawn),
        xaxis="x2",
        boxpoints="all",
        jitter=0.8,
        pointpos=0,
        line={"color": INK, "width": 1},
        fillcolor="rgba(0,0,0,0)",
        marker={"color": PURPLE, "size": 3, "opacity": 0.6},
        name="random embeddings",
        showlegend=False,
        hoveron="points",
        hovertemplate="a random embedding: norm %{y:.4g}<extra></extra>",
    )


def _sample(chosen: Bool[Tensor, "id"], *values: Float[Tensor, "id"], most: int) -> Int[Tensor, "drawn"]:
    """At most so many of the places chosen, in their order: the extreme ones of each value, and evenly spread ones of the others."""
    places = chosen.nonzero().flatten()
    if len(places) <= most:
        return places
    taken = torch.zeros(len(places), dtype=torch.bool)
    for value in values:
        order = value[places].nan_to_num(nan=0.0).argsort(stable=True)
        taken[order[:MAX_EXTREME]] = taken[order[-MAX_EXTREME:]] = True
    rest = (~taken).nonzero().flatten()
    taken[rest[torch.linspace(0, len(rest) - 1, most - int(taken.sum())).round().long()]] = True
    return places[taken]


def _thinned(values: Float[Tensor, "sample"], most: int) -> Float[Tensor, "drawn"]:
    """At most so many values with the same quantiles, smallest first."""
    ranks = torch.linspace(0, len(values) - 1, min(most, len(values))).round().long()
    return values.sort().values[ranks]


def _first(scan: VocabularyScan, k: int) -> list[tuple[int, str]]:
    """Places and texts of the trained ids with the largest norms."""
    trained = scan.trained.nonzero().flatten()
    places = trained[scan.norms[trained].argsort(descending=True, stable=True)][:k]
    return list(zip(places.tolist(), scan.texts(scan.ids[places].tolist()), strict=True))


def _jitter(n: int) -> Float[Tensor, "n"]:
    """Offsets between −0.5 and 0.5 that fill the width evenly, however many there are (multiples of the golden ratio)."""
    return (torch.arange(n, dtype=torch.float64) * 0.6180339887498949) % 1 - 0.5


def _exploding(scan: VocabularyScan) -> str:
    n_trained = int(scan.trained.sum())
    if not n_trained:
        return "none of 0 trained ids"
    n = round(scan.share_exploding * n_trained)
    return f"{n:,} of {n_trained:,} trained ids ({percent(scan.share_exploding)})"


def _levels(figure: go.Figure, reference: float, min_ratio: float) -> None:
    """Lines at the norm of ordinary tokens and at what counts as high."""
    level(figure, reference, "ordinary<br>tokens", dash="dot")
    level(figure, min_ratio * reference, f"{min_ratio:g} ×<br>ordinary", dash="dash")
    figure.update_layout(margin_r=72)


def _require_names(k: int) -> None:
    if k < 0:
        raise ValueError(f"k: got {k}; allowed: 0 or more")
