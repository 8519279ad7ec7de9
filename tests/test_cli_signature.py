"""``sd-lens signature``: what it prints and writes, and one line for bad input."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from sd_lens import cli
from sd_lens.applications.signature import Signature, with_sign


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, loaded_once):
    """Runs the command in this process, in an empty folder; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sd-lens", "signature", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture
def stored(tmp_path):
    """Two signatures of the shipped model's width that have nothing to do with it, one of them saved under the same name."""
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(3))
    for vector, name in zip(vectors, ("tiny", "stranger/one"), strict=True):
        made = Signature(with_sign(vector), name, d_model=128, n_blocks=6, method="activations", block=1, prompts="built-in")
        made.save(tmp_path / name.replace("/", "-"))
    return tmp_path


def test_the_shipped_models_signature_is_saved_and_compared(run, stored, tmp_path):
    code, out, err = run(
        "tiny",
        "tiny.json",
        "stranger-one",
        "--save",
        "out",
        "--json",
        "result.json",
        "--out",
        "page.html",
        "--text",
        "One. Two.",
    )
    assert code == 0, err
    assert "3 families among 3 models" in out
    assert "tiny (2), stranger/one" in out
    assert "random directions: 85.9° ± 3.1°" in out
    assert "└── " in out
    assert sorted(os.listdir(tmp_path / "out")) == [
        f"{name}.{ending}" for name in ("stranger_one", "tiny", "tiny_2") for ending in ("json", "safetensors")
    ]
    measured = Signature.load(tmp_path / "out" / "tiny")
    assert (measured.block, measured.prompts, measured.n_prompts) == (2, "given", 1)
    record = json.loads((tmp_path / "result.json").read_text())
    assert {"models", "distances_deg", "chance_deg", "verdicts"} <= set(record)
    assert record["models"][0]["content_hash"] == measured.content_hash
    assert {pair["verdict"] for pair in record["verdicts"]} == {"unrelated"}
    assert "<h1>Lineage</h1>" in (tmp_path / "page.html").read_text()


def test_one_model_alone_prints_its_signature(run):
    code, out, _ = run("--method", "weights", "--block", "2")
    assert code == 0
    assert out.startswith("The signature of tiny is the leading left singular vector of block 2's FFN")
    assert "content hash: " in out
    assert "at 18," in out  # where the shipped model's massive activation is


def test_bad_input_is_one_line(run, stored, tmp_path):
    listing = tmp_path / "tiny.json"
    whole = listing.read_text()
    (tmp_path / "empty").mkdir()
    listing.write_text(whole.replace('"block": 1', '"block": 3'))
    (tmp_path / "stranger-one.safetensors").unlink()
    for words, needle in (
        (("tiny.json",), "hash mismatch"),
        (("stranger-one.json",), "has no stranger-one.safetensors beside it"),
        (("nothing.json",), "no file 'nothing.json'"),
        (("./nowhere", "tiny"), "no folder './nowhere'"),
        (("tiny", "./empty"), "has no config.json"),
        (("--method", "magic"), "--method: got 'magic'; allowed: activations, weights"),
        (("--block", "1"), "--block: got 1; allowed: with one model and --method weights"),
        (("--method", "weights", "--block", "6"), "block: got 6; allowed: 0 to 5"),
        (("--method", "weights", "--text", "a"), "got prompts with --method weights"),
        (("tiny.json", "--text", "a"), "got prompts with saved signatures only"),
        (("--save", "no/where"), "--save: got 'no/where'"),
        (("--dtype", "int8"), "--dtype: got 'int8'"),
        (("--json", "no/where.json"), "--json"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, ""), words
        assert err.startswith("sd-lens: ")
        assert err.count("\n") == 1, err
        assert needle in err
