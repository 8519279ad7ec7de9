"""Texts generated with and without the subspace, against a greedy loop that computes every prefix anew."""

from __future__ import annotations

import pytest
import torch
import zoo
from recording import same_state, state
from shared import planted
from streams import ragged

from sd_lens.interventions.consequences import consequences
from sd_lens.interventions.generation import BEGINNINGS, beginnings, continuations
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.loading import load

FAMILIES = [name for name in ("qwen2", "gpt2", "hooked_qwen2", "hooked_gpt2") if name in zoo.FAMILIES]


def greedy(model, prompt, n, intervention=None):
    ids = prompt.tolist()
    for _ in range(n):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            hooks = [] if intervention is None else intervention.fwd_hooks()
            ids.append(int(model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_is_what_recomputing_every_prefix_gives(family):
    model, prompts = zoo.cached(family), ragged(zoo.VOCAB, (6, 3), seed=2)
    subspace = ExplosionSubspace.at(model, 1, rank=12, delimiters=list(range(40)))
    found = continuations(subspace, prompts, side="both", where=["initial", "delimiters", "everywhere"], max_new_tokens=5)
    assert [(one.intervention, one.where) for one in found[:4]] == [
        ("none", "none"),
        ("ablate", "initial"),
        ("ablate", "delimiters"),
        ("ablate", "everywhere"),
    ]
    wanted = []
    for prompt in prompts:
        wanted.append(greedy(model, prompt, 5))
        for positions in ("initial", "delimiters", "all"):
            wanted.append(greedy(model, prompt, 5, subspace.ablate(side="both", positions=positions)))
    assert [one.ids for one in found] == wanted
    assert len(set(wanted)) > 4  # they are not all the same
    for one, untouched in zip(found, [wanted[0]] * 4 + [wanted[4]] * 4, strict=True):
        same = [own == other for own, other in zip(one.ids, untouched, strict=True)]
        assert one.n_same == [*same, False].index(False)
    assert found[0].prompt == " ".join(f"<{token}>" for token in prompts[0].tolist())
    assert found[0].text == "".join(f" <{token}>" for token in found[0].ids)


def test_texts_of_the_shipped_model_side_by_side():
    model = load("tiny")
    found = consequences(model, sides=["both"], mean=False, controls=0, max_new_tokens=8)
    texts = found.texts
    # It has no delimiters that could be ablated.
    assert list(texts) == ["prompt", "untouched", "ablated, initial", "ablated, everywhere"]
    assert texts["prompt"].tolist() == [f"<s>{beginning}" for beginning in BEGINNINGS]
    assert texts["untouched"][1] == "   ...\n   ...\n   ..."
    assert texts["ablated, initial"][1] != texts["untouched"][1]
    tokens = model.to_tokens(BEGINNINGS[0])
    whole = model.generate(tokens, max_new_tokens=8, do_sample=False, verbose=False)[0]
    assert model.tokenizer.decode(tokens[0]) + texts["untouched"][0] == model.tokenizer.decode(whole)


def test_delimiters_in_generated_text_are_told_by_the_ids_of_the_prompts():
    truth = planted(pathway="embedding")
    token = truth.trigger_token
    prompts = torch.tensor([[5, 6, token, 8, 9], [5, 7, 7, 8, 20]])
    options = {"rank": 1, "mean": False, "controls": 0, "max_new_tokens": 2, "progress": False}
    found = consequences(truth.model, prompts, where=["delimiters"], sides=["direction"], generate=prompts[:1], **options)
    subspace = ExplosionSubspace.at(truth.model, truth.explosion_block)
    wanted = greedy(truth.model, prompts[0], 2, subspace.ablate(side="direction", positions=[2]))
    assert [text.where for text in found.continuations] == ["none", "delimiters"]
    assert found.continuations[1].ids == wanted
    assert "on the direction side" in found.notes[-1]


def test_a_text_ends_where_the_context_does():
    model = zoo.cached("gpt2")
    [sequence] = beginnings(model, [torch.arange(3, zoo.CONTEXT + 1)])
    subspace = ExplosionSubspace.at(model, 1)
    found = continuations(subspace, [sequence], side="both", where=["everywhere"], max_new_tokens=50)
    assert [len(one.ids) for one in found] == [zoo.CONTEXT - len(sequence)] * 2 == [2, 2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_after_an_error_while_generating(family, error):
    model = zoo.build(family).train()
    subspace = ExplosionSubspace.at(model, 1)
    runs = []

    def interrupt(stream, hook):
        runs.append(1)
        if len(runs) == 6:  # the first text has 4 tokens: it is in the second
            raise error("in the middle")

    before = state(model)
    with pytest.raises(error), model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", interrupt)]):
        continuations(subspace, ragged(zoo.VOCAB, (6,)), side="both", where=["everywhere"], max_new_tokens=4)
    assert len(runs) == 6
    assert same_state(before, state(model))
