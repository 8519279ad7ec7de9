"""Angles between the signatures of models, in the order of their lineage trees, which stand above."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from sd_lens.applications.distances import SignatureDistances
from sd_lens.applications.trees import LineageTree
from sd_lens.display.labels import plotly_text
from sd_lens.display.style import BLUE, INK, MUTED, count, frame, say_instead

MAX_NUMBERS = 12
"""Of so many models the angles are written into the cells."""
_SCALE = [[0.0, BLUE], [0.5, "#9CC4DE"], [1.0, "#F7F7F7"]]
_NOTHING = "#DDE1E5"
_TREE, _GAP, _CELL = 150, 16, 44  # pixels


def lineage_map(distances: SignatureDistances) -> go.Figure:
    """A map of angles, dark where models are of one lineage, and above it what is nearest to what.

    Args:
        distances: From `signature_distances`.

    Returns:
        The figure. Models of one width stand together; grey cells cannot be compared.
    """
    order = distances.order
    n = len(order)
    chosen = list(order)
    angles = distances.angles[chosen][:, chosen].numpy()
    texts = [[_cell(angles[row, column]) for column in range(n)] for row in range(n)]
    cells = go.Heatmap(
        x=list(range(n)),
        y=list(range(n)),
        z=angles,
        zmin=0.0,
        zmax=90.0,
        colorscale=_SCALE,
        customdata=_hover(distances, chosen),
        text=texts if n <= MAX_NUMBERS else None,
        texttemplate="%{text}" if n <= MAX_NUMBERS else None,
        textfont={"size": 11},
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=True,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "degrees"}, "thickness": 14, "outlinewidth": 0, "tickvals": [0, 15, 30, 45, 60, 75, 90]},
    )
    families = len(distances.families)
    without = sum(not one.found for one in distances.signatures)
    about = f"angles between directions of high-norm tokens; {families} {'family' if families == 1 else 'families'}"
    figure = frame(
        [cells],
        title=f"Lineage of {count(n, 'model')}",
        subtitle=about + (f", {count(without, 'model')} without a defect" if without else "") + "; grey: cannot be compared",
        x="",
        y="",
    )
    names = [plotly_text(distances.names[number], 32) for number in order]
    side = _CELL * max(n, 3)
    total = side + _GAP + _TREE
    ticks = {"tickvals": list(range(n)), "ticktext": names, "showgrid": False, "ticks": "", "zeroline": False}
    figure.update_layout(
        xaxis={**ticks, "range": [-0.5, n - 0.5], "tickangle": -45 if n > 3 else 0, "anchor": "y"},
        yaxis={**ticks, "range": [n - 0.5, -0.5], "domain": [0.0, side / total], "title": None},
        yaxis2={
            "domain": [1 - _TREE / total, 1.0],
            "range": [-2, 93],
            "tickvals": [0, 30, 60, 90],
            "title": {"text": "mean angle (degrees)"},
            "anchor": "x",
        },
        height=total + 210,
    )
    if np.isnan(angles).any():  # below the cells: what has no angle shows it
        figure.add_shape(
            type="rect",
            x0=-0.5,
            x1=n - 0.5,
            y0=-0.5,
            y1=n - 0.5,
            xref="x",
            yref="y",
            fillcolor=_NOTHING,
            line_width=0,
            layer="below",
        )
    at = {number: place for place, number in enumerate(order)}
    for tree in distances.trees:
        figure.add_traces(_branches(tree, at, distances.names))
    if not distances.trees:
        say_instead(figure, "no defect was found in any of them")
    return figure


def _branches(tree: LineageTree, at: dict[int, int], names: tuple[str, ...]) -> list[go.Scatter]:
    """One bracket per merge, from its branches up to its mean angle and across."""
    place = [(float(at[member]), 0.0) for member in tree.members]
    held = [[member] for member in tree.members]
    traces = []
    for left, right, angle, _ in tree.merges.tolist():
        (x0, y0), (x1, y1) = place[int(left)], place[int(right)]
        members = held[int(left)] + held[int(right)]
        place.append(((x0 + x1) / 2, angle))
        held.append(members)
        listed = ", ".join(names[member] for member in sorted(members, key=at.__getitem__))
        traces.append(
            go.Scatter(
                x=[x0, x0, x1, x1],
                y=[y0, angle, angle, y1],
                yaxis="y2",
                mode="lines",
                line={"color": INK, "width": 1.6},
                showlegend=False,
                text=[f"{plotly_text(listed, 120)}<br>{angle:.1f}° apart on average"] * 4,
                hoverinfo="text",
            )
        )
    if not traces:
        x, _ = place[0]
        traces.append(
            go.Scatter(x=[x, x], y=[0, 90], yaxis="y2", mode="lines", line={"color": MUTED}, hoverinfo="skip", showlegend=False)
        )
    return traces


def _cell(angle: float) -> str:
    return "–" if np.isnan(angle) else f"{angle:.0f}°"


def _hover(distances: SignatureDistances, order: list[int]) -> list[list[str]]:
    names = distances.names

    def text(row: int, column: int) -> str:
        one = distances.signatures[row]
        if row == column:
            return plotly_text(names[row]) + ("" if one.found else f"<br>{plotly_text(one.because)}")
        pair = distances.pair(names[row], names[column])
        head = f"{plotly_text(names[row])}, {plotly_text(names[column])}"
        if pair.because:
            return f"{head}<br>cannot be compared: {plotly_text(pair.because)}"
        chance = f"random directions: {pair.chance_mean_deg:.1f}° ± {pair.chance_std_deg:.1f}°"
        return f"{head}<br>{pair.angle_deg:.1f}°, {pair.verdict}<br>{chance}"

    return [[text(row, column) for column in order] for row in order]
