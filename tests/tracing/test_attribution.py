"""Norm and trigger, split over what wrote them: complete, and each part what it is by TransformerLens' own cache."""

import re

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import planted
from streams import ragged

from sd_lens.linear.trigger import trigger_direction
from sd_lens.models.loading import weights_of
from sd_lens.models.weights import MoEWeights
from sd_lens.tracing.attribution import attribute_norm, attribute_trigger
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms

LENGTHS = (7, 1, 4)


def direction_of(model, seed=0):
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def caches(model, prompts):
    with torch.no_grad():
        return [model.run_with_cache(prompt.unsqueeze(0))[1] for prompt in prompts]


def projections(cached, name, vector):
    """Product of a hook point's activation with a vector, for all tokens one after the other, in float64."""
    shape = (-1, len(vector))
    return torch.cat([cache[name].double().reshape(shape) @ vector.double() for cache in cached])


def head_vectors(model, cached, block):
    """What each head writes (token, head, d_model) by itself, with norms and scales behind the layer frozen, in float64."""
    attention = weights_of(model)[block].attention
    z = torch.cat(
        [cache[f"blocks.{block}.attn.hook_z"].double().reshape(-1, attention.n_heads, attention.W_O.shape[1]) for cache in cached]
    )
    written = torch.einsum("thd,hdm->thm", z, attention.W_O.double())
    if attention.post_norm is not None:
        norm = attention.post_norm
        total = written.sum(1) + (0 if attention.b_O is None else attention.b_O.double())
        centred = total - total.mean(-1, keepdim=True) if norm.kind == "layer" else total
        scale = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt().unsqueeze(1)
        written = written - written.mean(-1, keepdim=True) if norm.kind == "layer" else written
        written = written / scale * norm.gain.double()
    return written * attention.output_scale


def assert_complete(result, tolerance=2e-5):
    """The parts add up to the whole, and what is inside of an FFN to the FFN's part, but for float32 rounding of the terms."""
    terms = result.values.abs().sum(1).double() + 1e-6
    assert float((result.residual.abs() / terms).max()) < tolerance
    for inner in result.inside.values():
        units = inner.values.abs().sum(1).double() + terms
        assert float((inner.residual.abs() / units).max()) < tolerance


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_part_of_the_norm_is_what_the_cache_says(family):
    model = zoo.cached(family)
    prompts, vector, last = ragged(zoo.VOCAB, LENGTHS), direction_of(model), model.cfg.n_layers - 1
    result = attribute_norm(model, prompts, block=last, direction=3 * vector, rows="tokens", neurons=range(last + 1), by_key=True)
    assert_complete(result)
    cached = caches(model, prompts)
    scale = float(result.values.abs().max())

    def close(got, wanted):
        assert got.shape == wanted.shape
        assert float((got.double() - wanted).abs().max()) < 2e-5 * scale

    def column(*which):
        return torch.stack([torch.tensor(result.part(*which, row=row)) for row in range(len(result.rows))])

    close(result.total, projections(cached, f"blocks.{last}.hook_resid_post", vector))
    embedded = projections(cached, "hook_embed", vector)
    close(column("embed"), embedded)
    stream = projections(cached, "blocks.0.hook_resid_pre", vector)
    if "pos_embed" in [component.kind for component in result.components]:
        close(column("pos_embed"), stream - embedded)
    else:
        close(embedded.float(), stream)
    for block in range(last + 1):
        close(column("ffn", block), projections(cached, f"blocks.{block}.hook_mlp_out", vector))
        heads = head_vectors(model, cached, block) @ vector.double()
        for head in range(heads.shape[1]):
            close(column("head", block, head), heads[:, head])
        close(column("bias", block), projections(cached, f"blocks.{block}.hook_attn_out", vector) - heads.sum(1))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_trigger_is_the_ffn_inputs_coefficient(family):
    model, block = zoo.cached(family), 1
    prompts = ragged(zoo.VOCAB, LENGTHS)
    result = attribute_trigger(model, prompts, block=block, rows="tokens", neurons=True)
    assert_complete(result)
    weights, cached = weights_of(model)[block], caches(model, prompts)
    vector = trigger_direction(weights).vector.double()
    names = ["hook_resid_pre"] + ([] if weights.parallel else ["hook_attn_out"])
    shape = (-1, model.cfg.d_model)
    entering = sum(torch.cat([cache[f"blocks.{block}.{name}"].double().reshape(shape) for cache in cached]) for name in names)
    x = entering
    if weights.ffn.norm is not None:
        x = x - x.mean(-1, keepdim=True) if weights.ffn.norm.kind == "layer" else x
        x = x / (x.pow(2).mean(-1, keepdim=True) + weights.ffn.norm.eps).sqrt()
    wanted = x @ vector
    assert float((result.total.double() - wanted).abs().max()) < 1e-4 * float(x.norm(dim=-1).max())
    kinds = {(component.kind, component.block) for component in result.components}
    assert (("head", block) in kinds) is not weights.parallel  # in parallel with the FFN, it is not read by it
    assert ("ffn", block) not in kinds
    assert ("ffn", block - 1) in kinds
    assert set(result.inside) == {0}


@pytest.mark.parametrize("family", zoo.FAMILIES)
@settings(max_examples=2)
@given(data=st.data())
def test_parts_add_up_whatever_is_asked(family, data):
    """Completeness: prompts of any lengths, in batches of any size or as one padded tensor or as a cache; any block and options."""
    model = zoo.cached(family)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    prompts = ragged(zoo.VOCAB, lengths, seed=data.draw(st.integers(0, 99)))
    trigger = data.draw(st.booleans())
    block = data.draw(st.integers(0, model.cfg.n_layers - 1))
    asked = {
        "block": block,
        "direction": direction_of(model, data.draw(st.integers(0, 9))),
        "rows": data.draw(st.sampled_from(["tokens", "groups"])),
        "by_key": data.draw(st.booleans()),
        "neurons": data.draw(st.sets(st.integers(0, block - trigger), max_size=2)) if block >= trigger else (),
        "min_ratio": 1.05,  # so that all groups have members
    }
    asked["neurons"] = sorted(asked["neurons"])
    run = attribute_trigger if trigger else attribute_norm
    if len(lengths) == lengths.count(1):  # without a second token there is nothing to tell high norms by
        asked["rows"] = "tokens"
        prompts = [torch.cat([prompts[0], prompts[0]]), *prompts]
    result = run(model, prompts, batch_tokens=data.draw(st.sampled_from([1, 9, 4096])), **asked)
    assert_complete(result)
    assert sum(row.n_tokens for row in result.rows) == sum(map(len, prompts))
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=zoo.PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p), dtype=torch.bool) for p in prompts], batch_first=True)
    with torch.no_grad():
        _, cache = model.run_with_cache(padded)
    again = run(model, padded, cache=cache, mask=mask, **asked)
    assert_complete(again)
    assert [vars(row) for row in again.rows] == [vars(row) for row in result.rows]
    scale = float(result.values.abs().max())
    assert float((again.values - result.values).abs().max()) < 1e-4 * scale
    assert float((again.total - result.total).abs().max()) < 1e-4 * scale


def test_rows_of_groups_are_means_over_their_tokens():
    truth = planted(pathway="embedding")
    prompts = ragged(96, (9, 6, 12), first=0)
    prompts[0][4] = prompts[2][7] = truth.trigger_token
    by_group = attribute_norm(truth.model, prompts, neurons=True)
    by_token = attribute_norm(truth.model, prompts, neurons=True, rows="tokens")
    assert [row.label for row in by_group.rows] == ["initial", "delimiter", "other"]
    assert [row.n_tokens for row in by_group.rows] == [3, 2, 22]
    for number, group in enumerate(by_group.rows):
        members = [i for i, row in enumerate(by_token.rows) if row.group == group.label]
        assert len(members) == group.n_tokens
        torch.testing.assert_close(by_group.values[number], by_token.values[members].double().mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(by_group.total[number], by_token.total[members].double().mean(), rtol=1e-5, atol=1e-5)
        units, each = by_group.inside[1].values[number], by_token.inside[1].values[members]
        torch.testing.assert_close(units, each.double().mean(0), rtol=1e-5, atol=1e-5)
    exploding = [(row.prompt, row.pos) for row in by_token.rows if row.group == "delimiter"]
    assert exploding == [(0, 4), (2, 7)]
    assert by_group.main == 1


def test_the_block_asked_for():
    truth = planted(explosion_block=1, decay_block=4)
    prompts = ragged(96, (9, 6))
    assert attribute_norm(truth.model, prompts).block == 1
    assert attribute_trigger(truth.model, prompts).block == 1
    trace = trace_norms(truth.model, prompts)
    after = torch.tensor(find_defects(trace).profiles["initial"])[1:]
    peak = attribute_norm(truth.model, prompts, block="peak")
    assert peak.block == 1  # the plateau after it is flat but for rounding
    assert {c.block for c in peak.components} == {None, *range(peak.block + 1)}
    assert float(peak.total[0]) == pytest.approx(float(after.max()), rel=1e-2)


def test_heads_by_where_they_take_it_from():
    """A token at position 0 takes everything from itself; elsewhere, what it takes from itself is the pattern's diagonal times its value."""
    model = zoo.cached("llama")
    prompts, vector = ragged(zoo.VOCAB, (5, 3)), direction_of(model)
    result = attribute_norm(model, prompts, block=1, direction=vector, rows="tokens", by_key=True)
    cached = caches(model, prompts)
    by_key = {(c.block, c.index, c.keys): result.values[:, i] for i, c in enumerate(result.components) if c.kind == "head"}
    first = torch.tensor([row.pos == 0 for row in result.rows])
    for block in range(2):
        attention = weights_of(model)[block].attention
        for head in range(attention.n_heads):
            kv = head // attention.group_size
            wanted = []
            for cache in cached:
                diagonal = cache[f"blocks.{block}.attn.hook_pattern"][0, head].diagonal().double()
                value = cache[f"blocks.{block}.attn.hook_v"][0, :, kv].double()
                wanted.append(diagonal.unsqueeze(1) * value @ attention.W_O[head].double() @ vector.double())
            itself, others = by_key[block, head, "itself"], by_key[block, head, "others"]
            torch.testing.assert_close(itself.double(), torch.cat(wanted), rtol=1e-4, atol=1e-6)
            assert float(others[first].abs().max()) < 1e-6
            assert float(others[~first].abs().min()) > 0


@pytest.mark.parametrize("family", [name for name in ("gpt2", "llama", "gpt_neox_parallel", "hooked_gpt2") if name in zoo.FAMILIES])
@pytest.mark.parametrize("run", [attribute_norm, attribute_trigger])
@pytest.mark.parametrize("by_key", [False, True])
def test_a_cache_that_lacks_points_is_met_with_the_filter_that_keeps_them(family, run, by_key):
    model, tokens = zoo.cached(family), zoo.tokens(zoo.cached(family))
    asked = {"block": 2, "direction": direction_of(model), "by_key": by_key}
    with torch.no_grad():
        _, poor = model.run_with_cache(tokens, names_filter=lambda name: "resid" in name)
    with pytest.raises(
        ValueError, match=r"^cache: it lacks .*hook_[vz], .*allowed: .*run_with_cache\(\.\.\., names_filter="
    ) as error:
        run(model, tokens, cache=poor, **asked)
    lacking = re.search(r"it lacks (.*?)[,;]", str(error.value)).group(1)
    assert lacking not in poor
    names_filter = eval(re.search(r"names_filter=(.*)\)$", str(error.value)).group(1))  # what a user would paste
    with torch.no_grad():
        _, rich = model.run_with_cache(tokens, names_filter=names_filter)
    assert_complete(run(model, tokens, cache=rich, **asked))
    assert not any("hook_scale" in name or "hook_q" in name for name in rich)


def test_a_cache_without_its_batch_dimension():
    model, tokens = zoo.cached("gpt2"), zoo.tokens(zoo.cached("gpt2"), batch=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    asked = {"block": 2, "direction": direction_of(model), "rows": "tokens", "by_key": True}
    got, wanted = attribute_norm(model, tokens, cache=cache, **asked), attribute_norm(model, tokens, **asked)
    torch.testing.assert_close(got.values, wanted.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_half_precision_is_split_in_float32(family, dtype):
    model = zoo.build(family, dtype=dtype)
    result = attribute_norm(model, ragged(zoo.VOCAB, LENGTHS), block=2, direction=direction_of(model), neurons=[1])
    assert result.values.dtype == torch.float64
    assert_complete(result, tolerance=6 * torch.finfo(dtype).eps)  # the model itself rounds every sum of the stream


def test_without_an_explosion_nothing_is_claimed():
    model, prompts = zoo.cached("llama"), ragged(zoo.VOCAB, (6, 8))
    for run in (attribute_norm, attribute_trigger):
        with pytest.raises(
            ValueError, match=r"^prompts: no block makes a token's norm explode \(largest ratio .* threshold 6\); allowed: .*block="
        ):
            run(model, prompts)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"block": 6}, "block: got 6; allowed: 0 to 5, 'explosion', 'peak'"),
        ({"block": "decay"}, "block: got 'decay'; allowed: 0 to 5, 'explosion', 'peak'"),
        ({"rows": "heads"}, "rows: got 'heads'; allowed: 'groups', 'tokens'"),
        ({"block": True}, "block: got True; allowed: 0 to 5, 'explosion', 'peak'"),
        ({"neurons": [9]}, "neurons: got 9; allowed: 0 to 5"),
        ({"neurons": 3}, "neurons: got 3; allowed: some of 0 to 5, True or False"),
        ({"direction": [1.0, 2.0]}, "direction: got list; allowed: a tensor of 64 numbers"),
        ({"neurons": [3]}, "neurons: got block 3; allowed: 0 to 1, whose FFNs are among the parts"),
        ({"direction": torch.ones(5)}, "direction: got shape (5,) and norm 2.23607; allowed: 64 finite numbers"),
        ({"direction": torch.zeros(64)}, "direction: got shape (64,) and norm 0; allowed: 64 finite numbers"),
        ({"min_ratio": 0.5}, "min_ratio: got 0.5; allowed: above 1"),
        ({"mask": torch.ones(1, 8, dtype=torch.bool)}, "mask: got one without a cache"),
        ({"cache": {}}, "cache: it lacks blocks.0.hook_resid_pre"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input(asked, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        attribute_norm(planted().model, torch.arange(8).unsqueeze(0), **asked)


def test_prompts_of_a_cache_are_its_tokens():
    with pytest.raises(ValueError, match=r"^prompts: got none with a cache; allowed: the \(batch, pos\) tensor"):
        attribute_norm(planted().model, cache={})


def test_the_result_reads_well():
    truth = planted()
    result = attribute_norm(truth.model, torch.arange(10).unsqueeze(0), neurons=True)
    assert repr(result).startswith("Attribution(planted, norm after block 1: initial ")
    assert "= L1 FFN 100%" in repr(result)
    top = result.top(3)
    assert top["value"].abs().is_monotonic_decreasing
    assert top.iloc[0]["name"] == "L1 FFN"
    assert result.top(1, inside=1).iloc[0]["name"] == "L1N0"
    assert result.part("neuron", 1, 0) == pytest.approx(result.part("ffn", 1), rel=1e-3)
    frame = result.to_dataframe()
    groups = frame[~frame.kind.isin(["neuron", "expert", "ffn_bias"])].groupby("label").value.sum()
    summary = result.summary().set_index("label")
    assert groups.to_dict() == pytest.approx((summary.total - summary.residual).to_dict())
    with pytest.raises(ValueError, match=r"^k: got 0; allowed: at least 1"):
        result.top(0)
    with pytest.raises(ValueError, match=r"^row: got 'newline'; allowed: 0 to 1, or 'initial', 'other'"):
        result.top(row="newline")
    with pytest.raises(ValueError, match=r"^inside: got 0; allowed: 1"):
        result.top(inside=0)
    with pytest.raises(ValueError, match=r"^kind, block, index: got \('head', 5, 0\)"):
        result.part("head", 5, 0)


def test_mixtures_are_split_over_their_experts():
    model = zoo.cached("qwen2_moe")  # with a shared expert
    prompts, vector = ragged(zoo.VOCAB, (6, 4)), direction_of(model)
    result = attribute_norm(model, prompts, block=1, direction=vector, rows="tokens", neurons=[1])
    moe, cached = weights_of(model)[1].ffn, caches(model, prompts)
    assert isinstance(moe, MoEWeights)
    stream = torch.cat([cache["blocks.1.hook_resid_pre"][0] + cache["blocks.1.hook_attn_out"][0] for cache in cached])
    x = moe.input(stream)
    weight = moe.route(x)
    wanted = [weight[:, e] * (expert.output(expert.hidden(x)) @ vector) for e, expert in enumerate(moe.experts)]
    gate = torch.sigmoid(x @ moe.W_shared_gate).squeeze(1)
    wanted.append(gate * (moe.shared.output(moe.shared.hidden(x)) @ vector))
    assert [c.name for c in result.inside[1].components] == [*(f"L1E{e}" for e in range(len(wanted))), "L1 FFN bias"]
    torch.testing.assert_close(result.inside[1].values[:, :-1], torch.stack(wanted, 1).detach(), rtol=1e-4, atol=1e-5)
