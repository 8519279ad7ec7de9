"""Interactive outputs of notebooks become pictures of themselves; PNGs with a palette show what they are given."""

import base64
import io

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from notebooks.publishing.browser import chromium
from notebooks.publishing.pictures import PLOTLY, SCALE, WIDTH, draw_outputs, small_png
from sd_lens.display.attention import attention_patterns

ORANGE, GREY = (242, 142, 43), (200, 200, 200)


def decoded(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_few_colours_are_kept_exactly_and_white_rows_at_the_end_are_cut():
    palette = np.array([ORANGE, GREY, (0, 0, 0), (1, 64, 128)], dtype=np.uint8)
    pixels = np.full((60, 7, 3), 255, dtype=np.uint8)
    pixels[:13] = palette[np.random.default_rng(0).integers(0, len(palette), (13, 7))]
    assert np.array_equal(decoded(small_png(encoded(pixels), margin=5)), pixels[:18])
    assert np.array_equal(decoded(small_png(encoded(pixels[:13]))), pixels[:13])


def test_many_colours_become_near_ones():
    red, green = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    pixels = np.stack([red, green, np.full_like(red, 30)], axis=2).astype(np.uint8)
    small = small_png(encoded(pixels))
    assert np.abs(decoded(small).astype(int) - pixels).max() <= 32  # half of 256 colours over this square are 23 apart
    assert len(small) < 70_000


@pytest.mark.skipif(chromium() is None, reason="needs Chromium (Debian package: chromium)")
def test_figures_and_views_become_pictures_and_the_rest_stays():
    small = go.Figure(go.Bar(x=[1, 2], y=["&lt;/script&gt;", "b"]), layout={"title": {"text": "a &lt;b&gt; title"}, "height": 300})
    points = np.linspace(0, 1, 2000)
    large = go.Figure(go.Scatter(x=points, y=points, mode="markers", marker={"color": "rgb(242,142,43)", "size": 9}))
    view = attention_patterns(torch.tril(torch.ones(4, 4))[None] / torch.arange(1, 5)[:, None], list("abcd"), ["L0H0"])
    table = {"text/html": "<table></table>", "text/plain": "table"}
    outputs = [
        {"output_type": "display_data", "data": {PLOTLY: small.to_plotly_json()}},
        {"output_type": "stream", "name": "stdout", "text": "printed"},
        {"output_type": "execute_result", "data": {"text/html": view._repr_html_(), "text/plain": repr(view)}},
        {"output_type": "execute_result", "data": dict(table)},
        {"output_type": "display_data", "data": {PLOTLY: {"data": [_plain(large)], "layout": {}}}},
    ]
    draw_outputs(outputs)

    svg = outputs[0]["data"]
    assert svg["text/plain"] == "Figure(a <b> title)"
    assert svg["image/svg+xml"].startswith("<svg")
    assert f'width="{WIDTH}" height="300"' in svg["image/svg+xml"]
    assert "&#60;/script&#62;" in svg["image/svg+xml"]
    assert outputs[1]["text"] == "printed"
    assert outputs[3]["data"] == table

    shown = decoded(base64.b64decode(outputs[2]["data"].pop("image/png")))
    assert outputs[2]["data"] == {"text/plain": "View(attention of L0H0 over 4 tokens)"}
    height, width, _ = shown.shape
    assert width == round(WIDTH * SCALE)
    assert 300 < height < 900
    assert (shown[-12:] == 255).all()
    assert (shown[-13] < 255).any()
    # Of the sixteen squares six are grey; the first, all of a query's attention, is orange.
    grey, orange = ((shown == colour).all(2).sum() for colour in (GREY, ORANGE))
    assert grey / orange == pytest.approx(6, rel=0.15)

    points_shown = decoded(base64.b64decode(outputs[4]["data"]["image/png"]))
    assert points_shown.shape[1] == round(WIDTH * SCALE)
    assert 350 * SCALE < len(points_shown) <= 440 * SCALE
    assert 0.01 < (np.abs(points_shown.astype(int) - ORANGE) <= 3).all(2).mean() < 0.1


def _plain(figure):
    return {**figure.data[0].to_plotly_json(), "x": list(figure.data[0].x), "y": list(figure.data[0].y)}
