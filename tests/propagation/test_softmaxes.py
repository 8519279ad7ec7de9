"""Total variation of softmaxes against published numbers, closed forms and brute force."""

import math

import pytest
import torch

from sd_lens.propagation.decay import fit_decay
from sd_lens.propagation.softmaxes import alternating_total_variation, expected_total_variation, softmax_total_variation

PUBLISHED = {500: 0.0258, 1000: 0.0170, 2500: 0.0078, 10_000: 0.0020}


def test_the_published_numbers():
    variation = softmax_total_variation(list(PUBLISHED))
    assert variation.values.mean(0).tolist() == pytest.approx(list(PUBLISHED.values()), rel=0.1)
    assert list(variation.expected) == pytest.approx(list(PUBLISHED.values()), rel=0.05)


@pytest.mark.parametrize(("changed", "size"), [(200, 0.1), (50, 0.1), (400, 1.5)])
def test_sampled_and_closed_form_agree(changed, size):
    """The mean over 60 seeds lies within four of its own standard errors, which are about half a percent."""
    variation = softmax_total_variation([300, 1000, 4000], seeds=60, changed=changed, size=size)
    table = variation.to_dataframe()
    error = table["std"] / math.sqrt(60)
    assert (error < 0.015 * table["mean"]).all()
    assert ((table["mean"] - table["expected"]).abs() < 4 * error + 0.005 * table["expected"]).all()
    assert (table["min"] <= table["mean"]).all()
    assert (table["mean"] <= table["max"]).all()


def test_it_falls_like_one_over_the_length():
    variation = softmax_total_variation([20_000, 80_000], seeds=3)
    assert variation.decay().exponent == pytest.approx(1, abs=0.02)
    growth = math.expm1(0.1) / 0.1 - 1
    assert 10**8 * expected_total_variation(10**8) == pytest.approx(2 * growth * 200, rel=1e-4)


def test_lengths_share_their_entries():
    alone = softmax_total_variation([512], seeds=2).values[:, 0]
    among = softmax_total_variation([512, 2048], seeds=2).values[:, 0]
    assert torch.equal(alone, among)


@pytest.mark.parametrize("n", [2, 4, 10, 500, 10_000])
def test_the_alternating_counterexample_is_the_same_at_every_length(n):
    e = math.e
    assert alternating_total_variation(n) == pytest.approx(2 * (e - 1) / (e + 1), abs=1e-12)
    assert alternating_total_variation(n) == pytest.approx(0.92423, abs=1e-5)
    assert alternating_total_variation(n, low=-1.0, high=2.0) == pytest.approx(2 * math.tanh(1.5), abs=1e-12)
    assert alternating_total_variation(n, low=3.0, high=3.0) == 0


def test_bad_input(as_users_run_it):
    for arguments, message in (
        ({"lengths": []}, "lengths: got"),
        ({"lengths": [0]}, "lengths: got 0; allowed: whole numbers from 1"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"changed": 0}, "changed: got 0"),
        ({"size": 0.0}, "size: got 0.0"),
        ({"size": math.inf}, "size: got inf"),
        ({"size": "large"}, "size: got 'large'"),
    ):
        with pytest.raises(ValueError, match=message):
            softmax_total_variation(**{"lengths": [100], **arguments})
    with pytest.raises(ValueError, match="length: got 3; allowed: even numbers from 2"):
        alternating_total_variation(3)
    with pytest.raises(ValueError, match="low, high: got"):
        alternating_total_variation(4, low=1.0, high=0.0)
    with pytest.raises(ValueError, match="length: got 0"):
        expected_total_variation(0)


def test_fits():
    lengths = [10, 20, 40, 80]
    x = torch.tensor([float(n) for n in lengths])
    two = fit_decay(lengths, torch.stack([3 / x, x**-2.0]))
    assert (two.exponent, two.n_runs) == (pytest.approx(1.5), 2)
    assert two.standard_error == pytest.approx(0.5)  # of slopes 1 and 2
    bent = torch.tensor([[8.0, 4.0, 2.5, 1.0]])
    one = fit_decay(lengths, bent)
    reference = torch.linalg.lstsq(torch.stack([x.log(), torch.ones(4)], 1).double(), bent.log().T.double()).solution[0]
    assert one.exponent == pytest.approx(-float(reference), abs=1e-6)
    residuals = bent[0].log() + one.exponent * x.log()
    residuals = residuals - residuals.mean()
    by_hand = math.sqrt(float((residuals**2).sum()) / 2 / float(((x.log() - x.log().mean()) ** 2).sum()))
    assert one.standard_error == pytest.approx(by_hand, rel=1e-4)
    assert fit_decay(lengths, 1 / x[None], start=40).start == 40
    assert math.isnan(fit_decay(lengths, torch.tensor([[1.0, 0.0, 0.0, 0.0]])).exponent)  # nothing left to draw a line through
    with pytest.raises(ValueError, match="start: got 100; allowed: up to 80"):
        fit_decay(lengths, 1 / x[None], start=100)
