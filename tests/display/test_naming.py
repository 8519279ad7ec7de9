"""Names beside points never cover each other, and stay inside."""

import plotly.graph_objects as go
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens.display.naming import HEIGHT, WIDTH, Named, name_points

UNIT = (0.0, 1.0)
points = st.lists(st.builds(Named, st.floats(0, 1), st.floats(0, 1), st.text("abc<", min_size=1, max_size=12)), max_size=25)


def boxes(figure):
    """Where each name is, in pixels from the upper left."""
    found = []
    for note in figure.layout.annotations:
        width = 7 * len(note.text.replace("&lt;", "<"))
        x, y = note.x * WIDTH + note.ax, (1 - note.y) * HEIGHT + note.ay
        found.append((x - width / 2, y - 7, x + width / 2, y + 7))
    return found


@given(points)
def test_names_do_not_cover_each_other(named):
    figure = go.Figure()
    shown = name_points(figure, named, x=UNIT, y=UNIT)
    placed = boxes(figure)
    assert len(placed) == shown
    assert bool(placed) == bool(named)  # the first has room wherever it is
    for i, (left, top, right, bottom) in enumerate(placed):
        assert left >= 0
        assert top >= 0
        assert right <= WIDTH
        assert bottom <= HEIGHT
        for other in placed[:i]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_names_keep_clear_of_a_crowd():
    figure = go.Figure()
    xs, ys = (
        torch.rand(400, generator=torch.Generator().manual_seed(0)),
        torch.rand(400, generator=torch.Generator().manual_seed(1)),
    )
    ys = 0.5 + 0.04 * ys
    name_points(figure, [Named(0.5, 0.52, "token")], x=UNIT, y=UNIT, crowd=[(xs, ys)])
    ((left, top, right, bottom),) = boxes(figure)
    px, py = xs * WIDTH, (1 - ys) * HEIGHT
    assert not bool(((px > left) & (px < right) & (py > top) & (py < bottom)).any())


def test_points_that_are_nowhere_have_no_name():
    figure = go.Figure()
    assert name_points(figure, [Named(0.5, float("-inf"), "zero"), Named(0.5, 0.5, "here")], x=UNIT, y=UNIT) == 1
    assert [note.text for note in figure.layout.annotations] == ["here"]
