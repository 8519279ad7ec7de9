"""Figures of theory in numbers show the numbers that they are given."""

import math

import pytest
import torch

from sd_lens.display.theory_figures import counting_collapse, ratio_blindness, softmax_variation, synthetic_collapse
from sd_lens.propagation.count_collapse import CountingCollapse
from sd_lens.propagation.counting import RatioBlindness, RatioGap
from sd_lens.propagation.softmaxes import SoftmaxVariation
from sd_lens.propagation.synthetic import SyntheticCollapse


def test_total_variation_stands_beside_its_closed_form_and_the_counterexample():
    values = torch.tensor([[0.02, 0.01], [0.04, 0.03]], dtype=torch.float64)
    variation = SoftmaxVariation((500, 1000), values, 200, 0.1)
    figure = softmax_variation(variation)
    low, high, mean, expected = figure.data
    assert list(low.y) == [0.02, 0.01]
    assert list(high.y) == [0.04, 0.03]
    assert list(mean.y) == pytest.approx([0.03, 0.02])
    assert list(expected.y) == pytest.approx(list(variation.expected))
    assert figure.layout.shapes[0].y0 == pytest.approx(0.924234, abs=1e-6)
    assert figure.layout.yaxis.range[1] > math.log10(0.9242) > figure.layout.yaxis.range[0]
    assert "first 200 changed by up to 0.1" in figure.layout.title.subtitle.text
    assert variation.plot().to_dict() == figure.to_dict()


def test_of_several_ratios_the_largest_distance_is_drawn():
    gaps = [RatioGap("nope", False, 1, 1, times, 0.0, 0.0) for times in (2, 4)]
    gaps += [RatioGap("rope", True, ones, 1, times, 0.1 * ones * times, 0.3) for ones in (1, 2) for times in (2, 4)]
    found = RatioBlindness(tuple(gaps), 3, 1)
    none, rope = ratio_blindness(found).data
    assert (none.name, rope.name) == ("NoPE, no mask", "RoPE, causal mask")
    assert list(rope.x) == [2, 4]
    assert list(rope.y) == pytest.approx([0.4, 0.8])
    assert all(0 < y < 1e-16 for y in none.y)  # a log axis has no zero
    assert list(none.customdata) == [0, 0]
    assert "only ratios: NoPE, no mask" in found.plot().layout.title.subtitle.text


def test_counts_have_a_panel_per_precision():
    values = torch.tensor([[[[0.5, 0.25]], [[0.125, 0.0]]]], dtype=torch.float64)
    found = CountingCollapse((8, 16), ("alibi",), ("float32", "bfloat16"), values, values / 2, values / 4, values == 0, "0")
    figure = counting_collapse(found)
    assert [trace.xaxis for trace in figure.data] == ["x"] * 3 + ["x2"] * 3
    assert list(figure.data[0].y) == [0.5, 0.25]
    assert list(figure.data[1].y) == [0.25, 0.125]
    assert list(figure.data[3].y) == [0.125, None]  # equal to the bit
    assert figure.layout.xaxis2.title.text == "n, ones (bfloat16)"
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["ALiBi"]
    assert found.plot().to_dict() == figure.to_dict()


def test_synthetic_distances_stand_beside_what_theory_expects():
    distances = torch.tensor([[[1.0, 0.1], [3.0, 0.3]]], dtype=torch.float64)
    found = SyntheticCollapse((10, 100), ("nope",), distances, distances / 2, distances == 0, 64, 1, "float32")
    low, high, mean, expected = synthetic_collapse(found).data
    assert (list(low.y), list(high.y)) == ([1, 0.1], [3, 0.3])
    assert list(mean.y) == pytest.approx([2, 0.2])
    assert list(expected.y) == pytest.approx([1, 0.1])
    assert mean.name == "NoPE, exponent 1.00"
    assert "width 64, 1 head, float32" in found.plot().layout.title.subtitle.text
    assert repr(found) == "SyntheticCollapse(float32, lengths 10 to 100, 2 seeds; exponents: NoPE 1.00)"
