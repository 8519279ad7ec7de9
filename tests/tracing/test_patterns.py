"""Patterns are those of TransformerLens' cache, of the heads asked for or of the largest sinks."""

import pytest
import torch
import zoo

from sd_lens.models.loading import load
from sd_lens.tracing.patterns import head_patterns
from sd_lens.tracing.sinks import sink_attention

TEXT = "The cat sat on the mat.\nIt purred."


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def cached(tiny):
    tokens = tiny.to_tokens(TEXT)
    with torch.no_grad():
        _, cache = tiny.run_with_cache(tokens)
    return tokens, cache


def test_patterns_are_those_of_the_cache_in_the_order_asked_for(tiny, cached):
    tokens, cache = cached
    heads = [(4, 2), (0, 0), (2, 3), (2, 0)]
    shown = head_patterns(tiny, TEXT, heads)
    wanted = torch.stack([cache[f"blocks.{block}.attn.hook_pattern"][0, head] for block, head in heads])
    assert torch.allclose(shown.patterns, wanted, atol=1e-6)
    assert shown.heads == tuple(heads)
    assert shown.names == ("L4H2", "L0H0", "L2H3", "L2H0")
    assert shown.texts[0] == "<s>"
    assert "".join(shown.texts[1:]).strip() == TEXT
    assert repr(shown) == f"HeadPatterns(tiny: L4H2, L0H0, L2H3, L2H0 on {tokens.shape[1]} tokens)"


def test_the_default_heads_are_the_largest_sinks(tiny, cached):
    tokens, cache = cached
    alpha = {(b, h): float(cache[f"blocks.{b}.attn.hook_pattern"][0, h, :, 0].mean()) for b in range(6) for h in range(4)}
    assert tokens.shape[1] < 64
    ranked = sorted(alpha, key=alpha.__getitem__, reverse=True)
    assert head_patterns(tiny, TEXT, k=5).heads == tuple(ranked[:5])
    assert set(head_patterns(tiny, TEXT, k=3).heads) <= set(sink_attention(tiny, TEXT).sink_heads)
    assert len(head_patterns(tiny, TEXT, k=100).heads) == 24


def test_a_cache_gives_the_same_without_a_run(tiny, cached, monkeypatch):
    tokens, cache = cached
    from_prompts = [head_patterns(tiny, tokens, [(4, 2)]), head_patterns(tiny, tokens, k=3)]
    monkeypatch.setattr(type(tiny), "run_with_hooks", lambda *_, **__: pytest.fail("the model was run"))
    for heads, wanted in zip(([(4, 2)], None), from_prompts, strict=True):
        got = head_patterns(tiny, tokens, heads, k=3, cache=cache)
        assert got.heads == wanted.heads
        assert torch.allclose(got.patterns, wanted.patterns, atol=1e-6)


def test_a_cache_without_the_pattern_is_met_with_the_filter(tiny, cached):
    tokens, cache = cached
    lacking = {name: cache[name] for name in cache if "pattern" not in name}
    with pytest.raises(ValueError, match=r"cache: it lacks blocks.4.attn.hook_pattern; allowed: .*names_filter="):
        head_patterns(tiny, tokens, [(4, 2)], cache=lacking)


def test_padding_of_a_cache_is_left_out(tiny, cached):
    tokens, cache = cached
    padded = {name: cache[name] for name in ("blocks.0.hook_resid_pre", "blocks.4.attn.hook_pattern")}
    mask = torch.arange(tokens.shape[1]).unsqueeze(0) < 7
    shown = head_patterns(tiny, tokens, [(4, 2)], cache=padded, mask=mask)
    assert torch.equal(shown.patterns[0], cache["blocks.4.attn.hook_pattern"][0, 2, :7, :7])
    assert len(shown.texts) == 7


def test_the_table_holds_every_causal_pair_once(tiny):
    shown = head_patterns(tiny, TEXT, [(4, 2), (1, 3)])
    frame = shown.to_dataframe()
    n = len(shown.texts)
    assert len(frame) == 2 * n * (n + 1) // 2
    row = frame[(frame.block == 1) & (frame["query"] == 5) & (frame.key == 2)].iloc[0]
    assert row.attention == pytest.approx(float(shown.patterns[1, 5, 2]))
    assert (row["head"], row.query_token, row.key_token) == (3, shown.texts[5], shown.texts[2])


def test_the_result_draws_itself(tiny):
    shown = head_patterns(tiny, TEXT, [(4, 2), (1, 3)])
    assert repr(shown.plot()) == f"View(attention of L4H2, L1H3 over {len(shown.texts)} tokens)"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_other_architectures_without_a_tokenizer(family):
    model = zoo.FAMILIES[family].build()
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    shown = head_patterns(model, tokens, [(1, 1)])
    assert torch.allclose(shown.patterns[0], cache["blocks.1.attn.hook_pattern"][0, 1].float(), atol=1e-6)
    assert shown.texts == ("<3>", "<4>", "<5>", "<6>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": [(6, 0)]}, r"heads: got \(6, 0\); allowed: pairs of a block, 0 to 5, and a head, 0 to 3"),
        ({"heads": [(0, -1)]}, r"heads: got \(0, -1\); allowed"),
        ({"heads": []}, "heads: got \\[\\]; allowed"),
        ({"k": 0}, "k: got 0; allowed: a whole number from 1"),
        ({"prompt": ["a", "b"]}, "prompt: got 2; allowed: one"),
    ],
)
def test_bad_arguments_are_refused_before_any_run(tiny, arguments, message, monkeypatch):
    monkeypatch.setattr(type(tiny), "run_with_hooks", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=message):
        head_patterns(tiny, **{"prompt": TEXT, **arguments})
