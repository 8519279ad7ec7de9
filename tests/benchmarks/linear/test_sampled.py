"""The paper's path forms the package's maps, and runs with fewer samples only where all do not fit."""

import pytest
import torch

from benchmarks.linear.blocks import SHAPES, planted_block
from benchmarks.linear.sampled import dense_maps, extrapolated, sample_sizes
from sd_lens.linear.linearize import linearize
from sd_lens.linear.maps import IdentityPlus

TINY = SHAPES["tiny"]


def test_the_dense_maps_are_those_of_the_package():
    block = planted_block(TINY)
    maps = linearize(block.weights())
    dense = dense_maps(block, maps.ffn.fit.to_dense())
    for matrix, linear_map in zip(
        dense, (IdentityPlus(maps.attention), IdentityPlus(maps.ffn), maps.block, maps.update), strict=True
    ):
        torch.testing.assert_close(matrix, linear_map.to_dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "available", "quick", "sizes"),
    [
        (100_000, 1e9, False, (100_000,)),
        (100_000, 1e8, False, (20_000, 40_000)),
        (100_000, 1e9, True, (10_000, 20_000)),
        (1_000, 0, False, (200, 400)),
        (200, 0, False, (200,)),
    ],
)
def test_fewer_samples_are_run_where_all_do_not_fit(samples, available, quick, sizes):
    assert sample_sizes(TINY, samples, available, quick) == sizes


def test_what_is_extrapolated_is_linear_in_the_samples():
    assert extrapolated((20, 40), (3.0, 5.0), 100) == pytest.approx(11.0)
    assert extrapolated((100,), (7.0,), 100) == 7.0
