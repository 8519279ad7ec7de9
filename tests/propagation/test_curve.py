"""Critical lengths and decay of curves whose numbers are put in by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sd_lens.propagation.critical import critical_length
from sd_lens.propagation.curve import CollapseCurve

LENGTHS = (1, 10, 100, 1000)
EPS = 2.0**-7


def curve(values, equal=None, dtype="bfloat16", layer="final", metric="linf"):
    """Values are (sample, length) or (sample, length, part)."""
    values = torch.tensor(values, dtype=torch.float64)
    values = values.unsqueeze(-1) if values.ndim == 2 else values
    same = (values == 0).all(-1) if equal is None else torch.tensor(equal)
    return CollapseCurve("m", 3, {"name": "count-ones"}, LENGTHS, {(dtype, layer, metric): values}, {(dtype, layer): same})


@pytest.mark.parametrize(
    ("values", "below", "equal"),
    [
        ([[1.0, 0.1, 0.01, 0.001]], 1000, None),
        ([[1.0, 0.1, 0.001, 0.0]], 100, 1000),
        ([[1.0, 0.001, 0.1, 0.001]], 1000, None),  # it must stay below
        ([[1.0, 0.1, 0.001, 0.1]], None, None),
        ([[1.0, EPS, EPS, EPS]], None, None),  # as large as the epsilon is not below it
        ([[0.0, 0.0, 0.0, 0.0]], 1, 1),
        ([[1.0, 0.0, 0.1, 0.0]], 1000, 10),
        ([[0.1, 0.001, 0.001, 0.0], [0.1, 0.1, 0.001, 0.001]], 100, None),  # all samples
        ([[[0.1, 0.1], [0.001, 0.1], [0.001, 0.001], [0.0, 0.0]]], 100, 1000),  # all chunks
    ],
)
def test_critical_lengths(values, below, equal):
    found = critical_length(curve(values))
    assert (found.epsilon, found.below_epsilon, found.equal, found.longest) == (EPS, below, equal, 1000)


def test_epsilons_are_the_precisions():
    values = [[1.0, 2.0**-10, 2.0**-11, 2.0**-24]]
    assert [critical_length(curve(values, dtype=name)).below_epsilon for name in ("bfloat16", "float16", "float32")] == [
        10,
        100,
        1000,
    ]


def test_distances_of_another_precision():
    values = torch.tensor([[1.0, 0.1, 0.001, 0.0001]], dtype=torch.float64).unsqueeze(-1)
    rounded = torch.tensor([[1.0, 0.1, 0.0, 0.01]], dtype=torch.float64).unsqueeze(-1)
    both = CollapseCurve(
        "m",
        3,
        {"name": "count-ones"},
        LENGTHS,
        {("float32", "final", "linf"): values, ("bfloat16", "final", "linf"): rounded},
        {("float32", "final"): values[..., 0] == 0, ("bfloat16", "final"): rounded[..., 0] == 0},
    )
    own, true = critical_length(both, "bfloat16"), critical_length(both, "bfloat16", measured="float32")
    assert (own.below_epsilon, own.equal, own.measured) == (None, 100, "bfloat16")
    assert (true.below_epsilon, true.equal, true.measured, true.epsilon) == (100, 100, "float32", EPS)
    half = critical_length(both, torch.float16, measured="float32")
    assert (half.below_epsilon, half.equal) == (1000, None)


def test_decay_is_fitted_from_the_peak_to_the_rounding():
    # Rounding of one size at the end would halve the exponent, and so would a rise before the fall.
    fit = curve([[1.0, 0.1, 0.01, 0.007]]).decay()
    assert (fit.exponent, fit.start, fit.stop) == (pytest.approx(1.0), 1, 100)
    assert curve([[1.0, 0.1, 0.01, 0.007]], dtype="float32").decay().exponent < 0.8
    risen = curve([[0.1, 1.0, 0.1, 0.01]], dtype="float32")
    assert (risen.decay().exponent, risen.decay().start) == (pytest.approx(1.0), 10)
    assert risen.decay(start=1).exponent < 0.5
    two = curve([[0.0, 0.0, 1.0, 0.1]], dtype="float32").decay()  # any line goes through two points
    assert math.isnan(two.exponent)
    assert (two.start, two.stop) == (100, 1000)


def test_rounding_is_held_against_the_size_of_a_representation():
    large = replace(curve([[10.0, 1.0, 0.1, 0.06]]), sizes={("bfloat16", "final", "linf"): 8.0})
    assert large.decay().exponent == pytest.approx(1.0)
    assert large.decay().stop == 100


def test_rounding_is_seen_beside_a_finer_run():
    values = {
        ("float32", "final", "linf"): torch.tensor([[1.0, 0.1, 0.01, 0.001]], dtype=torch.float64).unsqueeze(-1),
        ("bfloat16", "final", "linf"): torch.tensor([[1.0, 0.11, 0.01, 0.02]], dtype=torch.float64).unsqueeze(-1),
    }
    equal = dict.fromkeys([("float32", "final"), ("bfloat16", "final")], torch.zeros(1, 4, dtype=torch.bool))
    both = CollapseCurve("m", 3, {"name": "count-ones"}, LENGTHS, values, equal)
    assert both.decay("float32").stop == 1000
    assert both.decay("bfloat16").exponent == pytest.approx(1.0)
    assert both.decay("bfloat16").stop == 100


def test_rows():
    table = curve([[1.0, 0.5, 0.25, 0.0], [3.0, 0.1, 0.05, 0.0]]).to_dataframe()
    assert table["mean"].tolist() == pytest.approx([2.0, 0.3, 0.15, 0.0])
    assert table["min"].tolist() == pytest.approx([1.0, 0.1, 0.05, 0.0])
    assert table["max"].tolist() == pytest.approx([3.0, 0.5, 0.25, 0.0])
    assert table["equal"].tolist() == [False, False, False, True]


def test_lines_are_checked(as_users_run_it):
    one = curve([[1.0, 0.1, 0.01, 0.001]])
    assert one.line(torch.bfloat16) == ("bfloat16", "final", "linf")
    with pytest.raises(ValueError, match=r"^dtype: got 'float32'; allowed: 'bfloat16'"):
        critical_length(one, "float32")
    with pytest.raises(ValueError, match=r"^layer: got 7; allowed: 'final'"):
        one.decay(layer=7)
    with pytest.raises(ValueError, match=r"^metric: got 'cosine', which is on another scale"):
        critical_length(one, metric="cosine")
    with pytest.raises(ValueError, match=r"^metric: got a curve of kl"):
        critical_length(curve([[1.0, 1.0, 1.0, 1.0]], layer="logits", metric="kl"))
