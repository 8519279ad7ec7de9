import re

import pytest
import torch
import zoo
from shared import planted
from streams import norms_alone, points, ragged, worst
from tokenizer import with_tokenizer

from sd_lens.models.hook_names import residual_points
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.trace import NormTrace


def needed(name):
    """The filter that the error about missing hook points proposes."""
    return name == "blocks.0.hook_resid_pre" or name.endswith("hook_resid_post")


def agree(trace, wanted):
    """Everything a trace says, direction included; the numbers up to rounding."""
    assert worst(trace.norms, wanted.norms) < 1e-5
    for name in ("tokens", "prompt", "position"):
        assert torch.equal(getattr(trace, name), getattr(wanted, name)), name
    for name in ("texts", "model_name", "d_model", "n_blocks", "n_prompts"):
        assert getattr(trace, name) == getattr(wanted, name), name
    assert (trace.direction is None) == (wanted.direction is None)
    if wanted.direction is not None:
        assert float(trace.direction.direction @ wanted.direction.direction) == pytest.approx(1, abs=1e-6)
        assert (trace.direction.n_vectors, trace.direction.n_tokens) == (wanted.direction.n_vectors, wanted.direction.n_tokens)
        assert trace.direction.mean_pairwise_angle_deg == pytest.approx(wanted.direction.mean_pairwise_angle_deg, abs=1e-3)
        assert trace.direction.profiles.keys() == wanted.direction.profiles.keys()
        for group, profile in wanted.direction.profiles.items():
            assert trace.direction.profiles[group] == pytest.approx(profile, rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_cache_gives_what_the_model_gives(family):
    model, tokens = zoo.cached(family), torch.stack(ragged(zoo.VOCAB, (6, 6, 6)))
    wanted = trace_norms(model, tokens)
    for names_filter in (None, needed):
        _, cache = model.run_with_cache(tokens, names_filter=names_filter)
        agree(NormTrace.from_cache(cache, tokens), wanted)
    assert worst(wanted.norms, norms_alone(model, list(tokens))) < 1e-5


def with_defects(planted_model):
    """Prompts with an initial, a later and a repeated high-norm token, of one length."""
    tokens = torch.stack(ragged(96, (7, 7, 7), first=0))
    tokens[1, 3:5] = 96
    tokens[2, :3] = tokens[2, 0]
    return planted_model.model, tokens


def test_a_planted_models_cache_gives_its_direction(planted_model):
    model, tokens = with_defects(planted_model)
    wanted = trace_norms(model, tokens)
    assert wanted.direction is not None
    _, cache = model.run_with_cache(tokens)
    agree(NormTrace.from_cache(cache, tokens), wanted)
    # A plain dict knows neither model nor name.
    bare = NormTrace.from_cache({name: cache[name] for name in points(6)}, tokens)
    assert (bare.model_name, bare.n_blocks) == ("model", 6)
    agree(NormTrace.from_cache({name: cache[name] for name in points(6)}, tokens, model=model), wanted)


def test_a_cache_that_was_stopped_early():
    truth = planted()
    model, tokens = with_defects(truth)
    for stop_at in (1, 3):
        _, cache = model.run_with_cache(tokens, stop_at_layer=stop_at)
        trace = NormTrace.from_cache(cache, tokens)
        agree(trace, trace_norms(model, tokens, stop_at=stop_at))
        assert len(trace.norms) == stop_at + 1
        assert find_defects(trace).explosion_blocks == ((1,) if stop_at > 1 else ())


def test_a_cache_without_batch_dimension(planted_model):
    model, tokens = with_defects(planted_model)
    _, cache = model.run_with_cache(tokens[1:2])
    cache = cache.remove_batch_dim()
    wanted = trace_norms(model, tokens[1:2])
    agree(NormTrace.from_cache(cache, tokens[1:2]), wanted)
    agree(NormTrace.from_cache(cache, tokens[1]), wanted)


def test_padding_on_the_right_is_masked(planted_model):
    model, tokens = with_defects(planted_model)
    lengths = (4, 7, 5)
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    _, cache = model.run_with_cache(torch.where(mask, tokens, 96))  # padding that would explode, if it were looked at
    wanted = trace_norms(model, [row[:length] for row, length in zip(tokens, lengths, strict=True)])
    agree(NormTrace.from_cache(cache, tokens, mask=mask), wanted)


def test_texts_come_from_the_caches_model():
    model = with_tokenizer("gpt2")
    tokens = model.to_tokens("ab")
    _, cache = model.run_with_cache(tokens)
    assert NormTrace.from_cache(cache, tokens).texts == ("<bos>", "a", "b")
    half = {name: cache[name].half() * 500 for name in points(3)}
    trace = NormTrace.from_cache(half, tokens)
    assert (trace.norms > 1000).any()
    assert worst(trace.norms, 500 * norms_alone(model, [tokens[0]])) < 2e-3


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        (lambda name: name != "blocks.0.hook_resid_pre", ["blocks.0.hook_resid_pre"]),
        (lambda name: name != "blocks.1.hook_resid_post", ["blocks.1.hook_resid_post"]),
        (lambda name: "attn" in name, points(3)),
        (lambda name: name.endswith("hook_resid_pre"), points(3)[1:]),
    ],
    ids=["embedding", "block 1", "only attention", "only resid_pre"],
)
def test_a_cache_that_lacks_hook_points_is_refused_with_what_to_keep(kept, missing):
    model, tokens = zoo.cached("llama"), zoo.tokens(zoo.cached("llama"))
    _, full = model.run_with_cache(tokens)
    cache = {name: value for name, value in full.items() if kept(name)}
    with pytest.raises(ValueError, match=r"^cache: it lacks ") as error:
        NormTrace.from_cache(cache, tokens, model=model)
    assert re.search(r"lacks (.*); allowed", str(error.value)).group(1).split(", ") == missing
    with pytest.raises(ValueError, match=f"^cache: it lacks {missing[0]}"):
        NormTrace.from_cache(cache, tokens)
    proposed = re.search(r"names_filter=(lambda name: .*)\)$", str(error.value)).group(1)
    _, again = model.run_with_cache(tokens, names_filter=eval(proposed))
    agree(NormTrace.from_cache(again, tokens), trace_norms(model, tokens))


def test_what_does_not_fit_the_cache_is_refused():
    model, tokens = zoo.cached("llama"), zoo.tokens(zoo.cached("llama"), batch=2, pos=5)
    _, cache = model.run_with_cache(tokens)
    for wrong in (tokens[:, :4], tokens[:1], tokens[0]):
        with pytest.raises(ValueError, match=r"^tokens: got shape .*; allowed: the cache's, \(2, 5\)"):
            NormTrace.from_cache(cache, wrong)
    with pytest.raises(ValueError, match=r"^min_ratio: got 1\.0; allowed: above 1"):
        NormTrace.from_cache(cache, tokens, min_ratio=1.0)
    left, gap, none = torch.ones(3, 2, 5, dtype=torch.bool)
    left[0, 0], gap[1, 2], none[1] = False, False, False
    for mask in (left, gap, none):
        with pytest.raises(ValueError, match=r"^mask: a row is not True .*; allowed: padding on the right"):
            NormTrace.from_cache(cache, tokens, mask=mask)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_mask_of_another_shape_is_refused():
    model, tokens = zoo.cached("llama"), zoo.tokens(zoo.cached("llama"), batch=2, pos=5)
    _, cache = model.run_with_cache(tokens)
    with pytest.raises(ValueError, match=r"^mask: got shape \(2, 4\); allowed: the tokens', \(2, 5\)"):
        NormTrace.from_cache(cache, tokens, mask=torch.ones(2, 4, dtype=torch.bool))


def test_a_padded_batch_gives_the_same_through_both_doors():
    """The batch that `to_tokens` pads: neither door takes its padding for tokens."""
    model = with_tokenizer("llama")
    tokens = model.to_tokens(["a longer prompt here", "ab"])
    _, cache = model.run_with_cache(tokens)
    traced, cached = trace_norms(model, tokens), NormTrace.from_cache(cache, tokens)
    assert traced.tokens.tolist() == cached.tokens.tolist()
    assert len(traced.tokens) < tokens.numel()
    assert torch.allclose(traced.norms, cached.norms, rtol=1e-5)


def test_streams_that_carry_gradients_leave_none_in_the_trace():
    model = zoo.cached("llama")
    tokens = zoo.tokens(model)
    kept = {}
    hooks = [(name, lambda stream, hook, name=name: kept.__setitem__(name, stream)) for name in residual_points(model.cfg.n_layers)]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert all(stream.requires_grad for stream in kept.values())
    trace = NormTrace.from_cache(kept, tokens, model=model)
    assert not trace.norms.requires_grad
    assert len(trace.to_dataframe()) == trace.norms.numel()
