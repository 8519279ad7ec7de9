"""Removal and response in one call, and what is said where they do not apply."""

from __future__ import annotations

import pytest
import torch
import zoo
from shared import planted

from sd_lens.anatomy import NOTHING
from sd_lens.interventions.causality import causality
from sd_lens.interventions.consequences import consequences
from sd_lens.interventions.subspace import ExplosionSubspace

FEW = {"sides": ["trigger"], "where": ["initial"], "mean": False, "controls": 0, "progress": False}


def test_it_is_the_table_and_the_curve_of_the_explosion_block():
    truth = planted("gpt2")
    tokens = torch.arange(24).reshape(2, 12)
    found = causality(truth.model, tokens, rank=3, **FEW)
    assert found.missing == {}
    assert found.consequences.to_dataframe().equals(consequences(truth.model, tokens, rank=3, **FEW).to_dataframe())
    curve = ExplosionSubspace.at(truth.model, truth.explosion_block, rank=3).response_curve()
    assert found.response.block == truth.explosion_block
    assert torch.equal(found.response.answers, curve.answers)
    assert found.sentences() == found.consequences.sentences()


def test_where_nothing_explodes_a_block_must_be_named():
    model = zoo.cached("llama")
    found = causality(model, zoo.tokens(model), **FEW)
    assert (found.consequences, found.response, found.sentences()) == (None, None, ())
    assert found.missing == {"consequences": NOTHING, "response": NOTHING}
    named = causality(model, zoo.tokens(model), block=2, **FEW)
    assert (named.consequences.block, named.response.block, named.missing) == (2, 2, {})


@pytest.mark.skipif("hooked_olmo2" not in zoo.FAMILIES, reason="TransformerLens 4 has no HookedTransformer")
def test_a_model_that_cannot_be_edited_there_is_left_alone_with_the_reason():
    model = zoo.build("hooked_olmo2")
    found = causality(model, zoo.tokens(model), block=1, **FEW)
    assert found.consequences is None
    assert found.missing["consequences"].startswith("model: no hook point shows what the FFN of block 1 alone reads")
    assert causality(model, zoo.tokens(model), block=1, **(FEW | {"sides": ["direction"]})).missing == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3}, r"^block: got 3; allowed: 0 to 2"),
        ({"rank": 0}, r"^rank: got 0; allowed: 1 to 32"),
        ({"rank": 33}, r"^rank: got 33; allowed: 1 to 32"),
        ({"controls": -1}, r"^controls: got -1"),
        ({"block": 1, "rank": 20, "controls": 1}, r"^controls: got 1 with rank 20; allowed: 0, or a rank of at most 15"),
        ({"block": 1, "generate": [torch.tensor([500])]}, r"^generate: prompts: prompt 0 has token ids 500 to 500"),
    ],
)
def test_bad_input_is_no_missing_result(options, message):
    model = zoo.cached("llama")
    with pytest.raises(ValueError, match=message):
        causality(model, zoo.tokens(model), **(FEW | options))
