"""Attributions against planted culprits: each at rank 1 with its share, and nobody else suspected."""

import pandas as pd
import pytest
import torch
from culprits import CASES, KINDS, cached

from sd_lens.tracing.attribution import attribute_norm, attribute_trigger
from sd_lens.tracing.components import StreamSplit

LARGEST_ERROR = 0.01
LARGEST_OTHER = 0.05
UNTRIGGERED = {"attention", "embedding_norm"}
"""Kinds in which no FFN is set off by anything."""
TRIGGERED = [(kind, architecture) for kind, architecture in CASES if kind not in UNTRIGGERED]


def from_prompts(planted):
    tokens = [row[:length] for row, length in zip(planted.prompts(), (9, 12, 4, 12, 6), strict=True)]
    return tokens, {"batch_tokens": 30}, torch.cat([planted.explodes(row.unsqueeze(0))[0] for row in tokens])


def from_cache(planted):
    tokens = planted.prompts()
    mask = torch.arange(tokens.shape[1]) < torch.tensor([[9], [12], [6], [12], [6]])
    if planted.trigger_token is not None:
        tokens = torch.where(mask, tokens, planted.trigger_token)  # what stands in the padding must not count
    _, cache = planted.model.run_with_cache(tokens)
    return tokens, {"cache": cache, "mask": mask}, planted.explodes(tokens)[mask]


@pytest.fixture(params=[from_prompts, from_cache], ids=["prompts", "cache"])
def source(request):
    """What an attribution is made from: a function of the culprit that gives tokens, options, and which tokens explode."""
    return request.param


def assert_found(attribution, wanted, rows):
    """The planted shares, in their order, and nothing else above 5 %; neurons too, of every FFN that was split."""
    total = attribution.total[rows].double()
    splits = [(attribution.components, attribution.values[rows], attribution.residual[rows], None)]
    splits += [(i.components, i.values[rows], i.residual[rows], i.block) for i in attribution.inside.values()]
    for components, values, residual, inside in splits:
        names = [(component.kind, component.block, component.index) for component in components]
        shares = values.double() / total.unsqueeze(1)
        known = {name: share for name, share in wanted.items() if name in names}
        expected = torch.tensor([known.get(name, 0.0) for name in names], dtype=torch.float64)
        allowed = torch.tensor([LARGEST_ERROR if name in known else LARGEST_OTHER for name in names])
        wrong = ((shares - expected).abs() > allowed).any(0).nonzero().flatten().tolist()
        assert not wrong, [names[i] for i in wrong]
        assert (residual / total).abs().max() < (1e-5 if inside is None else 1e-4)
        order = sorted(known, key=lambda name: -abs(known[name]))
        assert known or inside is not None
        for row in rows:
            assert ranked(attribution.top(len(order) or 1, row=row, inside=inside))[: len(order)] == order
    named = {(c.kind, c.block, c.index) for components, *_ in splits for c in components}
    assert {name for name in wanted if name[0] != "neuron"} <= named


def ranked(top):
    """The components of a table, as culprits name them."""
    names = top[["kind", "block", "index"]].astype(object).itertuples(index=False)
    return [tuple(None if value is pd.NA else value for value in name) for name in names]


def blocks_split(parts):
    return sorted({block for kind, block, _ in parts if kind == "neuron"})


@pytest.mark.parametrize(("kind", "architecture"), CASES)
def test_the_norm_is_blamed_on_who_wrote_it(kind, architecture, source):
    planted = cached(kind, architecture)
    tokens, options, explodes = source(planted)
    blocks = blocks_split(planted.norm_parts)
    attribution = attribute_norm(planted.model, tokens, block=planted.block, rows="tokens", neurons=blocks, **options)
    assert (attribution.quantity, attribution.block) == ("norm", planted.block)
    assert list(attribution.inside) == blocks
    assert len(attribution.rows) == len(explodes)
    assert explodes.sum() > 1
    assert (attribution.total[explodes] / planted.norm - 1).abs().max() < 0.05
    assert_found(attribution, planted.norm_parts, explodes.nonzero().flatten().tolist())
    assert attribution.total[~explodes].abs().max() < 0.01 * planted.norm


@pytest.mark.parametrize(("kind", "architecture"), TRIGGERED)
def test_the_trigger_is_blamed_on_who_wrote_it(kind, architecture, source):
    planted = cached(kind, architecture)
    tokens, options, explodes = source(planted)
    blocks = blocks_split(planted.trigger_parts)
    attribution = attribute_trigger(planted.model, tokens, rows="tokens", neurons=blocks, **options)
    assert (attribution.quantity, attribution.block) == ("trigger", planted.explosion_blocks[0])
    assert planted.trigger is not None
    assert attribution.vector @ planted.trigger > 0.9999
    assert attribution.total[explodes].min() > 5  # of at most √d = 8, which a stream along the trigger has
    assert_found(attribution, planted.trigger_parts, explodes.nonzero().flatten().tolist())
    assert attribution.total[~explodes].abs().max() < 0.01


@pytest.mark.parametrize(("kind", "architecture"), CASES)
def test_groups_of_tokens_and_the_block_chosen_by_itself(kind, architecture):
    planted = cached(kind, architecture)
    tokens = planted.prompts()
    if not planted.explosion_blocks:
        with pytest.raises(ValueError, match=r"^prompts: no block makes a token's norm explode \(largest ratio"):
            attribute_norm(planted.model, tokens)
        assert attribute_norm(planted.model, tokens, block="peak").block == 0  # it is there from the start
        attribution = attribute_norm(planted.model, tokens, block=planted.block)
    else:
        attribution = attribute_norm(planted.model, tokens, neurons=True)
    last = planted.explosion_blocks[-1] if planted.explosion_blocks else planted.block
    assert attribution.block == last
    wanted = planted.norm_parts
    if kind == "opposed":  # what takes some of it away comes later
        wanted = {component: 1.0 for component in wanted if component[1] == 1}
    groups = [row.label for row in attribution.rows]
    labels = ["initial", "other"] if kind == "position" else ["initial", "delimiter", "other"]
    assert groups == labels
    # The trigger token stands first in one of the prompts.
    assert_found(attribution, wanted, [attribution.row(label) for label in labels[:-1]])
    assert attribution.main == groups.index("initial" if kind == "position" else "delimiter")
    assert set(attribution.inside) == ({1, 2} if kind == "two_blocks" else set(planted.explosion_blocks))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_second_of_two_blocks_is_set_off_by_the_first(architecture):
    planted = cached("two_blocks", architecture)
    attribution = attribute_trigger(planted.model, planted.prompts(), block=2, neurons=[1])
    assert attribution.vector @ planted.direction > 0.9999
    assert_found(attribution, {("ffn", 1, None): 1.0, ("neuron", 1, 7): 1.0}, [attribution.row("delimiter")])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["head_trigger", "attention"])
def test_the_planted_head_takes_it_from_the_token_itself(kind, architecture):
    planted = cached(kind, architecture)
    tokens = planted.prompts()[:2]  # with the trigger token once: further on the head cannot tell it from its twin
    quantity = attribute_norm if kind == "attention" else attribute_trigger
    attribution = quantity(planted.model, tokens, by_key=True)
    parts = planted.norm_parts if kind == "attention" else planted.trigger_parts
    ((_, block, head),) = parts
    first = attribution.top(1, row="delimiter").iloc[0]
    assert (first["kind"], first["block"], first["index"], first["keys"]) == ("head", block, head, "itself")
    assert first["share"] == pytest.approx(1, abs=LARGEST_ERROR)
    assert attribution.top(2, row="delimiter")["share"].iloc[1] < LARGEST_OTHER


def test_an_attribution_that_mistakes_one_head_for_another_would_be_caught(monkeypatch):
    # The tests above must be able to fail.
    planted = cached("head_trigger", "llama")
    right = StreamSplit.terms.__get__

    def mistaken(self):
        found = [component for _, components in right(self) for component in components]
        places = [i for i, c in enumerate(found) if c.kind == "head" and c.block == planted.block]
        found[places[2]], found[places[3]] = found[places[3]], found[places[2]]
        return tuple(found)

    monkeypatch.setattr(StreamSplit, "components", property(mistaken))
    attribution = attribute_trigger(planted.model, planted.prompts())
    with pytest.raises(AssertionError):
        assert_found(attribution, planted.trigger_parts, [attribution.row("delimiter")])


def test_every_kind_of_culprit_is_looked_for():
    assert {kind for kind, _ in CASES} == set(KINDS)
    assert {kind for kind in KINDS if cached(kind, "gpt2").trigger is None} == UNTRIGGERED
