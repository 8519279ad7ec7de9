"""The tables mark what was not run, and read as text."""

from benchmarks.linear import sampled as sampled_module
from benchmarks.linear.blocks import SHAPES
from benchmarks.linear.checkpoint import CheckpointRun
from benchmarks.linear.pair import Pair
from benchmarks.linear.sampled import run_sampled
from benchmarks.linear.table import agreement, checkpoint_table, our_stages, path_tables

TINY = SHAPES["tiny"]


def test_what_was_run_is_not_marked(pair):
    whole = path_tables([pair])
    assert "≈" not in whole
    assert "weight reads" in whole


def test_what_was_extrapolated_is_marked(monkeypatch, ours):
    quick = run_sampled(TINY, samples=5_000, quick=True)
    assert quick.found is None
    assert "as the cube of the width from 32" in path_tables([Pair("tiny", quick, ours)])
    monkeypatch.setattr(sampled_module, "_available", lambda _: 0)
    marked = path_tables([Pair("tiny", run_sampled(TINY, samples=5_000), ours)])
    assert "≈ tiny: 5000 samples extrapolated from 1000 and 2000 samples" in marked
    assert "sampled (2000 samples)" in marked


def test_columns_line_up(pair):
    for table in our_stages([pair]), agreement([pair]):
        assert len({len(line) for line in table.splitlines()}) == 1


def test_the_block_that_stands_out_is_held_against_the_planted_one():
    best = {"block": 1, "sigma1": 100.0, "sigma2": 4.0}
    run = CheckpointRun(TINY, 4, 4 * 10**9, files=6, seconds=60.0, peak=25 * 10**8, baseline=5 * 10**8, planted=1, best=best)
    table = checkpoint_table(run)
    assert "2 GB" in table
    assert "NOT" not in table
    best["block"] = 2
    assert "NOT found (block 2 instead)" in checkpoint_table(run)
