"""What each block's linear map does to the defect direction: angles and eigenvalues."""

from __future__ import annotations

import plotly.graph_objects as go

from sd_lens.display.style import INK, PART_COLOURS, PART_NAMES, block_axis, frame, shade_blocks
from sd_lens.linear.directions import BlockDirections
from sd_lens.linear.parts import NEAR, PARTS, BlockDirection
from sd_lens.tracing.defects import Defects

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
        subtitle=f"angle to {directions.reference_name}; 90° is unrelated",
        x="block",
        y="angle (degrees)",
    )
    _finish(figure, directions, defects)
    figure.update_yaxes(range=[-4, 95], tickmode="linear", dtick=15)
    return figure


def singular_values(directions: BlockDirections, defects: Defects | None = None) -> go.Figure:
    """The largest and the second largest singular value of each part of each block.

    Args:
        directions: From `block_directions`.
        defects: Their explosion and decay blocks are marked.
    """
    traces = []
    for part in PARTS:
        rows = _rows(directions, part)
        x = [row.block + _BESIDE[part] for row in rows]
        colour = PART_COLOURS[part]
        gaps = go.Scatter(  # one stroke per block from the second to the first
            x=[value for at in x for value in (at, at, None)],
            y=[value for row in rows for value in (row.sigma2, row.sigma1, None)],
            mode="lines",
            line={"color": colour, "width": 2},
            legendgroup=part,
            showlegend=False,
            hoverinfo="skip",
        )
        traces += [
            gaps,
            go.Scatter(
                x=x,
                y=[row.sigma1 for row in rows],
                name=PART_NAMES[part],
                legendgroup=part,
                mode="markers",
                marker={"color": colour, "symbol": _SYMBOLS[part], "size": 9},
                customdata=[[row.block, row.sigma2, row.gap] for row in rows],
                hovertemplate=f"block %{{customdata[0]}}, {PART_NAMES[part]}: %{{y:.4g}}, second %{{customdata[1]:.4g}}"
                "<br>%{customdata[2]:.3g} times the second<extra></extra>",
            ),
        ]
    figure = frame(
        traces,
        title=f"Singular values of the blocks of {directions.model_name}",
        subtitle="the largest, and a stroke down to the second: where it is long, the block stretches one direction far more than any other",
        x="block",
        y="singular value",
    )
    _finish(figure, directions, defects)
    figure.update_yaxes(type="log")
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
        hollow = [row.eigenvector_angle_deg > NEAR or not row.converged for row in rows]
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
        subtitle=f"of each map without its identity, eigenvector nearest {directions.reference_name}; hollow: more than {NEAR:g}° away",
        x="block",
        y="eigenvalue, real part",
    )
    figure.add_hline(y=0, line={"color": INK, "width": 1}, layer="below")
    _finish(figure, directions, defects)
    return figure


def _rows(directions: BlockDirections, part: str) -> list[BlockDirection]:
    return [row for row in directions.rows if row.part == part]


def _finish(figure: go.Figure, directions: BlockDirections, defects: Defects | None) -> None:
    if defects is not None:
        shade_blocks(figure, defects.explosion_blocks, defects.decay_blocks)
    block_axis(figure, max(directions.n_blocks, 1 + max(row.block for row in directions.rows)))
