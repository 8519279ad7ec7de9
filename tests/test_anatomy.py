"""What an explosion is made of, and how tokens get there, in one call each: results, sentences, reasons."""

import pytest
import torch
import zoo
from shared import planted
from streams import ragged

from sd_lens.anatomy import NOTHING, anatomy
from sd_lens.pathways import pathways
from sd_lens.tracing.attribution import attribute_norm, attribute_trigger


def test_the_parts_of_a_planted_explosion():
    truth = planted(pathway="embedding")
    prompts = ragged(96, (9, 6), first=0)
    prompts[0][4] = truth.trigger_token
    found = anatomy(truth.model, prompts)
    assert found.missing == {}
    assert found.norm is not None
    assert found.trigger is not None
    assert repr(found.norm) == repr(attribute_norm(truth.model, prompts, neurons=True))
    assert repr(found.trigger) == repr(attribute_trigger(truth.model, prompts, neurons=True))
    norm, trigger = found.sentences()
    assert norm == (
        "In later high-norm tokens, the projection on the defect direction after block 1 is written by L1 FFN (100%; its neuron 0 alone 100%)."
    )
    assert trigger.startswith("In later high-norm tokens, what sets off the FFN of block 1 (a coefficient of 6.4; ")
    assert trigger.endswith(" is written by embedding (100%).")
    assert found.massive.found
    assert {row.pos for row in found.massive.rows} == {4}


def test_without_an_explosion_there_is_nothing_to_split():
    found = anatomy(zoo.cached("llama"), ragged(zoo.VOCAB, (6, 8)))
    assert (found.norm, found.trigger) == (None, None)
    assert found.missing == {"norm": NOTHING, "trigger": NOTHING}
    assert found.sentences() == ()
    assert not found.massive.found
    assert found.super_weights is not None
    assert not found.super_weights.rows


def test_what_does_not_apply_is_left_out_with_the_reason(monkeypatch):
    model = planted().model

    def refuse(*args, **kwargs):
        raise ValueError("model: block 1 has a norm inside its mlp; allowed: none")

    monkeypatch.setattr("sd_lens.anatomy.attribute_trigger", refuse)
    monkeypatch.setattr("sd_lens.pathways.sink_attention", refuse)
    found = anatomy(model, torch.arange(10).unsqueeze(0))
    assert found.trigger is None
    assert found.norm is not None
    assert found.missing == {"trigger": "model: block 1 has a norm inside its mlp; allowed: none"}
    assert len(found.sentences()) == 1
    paths = pathways(model, torch.arange(10).unsqueeze(0), which=["initial"], max_ids=12)
    assert paths.sinks is None
    assert paths.missing["sinks"].startswith("model: block 1 has a norm")


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("block", "message"), [(9, r"^block: got 9; allowed: 0 to 5, 'explosion', 'peak'"), (-1, "^block: got -1")]
)
def test_unknown_blocks_are_refused(block, message):
    with pytest.raises(ValueError, match=message):
        anatomy(planted().model, torch.arange(10).unsqueeze(0), block=block)


def test_a_delimiters_pathway():
    truth = planted(pathway="embedding")
    prompts = ragged(96, (9, 6), first=0)
    prompts[0][4] = truth.trigger_token
    found = pathways(truth.model, prompts)
    assert [scan.pathway for scan in found.scans] == ["initial", "no_attention", "second"]
    for scan in found.scans:
        assert scan.block == truth.explosion_block
        assert scan.self_exploding().id.tolist() == [truth.trigger_token]
    assert found.confirmation is not None
    assert found.confirmation.confirmed.id.tolist() == [truth.trigger_token]
    first, about = found.sentences()
    assert (
        first
        == "Token ids that explode by themselves: 1 of 97 alone at position 0, 1 of 97 without attention, 1 of 97 after another token."
    )
    assert about.startswith("'<96>' is high-norm in 1 of 1 ")
    assert found.repeated.block == truth.explosion_block
    assert found.sinks is not None
    assert found.missing == {}


def test_an_initial_tokens_pathway():
    truth = planted()
    found = pathways(truth.model, ragged(96, (9, 6)), which=["no_attention", "initial"])
    by_name = {scan.pathway: scan for scan in found.scans}
    assert by_name["initial"].share_exploding == 1
    assert by_name["no_attention"].share_exploding == 0
    assert found.confirmation is None
    assert found.missing == {"confirmation": "no id explodes by itself"}


def test_a_sample_of_ids_has_those_of_the_text():
    truth = planted()
    prompts = [torch.tensor([3, 96, 41]), torch.tensor([41, 7])]
    some = pathways(truth.model, prompts, which=["initial"], max_ids=10)
    ids = some.scans[0].ids.tolist()
    assert len(ids) == len(set(ids)) == 10
    assert {3, 7, 41, 96} <= set(ids)
    again = pathways(truth.model, prompts, which=["initial"], max_ids=10)
    assert again.scans[0].ids.tolist() == ids
    assert len(pathways(truth.model, prompts, which=["initial"], max_ids=97).scans[0].ids) == 97


def test_true_negatives_claim_nothing():
    for family in ("llama", "gpt2"):
        model = zoo.cached(family)
        found = pathways(model, ragged(zoo.VOCAB, (6, 8)))
        assert not found.defects.found
        assert [len(scan.self_exploding()) for scan in found.scans] == [0, 0, 0]
        assert found.tokens.high().empty
        assert found.sentences() == (
            "Token ids that explode by themselves: 0 of 101 alone at position 0, 0 of 101 without attention, 0 of 101 after another token.",
        )
