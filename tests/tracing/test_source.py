"""Prompts and caches behind one door."""

import pytest
import torch
import zoo
from shared import planted
from streams import ragged

from sd_lens.models import hook_names
from sd_lens.tracing.attribution import attribute_norm, attribute_trigger
from sd_lens.tracing.census import massive_activations
from sd_lens.tracing.delimiters import token_pathways
from sd_lens.tracing.sinks import sink_attention
from sd_lens.tracing.source import source_of
from sd_lens.tracing.super_weights import super_weights

POINTS = [hook_names.resid_pre(0), hook_names.mixed_values(1), hook_names.resid_post(1)]


def everything(source, points=POINTS):
    """What a source hands over: per hook point, the real tokens' activations in the prompts' order."""
    n_tokens = sum(map(len, source.sequences))
    seen = {}

    def on_batch(batch):
        def receive(point, activation):
            rows = activation.reshape(*batch.mask.shape, -1)[batch.mask]
            kept = seen.setdefault(points[point], torch.full((n_tokens, rows.shape[1]), float("nan")))
            kept[batch.flat[batch.mask]] = rows

        return receive

    source.run(points, on_batch, stop_at=2)
    return seen


@pytest.mark.parametrize("family", [name for name in ("gpt2", "llama", "hooked_llama") if name in zoo.FAMILIES])
def test_prompts_and_their_cache_give_the_same(family):
    model = zoo.cached(family)
    prompts = ragged(zoo.VOCAB, (6, 2, 4))
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=zoo.PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p), dtype=torch.bool) for p in prompts], batch_first=True)
    with torch.no_grad():
        _, cache = model.run_with_cache(padded)
    run = source_of(model, prompts, may_need=(), batch_tokens=5)
    kept = source_of(model, padded, may_need=(), cache=cache, mask=mask)
    assert [s.tolist() for s in kept.sequences] == [s.tolist() for s in run.sequences] == [p.tolist() for p in prompts]
    got, wanted = everything(kept), everything(run)
    for name in POINTS:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept.trace().norms, run.trace().norms, rtol=1e-4, atol=1e-5)


def test_analyses_that_share_a_source_trace_once():
    model, prompts = planted().model, ragged(96, (6, 8))
    passes = []
    with model.hooks(fwd_hooks=[("blocks.5.hook_resid_post", lambda stream, hook: passes.append(1))]):
        source = source_of(model, prompts, may_need=())
        results = [run(model, source) for run in (attribute_norm, attribute_trigger, super_weights, token_pathways)]
        assert len(passes) == 2  # norms and direction, once; the rest stops at the explosion block
        assert source.trace() is source.trace()
        assert source.trace(min_ratio=5.0) is not source.trace(min_ratio=6.0)
    alone = [run(model, prompts) for run in (attribute_norm, attribute_trigger, super_weights, token_pathways)]
    assert list(map(repr, results)) == list(map(repr, alone))
    assert repr(massive_activations(model, source)) == repr(massive_activations(model, prompts))
    assert repr(sink_attention(model, source)) == repr(sink_attention(model, prompts))


def test_a_source_is_of_one_model_and_comes_alone():
    model = zoo.cached("llama")
    source = source_of(model, ragged(zoo.VOCAB, (4,)), may_need=())
    assert source_of(model, source, may_need=()) is source
    for bad in ({"cache": {}}, {"mask": torch.ones(1, 4, dtype=torch.bool)}):
        with pytest.raises(ValueError, match=r"^prompts: got a source with a cache, a mask or another model"):
            source_of(model, source, may_need=(), **bad)
    with pytest.raises(ValueError, match=r"^prompts: got a source with a cache, a mask or another model"):
        source_of(zoo.cached("gpt2"), source, may_need=())


def test_what_cannot_be_had_is_said():
    model, tokens = zoo.cached("llama"), zoo.tokens(zoo.cached("llama"))
    with pytest.raises(ValueError, match=r"^model: it has no hook point blocks.9.hook_resid_pre; allowed"):
        source_of(model, tokens, may_need=()).require(["blocks.9.hook_resid_pre"])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    with pytest.raises(ValueError, match=r"^tokens: got shape \(2, 11\); allowed: the cache's, \(2, 12\)"):
        source_of(model, tokens[:, 1:], may_need=(), cache=cache)
    with pytest.raises(ValueError, match=r"^mask: a row is not True at its first tokens"):
        source_of(model, tokens, may_need=(), cache=cache, mask=torch.arange(12).expand(2, -1) > 3)
    with pytest.raises(ValueError, match=r"^prompts: got str with a cache; allowed: the \(batch, pos\) tensor"):
        source_of(model, "text", may_need=(), cache=cache)


def test_a_cache_is_read_without_gradients():
    model, tokens = zoo.cached("gpt2"), zoo.tokens(zoo.cached("gpt2"))
    cache = {name: value.clone().requires_grad_() for name, value in model.run_with_cache(tokens)[1].items() if name in POINTS}
    assert not any(value.requires_grad for value in everything(source_of(model, tokens, may_need=(), cache=cache)).values())
