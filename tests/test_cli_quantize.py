"""``sd-lens quantize``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest

from sd_lens import cli
from sd_lens.applications.quantization import quantization_study
from sd_lens.models.loading import load

TEXT = "Once upon a time there was a small boat. It lay at the shore, and nobody knew whose it was. " * 4
DOWN = "model.layers.2.mlp.down_proj"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, loaded_once):
    """Runs the command in this process, in an empty folder; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sd-lens", "quantize", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_what_it_writes_is_the_apis_result(run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "names.txt").write_text(f"\n{DOWN}\n  model.layers.1.mlp.down_proj \n")
    words = ("--text", "text.txt", "--spare-file", "names.txt", "--window", "32", "--stride", "16", "--no-each-block")
    more = ("--method", "rtn", "--max-spared", "1", "--budget", "0", "--unembedding", "--top", "2")
    code, out, err = run("tiny", *words, *more, "--json", "study.json", "--out", "page.html")
    assert (code, err) == (0, "")
    study = quantization_study(
        load("tiny"),
        TEXT,
        methods=["rtn"],
        spare=[DOWN, "model.layers.1.mlp.down_proj"],
        each_block=False,
        max_spared=1,
        budget=0.0,
        unembedding=True,
        window=32,
        stride=16,
    )
    record = json.loads((tmp_path / "study.json").read_text())
    assert (record["schema"], record["model"], record["d_model"], record["n_blocks"]) == ("sd_lens.quantize/1", "tiny", 128, 6)
    assert [(row["method"], row["spared"], row["loss"]) for row in record["rows"]] == [
        (row.method, row.spared, row.loss) for row in study.rows
    ]
    assert [row["spared"] for row in record["rows"]] == ["none", "none", "explosion and decay", "given", "recommended"]
    assert (record["explosion_blocks"], record["decay_blocks"]) == ([2], [])
    assert (record["window"], record["stride"], record["bos"], record["n_tokens"]) == (32, 16, True, study.n_tokens)
    assert record["ranges"][-1]["role"] == "unembed"
    assert [one["input_max"] for one in record["ranges"]] == [one.input_max for one in study.ranges]
    assert study.recommendation is not None
    assert record["recommended"] == list(study.recommendation.spared)
    assert len(record["recommended"]) == 1
    assert (record["within_budget"], record["budget"]) == (study.recommendation.within_budget, 0)
    for sentence in study.sentences():
        assert sentence in out
    worst = min(study.ranges, key=lambda one: one.token_sqnr_db["rtn, per_tensor"])
    listed = out[out.index("worst kept of 43 projections (RTN per-tensor)") :].splitlines()
    assert listed[2].split()[:2] == [worst.name, f"{worst.token_sqnr_db['rtn, per_tensor']:.1f}"]
    assert listed[4] == ""  # two rows were asked for
    assert study.recommendation.torchao() in out
    assert study.recommendation.llm_compressor() in out
    given = next(line for line in out.splitlines() if line.startswith("given "))
    assert f"{study.row('rtn', 'per_tensor', 'given').perplexity:.2f} (" in given
    assert "Perplexity of tiny in eight bits" in (tmp_path / "page.html").read_text()
    assert sorted(os.listdir(tmp_path)) == ["names.txt", "page.html", "study.json", "text.txt"]


def test_only_what_was_asked_for_is_computed(run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    words = ("--text", "text.txt", "--window", "64", "--no-each-block", "--method", "smoothquant", "--granularity", "per_token")
    code, out, err = run(*words, "--recommend", "none", "--no-bos", "--json", "study.json")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "study.json").read_text())
    assert record["recommended"] is None
    assert {(row["method"], row["granularity"]) for row in record["rows"][1:]} == {("smoothquant", "per_token")}
    assert record["bos"] is False
    assert (
        "(no explosion or decay block with a dense FFN was found on this text)" in out
    )  # which begins with no token that explodes
    assert "torchao" not in out


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("--text", "short.txt"), " tokens; allowed: at least 127, one window"),
        (("--text", "missing.txt"), "--text: missing.txt cannot be read (No such file or directory); allowed: a text file"),
        (("--text", "."), "--text: . cannot be read (Is a directory)"),
        (("--text", "empty.txt"), "--text: empty.txt is empty; allowed"),
        (("--text", "latin.txt"), "--text: latin.txt is not UTF-8 text; allowed"),
        (("--spare", "model.layers.2.mlp.down_prj"), f"spare: got 'model.layers.2.mlp.down_prj'; allowed: names of linear projections in the Hugging Face model, such as '{DOWN}'"),
        (("--spare", DOWN, "--spare-file", "short.txt"), "--spare, --spare-file: got both; allowed: one of them"),
        (("--spare-file", "empty.txt"), "--spare-file: empty.txt is empty; allowed"),
        (("--method", "gptq"), "--method: got 'gptq'; allowed: rtn, smoothquant"),
        (("--granularity", "per_group"), "--granularity: got 'per_group'; allowed: per_tensor, per_token"),
        (("--method", "rtn", "--recommend", "smoothquant"), "--recommend: got 'smoothquant'; allowed: rtn, none"),
        (("--backend", "int8"), "--backend: got 'int8'; allowed: fake, torchao"),
        (("--alpha", "2"), "'--alpha'"),
        (("--budget", "-1"), "'--budget'"),
        (("--budget", "inf"), "budget: got inf; allowed: 0 and more"),
        (("--window", "9999"), "window: got 9999; allowed: 2 to "),
        (("--stride", "128"), "stride: got 128; allowed: 1 to 127"),
        (("--json", "nowhere/study.json"), "--json: got 'nowhere/study.json', whose folder does not exist"),
        (("./nowhere",), "nowhere"),
    ],
)  # fmt: skip
def test_refused_in_one_line(run, tmp_path, words, needle):
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("sd-lens: ")
    assert err.count("\n") == 1, err
    assert needle in err
    assert sorted(os.listdir(tmp_path)) == ["empty.txt", "latin.txt", "short.txt"]


def test_without_torchao_its_backend_is_refused_before_any_work(run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name, *rest))
    code, _, err = run("./nowhere", "--backend", "torchao")
    assert code == 2
    assert "backend: got 'torchao', which is not installed; allowed: 'fake', or pip install 'sd-lens[quantization]'" in err
