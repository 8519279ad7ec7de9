"""Information propagation in one call: its parts are those of the single calls, and what is left out says why."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import pytest
import torch
import zoo
from shared import planted
from tokenizer import with_tokenizer

from sd_lens.display.propagation_page import render_propagation
from sd_lens.display.propagation_records import collapse_record
from sd_lens.propagation import overview
from sd_lens.propagation.collapse import collapse_curve
from sd_lens.propagation.overview import FEW, propagation_overview
from sd_lens.propagation.probes import probe
from sd_lens.propagation.sensitivity import sensitivity
from sd_lens.propagation.squashing import squashing_bound
from sd_lens.wording import propagated

IDS = torch.tensor([5, 9, 7, 9, 7, 9, 11])


@pytest.fixture(scope="module")
def found():
    options = {"separators": [2], "without_explosion": True, "answers": True, "dtypes": ["float32"], "progress": False}
    symbols = {"zero": 3, "one": 4, "separator": 6}
    return propagation_overview(planted().model, [IDS], probe_options={"symbols": symbols}, lengths=[2, 8], **options)


def test_its_parts_are_those_of_the_single_calls(found):
    model = planted().model
    made = probe(model, "repeat-last", symbols={"zero": 3, "one": 4})
    curve = collapse_curve(model, made, [2, 8], metrics=["linf_heads", "linf"], dtypes=["float32"])
    assert found.curve.values.keys() == curve.values.keys()
    assert all(torch.equal(values, curve.values[line]) for line, values in found.curve.values.items())
    felt = sensitivity(model, [IDS])
    bound = squashing_bound(model, [IDS])
    assert torch.equal(found.sensitivity.frobenius, felt.frobenius)
    assert torch.equal(found.bound.log10_bound, bound.log10_bound)
    assert found.correlation == {which: float(bound.correlation(felt, which=which)[0]) for which in ("theorem", "token")}
    assert [setting.separator_every for setting in found.mitigations.settings] == [None, 2]
    untouched = found.consequences.curves["untouched"].values["float32", "final", "linf_heads"]
    assert torch.equal(untouched, curve.values["float32", "final", "linf_heads"])
    assert found.to_dataframe().equals(curve.to_dataframe())
    assert found.plot().to_dict() == curve.plot().to_dict()


def test_without_digits_the_prompts_commonest_tokens_stand_in_for_them():
    found = propagation_overview(planted().model, [IDS], dtypes=["float32"], progress=False)
    symbols = found.curve.probe["symbols"]
    assert (symbols["one"]["id"], symbols["zero"]["id"]) == (9, 7)
    assert found.notes == (
        "the vocabulary has no digits: the probe repeats '<9>' and ends in '<7>', the prompt's two commonest tokens",
    )
    assert found.curve.lengths == tuple(length for length in FEW if length < planted().model.cfg.n_ctx)
    with pytest.raises(ValueError, match=r"^symbols\.zero: got '0'"):
        propagation_overview(planted().model, [IDS], probe="copy-last")
    with pytest.raises(ValueError, match="tokenizer"):
        propagation_overview(planted().model, [IDS[:2]])  # no two tokens to choose


def test_lengths_that_leave_no_room_are_left_out_and_said_to_be():
    options = {"metrics": "linf", "dtypes": ["float32"], "separators": [1], "answers": True, "progress": False}
    symbols = {"zero": 13, "one": 14, "separator": 16}
    found = propagation_overview(
        zoo.cached("gpt2"), [IDS], probe="copy-last", probe_options={"symbols": symbols}, lengths=[4, 40, 60], **options
    )
    assert found.mitigations.lengths == (4,)
    assert [row.length for row in found.answers.rows] == [4, 40]
    assert [note.split(" were")[0] for note in found.notes] == ["separators: lengths above 4", "answers: lengths above 40"]


def test_what_cannot_be_had_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(overview, "EXACT_WIDTH", 16)
    found = propagation_overview(
        zoo.cached("llama"), [IDS], lengths=[2], dtypes=["float32"], without_explosion=True, progress=False
    )
    assert found.consequences is None
    assert found.missing.keys() == {"consequences"}
    assert "explo" in found.missing["consequences"]
    # Of wide models sensitivities are estimated.
    assert (found.sensitivity.method, found.sensitivity.n_products) == ("hutchinson", 32)


def test_bos_stands_before_prompt_and_probe_or_before_neither():
    model = with_tokenizer("gpt2")
    for bos in (True, False):
        options = {"lengths": [2], "dtypes": ["float32"], "metrics": "linf", "progress": False}
        found = propagation_overview(model, "a b", prepend_bos=bos, **options)
        assert len(found.curve.probe["before"]) == bos
        assert (int(found.sensitivity.tokens[0]) == zoo.BOS) == bos


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"separators": [0]}, r"separators: got 0; allowed: a whole number from 1"),
        ({"lengths": [999]}, r"lengths: got 999, whose longest sequence has 1000 tokens; allowed"),
        ({"lengths": "all"}, r"lengths: got 'all'; allowed: 'few', whole numbers from 1, or None"),
        ({"layers": 6}, r"layers: got 6; allowed: 0 to 5, 'final'"),
        ({"metrics": "l3"}, r"metrics: got 'l3'; allowed"),
        ({"dtypes": ["int8"]}, r"dtypes: got 'int8'; allowed"),
        ({"probe": "copy"}, r"name: got 'copy'; allowed"),
        ({"prompt": [IDS, IDS]}, r"prompt: got 2; allowed: one"),
    ],
)
def test_bad_input(as_users_run_it, options, needle):
    with pytest.raises(ValueError, match=f"^{needle}"):
        propagation_overview(planted().model, **({"prompt": [IDS]} | options))


def test_sentences_say_where_collapse_begins(found):
    values = torch.tensor([0.5, 1e-3], dtype=torch.float64).reshape(1, 2, 1)
    zero = torch.tensor([0.5, 0.0], dtype=torch.float64).reshape(1, 2, 1)
    line = ("final", "linf")
    lines = {("float32", *line): values, ("bfloat16", *line): zero, ("float16", *line): 10 * values}
    equal = {(dtype, "final"): (rows == 0).all(2) for (dtype, _, _), rows in lines.items()}
    made = replace(found, curve=replace(found.curve, values=lines, equal=equal, lengths=(4, 64)))
    first, second, third = propagated(made)
    assert first == (
        "Of an input and the same with its last element once more (probe repeat-last), the last token's final representations are 0.5 apart at length 4 "
        "and 0.001 at length 64 (L∞, float32)."
    )
    assert second == (
        "Below machine epsilon they stay, up to length 64: never in float32 and float16; in bfloat16 from length 64 on (equal to the bit at length 64)."
    )
    felt = found.sensitivity
    most = int(felt.frobenius[0].argmax())
    assert third.startswith(f"Of 7 tokens of a text the last one feels {felt.texts[most]!r} at position {most} most")
    assert f"a rank correlation of {found.correlation['theorem']:.2f} to the true order" in third
    # The finest run's distances are held against coarser epsilons, too.
    lines[("bfloat16", *line)] = 10 * values
    never = propagated(
        replace(made, curve=replace(made.curve, values=lines, equal=dict.fromkeys(equal, equal["float32", "final"])))
    )
    assert "never in bfloat16 (by float32's distances from length 64 on)" in never[1]


def test_the_record_holds_the_results_and_is_strict(found):
    record = json.loads(json.dumps(collapse_record(found), allow_nan=False))
    assert (record["schema"], record["model"], record["d_model"], record["n_blocks"]) == ("sd_lens.collapse/1", "planted", 64, 6)
    assert record["rows"] == found.curve.rows()
    critical = found.critical_lengths[0]
    lengths = {"below_epsilon": critical.below_epsilon, "equal": critical.equal}
    assert record["critical_length"] == {"float32": {"layer": "final", "metric": "linf_heads", **lengths}}
    assert [(row["dtype"], row["measured"]) for row in record["critical_lengths"]] == [("float32", "float32")]
    felt = record["sensitivity"]["rows"]
    assert [row["frobenius"] for row in felt] == found.sensitivity.frobenius[0].tolist()
    assert [row["high_norm"] for row in felt] == found.sensitivity.high_norm.tolist()
    bound = record["bound"]
    assert [row["log10_bound"] for row in bound["rows"]] == pytest.approx(found.bound.log10_bound[-1].tolist())
    assert bound["first_column"][-1] == pytest.approx(found.bound.first_column())
    assert [row["beta1"] for row in bound["constants"]] == [row.beta1 for row in found.bound.constants]
    runs = record["without_explosion"]
    assert runs["curves"]["ablated"] == found.consequences.curves["ablated"].rows()
    assert [row["frobenius"] for row in runs["sensitivity"]["ablated"]["rows"]] == found.consequences.sensitivities[
        "ablated"
    ].frobenius[0].tolist()
    assert [row["longest"] for row in record["mitigations"]["rows"]] == [row["longest"] for row in found.mitigations.rows()]
    assert [row["answered"] for row in record["answers"]["rows"]] == [row.answered for row in found.answers.rows]
    bare = collapse_record(
        replace(found, sensitivity=None, bound=None, mitigations=None, consequences=None, answers=None, missing={})
    )
    assert [bare[name] for name in ("sensitivity", "bound", "mitigations", "without_explosion", "answers")] == [None] * 5


def shown(page):
    """The page without its scripts and styles."""
    return page[page.index("<main>") :]


def test_the_page_shows_what_there_is(found):
    page = shown(render_propagation(found))
    text = html.unescape(page)
    assert all(sentence in text for sentence in propagated(found))
    figures = (
        "collapse-linf-heads",
        "collapse-linf",
        "sensitivity",
        "bound",
        "mitigations-float32",
        "without-explosion",
        "answers",
    )
    assert all(page.count(f'id="figure-{name}"') == 1 for name in figures)
    assert page.count("<td>none up to 8</td>") == 2  # below epsilon, and equal
    reasons = {"sensitivity": "no <gradient>", "bound": "no <weights>", "answers": "no <tokenizer>"}
    without = shown(render_propagation(replace(found, sensitivity=None, bound=None, answers=None, missing=reasons)))
    assert "Sensitivities were not measured: no &lt;gradient&gt;." in without
    assert "This could not be measured: no &lt;tokenizer&gt;." in without
    assert not any(f'id="figure-{name}"' in without for name in ("sensitivity", "bound", "answers"))
