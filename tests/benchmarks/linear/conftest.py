"""Both paths on the tiny block, run once for all tests."""

import pytest

from benchmarks.linear import timing
from benchmarks.linear.blocks import SHAPES
from benchmarks.linear.ours import run_ours
from benchmarks.linear.pair import Pair
from benchmarks.linear.sampled import run_sampled


@pytest.fixture(scope="session")
def ours():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_TRYING", 0.05)
        return run_ours(SHAPES["tiny"])


@pytest.fixture(scope="session")
def sampled():
    return run_sampled(SHAPES["tiny"], samples=40_000)


@pytest.fixture(scope="session")
def pair(ours, sampled):
    return Pair("tiny", sampled, ours)
