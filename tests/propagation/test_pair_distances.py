"""Distances of two vectors against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sd_lens.propagation.pair_distances import METRICS, distance, require_metrics

A, B = torch.tensor([3.0, 0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 4.0, 1.0, -2.0, 1.0])
WANTED = {
    "l1": [9.0],
    "l2": [math.sqrt(29)],
    "linf": [4.0],
    "l1_heads": [7.0, 2.0, 0.0],
    "l2_heads": [5.0, 2.0, 0.0],
    "linf_heads": [4.0, 2.0, 0.0],
    "relative": [math.sqrt(29 / 11)],
    "cosine": [1 - 2 / math.sqrt(11 * 22)],
}


@pytest.mark.parametrize("metric", WANTED)
def test_norms(metric):
    assert distance(metric, 2)(A, B).tolist() == pytest.approx(WANTED[metric], abs=1e-12)


def test_predictions():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    assert distance("kl", 2)(p.log() + 3, q.log()).item() == pytest.approx(0.25 * math.log(2), abs=1e-7)
    assert distance("argmax", 2)(p, q).tolist() == [1.0]
    assert distance("argmax", 2)(p, p).tolist() == [0.0]


def test_small_angles_keep_their_digits():
    turned = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    assert distance("cosine", 2)(torch.tensor([1.0, 0.0], dtype=torch.float64), turned).item() == pytest.approx(0.5e-18, rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_a_vector_is_no_distance_from_itself(metric):
    assert distance(metric, 2)(A, A).abs().max().item() <= 1e-15


def test_names_are_checked():
    assert require_metrics("l2") == ("l2",)
    assert require_metrics(["l2", "kl", "l2"]) == ("l2", "kl")
    with pytest.raises(ValueError, match=r"^metrics: got 'l3'; allowed: 'linf', 'l2'"):
        require_metrics(["l2", "l3"])
    with pytest.raises(ValueError, match=r"^metrics: got none"):
        require_metrics([])
