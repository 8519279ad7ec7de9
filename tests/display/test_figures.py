"""Figures show the numbers of the results, stay light, and survive missing values."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens.display.figures import direction_angles, eigenvalues, norm_heatmap, norm_lines, sublayer_bars
from sd_lens.display.norm_figures import MAX_MUTED, MAX_TICKS, log_ticks
from sd_lens.tracing.sublayers import SublayerAttribution

TOKEN_LINES = ("other tokens", "later high-norm tokens", "initial high-norm token")


def token_lines(figure):
    return [trace for trace in figure.data if trace.name in TOKEN_LINES]


def named(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def test_there_is_a_line_for_every_token(findings):
    trace = findings.defects.trace
    figure = norm_lines(trace, 1)
    lines = token_lines(figure)
    drawn = sorted(tuple(line.y) for line in lines)
    assert drawn == sorted(map(tuple, trace.of_prompt(1).T.tolist()))
    assert all(tuple(line.x) == ("embed", "0", "1", "2", "3", "4", "5") for line in lines)
    assert figure.layout.yaxis.type == "log"
    reference = next(line for line in figure.data if line.line.dash == "dash")
    assert list(reference.y) == trace.reference.tolist()


def test_high_norm_tokens_stand_out_and_are_named(findings):
    figure = norm_lines(findings.defects.trace, 0)
    initial = [line for line in figure.data if line.name == "initial high-norm token"]
    assert len(initial) == 1
    assert max(initial[0].y) == pytest.approx(findings.defects.tokens[0].norm)
    assert initial[0].customdata[2] == pytest.approx(findings.defects.tokens[0].ratio, rel=1e-5)
    assert initial[0].line.width > named(figure, "other tokens").line.width
    assert [note.text for note in figure.layout.annotations] == ["<b>&lt;s&gt;</b> at 0"]


def test_each_kind_of_line_is_in_the_legend_once(findings):
    shown = [trace.name for trace in norm_lines(findings.defects.trace).data if trace.showlegend]
    assert len(shown) == len(set(shown)) == 3


def test_a_long_prompt_draws_its_high_norm_tokens_and_some_others(make_trace):
    norms = torch.rand(5, 400) + 1
    norms[2:4, 0] = 100
    norms[2:4, 250] = 90
    figure = norm_lines(make_trace(norms))
    lines = token_lines(figure)
    assert len(lines) == MAX_MUTED + 2
    assert {max(line.y) for line in lines} >= {100, 90}
    assert figure.layout.title.subtitle.text == f"2 high-norm tokens; {MAX_MUTED} of 398 other tokens are drawn"


def test_a_long_heat_map_shows_every_token_and_names_some(make_trace):
    norms = torch.rand(5, 401) + 1
    norms[2:4, 251] = 90
    figure = norm_heatmap(make_trace(norms))
    assert figure.data[0].z.shape == (5, 401)
    ticks = figure.layout.xaxis.tickvals
    assert 251 in ticks
    assert MAX_TICKS / 2 < len(ticks) <= MAX_TICKS
    assert f"{len(ticks)} of 401 tokens are named" in figure.layout.title.subtitle.text


def test_the_heat_map_shows_the_logarithm_of_norms(findings):
    trace = findings.defects.trace
    figure = norm_heatmap(trace, 2)
    np.testing.assert_allclose(10.0 ** figure.data[0].z, trace.of_prompt(2).numpy(), rtol=1e-5)
    assert list(figure.data[0].y) == ["embed", "0", "1", "2", "3", "4", "5"]
    assert figure.layout.xaxis.ticktext[:2] == ("&lt;s&gt;", "&lt;/script&gt;")
    assert list(figure.data[0].customdata[2][0]) == ["&lt;s&gt;", f"{trace.of_prompt(2)[2, 0]:.4g}", f"{trace.ratios[2, 48]:.3g}"]


@pytest.mark.parametrize("draw", [norm_lines, norm_heatmap])
def test_missing_zero_and_infinite_norms_are_left_out(make_trace, draw):
    norms = torch.rand(4, 6) + 1
    norms[1, 2], norms[2, 3], norms[3, 4] = math.nan, 0.0, math.inf
    figure = draw(make_trace(norms))
    json.loads(figure.to_json())
    axis = figure.layout.yaxis.range if draw is norm_lines else (figure.data[0].zmin, figure.data[0].zmax)
    assert all(map(math.isfinite, axis))


@pytest.mark.parametrize("draw", [norm_lines, norm_heatmap])
@pytest.mark.parametrize("norms", [torch.full((3, 4), math.nan), torch.zeros(3, 4), torch.ones(2, 1), torch.ones(3, 4)])
def test_traces_without_any_contrast_can_be_drawn(make_trace, draw, norms):
    assert len(draw(make_trace(norms)).data) > 0


@pytest.mark.parametrize("draw", [norm_lines, norm_heatmap])
def test_a_prompt_that_is_not_there_is_refused(findings, draw):
    with pytest.raises(ValueError, match="prompt: got 3; allowed: 0 to 2"):
        draw(findings.defects.trace, 3)


@pytest.mark.parametrize("part", ["attention", "ffn", "block"])
def test_angles_and_eigenvalues_are_those_of_the_table(findings, part):
    rows = [row for row in findings.directions.rows if row.part == part]
    name = "FFN" if part == "ffn" else part
    angles = named(direction_angles(findings.directions), name)
    assert list(angles.x) == [row.block for row in rows]
    assert list(angles.y) == [row.angle_deg for row in rows]
    values = named(eigenvalues(findings.directions), name)
    assert [round(x) for x in values.x] == [row.block for row in rows]
    assert list(values.y) == [row.eigenvalue.real for row in rows]
    assert [data[2] for data in values.customdata] == [row.eigenvector_angle_deg for row in rows]


def test_eigenvalues_of_distant_eigenvectors_are_hollow(not_found):
    for trace in eigenvalues(not_found.directions).data:
        for colour, (_, _, angle, _) in zip(trace.marker.color, trace.customdata, strict=True):
            assert (colour == "white") == (angle > 30)


@pytest.mark.parametrize("draw", [direction_angles, eigenvalues])
def test_explosion_and_decay_blocks_are_shaded(findings, draw):
    figure = draw(findings.directions, findings.defects)
    shaded = [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"]
    assert shaded == [(0.5, 1.5), (3.5, 4.5)]
    assert {"explosion block", "decay block"} <= {trace.name for trace in figure.data}
    assert not [shape for shape in draw(findings.directions).layout.shapes if shape.type == "rect"]


def test_bars_add_up_to_what_leaves_the_block(findings):
    figure = sublayer_bars(findings.attribution)
    parts = [named(figure, name).y for name in ("before the block", "attention", "FFN")]
    np.testing.assert_allclose(np.sum(parts, axis=0), named(figure, "after the block").y, rtol=1e-4, atol=1e-3)
    assert list(figure.data[0].x) == ["block 1", "block 4"]


def test_an_attribution_of_nothing_says_so():
    figure = sublayer_bars(SublayerAttribution("made", (), 0))
    assert [note.text for note in figure.layout.annotations] == ["no explosion or decay block"]


def test_every_figure_has_a_title_and_units_and_is_json(findings):
    trace = replace(findings.defects.trace, model_name="a <b>& c")
    maps = replace(findings.directions, model_name="a <b>& c")
    for figure in (
        norm_lines(trace),
        norm_heatmap(trace),
        direction_angles(maps),
        eigenvalues(maps),
        sublayer_bars(findings.attribution),
    ):
        layout = json.loads(figure.to_json())["layout"]
        assert layout["title"]["text"]
        assert layout["yaxis"]["title"]["text"]
        assert "<b>&" not in layout["title"]["text"]


@given(st.floats(-6, 6), st.floats(0.31, 8))
def test_log_axes_have_a_few_ticks_in_their_range(low, span):
    ticks = log_ticks(low, low + span)
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 12
    assert all(low - 0.1 * span - 0.1 <= math.log10(tick) <= low + span + 0.1 * span + 0.1 for tick in ticks)
