"""What a position still feels of each token, as bars and as a heat map."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sd_lens.display.sensitivity_figures import MAX_TICKS, sensitivity_figure
from sd_lens.display.style import VERMILLION
from sd_lens.propagation.sensitivity_result import Sensitivity


@pytest.fixture
def one():
    frobenius = torch.tensor([[0.5, 2.0, 1.0, 4.0, 0.0]], dtype=torch.float64)
    return Sensitivity(
        model_name="made",
        of="final",
        position=3,
        sources=(0,),
        frobenius=frobenius,
        spectral=frobenius / 2,
        standard_error=torch.zeros_like(frobenius),
        stream_norm=torch.full_like(frobenius, 10.0),
        tokens=torch.arange(5),
        texts=("<b>", " the", "\n", "cat", "!"),
        high_norm=torch.tensor([True, False, False, False, False]),
        sinks=torch.tensor([True, False, True, False, False]),
        method="exact",
        n_products=8,
    )


@pytest.fixture
def several(one):
    rows = torch.cat([one.frobenius, 10 * one.frobenius])
    return replace(one, sources=(0, 3), frobenius=rows, spectral=rows / 2, standard_error=0 * rows, stream_norm=rows.new_ones(2, 5))


def named(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def test_bars_up_to_the_position_with_marks(one):
    figure = one.plot()
    others, high = named(figure, "other tokens"), named(figure, "high-norm tokens")
    assert (list(others.x), list(others.y)) == ([1, 2, 3], [2.0, 1.0, 4.0])
    assert (list(high.x), list(high.y), high.marker.color) == ([0], [0.5], VERMILLION)
    assert list(named(figure, "spectral norm").y) == [0.25, 1.0, 0.5, 2.0]
    sinks = named(figure, "attention sink")
    assert list(sinks.x) == [0, 2]
    assert all(y > value for y, value in zip(sinks.y, (0.5, 1.0), strict=True))
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.range[0] < math.log10(0.25)
    assert figure.layout.yaxis.range[1] > math.log10(4.0)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;", "·the", "↵", "cat"]
    assert figure.layout.title.text == "What position 3 still feels of each token in made"
    wanted = (
        "Jacobian of the final representation, with respect to the input of block 0, exact; 1 high-norm token: 1 % of the squares"
    )
    assert figure.layout.title.subtitle.text == wanted
    token, marks, numbers = high.customdata[0]
    assert (token, marks) == ("&lt;b&gt;", ", high-norm token, attention sink")
    assert numbers == "Frobenius norm 0.5, 1 % of the squares<br>times the vector's length 5<br>spectral norm 0.25"
    json.loads(figure.to_json())


def test_estimates_have_error_bars_and_no_spectral_norms(one):
    estimated = replace(
        one,
        method="hutchinson",
        n_products=32,
        spectral=torch.full_like(one.spectral, math.nan),
        standard_error=one.frobenius / 10,
        of=2,
        intervention="ablate",
    )
    figure = sensitivity_figure(estimated)
    assert list(named(figure, "other tokens").error_y.array) == pytest.approx([0.2, 0.1, 0.4])
    assert "spectral norm" not in [trace.name for trace in figure.data]
    assert figure.layout.title.text.endswith("in made (ablate)")
    about = figure.layout.title.subtitle.text
    assert about.startswith(
        "Jacobian of the stream after block 2, with respect to the input of block 0, estimated from 32 random probes"
    )
    assert "0.5 ± 0.05," in named(figure, "high-norm tokens").customdata[0][2]


def test_spectral_norms_alone(one):
    nan = torch.full_like(one.frobenius, math.nan)
    figure = sensitivity_figure(replace(one, frobenius=nan, standard_error=nan))
    assert list(named(figure, "other tokens").y) == [1.0, 0.5, 2.0]
    assert figure.layout.yaxis.title.text == "spectral norm of the Jacobian (log scale)"
    assert named(figure, "high-norm tokens").customdata[0][2] == "spectral norm 0.25"
    assert figure.layout.title.subtitle.text.endswith("exact")


def test_several_sources_are_a_heat_map(several):
    figure = several.plot()
    heatmap = figure.data[0]
    np.testing.assert_allclose(heatmap.z, np.log10(several.frobenius[:, :4].numpy()))
    assert list(figure.layout.yaxis.ticktext) == ["0", "3"]
    assert list(named(figure, "high-norm token").x) == [0]
    assert list(named(figure, "attention sink").x) == [0, 2]
    assert all(y > 1.5 for name in ("high-norm token", "attention sink") for y in named(figure, name).y)  # above the map
    assert heatmap.customdata[1][3][2].startswith("Frobenius norm 40, ")
    json.loads(figure.to_json())


def test_tokens_that_are_not_felt_have_no_colour(several, one):
    some = several.frobenius.clone()
    some[0, 1] = 0
    assert math.isnan(sensitivity_figure(replace(several, frobenius=some)).data[0].z[0][1])
    for result in (several, one):
        zeros = torch.zeros_like(result.frobenius)
        figure = sensitivity_figure(replace(result, frobenius=zeros, spectral=zeros, standard_error=zeros))
        assert "the output depends on none of these tokens" in [note.text for note in figure.layout.annotations]


def test_of_many_tokens_some_are_named_and_all_marked_ones(one):
    n = 3 * MAX_TICKS
    long = torch.ones(1, n, dtype=torch.float64)
    high = torch.zeros(n, dtype=torch.bool)
    high[100] = True
    wide = replace(
        one,
        position=n - 1,
        frobenius=long,
        spectral=long,
        standard_error=0 * long,
        stream_norm=long,
        tokens=torch.arange(n),
        texts=("a",) * n,
        high_norm=high,
        sinks=~high & False,
    )
    shown = list(sensitivity_figure(wide).layout.xaxis.tickvals)
    assert 100 in shown
    assert n - 1 in shown
    assert len(shown) <= MAX_TICKS
    assert len(named(sensitivity_figure(wide), "other tokens").x) == n - 1
