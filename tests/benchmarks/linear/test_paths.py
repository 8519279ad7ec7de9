"""Both paths reach the same numbers, and time all that they do."""

import pytest

from benchmarks.linear.ours import LINEARIZE


def test_both_paths_reach_the_same_numbers(ours, sampled):
    assert ours.fit_error < 1e-6
    assert sampled.fit_error < 0.1
    assert sampled.found.sigma1 == pytest.approx(ours.found.sigma1, rel=0.05)
    assert sampled.found.angle_deg == pytest.approx(ours.found.angle_deg, abs=0.5)
    assert sampled.found.eigenvalue == pytest.approx(ours.found.eigenvalue, rel=0.05)
    assert ours.found.eigenvector_angle_deg < 2


def test_times_are_of_all_stages_and_products_are_counted(ours, sampled):
    assert ours.total == pytest.approx(sum(ours.seconds.values()))
    assert len(ours.seconds) == len(sampled.seconds) == 5
    assert all(seconds > 0 for seconds in (*ours.seconds.values(), *sampled.seconds.values()))
    assert set(ours.products) == set(ours.seconds) - {LINEARIZE}
    assert all(0 < part < 1 for part in ours.in_products.values())
    assert ours.reads == pytest.approx(ours.total / ours.product)
