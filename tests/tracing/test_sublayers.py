import pytest
import torch
import zoo
from shared import planted
from streams import ragged

from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.sublayers import SublayerShare, attribute_sublayers


def prompts_with_triggers():
    prompts = ragged(96, (9, 5, 12), first=0)
    prompts[0][4] = prompts[2][7:9] = 96
    return prompts


def by_hand(model, block, prompts, chosen, direction):
    """Means over the chosen (prompt, pos), from TransformerLens' cache of one prompt at a time."""
    sums = torch.zeros(4, dtype=torch.float64)
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            _, cache = model.run_with_cache(prompt.unsqueeze(0))
        for place in (place for prompt_of, place in chosen if prompt_of == number):
            for part, name in enumerate(("resid_pre", "attn_out", "mlp_out", "resid_post")):
                sums[part] += cache[f"blocks.{block}.hook_{name}"][0, place].double() @ direction.double()
    return (sums / len(chosen)).tolist()


def test_the_planted_ffns_make_the_steps(planted_model):
    model, prompts = planted_model.model, prompts_with_triggers()
    defects = find_defects(trace_norms(model, prompts))
    chosen = [(token.prompt, token.pos) for token in defects.tokens]
    for batch_tokens in (4096, 1):
        attribution = attribute_sublayers(model, defects, batch_tokens=batch_tokens)
        assert [share.block for share in attribution.shares] == [planted_model.explosion_block, planted_model.decay_block]
        assert attribution.n_tokens == len(chosen)
        for share in attribution.shares:
            wanted = by_hand(model, share.block, prompts, chosen, defects.direction.direction)
            got = [share.before, share.attention, share.ffn, share.after]
            assert got == pytest.approx(wanted, abs=2e-6 * planted_model.norm)
            assert share.residual == pytest.approx(share.after - share.before - share.attention - share.ffn, abs=1e-9)
            assert abs(share.residual) < 1e-6 * planted_model.norm
            assert share.ffn_share == pytest.approx(1, abs=1e-3)
            assert share.main_part == "ffn"
    rise, fall = attribution.shares
    assert rise.ffn == pytest.approx(planted_model.norm, rel=0.02)
    assert fall.ffn == pytest.approx(-planted_model.norm, rel=0.02)
    blocks = f"block {rise.block}: ffn, block {fall.block}: ffn"
    assert repr(attribution) == f"SublayerAttribution(planted: {blocks})"
    frame = attribution.to_dataframe()
    assert frame.columns.tolist() == ["block", "before", "attention", "ffn", "after", "residual", "ffn_share"]
    assert frame.ffn.tolist() == [rise.ffn, fall.ffn]


def test_only_the_first_prompts_with_a_high_norm_token_are_run(planted_model):
    model, prompts = planted_model.model, [torch.arange(5), *prompts_with_triggers()]
    defects = find_defects(trace_norms(model, prompts))
    first = {"head": 0, "embedding": 1}[planted_model.pathway]
    chosen = [(token.prompt, token.pos) for token in defects.tokens if token.prompt == first]
    ran = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda stream, hook: ran.append(tuple(stream.shape[:2])))]):
        attribution = attribute_sublayers(model, defects, max_prompts=1)
    assert ran == [(1, len(prompts[first]))]
    assert attribution.n_tokens == len(chosen)
    share = attribution.shares[0]
    wanted = by_hand(model, share.block, prompts, chosen, defects.direction.direction)
    assert [share.before, share.attention, share.ffn, share.after] == pytest.approx(wanted, abs=2e-6 * planted_model.norm)


def test_an_explosion_that_attention_writes_is_the_attentions():
    truth = planted("gpt2", pathway="head")
    model, prompts = truth.model, ragged(96, (8, 6))

    def write(attn_out, hook):
        attn_out = attn_out.clone()
        attn_out[:, 0] += 0.75 * truth.norm * truth.direction
        return attn_out

    def partly(mlp_out, hook):
        return mlp_out * 0.25

    # The first token's FFN sees what attention wrote instead of its trigger; that the rest comes from it is arranged as well.
    hooks = [("blocks.1.hook_attn_out", write), ("blocks.1.hook_mlp_out", partly)]
    with model.hooks(fwd_hooks=hooks):
        defects = find_defects(trace_norms(model, prompts))
        attribution = attribute_sublayers(model, defects)
        chosen = [(token.prompt, token.pos) for token in defects.tokens]
        wanted = by_hand(model, 1, prompts, chosen, defects.direction.direction)
    assert defects.explosion_blocks == (1,)
    share = attribution.shares[0]
    assert [share.before, share.attention, share.ffn, share.after] == pytest.approx(wanted, abs=1e-5 * truth.norm)
    assert share.attention == pytest.approx(0.75 * truth.norm, rel=0.01)
    assert share.main_part == "attention"
    assert share.ffn_share == pytest.approx(share.ffn / (share.ffn + 0.75 * truth.norm), rel=0.01)


@pytest.mark.parametrize(
    ("parts", "ffn_share", "main"),
    [
        ((0.0, 10.0, 90.0), 0.9, "ffn"),
        ((0.0, 90.0, 10.0), 0.1, "attention"),
        ((100.0, -10.0, -90.0), 0.9, "ffn"),
        ((100.0, -90.0, -10.0), 0.1, "attention"),
        ((0.0, -20.0, 100.0), 1.25, "ffn"),
        ((0.0, 100.0, -20.0), -0.25, "attention"),
        ((0.0, 50.0, 50.0), 0.5, "ffn"),
    ],
)
def test_shares_by_hand(parts, ffn_share, main):
    share = SublayerShare(3, *parts, after=sum(parts) + 0.5)
    assert share.ffn_share == pytest.approx(ffn_share)
    assert share.main_part == main
    assert share.residual == 0.5


def test_nothing_found_has_no_shares():
    model = zoo.cached("llama")
    defects = find_defects(trace_norms(model, ragged(zoo.VOCAB, (5, 8))))
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never):
        attribution = attribute_sublayers(model, defects)
    assert (attribution.shares, attribution.n_tokens) == ((), 0)
    assert attribution.to_dataframe().empty
    assert repr(attribution).endswith(": no blocks)")


def test_without_a_direction_there_is_nothing_to_project_on():
    model = planted().model
    defects = find_defects(trace_norms(model, ragged(96, (5, 8)), direction_prompts=0))
    assert defects.found
    with pytest.raises(ValueError, match=r"^defects: their trace has no direction; allowed: a trace from trace_norms with"):
        attribute_sublayers(model, defects)


def test_a_stopped_trace_runs_no_later_block():
    model, prompts = planted().model, ragged(96, (5, 8))
    defects = find_defects(trace_norms(model, prompts, stop_at=3))
    ran = []
    with model.hooks(fwd_hooks=[(f"blocks.{b}.hook_attn_out", lambda x, hook, b=b: ran.append(b)) for b in range(6)]):
        attribution = attribute_sublayers(model, defects)
    assert ran == [0, 1]
    assert [share.block for share in attribution.shares] == [1]


def test_another_model_than_the_traced_one_is_refused():
    truth, other = planted(), planted(n_blocks=7)
    defects = find_defects(trace_norms(truth.model, torch.arange(10)[None]))
    with pytest.raises(ValueError, match=r"^model: got one of 7 blocks.*allowed: the model that was traced"):
        attribute_sublayers(other.model, defects)
