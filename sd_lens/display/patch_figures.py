"""What patching changes, over blocks and positions or heads, above what random displacements of the same length change."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.display.labels import plotly_text, visible
from sd_lens.display.style import BLUE, VERMILLION, count, frame, percent, say_instead, tick_step
from sd_lens.interventions.sweep import PatchSweep

MAX_TICKS = 64
"""So many positions are named below; of more, every second, third, ..."""
METRICS = {
    "peak_norm": "the largest norm",
    "sink_rate": "share of heads with a sink at position 0",
    "loss": "loss (nats per token)",
    "kl": "KL divergence from the clean run (nats per token)",
    "logit_diff": "logit difference",
}
_SIDES = {"trigger": "in what the FFN reads", "direction": "in the stream leaving the block"}
_VECTORS = {"trigger": "right", "direction": "left"}
_SCALE = [[0.0, BLUE], [0.5, "#F7F7F7"], [1.0, VERMILLION]]
_GAP = 0.14  # between the two maps, as a share of the height


def patch_heatmap(sweep: PatchSweep) -> go.Figure:
    """Effects of patches, blocks against positions or heads; below them those of random displacements, if there were any.

    Args:
        sweep: From `patch_sweep`.

    Returns:
        The figure. Both maps have the same colours: white is no effect.
    """
    finite = torch.cat([sweep.effect.flatten(), sweep.control_effect.flatten()])
    finite = finite[finite.isfinite()]
    largest = float(finite.abs().max()) if len(finite) else 0.0
    traces = [_map(sweep, sweep.effect, largest, "patched")]
    with_controls = sweep.n_controls > 0
    if with_controls:
        traces.append(_map(sweep, sweep.control_effect, largest, "random").update(yaxis="y2", showscale=False))
    figure = frame(
        traces,
        title=f"Patching the explosion subspace in {sweep.model_name}",
        subtitle=_about(sweep),
        x="head" if sweep.over == "head" else "token (corrupted ← clean, where they differ)",
        y="block",
    )
    names = _names(sweep)
    step = tick_step(len(names)) if sweep.over == "head" else math.ceil(len(names) / MAX_TICKS)
    shown = list(range(0, len(names), step))
    figure.update_xaxes(
        tickvals=shown,
        ticktext=[names[column] for column in shown],
        tickangle=-90 if sweep.over == "position" and len(names) > 8 else 0,
        showgrid=False,
        tickfont={"size": 11},
    )
    rows = list(map(str, sweep.blocks))
    axis = {"type": "category", "tickvals": rows[:: tick_step(2 * len(rows))], "showgrid": False}
    figure.update_layout(yaxis=axis)
    height = max(130, min(420, 26 * len(rows)))
    if with_controls:
        half = (1 - _GAP) / 2
        figure.update_layout(
            yaxis_domain=[1 - half, 1], yaxis2={**axis, "title": {"text": "block"}, "domain": [0, half]}, xaxis_anchor="y2"
        )
        over = f"mean of {count(sweep.n_controls, 'random displacement')} of the same length"
        for text, top in (("the subspace", 1.0), (over, half)):
            figure.add_annotation(
                text=text,
                x=0,
                xref="paper",
                xanchor="left",
                y=top,
                yref="paper",
                yanchor="bottom",
                showarrow=False,
                font={"size": 12},
            )
        height *= 2
    if not len(finite):
        say_instead(figure, "the metric is not a number")
    figure.update_layout(height=230 + height)
    return figure


def _map(sweep: PatchSweep, effect: Float[Tensor, "block index"], largest: float, name: str) -> go.Heatmap:
    return go.Heatmap(
        x=list(range(len(sweep.indices))),
        y=list(map(str, sweep.blocks)),
        z=effect.numpy(),
        customdata=_hover(sweep),
        colorscale=_SCALE,
        zmin=-largest or -1.0,
        zmax=largest or 1.0,
        name=name,
        colorbar={"title": {"text": "effect"}, "thickness": 14, "outlinewidth": 0},
        hovertemplate="<b>%{customdata[0]}</b><br>block %{y}: %{customdata[1]}<br>%{customdata[2]}<extra></extra>",
    )


def _hover(sweep: PatchSweep) -> np.ndarray:
    """Where every cell is, what it does, and what its controls do, as text."""
    places = [f"{sweep.over} {index}" for index in sweep.indices]
    if sweep.over == "position":
        places = [f"{name} at position {index}" for name, index in zip(_names(sweep, 40), sweep.indices, strict=True)]
    numbers = torch.stack([sweep.values, sweep.effect, sweep.recovered, sweep.control_effect, sweep.control_std, sweep.z], dim=-1)
    return np.array(
        [[[place, *_cell(cell)] for place, cell in zip(places, row, strict=True)] for row in numbers.tolist()], dtype=object
    )


def _cell(cell: list[float]) -> tuple[str, str]:
    value, effect, recovered, control, spread, z = cell
    what = (
        f"{value:.4g} ({effect:+.3g}"
        + ("" if math.isnan(recovered) else f", {percent_of(recovered)} of the way to the clean run")
        + ")"
    )
    if math.isnan(control):
        return what, "no controls"
    against = f"random: {control:+.3g}" + ("" if math.isnan(spread) else f" ± {spread:.2g}")
    return what, against + ("" if math.isnan(z) else f", {abs(z):.1f} standard deviations away")


def percent_of(share: float) -> str:
    """A share that may be negative or more than the whole: ``-12 %``, ``104 %``."""
    return percent(share) if 0 <= share <= 1 else f"{100 * share:.0f} %"


def _names(sweep: PatchSweep, limit: int = 14) -> list[str]:
    """Columns by name: heads by number; positions by their tokens where all prompts have the same, else by number."""
    if sweep.over == "head":
        return list(map(str, sweep.indices))
    return [
        str(index) if old is None or new is None else _token(old, new, limit)
        for index, old, new in zip(sweep.indices, sweep.tokens, sweep.clean_tokens, strict=True)
    ]


def _token(corrupted: str, clean: str, limit: int) -> str:
    shown = plotly_text(visible(corrupted), limit)
    return shown if corrupted == clean else f"{shown} ← {plotly_text(visible(clean), limit)}"


def _about(sweep: PatchSweep) -> str:
    where = _SIDES[sweep.side] if sweep.over == "position" else f"heads along {_VECTORS[sweep.side]} singular vectors"
    whose = "each block's own" if sweep.subspace_block is None else f"that of block {sweep.subspace_block}"
    return (
        f"change of {METRICS.get(sweep.metric, sweep.metric)} (corrupted {sweep.corrupted:.4g}, clean {sweep.clean:.4g}), "
        f"{where}, rank {sweep.rank}, {whose}"
    )
