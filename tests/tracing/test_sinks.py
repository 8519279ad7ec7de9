import pytest
import torch
import zoo
from recording import same_state, state
from shared import planted
from streams import norms_alone, points, ragged
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sd_lens.tracing.sinks import sink_attention
from sd_lens.tracing.source import source_of

LENGTHS = (9, 4, 12, 1, 7)
FIELDS = ("to_high", "to_other", "to_self", "per_high_key", "per_other_key", "alpha", "sink_share")


def pattern_names(model):
    return [f"blocks.{block}.attn.hook_pattern" for block in range(model.cfg.n_layers)]


def patterns_alone(model, prompt):
    """The attention (block, head, query, key) of one unpadded prompt, from TransformerLens' cache, in float64."""
    names = pattern_names(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt.unsqueeze(0), names_filter=lambda name: name in names)
    return torch.stack([cache[name][0].double() for name in names])


def high_alone(model, prompts, min_ratio):
    """Per prompt, which tokens are high-norm after any block."""
    norms = norms_alone(model, prompts)
    later = torch.cat([torch.arange(len(prompt)) > 0 for prompt in prompts])
    high = (norms[1:] >= min_ratio * norms[1:, later].median(dim=1, keepdim=True).values).any(0)
    return list(high.split([len(prompt) for prompt in prompts]))


def by_hand(model, prompts, *, min_ratio, epsilon, T, key):
    """The definitions, one query at a time."""
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    paid = {name: torch.zeros(shape, dtype=torch.float64) for name in ("high", "other", "self")}
    alphas, queries, pairs = [], 0, {"high": 0, "other": 0}
    highs = high_alone(model, prompts, min_ratio)
    for prompt, high in zip(prompts, highs, strict=True):
        pattern = patterns_alone(model, prompt)
        for query in range(len(prompt)):
            chosen = {
                "high": [k for k in range(query) if high[k]],
                "other": [k for k in range(query) if not high[k]],
            }
            if high[query] or not chosen["high"] or not chosen["other"]:
                continue
            queries += 1
            paid["self"] += pattern[..., query, query]
            for name, keys in chosen.items():
                paid[name] += pattern[..., query, keys].sum(-1)
                pairs[name] += len(keys)
        if len(prompt) > key:
            alphas.append(pattern[..., key : min(T, len(prompt)), key].mean(-1))
    alpha = torch.stack(alphas)
    return {
        "to_high": paid["high"] / queries,
        "to_other": paid["other"] / queries,
        "to_self": paid["self"] / queries,
        "per_high_key": paid["high"] / pairs["high"],
        "per_other_key": paid["other"] / pairs["other"],
        "alpha": alpha.mean(0),
        "sink_share": (alpha > epsilon).double().mean(0),
        "n_queries": queries,
        "n_high": int(sum(high.sum() for high in highs)),
        "n_prompts": len(alphas),
        "n_short": sum(key < len(prompt) < T for prompt in prompts),
    }


def agree(sinks, wanted):
    for name in FIELDS:
        assert torch.allclose(getattr(sinks, name).double(), wanted[name], atol=2e-6), name
    assert {name: getattr(sinks, name) for name in wanted if name.startswith("n_")} == {
        name: value for name, value in wanted.items() if name.startswith("n_")
    }
    whole = sinks.to_high + sinks.to_other + sinks.to_self
    assert torch.allclose(whole, torch.ones_like(whole), atol=2e-6)
    assert sinks.sink_rate == pytest.approx(float(wanted["sink_share"].mean()))
    assert sinks.sink_heads == [tuple(head) for head in (wanted["alpha"] > sinks.epsilon).nonzero().tolist()]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_by_brute_force(family):
    model, prompts = zoo.cached(family), ragged(zoo.VOCAB, LENGTHS)
    options = {"min_ratio": 1.15, "epsilon": 0.2, "T": 8, "key": 1}
    wanted = by_hand(model, prompts, **options)
    assert wanted["n_high"] > 0
    assert wanted["n_queries"] > 3
    assert 0 < wanted["sink_share"].mean() < 1
    agree(sink_attention(model, prompts, batch_tokens=24, **options), wanted)

    tokens = torch.full((len(prompts), max(LENGTHS)), 5)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    needed = [*points(model.cfg.n_layers), *pattern_names(model)]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in needed)
    agree(sink_attention(model, tokens, cache=cache, mask=mask, **options), wanted)


def test_an_even_head_of_the_planted_model_in_closed_form():
    truth, n = planted(n_kv_heads=2), 10
    sinks = sink_attention(truth.model, torch.arange(3 * n).reshape(3, n), T=6)
    assert (sinks.n_high, sinks.n_queries, sinks.n_prompts, sinks.n_short) == (3, 3 * (n - 2), 3, 0)
    # The planted head has no query weights: the query at position q pays 1 / (q + 1) to every token up to itself.
    queries = range(2, n)  # position 0 has the high norm, position 1 has no other token before it
    evenly = sum(1 / (q + 1) for q in queries) / len(queries)
    others = sum((q - 1) / (q + 1) for q in queries)
    wanted = {
        "to_high": evenly,
        "to_self": evenly,
        "to_other": others / len(queries),
        "per_high_key": evenly,
        "per_other_key": others / sum(q - 1 for q in queries),
        "alpha": sum(1 / (q + 1) for q in range(6)) / 6,
    }
    for name, value in wanted.items():
        assert float(getattr(sinks, name)[truth.explosion_block, 0]) == pytest.approx(value, rel=1e-5), name
    assert float(sinks.ratio[truth.explosion_block, 0]) == pytest.approx(wanted["per_high_key"] / wanted["per_other_key"], rel=1e-5)


def made_up(alphas, lengths, *, loud=()):
    """A cache of prompts whose queries pay ``alphas[prompt][head]`` to position 0 and the rest to themselves."""
    batch, pos, blocks = len(lengths), max(lengths), 3
    stream = torch.ones(batch, pos, zoo.D_MODEL)
    cache = {name: stream.clone() for name in points(blocks)}
    for prompt, place in loud:
        cache[points(blocks)[-1]][prompt, place] *= 100
    pattern = torch.zeros(batch, zoo.HEADS, pos, pos)
    for prompt in range(batch):
        for head in range(zoo.HEADS):
            pattern[prompt, head] = (1 - alphas[prompt][head]) * torch.eye(pos)
            pattern[prompt, head, :, 0] += alphas[prompt][head]
        pattern[prompt, :, lengths[prompt] :] = float("nan")  # what padding attends to is nobody's business
    mask = torch.arange(pos) < torch.tensor(lengths).unsqueeze(1)
    return cache | dict.fromkeys([f"blocks.{b}.attn.hook_pattern" for b in range(blocks)], pattern), mask


def test_the_sink_rate_is_taken_prompt_by_prompt():
    # Over queries 0..T-1, the first of which pays everything to itself: α = (1 + (T - 1) a) / T.
    alphas, lengths = ((0.5, 0.0, 0.25, 0.9), (0.5, 0.0, 0.5, 0.0)), (5, 3)
    cache, mask = made_up(alphas, lengths)
    model, tokens = zoo.cached("llama"), torch.full((2, 5), 7)
    sinks = sink_attention(model, tokens, cache=cache, mask=mask, T=4, epsilon=0.5)
    alpha = [[(1 + (t - 1) * a) / t for a in row] for row, t in zip(alphas, (4, 3), strict=True)]
    for head in range(4):
        assert sinks.alpha[:, head].tolist() == pytest.approx([(alpha[0][head] + alpha[1][head]) / 2] * 3, rel=1e-6)
    assert sinks.sink_share[0].tolist() == [1, 0, 0.5, 0.5]
    assert sinks.sink_rate == 0.5
    assert sinks.sink_heads == [(block, head) for block in range(3) for head in (0, 2, 3)]
    assert (sinks.n_prompts, sinks.n_short, sinks.T, sinks.key, sinks.epsilon) == (2, 1, 4, 0, 0.5)

    # At position 3 the shorter prompt has no token: it counts neither for nor against.
    late = sink_attention(model, tokens, cache=cache, mask=mask, T=4, epsilon=0.5, key=3)
    assert late.alpha[0].tolist() == pytest.approx([1 - a for a in alphas[0]], rel=1e-6)
    assert late.sink_share[0].tolist() == [0, 1, 1, 0]
    assert (late.n_prompts, late.n_short) == (1, 0)

    with pytest.raises(ValueError, match=r"^key: got 8; allowed: 0 to 4, a position that some prompt has$"):
        sink_attention(model, tokens, cache=cache, mask=mask, T=9, key=8)


def test_an_alpha_of_epsilon_is_no_sink():
    cache, mask = made_up([(0.5, 0.0, 0.0, 0.0)], [2])
    sinks = [
        sink_attention(zoo.cached("llama"), torch.tensor([[7, 7]]), cache=cache, mask=mask, epsilon=epsilon)
        for epsilon in (0.75, 0.74)
    ]
    assert [s.alpha[0, 0].item() for s in sinks] == [0.75, 0.75]
    assert [s.sink_rate for s in sinks] == [0, 0.25]
    assert [len(s.sink_heads) for s in sinks] == [0, 3]


def test_which_queries_count():
    """High-norm tokens at 0 and 2: of five tokens only 3 and 4 could choose, and 3 has one other token before it, 4 two."""
    cache, mask = made_up([(0.5, 0.1, 0.0, 1.0)], [5], loud=[(0, 0), (0, 2)])
    sinks = sink_attention(zoo.cached("llama"), torch.full((1, 5), 7), cache=cache, mask=mask)
    assert (sinks.n_high, sinks.n_queries) == (2, 2)
    assert sinks.to_high[1].tolist() == pytest.approx([0.5, 0.1, 0.0, 1.0])
    assert sinks.to_self[1].tolist() == pytest.approx([0.5, 0.9, 1.0, 0.0])
    assert sinks.to_other[1].abs().max() < 1e-7
    assert sinks.per_high_key[1].tolist() == pytest.approx([0.25, 0.05, 0.0, 0.5])


def test_without_high_norm_tokens_the_sink_rate_is_measured_all_the_same():
    model, prompts = zoo.cached("gpt2"), ragged(zoo.VOCAB, (6, 8))
    sinks = sink_attention(model, prompts)
    assert (sinks.n_high, sinks.n_queries, sinks.n_short) == (0, 0, 2)
    for name in FIELDS[:5]:
        assert getattr(sinks, name).isnan().all(), name
    wanted = torch.stack([patterns_alone(model, prompt)[..., 0].mean(-1) for prompt in prompts])
    assert torch.allclose(sinks.alpha.double(), wanted.mean(0), atol=1e-6)
    assert sinks.sink_rate == pytest.approx(float((wanted > 0.3).double().mean()))
    assert "no high-norm token, sink rate" in repr(sinks)
    top = sinks.top(2)
    assert top.alpha.tolist() == sinks.alpha.flatten().sort(descending=True).values[:2].tolist()


def test_high_norm_tokens_with_nothing_to_compare():
    sinks = sink_attention(planted().model, torch.arange(4).reshape(2, 2))
    assert (sinks.n_high, sinks.n_queries) == (2, 0)
    assert sinks.to_high.isnan().all()
    assert "none with tokens to compare" in repr(sinks)


def test_table_and_top():
    truth = planted()
    sinks = sink_attention(truth.model, torch.arange(30).reshape(3, 10), epsilon=0.2)
    frame = sinks.to_dataframe()
    assert frame.columns.tolist() == [
        "block", "head", "to_high", "to_other", "to_self", "per_high_key", "per_other_key", "ratio", "alpha", "sink_share", "sink",
    ]  # fmt: skip
    assert len(frame) == 24
    row = frame[(frame.block == 4) & (frame["head"] == 2)].iloc[0]
    assert row.to_high == pytest.approx(float(sinks.to_high[4, 2]))
    assert row.alpha == pytest.approx(float(sinks.alpha[4, 2]))
    assert row.ratio == pytest.approx(float(sinks.ratio[4, 2]))
    assert frame.sink.tolist() == [(block, head) in sinks.sink_heads for block in range(6) for head in range(4)]
    assert sinks.top(3).to_high.tolist() == sinks.to_high.flatten().sort(descending=True).values[:3].tolist()
    with pytest.raises(ValueError, match=r"^k: got 0; allowed: at least 1"):
        sinks.top(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_float32_computed(dtype):
    model, prompts = zoo.build("llama", dtype=dtype), ragged(zoo.VOCAB, (9, 5))
    wanted = sink_attention(zoo.cached("llama"), prompts, min_ratio=1.15)
    sinks = sink_attention(model, prompts, min_ratio=1.15)
    assert sinks.n_queries == wanted.n_queries > 0
    for name in FIELDS[:6]:
        assert getattr(sinks, name).dtype == torch.float32
        assert torch.allclose(getattr(sinks, name), getattr(wanted, name), atol=0.02), name


def test_a_model_whose_attention_hides_its_pattern_is_named_before_any_work():
    hf = zoo.hf_model("opt")
    hf.set_attn_implementation("sdpa")
    model = build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config).eval()
    ran = []
    watch = [("blocks.0.hook_resid_pre", lambda stream, hook: ran.append(tuple(stream.shape[:2])))]
    refusal = r"^model: its attention never shows blocks\.0\.attn\.hook_pattern.*allowed: a model whose"
    with model.hooks(fwd_hooks=watch), pytest.raises(ValueError, match=refusal):
        sink_attention(model, ragged(zoo.VOCAB, (5, 6)))
    assert ran == [(1, 1)]


def test_a_cache_must_have_what_is_needed():
    model, tokens = zoo.cached("gpt2"), zoo.tokens(zoo.cached("gpt2"))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: "resid" in name)
    with pytest.raises(ValueError, match=r"^cache: it lacks blocks\.0\.attn\.hook_pattern") as error:
        sink_attention(model, tokens, cache=cache)
    proposed = eval(str(error.value).split("names_filter=")[1][:-1])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=proposed)
    assert torch.allclose(sink_attention(model, tokens, cache=cache).alpha, sink_attention(model, tokens).alpha, atol=1e-6)


def test_a_source_is_traced_once_and_a_cached_one_never_runs_the_model():
    model, tokens = zoo.cached("gpt2"), zoo.tokens(zoo.cached("gpt2"))
    wanted = sink_attention(model, tokens)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    ran = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda stream, hook: ran.append(tuple(stream.shape[:2])))]):
        cached = sink_attention(model, source_of(model, tokens, may_need=(), cache=cache))
        assert ran == []
        shared = source_of(model, tokens, may_need=())
        again = [sink_attention(model, shared) for _ in range(2)]
    assert ran.count((2, 12)) == 3  # one trace, and the patterns twice
    for sinks in (cached, *again):
        assert torch.allclose(sinks.alpha, wanted.alpha, atol=1e-6)


def test_a_pattern_of_another_shape_is_refused():
    cache, mask = made_up([(0.5,) * 4], [5])
    cache["blocks.2.attn.hook_pattern"] = cache["blocks.2.attn.hook_pattern"][..., :4]
    with pytest.raises(ValueError, match=r"^model: the attention pattern of block 2 has shape \(1, 4, 5, 4\); allowed"):
        sink_attention(zoo.cached("llama"), torch.full((1, 5), 7), cache=cache, mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon: got 0.0; allowed: between 0 and 1"),
        ({"epsilon": 1.0}, "epsilon: got 1.0; allowed: between 0 and 1"),
        ({"T": 0}, "T: got 0; allowed: at least 1"),
        ({"T": 5, "key": 5}, "key: got 5; allowed: 0 to 4"),
        ({"key": -1}, "key: got -1; allowed: 0 to 63"),
        ({"min_ratio": 1.0}, "min_ratio: got 1.0; allowed: above 1"),
    ],
)
def test_options_out_of_range(options, message):
    model = zoo.cached("llama")
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never), pytest.raises(ValueError, match=f"^{message}"):
        sink_attention(model, zoo.tokens(model), **options)


def test_it_leaves_no_trace_and_makes_its_figure(monkeypatch):
    model = zoo.build("llama")
    before, random = state(model), torch.get_rng_state()
    sinks = sink_attention(model, zoo.tokens(model))
    assert same_state(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    monkeypatch.setattr("sd_lens.display.figures.sink_heatmap", lambda result: ("drawn", result), raising=False)
    assert sinks.plot() == ("drawn", sinks)
