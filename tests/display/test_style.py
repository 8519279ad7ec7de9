"""Numbers in sentences, and the layout of bars."""

import plotly.graph_objects as go
import pytest

from sd_lens.display.style import count, horizontal_bars, percent


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50 %"),
        (0.123, "12 %"),
        (0.0946, "9 %"),
        (0.0125, "1 %"),
        (0.00012, "0.01 %"),
        (0.9996, "99.96 %"),
        (1.25, "125 %"),
        (float("nan"), "–"),
    ],
)
def test_few_is_told_from_none_and_most_from_all(share, text):
    assert percent(share) == text


def test_things_are_counted_in_the_singular_and_the_plural():
    assert [count(n, "token id") for n in (0, 1, 256_000)] == ["0 token ids", "1 token id", "256,000 token ids"]


@pytest.mark.parametrize(
    ("values", "left", "right"),
    [([3.0, 1.0], False, True), ([-3.0, -1.0], True, False), ([3.0, -1.0], True, True), ([3.0, -0.001], False, True)],
)
def test_bars_leave_room_for_the_numbers_beside_them(values, left, right):
    figure = go.Figure(go.Bar(x=values, y=["a", "b"], orientation="h"))
    horizontal_bars(figure, ["a", "b"], values)
    low, high = figure.layout.xaxis.range
    least, most = min(0.0, *values), max(0.0, *values)
    assert (low <= least - 0.15 * (most - least)) == left
    assert (high >= most + 0.15 * (most - least)) == right
    assert low <= least
    assert high >= most
    assert figure.layout.yaxis.range == (1.5, -0.5)
