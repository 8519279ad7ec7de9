"""The command prints what it saves, and refuses what it cannot run."""

import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks.linear import __main__ as command
from benchmarks.machine import machine


def test_the_command_saves_its_tables(tmp_path, monkeypatch, capsys, pair):
    assert Path(benchmarks.__file__).parent / "results" / "linear.md" == command.RESULTS
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results" / "linear.md")
    monkeypatch.setattr(command, "measure", lambda *_, **__: pair)
    monkeypatch.setattr(command, "run_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(command, "checkpoint_table", lambda _: "of the checkpoint")
    monkeypatch.setattr(sys, "argv", ["linear", "--write", "--shapes", "tiny", "--device", "cpu"])
    command.main()
    saved = (tmp_path / "results" / "linear.md").read_text(encoding="utf-8")
    assert saved == capsys.readouterr().out
    assert "weight reads" in saved
    assert "of the checkpoint" in saved
    assert machine(1, "cpu") in saved


@pytest.mark.parametrize("arguments", [["--shapes", "3B"], ["--samples", "0"]])
def test_unknown_shapes_and_numbers_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["linear", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert "allowed" in capsys.readouterr().err
