"""What each block's linear map does to the defect direction: angles and eigenvalues."""

from __future__ import annotations

import plotly.graph_objects as go

from sd_lens.display.style import INK, PART_COLOURS, PART_NAMES, block_axis, frame, shade_blocks
from sd_lens.linear.directions import PARTS, BlockDirection, BlockDirections
from sd_lens.tracing.defects import Defects

ALIGNED = 30.0
"""An eigenvector within so many degrees of the direction speaks about it; eigenvalues of others are drawn hollow."""

_SYMBOLS = {"attention": "circle", "ffn": "square", "block": "diamond"}
_BESIDE = {"attention": -0.2, "ffn": 0.0, "block": 0.2}  # a block's eigenvalues are often equal: side by side


def direction_angles(directions: BlockDirections, defects: Defects | None = None) -> go.Figure:
    """Angle of each block's leading left singular vector to the reference direction.

    Args:
        directions: From `block_directions`.
        defects: Their explosion and decay blocks are marked.
    """
    traces = []
    for part in reversed(PARTS):  # the block's line is wide and below: where one sublayer dominates, both stay visible
        rows = _rows(directions, part)
        traces.append(
            go.Scatter(
                x=[row.block for row in rows],
                y=[row.angle_deg for row in rows],
                name=PART_NAMES[part],
                mode="lines+markers",
                line={"color": PART_COLOURS[part], "width": 4 if part == "block" else 2},
                marker={"symbol": _SYMBOLS[part], "size": 11 if part == "block" else 7},
                customdata=[[row.sigma1, row.sigma2] for row in rows],
                hovertemplate=f"block %{{x}}, {PART_NAMES[part]}: %{{y:.1f}}°"
                "<br>singular values %{customdata[0]:.4g}, %{customdata[1]:.4g}<extra></extra>",
            )
        )
    figure = frame(
        traces,
        title=f"Leading left singular vectors of {directions.model_name}",
        subtitle=f"angle to {_reference(directions)}; 90° is unrelated",
        x="block",
        y="angle (degrees)",
    )
    _finish(figure, directions, defects)
    figure.update_yaxes(range=[-4, 95], tickmode="linear", dtick=15)
    return figure


def eigenvalues(directions: BlockDirections, defects: Defects | None = None) -> go.Figure:
    """Real part of each update map's eigenvalue whose eigenvector is nearest the reference direction.

    Args:
        directions: From `block_directions`.
        defects: Their explosion and decay blocks are marked.
    """
    traces = []
    for part in PARTS:
        rows = _rows(directions, part)
        hollow = [row.eigenvector_angle_deg > ALIGNED for row in rows]
        colour = PART_COLOURS[part]
        traces.append(
            go.Scatter(
                x=[row.block + _BESIDE[part] for row in rows],
                y=[row.eigenvalue.real for row in rows],
                name=PART_NAMES[part],
                mode="markers",
                marker={
                    "color": ["white" if empty else colour for empty in hollow],
                    "symbol": _SYMBOLS[part],
                    "size": 9,
                    "line": {"width": 1.8, "color": colour},
                },
                customdata=[[row.block, row.eigenvalue.imag, row.eigenvector_angle_deg, row.residual] for row in rows],
                hovertemplate=f"block %{{customdata[0]}}, {PART_NAMES[part]}: eigenvalue %{{y:.4g}} %{{customdata[1]:+.2g}}i"
                "<br>its eigenvector: %{customdata[2]:.1f}° away, residual %{customdata[3]:.1e}<extra></extra>",
            )
        )
    figure = frame(
        traces,
        title=f"Eigenvalues along the direction in {directions.model_name}",
        subtitle=f"of each map without its identity, eigenvector nearest {_reference(directions)}; hollow: more than {ALIGNED:g}° away",
        x="block",
        y="eigenvalue, real part",
    )
    figure.add_hline(y=0, line={"color": INK, "width": 1}, layer="below")
    _finish(figure, directions, defects)
    return figure


def _rows(directions: BlockDirections, part: str) -> list[BlockDirection]:
    return [row for row in directions.rows if row.part == part]


def _reference(directions: BlockDirections) -> str:
    source = directions.reference_source
    return "the direction of the high-norm tokens" if source == "given" else f"the leading left singular vector of {source}"


def _finish(figure: go.Figure, directions: BlockDirections, defects: Defects | None) -> None:
    if defects is not None:
        shade_blocks(figure, defects.explosion_blocks, defects.decay_blocks)
    block_axis(figure, 1 + max(row.block for row in directions.rows))
