"""``sd-lens dynamics``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from sd_lens import cli

FAMILY = Path(__file__).parents[1] / "training" / "family"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, loaded_once):
    """Runs the command in this process, in an empty folder; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sd-lens", "dynamics", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_a_folder_of_checkpoints_and_the_last_one(run, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("step-00500", "step-00250"):
        (tmp_path / "run" / name).symlink_to(FAMILY / name)
    words = ("run", "tiny", "--steps", "250,500,1250", "--text", "One. Two.", "--text", "Once upon a time there was a small boat.")
    code, out, err = run(*words, "--json", "dynamics.json", "--out", "page.html")
    assert code == 0, err
    assert "The explosion emerges at step 500 (block 2): the largest norm is " in out
    assert "6.5 times at step 500, 12.7 times at step 1250." in out.splitlines()[0]
    record = json.loads((tmp_path / "dynamics.json").read_text())
    assert (record["schema"], record["model"], record["d_model"], record["n_blocks"]) == ("sd_lens.dynamics/1", "tiny", 128, 6)
    assert record["emergence"] == {"label": "step-00500", "step": 500}
    assert [row["step"] for row in record["checkpoints"]] == [250, 500, 1250]
    assert [row["found"] for row in record["checkpoints"]] == [False, True, True]
    angles = [row["angle_to_last_deg"] for row in record["checkpoints"]]
    assert 60 > angles[0] > angles[1] > angles[2] == 0
    page = (tmp_path / "page.html").read_text()
    assert "How the defect direction of tiny comes about" in page
    assert sorted(os.listdir(tmp_path)) == ["dynamics.json", "page.html", "run"]


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("tiny",), "checkpoints: got 1; allowed: two or more"),
        (("empty", "tiny"), "folder empty has no config.json"),
        (("./nowhere", "tiny"), "checkpoints: no folder './nowhere'; allowed"),
        (("tiny", "tiny", "--steps", "1"), "steps: got 1; allowed: one for each of 2 checkpoints"),
        (("tiny", "tiny", "--steps", "2,1"), "steps: got 1 (tiny (2)) after 2 (tiny (1)); allowed: steps that grow"),
        (("tiny", "tiny", "--steps", "1,x"), "--steps: got 'x'; allowed: whole numbers from 0"),
        (("tiny", "tiny", "--min-ratio", "1"), "min_ratio: got 1.0; allowed: above 1"),
        (("tiny", "tiny", "--dtype", "int8"), "--dtype: got 'int8'; allowed"),
        (("tiny", "tiny", "--out", "nowhere/page.html"), "--out"),
        (("tiny", "tiny", "--text", "a", "--prompts-file", "b"), "--text, --prompts-file: got both"),
        ((), "checkpoints"),
    ],
)
def test_refused_in_one_line(run, tmp_path, words, needle):
    (tmp_path / "empty").mkdir()
    code, _, err = run(*words)
    assert code == 2
    assert err.startswith("sd-lens: ")
    assert err.count("\n") == 1, err
    assert needle in err.lower() if not words else needle in err
    assert os.listdir(tmp_path) == ["empty"]
