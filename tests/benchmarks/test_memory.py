"""The largest memory of a process is seen, also where it is over before the body ends."""

import torch

from benchmarks.memory import PeakMemory


def test_memory_that_was_let_go_is_seen():
    with PeakMemory() as memory:
        torch.ones(2**25).sum()
    assert 2**27 <= memory.beyond < 2**28
