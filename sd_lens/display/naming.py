"""Names beside points, where they cover neither each other nor more points than they must."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.display.labels import plotly_text, visible

MAX_NAME = 18
WIDTH, HEIGHT = 560.0, 260.0
"""Pixels that a plot is taken to have at least."""
_CHARACTER, _LINE = 7.5, 16.0  # pixels that a character is wide, and a name high
_REACHES = (12, 26, 42, 60, 80, 102)
_SIDES = ((1, 0), (-1, 0), (0.7, -0.7), (-0.7, -0.7), (0.7, 0.7), (-0.7, 0.7), (0, -1), (0, 1))
_DEAR = 3.0  # of the distance a name is moved away for each point it would cover


class Named(NamedTuple):
    """A point with its name.

    Attributes:
        x: Along its axis; on a log axis, the logarithm.
        y: Likewise.
        name: A token's text as it is.
    """

    x: float
    y: float
    name: str


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom

    def covers(self, x: Float[Tensor, "point"], y: Float[Tensor, "point"]) -> int:
        return int(((x > self.left - 3) & (x < self.right + 3) & (y > self.top - 3) & (y < self.bottom + 3)).sum())


def name_points(
    figure: go.Figure,
    points: Iterable[Named],
    *,
    x: tuple[float, float],
    y: tuple[float, float],
    crowd: Sequence[tuple[Float[Tensor, "_"], Float[Tensor, "_"]]] = (),
    width: float = WIDTH,
) -> int:
    """Writes names beside points, joined to them by a stroke.

    Args:
        figure: The figure.
        points: What to name, by importance.
        x: Range of the axis.
        y: Likewise.
        crowd: All that is drawn, as coordinates, which names should not hide.
        width: Pixels that the plot is wide at least.

    Returns:
        How many had room.
    """

    def across(value: Tensor) -> Tensor:
        return (value.double() - x[0]) / (x[1] - x[0]) * width

    def down(value: Tensor) -> Tensor:
        return (y[1] - value.double()) / (y[1] - y[0]) * HEIGHT

    xs = torch.cat([torch.empty(0, dtype=torch.float64), *(across(part) for part, _ in crowd)])
    ys = torch.cat([torch.empty(0, dtype=torch.float64), *(down(part) for _, part in crowd)])
    finite = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    spots = [(point, float(across(torch.tensor(point.x))), float(down(torch.tensor(point.y)))) for point in finite]
    taken = [_Box(left - 4, top - 4, left + 4, top + 4) for _, left, top in spots]
    named = 0
    for point, left, top in spots:
        text = visible(point.name)
        size = _CHARACTER * min(len(text), MAX_NAME) + 4
        free: list[tuple[float, _Box, float, float]] = []
        for reach, ax, ay in _offsets(size):
            box = _Box(left + ax - size / 2, top + ay - _LINE / 2, left + ax + size / 2, top + ay + _LINE / 2)
            inside = box.left >= 0 and box.top >= 0 and box.right <= width and box.bottom <= HEIGHT
            if inside and not any(box.meets(other) for other in taken):
                free.append((reach + _DEAR * box.covers(xs, ys), box, ax, ay))
        if not free:
            continue
        _, box, ax, ay = min(free, key=lambda place: place[0])
        taken.append(box)
        named += 1
        figure.add_annotation(
            x=point.x,
            y=point.y,
            ax=ax,
            ay=ay,
            text=plotly_text(text, MAX_NAME),
            arrowhead=0,
            arrowwidth=0.8,
            arrowcolor="#8A929A",
            standoff=4,
            font={"size": 12},
            bgcolor="rgba(255,255,255,0.8)",
            borderpad=1,
        )
    return named


def _offsets(size: float) -> Iterator[tuple[float, float, float]]:
    """Ways from a point to the middle of its name, and how long they are; the nearest places first."""
    for reach in _REACHES:
        for right, down in _SIDES:
            yield reach, right * reach + (size / 2) * ((right > 0) - (right < 0)), down * (reach + _LINE / 2)
