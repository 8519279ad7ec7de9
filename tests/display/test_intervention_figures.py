"""The panels of consequences: what is drawn where, and what is left out."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest

from sd_lens.display.intervention_figures import consequence_panels
from sd_lens.interventions.outcomes import Consequences, Measures, Outcome


def measures(**known):
    values = {"loss": 4.0, "kl": 0.0, "peak_norm": 500.0, "peak_ratio": 20.0, "block_ratio": 15.0, "peak_ratio_anywhere": 20.0}
    return Measures(**(values | {"n_high": 2.0, "sink_rate": 0.25, "sink_attention": 0.4} | known))


ABLATED = measures(loss=4.25, kl=0.125, peak_ratio=1.25, sink_rate=0.125)
CONTROL = measures(loss=4.5, kl=0.25, peak_ratio=22.0, sink_rate=0.5)
SPREAD = measures(loss=0.5, kl=0.0625, peak_ratio=1.0, sink_rate=0.01)


@pytest.fixture
def found():
    rows = [Outcome("none", "none", "none", 0, measures())]
    for side in ("trigger", "both"):
        for where, n_tokens in (("initial", 2), ("delimiters", 0)):
            rows += [
                Outcome("ablate", side, where, n_tokens, ABLATED),
                Outcome("mean ablate", side, where, n_tokens, ABLATED),
                Outcome("random control", side, where, n_tokens, CONTROL, SPREAD),
            ]
    return Consequences("made", 3, 2, tuple(rows), (), 40, 2, 2, 0, 5, 3, 6.0, 0.3, 64)


def drawn(figure, panel):
    return {trace.name: trace for trace in figure.data if (trace.xaxis or "x") == ("x" if panel == 1 else f"x{panel}")}


def test_each_panel_shows_a_measure_of_every_row_that_was_edited(found):
    figure = consequence_panels(found)
    assert len(figure.data) == 4 * 3
    for panel, ablated, control, spread in (
        (1, 1.25, 22.0, 1.0),
        (2, 0.25, 0.5, 0.5),
        (3, 0.125, 0.25, 0.0625),
        (4, 0.125, 0.5, 0.01),
    ):
        traces = drawn(figure, panel)
        assert list(traces) == ["ablated", "mean-ablated", "random control, norm-matched"]
        assert list(traces["ablated"].x) == [ablated] * 2
        assert list(traces["random control, norm-matched"].x) == [control] * 2
        assert list(traces["random control, norm-matched"].error_x.array) == [spread] * 2
        assert not traces["ablated"].error_x.visible
        assert [round(y) for y in traces["ablated"].y] == [0, 1]
    assert list(figure.layout.yaxis.ticktext) == ["initial tokens, trigger side", "initial tokens, both sides"]
    title = figure.layout.title
    assert title.text == "What removing the explosion subspace of block 3 (rank 2) does to made"
    assert title.subtitle.text == (
        "2 high-norm tokens of 40 tokens; lines: the untouched model; controls: mean and standard deviation over 3 seeds"
    )


def test_the_untouched_model_is_a_line_in_each_panel(found):
    figure = consequence_panels(found)
    lines = {shape.xref: shape.x0 for shape in figure.layout.shapes if shape.yref == "paper"}
    assert lines == {"x": 20.0, "x2": 0.0, "x3": 0.0, "x4": 0.25}


def test_panels_stand_beside_each_other_and_hold_all_their_points(found):
    figure = consequence_panels(found)
    axes = [figure.layout[name] for name in ("xaxis", "xaxis2", "xaxis3", "xaxis4")]
    domains = [axis.domain for axis in axes]
    assert domains[0][0] == 0
    assert domains[3][1] == pytest.approx(1)
    assert all(right[0] > left[1] for left, right in itertools.pairwise(domains))
    low, high = axes[0].range
    assert axes[0].type == "log"
    assert low < math.log10(1.25) < math.log10(22.0) < high
    assert axes[1].range[0] < 0
    assert axes[1].range[1] > 0.5 + 0.5  # with the spread
    assert axes[3].range[0] < 0 < 0.5 < axes[3].range[1]


def test_names_are_in_the_legend_once_and_hovers_say_all(found):
    figure = consequence_panels(found)
    assert sum(bool(trace.showlegend) for trace in figure.data) == 3
    control = drawn(figure, 3)["random control, norm-matched"]
    assert list(control.customdata[0]) == ["trigger side", "initial tokens", 2, "kl 0.25 ± 0.0625"]
    assert drawn(figure, 4)["ablated"].customdata[1][3] == "sink_rate 12.5%"
    json.dumps(figure.to_plotly_json(), default=list)


def test_what_was_not_measured_has_no_panel(found):
    rows = tuple(replace(row, measures=replace(row.measures, sink_rate=math.nan, peak_ratio=math.nan)) for row in found.rows)
    figure = consequence_panels(replace(found, rows=rows))
    assert len(figure.data) == 2 * 3
    assert "KL" in figure.layout.xaxis2.title.text
    zero = tuple(replace(row, measures=replace(row.measures, sink_rate=0.0)) for row in found.rows)
    assert len(consequence_panels(replace(found, rows=zero)).data) == 3 * 3
    single = tuple(replace(row, spread=row.spread and replace(row.spread, kl=math.nan)) for row in found.rows)
    control = drawn(consequence_panels(replace(found, rows=single, controls=1)), 3)["random control, norm-matched"]
    assert list(control.error_x.array) == [0.0, 0.0]
    assert control.customdata[0][3] == "kl 0.25"


def test_where_nothing_was_edited_that_is_said(found):
    rows = (found.rows[0], *(row for row in found.rows if row.where == "delimiters"))
    figure = consequence_panels(replace(found, rows=rows))
    assert [note.text for note in figure.layout.annotations] == ["there was no token to edit"]
