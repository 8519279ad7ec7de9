"""Figures of collapse show the numbers that they are given; zeros, epsilons and critical lengths have their place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sd_lens.display.collapse_figures import collapse_lines, mitigation_lines
from sd_lens.display.propagation_figures import answer_curves, propagation_panels
from sd_lens.display.style import BLUE, VERMILLION
from sd_lens.propagation.answers import Answer, Answers
from sd_lens.propagation.consequences import PropagationConsequences
from sd_lens.propagation.curve import CollapseCurve
from sd_lens.propagation.mitigations import Mitigations, Setting
from sd_lens.propagation.sensitivity_result import Sensitivity

LENGTHS = (1, 10, 100, 1000)
PROBE = {"name": "repeat-last", "contrast": "repeated", "separator_every": None}


def made(values, *, metric="linf", layer="final", lengths=LENGTHS):
    """A curve of one layer and metric; values per dtype are (sample, length, part), equal to the bit where all are 0."""
    tensors = {dtype: torch.tensor(rows, dtype=torch.float64).reshape(-1, len(lengths), 1) for dtype, rows in values.items()}
    return CollapseCurve(
        model_name="made",
        n_blocks=2,
        probe=PROBE,
        lengths=lengths,
        values={(dtype, layer, metric): rows for dtype, rows in tensors.items()},
        equal={(dtype, layer): (rows == 0).all(2) for dtype, rows in tensors.items()},
    )


@pytest.fixture
def curve():
    return made({"float32": [0.5, 0.1, 0.02, 0.006], "bfloat16": [0.5, 0.1, 0.004, 0.0]})


def lines(figure):
    return {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}


def markers(figure):
    return {trace.name: trace for trace in figure.data if trace.mode == "markers"}


def test_a_line_per_precision_with_the_curves_numbers(curve):
    figure = collapse_lines(curve)
    drawn = lines(figure)
    assert list(drawn) == ["float32", "bfloat16"]
    assert drawn["float32"].x == LENGTHS
    assert list(drawn["float32"].y) == [0.5, 0.1, 0.02, 0.006]
    assert list(drawn["bfloat16"].y) == [0.5, 0.1, 0.004, None]
    assert (drawn["float32"].line.color, drawn["bfloat16"].line.color) == (BLUE, VERMILLION)
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert curve.plot().to_dict() == figure.to_dict()


def test_zeros_stand_at_the_lower_edge(curve):
    figure = collapse_lines(curve)
    zero = markers(figure)["bfloat16: equal to the bit"]
    assert zero.x == (1000,)
    edge = figure.layout.yaxis.range[0]
    assert math.log10(zero.y[0]) == pytest.approx(edge)
    assert edge < math.log10(0.004)
    # Nothing between two representations that differ: their angle, say, may still be 0.
    other = made({"float32": [0.5, 0.1, 0.0, 0.0]}, metric="cosine")
    other = replace(other, equal={("float32", "final"): torch.tensor([[False, False, False, True]])})
    shown = markers(collapse_lines(other))
    assert (shown["float32: distance 0"].x, shown["float32: equal to the bit"].x) == ((100,), (1000,))


def test_epsilons_and_critical_lengths_are_marked_where_they_are_near(curve):
    figure = collapse_lines(curve)
    assert [(shape.y0, shape.line.color, shape.line.dash) for shape in figure.layout.shapes] == [(2**-7, VERMILLION, "dot")]
    assert "machine epsilon of float32, 1.19e-07, is far below" in figure.layout.title.subtitle.text
    star = markers(figure)["critical length of bfloat16: 100"]
    assert (star.x, star.y) == ((100,), (2**-7,))
    assert not any(name.startswith("critical length of float32") for name in markers(figure))
    # An angle is on another scale than an epsilon.
    assert not collapse_lines(made({"bfloat16": [0.5, 0.1, 0.004, 0.001]}, metric="cosine")).layout.shapes


def test_bands_go_from_least_to_most_over_samples_and_chunks():
    rows = torch.tensor([[[0.1, 0.3], [0.2, 0.4]], [[0.5, 0.7], [0.0, 0.6]]], dtype=torch.float64)
    curve = replace(
        made({"float32": [0.1, 0.1]}, lengths=(1, 2)),
        values={("float32", 0, "l2_heads"): rows, ("float32", "final", "l2_heads"): rows / 2},
        equal={("float32", 0): torch.zeros(2, 2, dtype=torch.bool), ("float32", "final"): torch.zeros(2, 2, dtype=torch.bool)},
    )
    figure = collapse_lines(curve, "l2_heads")
    band = next(trace for trace in figure.data if trace.fill == "toself")
    floor = 10 ** figure.layout.yaxis.range[0]
    assert list(band.x) == [1, 2, 2, 1]
    assert list(band.y) == pytest.approx([0.1, floor, 0.6, 0.7])
    drawn = lines(figure)
    assert list(drawn) == ["float32, after block 0", "float32, after the final norm"]
    assert list(drawn["float32, after block 0"].y) == pytest.approx([0.4, 0.3])
    assert drawn["float32, after block 0"].line.dash != drawn["float32, after the final norm"].line.dash
    assert "over 2 head-sized chunks and 2 samples" in figure.layout.title.subtitle.text


def test_a_share_has_a_linear_axis_and_equal_pairs_are_said_to_be():
    figure = collapse_lines(made({"float32": [1, 1, 0, 0]}, metric="argmax", layer="logits"))
    assert figure.layout.yaxis.type == "linear"
    assert list(lines(figure)["float32"].y) == [1, 1, 0, 0]
    nothing = collapse_lines(made({"float32": [0, 0, 0, 0]}))
    assert nothing.layout.annotations[-1].text == "all pairs are the same"
    with pytest.raises(ValueError, match=r"^metric: got 'l1'; allowed: 'linf'"):
        collapse_lines(made({"float32": [1, 1, 0, 0]}), "l1")


def test_mitigations_a_line_per_setting_in_the_precision_asked_for(curve):
    apart = made({"float32": [0.5, 0.4, 0.3, 0.2], "bfloat16": [0.5, 0.45, 0.35, 0.25]})
    settings = (Setting(None, 8, curve), Setting(3, 8, apart), Setting(None, None, curve), Setting(3, None, apart))
    found = Mitigations("made", "repeat-last", "linf", "final", LENGTHS, settings)
    drawn = lines(mitigation_lines(found, "bfloat16"))
    names = ["no separators, window 8", "separator every 3, window 8", "no separators, window off", "separator every 3, window off"]
    assert list(drawn) == names
    assert list(drawn[names[1]].y) == [0.5, 0.45, 0.35, 0.25]
    assert drawn[names[0]].line.color == drawn[names[2]].line.color != drawn[names[1]].line.color
    assert [drawn[name].line.dash for name in names] == ["dash", "dash", "solid", "solid"]
    assert list(lines(mitigation_lines(found))[names[1]].y) == [0.5, 0.4, 0.3, 0.2]
    assert found.plot("bfloat16").to_dict() == mitigation_lines(found, "bfloat16").to_dict()


def felt(numbers, *, position=2):
    norms = torch.tensor([numbers], dtype=torch.float64)
    high = torch.zeros(len(numbers), dtype=torch.bool)
    high[0] = True
    return Sensitivity(
        model_name="made",
        of="final",
        position=position,
        sources=(0,),
        frobenius=norms,
        spectral=norms / 2,
        standard_error=0 * norms,
        stream_norm=torch.ones_like(norms),
        tokens=torch.arange(len(numbers)),
        texts=("<s>", "<b>", "$x", "\n")[: len(numbers)],
        high_norm=high,
        sinks=high,
        method="exact",
        n_products=4,
    )


def test_panels_of_all_runs_and_what_they_feel(curve):
    other = made({"float32": [0.4, 0.3, 0.2, 0.1], "bfloat16": [0.4, 0.3, 0.2, 0.1]})
    curves = {"untouched": curve, "ablated": other, "random control 0": curve}
    felts = {"untouched": felt([1.0, 2.0, 4.0, 0.0]), "ablated": felt([3.0, 2.0, 0.0, 0.0])}
    found = PropagationConsequences("made", 1, "both", 2, "linf", curves, felts)
    figure = propagation_panels(found)
    left = {trace.name: list(trace.y) for trace in figure.data if trace.yaxis == "y"}
    assert left["untouched"] == left["random control 0"] == [0.5, 0.1, 0.02, 0.006]
    assert left["ablated"] == [0.4, 0.3, 0.2, 0.1]
    right = {trace.name: list(trace.y) for trace in figure.data if trace.yaxis == "y2"}
    assert right == {"untouched": [1.0, 2.0, 4.0], "ablated": [3.0, 2.0, None]}  # not what stands behind the position
    assert figure.layout.xaxis2.ticktext == ("<b>&lt;s&gt;</b>", "&lt;b&gt;", "&#36;x")
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]
    assert found.plot().to_dict() == figure.to_dict()
    alone = propagation_panels(replace(found, sensitivities={}), "bfloat16")
    assert {trace.yaxis for trace in alone.data} == {"y"}
    assert "xaxis2" not in alone.layout.to_plotly_json()
    assert list(lines(alone)["untouched"].y) == [0.5, 0.1, 0.004, None]


def test_answers_share_and_error_over_length():
    rows = (Answer(1, 0, False, 1, 1), Answer(8, 0, False, 8, 5), Answer(8, 1, False, 6, 6), Answer(64, 0, False, 64, None))
    found = Answers("made", PROBE, "generation", (), rows)
    share, mean, median = answer_curves(found).data
    assert (share.x, list(share.y)) == ((1, 8, 64), [1, 0.5, 0])
    assert list(mean.y) == list(median.y) == [0, 1.5, None]
    assert found.plot().to_dict() == answer_curves(found).to_dict()
    assert len(answer_curves(replace(found, by="logits", candidates=(0, 1))).data) == 2
