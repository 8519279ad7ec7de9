"""Each path runs in a process of its own, and a busy machine is said."""

from dataclasses import replace

import pytest

from benchmarks.linear import pair as module
from benchmarks.linear.blocks import SHAPES
from benchmarks.linear.pair import in_a_process
from benchmarks.linear.sampled import run_sampled


def test_a_path_runs_in_a_process_of_its_own(sampled):
    found = in_a_process(run_sampled, SHAPES["tiny"], threads=1, samples=40_000, label="elsewhere")
    assert found.run_with == (40_000,)
    assert found.found.sigma1 == pytest.approx(sampled.found.sigma1, rel=1e-3)


@pytest.mark.parametrize("cores", [1.0, 0.5])
def test_a_busy_machine_is_said(cores, monkeypatch, capsys, ours, sampled):
    runs = {"run_ours": ours, "run_sampled": replace(sampled, cores=cores)}
    monkeypatch.setattr(module, "in_a_process", lambda run, *_, **__: runs[run.__name__])
    pair = module.measure("tiny", samples=40_000, device="cpu", threads=1, quick=False)
    assert pair.ours is ours
    assert ("the machine was busy" in capsys.readouterr().err) == (cores < 0.9)
