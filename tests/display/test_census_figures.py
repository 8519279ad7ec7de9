"""Massive activations over the blocks, super weights beside what their dimension gets; or that there are none."""

import json

import pytest

from sd_lens.display.census_figures import MAX_LINES, MAX_NAMED, massive_activations_figure, super_weight_bars
from sd_lens.tracing.census import MassiveActivation, MassiveActivations
from sd_lens.tracing.super_weights import SuperWeight, SuperWeights

HARD, SHOWN = "<b>$x$\n", "&lt;b&gt;&#36;x&#36;↵"


def census(rows, n_found=None, **changes):
    """A census of entries given as (block, dimension, value)."""
    rows = tuple(
        MassiveActivation(block=block, prompt=i, pos=3, token=HARD, id=7, dim=dim, value=value, times_median=2000.0)
        for i, (block, dim, value) in enumerate(rows)
    )
    options = {"model_name": "made", "n_blocks": 6, "d_model": 64, "n_tokens": 50, "min_value": 100.0, "min_times": 1000.0}
    return MassiveActivations(**options | changes, n_found=len(rows) if n_found is None else n_found, rows=rows)


def test_each_line_is_the_largest_of_a_dimension_after_every_block():
    figure = massive_activations_figure(census([(1, 5, -300.0), (1, 5, 200.0), (2, 5, 400.0), (4, 5, 150.0), (2, 9, -1000.0)]))
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines["5"].y) == [None, 300.0, 400.0, None, 150.0, None]
    assert list(lines["9"].y) == [None, None, 1000.0, None, None, None]
    assert list(lines["5"].x) == list(range(6))
    symbols = [symbol for symbol, value in zip(lines["5"].marker.symbol, lines["5"].y, strict=True) if value is not None]
    assert symbols == ["triangle-down", "triangle-up", "triangle-up"]
    hover = lines["5"].customdata[1]
    assert hover.startswith("dimension 5 after block 1: −300, 2000 × the median")
    assert f"at <b>{SHOWN}</b>, position 3 of prompt 0" in hover
    assert "2 massive activations here" in hover
    assert figure.layout.yaxis.type == "log"
    assert [shape.y0 for shape in figure.layout.shapes] == [100.0]
    assert figure.layout.title.text.startswith("Massive activations of made: |x| &gt; 100 and &gt; 1000 × median |x|")
    assert figure.layout.title.subtitle.text.startswith("5 in 50 tokens; of 2 dimensions ")


def test_the_largest_dimensions_are_named():
    figure = massive_activations_figure(census([(2, dim, 200.0 + dim) for dim in range(100)]))
    assert len(figure.data) == MAX_LINES
    named = [trace.name for trace in sorted(figure.data, key=lambda trace: trace.legendrank) if trace.name != "others"]
    assert named == [str(99 - rank) for rank in range(MAX_NAMED)]
    assert [trace.name for trace in figure.data if trace.showlegend].count("others") == 1
    assert f"of the first {MAX_LINES} of 100 dimensions" in figure.layout.title.subtitle.text


def test_a_census_that_kept_some_says_so():
    figure = massive_activations_figure(census([(2, 5, 200.0)], n_found=12_345))
    assert figure.layout.title.subtitle.text.startswith("12,345 in 50 tokens (the largest 1 are looked at); of one dimension ")


def test_a_census_of_nothing_says_so():
    figure = massive_activations_figure(census([]))
    assert [note.text for note in figure.layout.annotations] == ["no massive activation"]
    assert figure.layout.title.subtitle.text == "0 in 50 tokens"
    assert not figure.data


def test_any_entry_may_count():
    assert massive_activations_figure(census([(0, 1, 1e-3)], min_value=0.0)).data[0].y[0] == 1e-3


def weight(neuron, share, output, *, expert=None, hf="model.<b>"):
    return SuperWeight(
        block=2,
        expert=expert,
        neuron=neuron,
        dim=18,
        weight=0.5,
        activation=-20.0,
        output=output,
        share=share,
        energy=0.8,
        n_tokens=6,
        token=HARD,
        prompt=1,
        pos=0,
        tl=f"blocks.2.mlp.W_out[{neuron}, 18]",
        hf=hf,
    )


def found(*rows, blocks=(2,)):
    return SuperWeights("made", blocks, 6, 6.0, 0.5, 0.1, rows)


def test_candidates_stand_in_what_their_dimension_gets():
    figure = super_weight_bars(
        found(weight(205, 0.75, -292.0), weight(3, 1.25, 80.0, expert=1), weight(4, 0.5, 70.0, expert="shared"))
    )
    whole, own = figure.data
    names = ["L2N205 → dimension 18", "L2E1N3 → dimension 18", "L2 shared expert N4 → dimension 18"]
    assert list(whole.y) == list(own.y) == list(figure.layout.yaxis.categoryarray) == names
    assert list(whole.x) == [-292.0, 80.0, 70.0]
    assert list(own.x) == [-219.0, 100.0, 35.0]
    # Beside the longer of the two bars, so that no number stands in a bar.
    assert list(whole.text) == ["75 %", "", "50 %"]
    assert list(own.text) == ["", "125 %", ""]
    assert "FFN of block 2; 3 candidates" in figure.layout.title.subtitle.text


def test_hovering_gives_the_coordinates():
    hover = super_weight_bars(found(weight(205, 0.75, -292.0), weight(7, 0.6, 8.0, hf=None))).data[1].customdata
    assert hover[0].startswith("<b>blocks.2.mlp.W_out[205, 18]</b><br>model.&lt;b&gt;<br>weight 0.5 × activation −20")
    assert f"at <b>{SHOWN}</b>, position 0 of prompt 1" in hover[0]
    assert "a candidate at 6 tokens" in hover[0]
    assert hover[1].startswith("<b>blocks.2.mlp.W_out[7, 18]</b><br>weight")


def test_of_many_candidates_the_first_are_shown():
    figure = super_weight_bars(found(*(weight(n, 0.5, 10.0) for n in range(30))), k=8)
    assert len(figure.data[0].x) == 8
    assert "30 candidates, 8 are shown" in figure.layout.title.subtitle.text
    with pytest.raises(ValueError, match="k: got 0; allowed: at least 1"):
        super_weight_bars(found(), k=0)


def test_none_is_said_and_why():
    notes = [[note.text for note in super_weight_bars(found(blocks=blocks)).layout.annotations] for blocks in ((2, 3), ())]
    assert notes == [["no super weight"], ["no super weight: no block makes a large norm"]]
    assert "FFNs of block 2, 3; 0 candidates" in super_weight_bars(found(blocks=(2, 3))).layout.title.subtitle.text


def test_results_draw_themselves():
    counted, weights = census([(2, 5, 200.0)]), found(weight(205, 0.75, -292.0))
    assert json.loads(counted.plot().to_json()) == json.loads(massive_activations_figure(counted).to_json())
    assert json.loads(weights.plot().to_json()) == json.loads(super_weight_bars(weights).to_json())
