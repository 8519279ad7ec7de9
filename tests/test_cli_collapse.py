"""``sd-lens collapse``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from sd_lens import cli
from sd_lens.cli.collapsing import _held, _lengths
from sd_lens.propagation import overview
from sd_lens.propagation.overview import propagation_overview
from sd_lens.wording import propagated

TEXT = "The cat sat."


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, loaded_once):
    """Runs the command in this process, in an empty folder; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sd-lens", "collapse", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_what_it_writes_is_the_apis_result(run, monkeypatch, tmp_path):
    calls = []

    def seen(model, text, **options):
        calls.append((text, options, propagation_overview(model, text, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(overview, "propagation_overview", seen)
    words = (
        "--text",
        TEXT,
        "--probe",
        "copy-first",
        "--contrast",
        "changed",
        "--lengths",
        "4,1",
        "--metric",
        "l2",
        "--metric",
        "kl",
    )
    more = (
        "--dtype",
        "float32",
        "--layer",
        "1",
        "--layer",
        "final",
        "--separator-every",
        "2",
        "--mitigations",
        "--answers",
        "--no-bos",
    )
    code, out, err = run("tiny", *words, *more, "--json", "collapse.json", "--out", "page.html")
    assert (code, err) == (0, "")
    [(text, options, found)] = calls
    assert (text, options["probe"], options["lengths"], options["layers"]) == (TEXT, "copy-first", [4, 1], [1, "final"])
    assert (options["metrics"], options["dtypes"], options["separators"]) == (["l2", "kl"], ["float32"], (2,))
    assert (options["without_explosion"], options["answers"], options["exact"], options["prepend_bos"]) == (
        False,
        True,
        None,
        False,
    )
    record = json.loads((tmp_path / "collapse.json").read_text())
    assert (record["schema"], record["model"], record["d_model"], record["n_blocks"]) == ("sd_lens.collapse/1", "tiny", 128, 6)
    assert record["rows"] == found.curve.rows()
    assert {(row["layer"], row["metric"]) for row in record["rows"]} == {(1, "l2"), ("final", "l2"), ("logits", "kl")}
    assert record["probe"] == found.curve.probe
    assert (record["probe"]["separator_every"], record["probe"]["contrast"], record["probe"]["before"]) == (2, "changed", [])
    assert found.mitigations is not None
    assert [row["longest"] for row in record["mitigations"]["rows"]] == [row["longest"] for row in found.mitigations.rows()]
    assert record["answers"]["candidates"] == {"n": 2, "smallest": 0, "largest": 1}
    assert record["without_explosion"] is None
    assert [row["token"] for row in record["sensitivity"]["rows"]][:2] == ["The", " c"]
    for sentence in propagated(found):
        assert sentence in out
    row = next(line for line in out.splitlines() if line.split()[:1] == ["4"])
    cells = {(line[1], line[2]): f"{values[:, 1].mean():.4g}" for line, values in found.curve.values.items()}
    assert row.split()[1:] == list(cells.values())
    assert "critical length in float32 after block 1, machine epsilon 1.19e-07: none up to 4; equal to the bit: none up to 4" in out
    assert "\nwith separators\n" in out
    assert "\nanswers\n" in out
    page = (tmp_path / "page.html").read_text()
    assert all(
        f'id="{name}"' in page for name in ("figure-collapse-l2", "figure-collapse-kl", "figure-sensitivity", "figure-answers")
    )
    assert sorted(os.listdir(tmp_path)) == ["collapse.json", "page.html"]


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("--lengths", "1,9999"), "lengths: got 9999, whose longest sequence has 10001 tokens; allowed: sequences of at most 512 tokens"),
        (("--up-to", "511"), "lengths: got 511, whose longest sequence has 513 tokens"),
        (("--lengths", "4,0"), "--lengths: got '0'; allowed: whole numbers from 1, separated by commas"),
        (("--lengths", "4,,8"), "--lengths: got ''; allowed"),
        (("--lengths", "4", "--up-to", "8"), "--lengths, --up-to: got both; allowed: one of them"),
        (("--up-to", "0"), "'--up-to'"),
        (("--probe", "copy-middle"), "--probe: got 'copy-middle'; allowed: repeat-last, count-ones"),
        (("--probe", "count-ones", "--contrast", "changed"), "contrast: got 'changed' with 'count-ones'; allowed: 'repeated'"),
        (("--contrast", "removed"), "--contrast: got 'removed'; allowed: repeated, changed"),
        (("--metric", "l3"), "--metric: got 'l3'; allowed: linf, l2, l1, linf_heads"),
        (("--layer", "6"), "layers: got 6; allowed: 0 to 5, 'final'"),
        (("--layer", "first"), "--layer: got 'first'; allowed: a block, counted from 0, or final"),
        (("--dtype", "int8"), "--dtype: got 'int8'; allowed: float32, bfloat16, float16, float64"),
        (("--samples", "3"), "samples: got 3 with 'repeat-last', which has one pair per length; allowed: 1, or 'bernoulli'"),
        (("--probe", "bernoulli", "--p", "1.5"), "p: got 1.5; allowed: between 0 and 1"),
        (("--word", "dog"), "word: got 'dog' with 'repeat-last'; allowed: None, or 'count-word'"),
        (("--separator", "§§", "--separator-every", "3", "--lengths", "4"), "symbols.separator: the vocabulary of tiny has no token '§§'; allowed"),
        (("--text", ""), "prompts: got an empty prompt"),
        (("--device", "cuda:77"), "--device: got 'cuda:77'; allowed"),
        (("--json", "nowhere/collapse.json"), "--json: got 'nowhere/collapse.json', whose folder does not exist"),
        (("--out", "same", "--json", "same"), "--out, --json: got same for both; allowed: two files"),
        (("./nowhere",), "nowhere"),
    ],
)  # fmt: skip
def test_refused_in_one_line(run, tmp_path, words, needle):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("sd-lens: ")
    assert err.count("\n") == 1, err
    assert needle in err
    assert os.listdir(tmp_path) == []


def test_of_the_default_precisions_what_the_machine_cannot_run_is_left_out(run, monkeypatch, tmp_path):
    from sd_lens.models import precision

    def only_float32(dtype, device, real=precision._try):
        if dtype != torch.float32:
            raise RuntimeError("no such kernel")
        real(dtype, device)

    monkeypatch.setattr(precision, "_try", only_float32)
    code, out, err = run("--text", TEXT, "--lengths", "4", "--json", "collapse.json")
    assert (code, err) == (0, "")
    assert "(bfloat16 was left out: dtypes: got bfloat16, which cpu cannot run (no such kernel)" in out
    record = json.loads((tmp_path / "collapse.json").read_text())
    assert {row["dtype"] for row in record["rows"]} == {"float32"}
    assert record["notes"][0].startswith("bfloat16 was left out")


def test_a_precision_that_the_machine_cannot_run_is_refused(run, monkeypatch, tmp_path):
    from sd_lens.models import precision

    def cannot(dtype, device):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(precision, "_try", cannot)
    code, _, err = run("--dtype", "float16", "--dtype", "float32", "--lengths", "4", "--json", "collapse.json")
    assert code == 2
    assert "dtypes: got float16, which cpu cannot run (no such kernel); allowed: float64, float32" in err
    assert os.listdir(tmp_path) == []


def test_lengths_and_the_precision_that_weights_are_held_in():
    assert _lengths(None, None) is None
    assert _lengths("8, 2", None) == [8, 2]
    assert _lengths(None, 21) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 21]
    assert [_held(types) for types in ([], ["bfloat16"], ["bfloat16", "float16"], ["float64", "float32"])] == [
        "float32",
        "bfloat16",
        "float32",
        "float64",
    ]
