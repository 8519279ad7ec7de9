import pytest
import torch
import zoo
from recording import same_state, state
from shared import planted
from streams import streams_alone, worst
from tokenizer import tiny_tokenizer, with_tokenizer

from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import default_prompts
from sd_lens.tracing.repetition import RepeatedTokens, repeated_tokens


def by_hand(model, ids, n, prefix=()):
    """Norms [point, id, count], one run per id and count, and norms [point, id] of the first tokens."""
    runs = [torch.tensor([*prefix, *[token] * count]) for token in ids for count in range(1, n + 1)]
    streams = streams_alone(model, runs)
    last, first = (torch.stack([stream[:, place].norm(dim=-1) for stream in streams], dim=-1) for place in (-1, 0))
    return last.unflatten(-1, (len(ids), n)), first[:, ::n]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_one_pass_shows_all_counts_on_every_family(family):
    model, ids = zoo.cached(family), [7, 99]
    norms, first = by_hand(model, ids, 4)
    for block, batch_tokens in ((0, 4096), (2, 5)):
        repeated = repeated_tokens(model, ids, n=4, block=block, batch_tokens=batch_tokens)
        assert worst(repeated.norms, norms[block + 1]) < 2e-5
        assert worst(repeated.first_norm, first[block + 1]) < 2e-5
        assert (repeated.block, repeated.ids, repeated.prefix, repeated.texts) == (block, (7, 99), (), ("<7>", "<99>"))


def test_a_bos_stands_before_the_run_where_the_model_puts_one():
    model = with_tokenizer("gpt2")
    bos, a, dot = (tiny_tokenizer().convert_tokens_to_ids(token) for token in ("<bos>", "a", "."))
    for ids in (["a", "."], [a, dot], torch.tensor([a, dot])):
        repeated = repeated_tokens(model, ids, n=4, block=1)
        norms, first = by_hand(model, [a, dot], 4, prefix=(bos,))
        assert worst(repeated.norms, norms[2]) < 1e-5
        assert worst(repeated.first_norm, first[2]) < 1e-5
        assert (repeated.prefix, repeated.ids, repeated.texts) == ((bos,), (a, dot), ("a", "."))
    without = repeated_tokens(model, ["a"], n=4, block=1, prepend_bos=False)
    norms, first = by_hand(model, [a], 4)
    assert without.prefix == ()
    assert worst(without.norms, norms[2]) < 1e-5
    assert worst(without.first_norm, first[2]) < 1e-5
    assert repeated_tokens(model, "a", n=2, block=1, prepend_bos=True).prefix == (bos,)


def test_repeats_of_the_planted_head_explode_like_the_first_token():
    truth = planted("gpt2")
    repeated = repeated_tokens(truth.model, n=6)
    assert repeated.block == truth.explosion_block
    assert repeated.first_norm.tolist() == pytest.approx([truth.norm] * 16, rel=0.02)
    assert repeated.norms.flatten().tolist() == pytest.approx([truth.norm] * 96, rel=0.02)
    assert all(repeated.first_is_high)
    assert repeated.reached(0.9) == [2] * 16  # the first of them is the first token itself
    assert repr(repeated) == (
        "RepeatedTokens(planted: 16 tokens repeated 6 times, block 1: 16 reach 50% of the first token's norm, the earliest after 2)"
    )


def test_only_the_planted_token_explodes_on_the_other_pathway():
    truth = planted(pathway="embedding")
    repeated = repeated_tokens(truth.model, [5, 96], n=4, block=truth.explosion_block)
    assert repeated.first_is_high == [False, True]
    assert repeated.norms[1].tolist() == pytest.approx([truth.norm] * 4, rel=0.02)
    assert repeated.norms[0].max() < 2
    assert repeated.reached(0.5) == [None, 2]
    # Prompts without that token show no explosion block; then norms are taken after the last.
    nothing = repeated_tokens(truth.model, [5], n=4)
    assert nothing.block == 5
    assert nothing.reached(0.5) == [None]
    assert repr(nothing).endswith("block 5: the first token has no high norm)")


def made_up(norms, *, first=(100.0, 100.0, 100.0), prefix=(0,), reference=10.0):
    texts = ("a", "b", "c")
    return RepeatedTokens("m", 2, (4, 5, 6), texts, prefix, torch.tensor(norms), torch.tensor(first), reference, 6.0)


def test_counts_at_which_a_share_is_reached():
    norms = [[1.0, 60.0, 40.0, 95.0], [1.0, 2.0, 3.0, 49.0], [90.0, 1.0, 1.0, 1.0]]
    repeated = made_up(norms)
    assert repeated.ratios[0].tolist() == pytest.approx([0.01, 0.6, 0.4, 0.95])
    assert repeated.reached(0.5) == [2, None, 1]
    assert repeated.reached(0.9) == [4, None, 1]
    assert repeated.reached(1.0) == [None, None, None]
    assert repr(repeated) == (
        "RepeatedTokens(m: 3 tokens repeated 4 times, block 2: 2 reach 50% of the first token's norm, the earliest after 1)"
    )
    summary = repeated.summary()
    assert summary.columns.tolist() == ["id", "token", "once", "last", "first_norm", "last_ratio", "reached_50", "reached_90"]
    assert summary.once.tolist() == [1, 1, 90]
    assert summary["last"].tolist() == [95, 49, 1]
    assert summary.last_ratio.tolist() == pytest.approx([0.95, 0.49, 0.01])
    assert summary.reached_90.isna().tolist() == [False, True, False]
    assert summary.reached_50[0] == 2
    frame = repeated.to_dataframe()
    assert frame.columns.tolist() == ["id", "token", "count", "norm", "first_norm", "ratio"]
    row = frame[(frame.id == 6) & (frame["count"] == 1)].iloc[0]
    assert (row.token, row.norm, row.first_norm) == ("c", 90, 100)
    assert row.ratio == pytest.approx(0.9)
    assert len(frame) == 12
    # Without a prefix the first repeat is the first token and does not count.
    assert made_up(norms, prefix=()).reached(0.5) == [2, None, None]


def test_nothing_is_reached_where_the_first_token_has_no_high_norm():
    norms = [[100.0] * 3] * 3
    assert made_up(norms, first=(59.0, 60.0, 61.0)).reached(0.5) == [None, 1, 1]
    quiet = made_up(norms, reference=50.0)
    assert quiet.first_is_high == [False] * 3
    assert quiet.reached(0.5) == [None] * 3
    assert repr(quiet).endswith("the first token has no high norm)")
    low = made_up([[30.0, 20.0]] * 3)
    assert repr(low).endswith("none reaches 50% of the first token's norm, largest ratio 0.3)")
    with pytest.raises(ValueError, match=r"^share: got 0\.0; allowed: above 0, up to 1"):
        low.reached(0.0)


def test_the_shipped_models_repeats_stay_ordinary():
    import sd_lens

    model = sd_lens.load("tiny")
    repeated = repeated_tokens(model, n=200)
    assert repeated.block == find_defects(trace_norms(model, default_prompts(model))).explosion_blocks[-1]
    assert all(repeated.first_is_high)
    assert repeated.reached(0.5) == [None] * 16
    assert not {*repeated.ids} & {*model.tokenizer.all_special_ids}
    # The BOS repeated explodes each time, being what it is.
    assert repeated_tokens(model, ["<s>"], n=5).reached(0.9) == [1]


def test_ids_are_drawn_from_the_built_in_prompts():
    model = with_tokenizer("llama")
    known = {token for prompt in default_prompts(model) for token in prompt.tolist()}
    drawn = [repeated_tokens(model, n=2, seed=seed).ids for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for ids in drawn:
        assert len(set(ids)) == 16
        assert known - {zoo.BOS, zoo.EOS, zoo.PAD} >= set(ids)


def test_as_many_repeats_as_the_context_allows():
    model = with_tokenizer("gpt2")
    assert repeated_tokens(model, ["a"]).norms.shape == (1, zoo.CONTEXT - 1)
    assert repeated_tokens(model, ["a"], prepend_bos=False).norms.shape == (1, zoo.CONTEXT)
    assert repeated_tokens(model, ["a"], n=zoo.CONTEXT - 1).norms.shape == (1, zoo.CONTEXT - 1)
    with pytest.raises(ValueError, match=r"^n: got 64; allowed: 2 to 63, what fits into the model's context"):
        repeated_tokens(model, ["a"], n=zoo.CONTEXT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 1}, r"n: got 1; allowed: 2 to 64"),
        ({"block": 3}, r"block: got 3; allowed: 0 to 2"),
        ({"block": -1}, r"block: got -1; allowed: 0 to 2"),
        ({"batch_tokens": 0}, r"batch_tokens: got 0; allowed: at least 1"),
        ({"min_ratio": 0.5}, r"min_ratio: got 0\.5; allowed: above 1"),
        ({"ids": [5, 101]}, r"ids: got 101; allowed: 0 to 100"),
        ({"ids": [-1]}, r"ids: got -1; allowed: 0 to 100"),
        ({"ids": []}, r"ids: got none; allowed: at least one token id"),
        ({"ids": ["a"]}, r"ids: got text for a model without tokenizer; allowed: token ids"),
        ({"ids": torch.zeros(2, 2).long()}, r"ids: got a tensor of shape \(2, 2\) and torch\.int64; allowed: integer ids"),
        ({"ids": torch.tensor([0.5])}, r"ids: got a tensor of shape \(1,\) and torch\.float32; allowed: integer ids"),
        ({"prepend_bos": True}, r"prepend_bos: got True for a model without tokenizer; allowed: None or False"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_refused(arguments, message):
    model = zoo.cached("llama")
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never), pytest.raises(ValueError, match=f"^{message}"):
        repeated_tokens(model, **arguments)


@pytest.mark.parametrize("text", ["ab", ""])
def test_strings_are_one_token(text):
    with pytest.raises(ValueError, match=rf"^ids: got '{text}', which is {len(text)} tokens; allowed: strings of one token"):
        repeated_tokens(with_tokenizer("llama"), ["a", text])


def test_a_stream_that_overflows_is_named():
    model = zoo.build("llama", dtype=torch.float16)

    def grow(mlp_out, hook):
        return mlp_out + (mlp_out.shape[1] == 7) * 1e6  # in the runs only: prompts have another length

    refusal = r"^model: its residual stream is NaN or infinite after block 1; allowed: finite weights"
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", grow)]), pytest.raises(ValueError, match=refusal):
        repeated_tokens(model, [5], n=7, block=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = zoo.build("llama", dtype=dtype)
    repeated = repeated_tokens(model, [5, 9], n=3, block=1)
    assert repeated.norms.dtype == torch.float32
    assert worst(repeated.norms, repeated_tokens(zoo.cached("llama"), [5, 9], n=3, block=1).norms) < 0.02


def test_it_leaves_no_trace_and_makes_its_figure(monkeypatch):
    model = zoo.build("llama")
    before, random, ran = state(model), torch.get_rng_state(), []
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", lambda stream, hook: ran.append(1))]):
        repeated = repeated_tokens(model, block=0)
    assert ran == []  # nothing runs beyond the block
    assert same_state(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    monkeypatch.setattr("sd_lens.display.figures.repetition_curves", lambda result: ("drawn", result), raising=False)
    assert repeated.plot() == ("drawn", repeated)
