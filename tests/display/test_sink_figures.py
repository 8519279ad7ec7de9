"""Attention to high-norm tokens as a heat map, and repetition as curves."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sd_lens.display.sink_figures import MAX_LINES, repetition_curves, sink_heatmap
from sd_lens.tracing.repetition import RepeatedTokens
from sd_lens.tracing.sinks import SinkAttention


@pytest.fixture
def sinks():
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(3, 5, 7, generator=generator)
    parts = parts / parts.sum(0)
    return SinkAttention(
        model_name="made",
        to_high=parts[0],
        to_other=parts[1],
        to_self=parts[2],
        per_high_key=parts[0] / 2,
        per_other_key=parts[1] / 30,
        alpha=0.9 * parts[0],
        sink_share=(parts[0] > 0.4).float(),
        n_queries=200,
        n_high=6,
        n_prompts=4,
        n_short=1,
        epsilon=0.3,
        T=64,
        key=0,
    )


def without_high_norm(sinks):
    nan = torch.full_like(sinks.alpha, math.nan)
    return replace(sinks, to_high=nan, to_other=nan, to_self=nan, per_high_key=nan, per_other_key=nan, n_queries=0, n_high=0)


def outlined(figure):
    """The cells (block, head) that have an outline."""
    line = figure.data[1]
    corners = [list(zip(line.x[i : i + 5], line.y[i : i + 5], strict=True)) for i in range(0, len(line.x), 6)]
    for box in corners:
        assert max(x for x, _ in box) - min(x for x, _ in box) == 1
        assert max(y for _, y in box) - min(y for _, y in box) == 1
        assert box[0] == box[-1]
    return [(box[0][1] + 0.5, box[0][0] + 0.5) for box in corners]


def test_each_cell_is_what_a_head_pays_to_high_norm_tokens(sinks):
    figure = sink_heatmap(sinks)
    heatmap = figure.data[0]
    np.testing.assert_array_equal(heatmap.z, sinks.to_high.numpy())
    assert (heatmap.zmin, heatmap.zmax) == (0, 1)
    known = np.stack([sinks.alpha, sinks.sink_share, sinks.to_high, sinks.to_other, sinks.to_self, sinks.ratio], axis=-1)
    np.testing.assert_array_equal(heatmap.customdata, known)
    assert figure.layout.title.text == "Attention paid to high-norm tokens in made"
    assert "6 high-norm tokens, mean of 200 later tokens; sink rate " in figure.layout.title.subtitle.text


def test_sink_heads_are_outlined(sinks):
    figure = sink_heatmap(sinks)
    assert sinks.sink_heads
    assert outlined(figure) == sinks.sink_heads
    assert "more than 30 %" in figure.data[1].name
    assert figure.data[1].showlegend
    none = sink_heatmap(replace(sinks, alpha=torch.zeros(5, 7)))
    assert not outlined(none)
    assert not none.data[1].showlegend


def test_without_high_norm_tokens_it_shows_the_position(sinks):
    bare = without_high_norm(sinks)
    figure = sink_heatmap(bare)
    np.testing.assert_array_equal(figure.data[0].z, bare.alpha.numpy())
    assert figure.layout.title.text == "Attention paid to position 0 in made"
    assert figure.layout.title.subtitle.text.startswith("there is no high-norm token; mean of 4 prompts; sink rate ")
    assert "customdata[2]" not in figure.data[0].hovertemplate
    assert "NaN" not in figure.to_json()


def test_many_blocks_and_heads_stay_small():
    alpha = torch.rand(80, 64)
    sinks = SinkAttention("made", *[alpha] * 7, n_queries=9, n_high=1, n_prompts=1, n_short=0, epsilon=0.3, T=64, key=0)
    figure = sink_heatmap(sinks)
    assert len(figure.to_json()) < 500_000
    assert len(outlined(figure)) == len(sinks.sink_heads)


def repeats(norms, *, first=100.0, prefix=(0,), texts=None):
    norms = torch.as_tensor(norms, dtype=torch.float32)
    first_norm = torch.full((len(norms),), float(first)) if prefix else norms[:, 0]
    ids = tuple(range(len(norms)))
    return RepeatedTokens("made", 2, ids, tuple(texts or (f"t{i}" for i in ids)), prefix, norms, first_norm, 10.0, 6.0)


RISING = [[2.0, 10, 40, 70, 90], [2.0, 2, 3, 2, 2], [1.0, 60, 80, 99, 101]]


def curves(figure):
    return {trace.hovertemplate.split("</b>")[0].removeprefix("<b>"): trace for trace in figure.data}


def test_each_line_is_a_token_relative_to_the_first():
    repeated = repeats(RISING)
    figure = repetition_curves(repeated)
    lines = curves(figure)
    assert set(lines) == {"t0", "t1", "t2"}
    for row, norms in enumerate(RISING):
        assert list(lines[f"t{row}"].x) == [1, 2, 3, 4, 5]
        assert list(lines[f"t{row}"].y) == pytest.approx([norm / 100 for norm in norms])
        assert list(lines[f"t{row}"].customdata) == norms
    assert {token: line.name for token, line in lines.items()} == {"t0": "reach 50 %", "t1": "stay below 50 %", "t2": "reach 50 %"}
    assert figure.layout.title.subtitle.text == "norm after block 2; 2 of 3 tokens reach 50 %, the earliest after 2 repeats"
    assert [shape.y0 for shape in figure.layout.shapes] == [1.0]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert all(text.endswith(" %") for text in figure.layout.yaxis.ticktext)
    assert sum(bool(trace.showlegend) for trace in figure.data) == 2


def test_lines_are_named_where_they_end_on_the_right():
    figure = repetition_curves(repeats(RISING, texts=["<b>\n", "<b>\n", "$"]))
    notes = {note.text: note.y for note in figure.layout.annotations}
    # The others end where the first token's line is, and what is written there is that.
    assert notes == {"first token": 0.0, "&lt;b&gt;↵": pytest.approx(math.log10(0.02))}


def test_without_a_high_norm_to_reach_it_says_so():
    figure = repetition_curves(repeats([[11.0, 12, 10], [9.0, 9, 9]], prefix=()))
    assert "the first token itself has no high norm here" in figure.layout.title.subtitle.text
    assert {trace.name for trace in figure.data} == {"after a first token without a high norm"}


def test_without_a_prefix_the_first_time_is_the_first_token():
    figure = repetition_curves(repeats([[100.0, 80, 4]], prefix=()))
    assert list(figure.data[0].y) == pytest.approx([1.0, 0.8, 0.04])
    assert "1 of 1 token reach 50 %, the earliest after 2" in figure.layout.title.subtitle.text


def test_of_many_tokens_some_are_drawn_among_them_the_nearest():
    norms = torch.rand(300, 8, generator=torch.Generator().manual_seed(0)) * 10
    norms[123] = 95.0
    figure = repetition_curves(repeats(norms))
    assert len(figure.data) == MAX_LINES
    assert "t123" in curves(figure)
    assert f"{MAX_LINES} are drawn" in figure.layout.title.subtitle.text
    json.loads(figure.to_json())


@pytest.mark.parametrize("norms", [[[0.0, 0.0]], [[100.0, 100.0]], [[1e-30, 1e6]]])
def test_extreme_norms_can_be_drawn(norms):
    figure = repetition_curves(repeats(norms))
    assert all(map(math.isfinite, figure.layout.yaxis.range))
    json.loads(figure.to_json())


def test_results_draw_themselves(sinks):
    assert sinks.plot().to_json() == sink_heatmap(sinks).to_json()
    assert repeats(RISING).plot().to_json() == repetition_curves(repeats(RISING)).to_json()
