"""Block weights of live models against what the models' own hooks show."""

import pytest
import torch
import zoo
from recording import record, relative_error

from sd_lens.models.live import architecture, is_mixture_of_experts
from sd_lens.models.loading import weights_of

DENSE = [family for family in zoo.FAMILIES.values() if not family.moe]
MOE = [family for family in zoo.FAMILIES.values() if family.moe]
TOLERANCE = 1e-5
dense = pytest.mark.parametrize("family", DENSE, ids=lambda family: family.name)


def _hooks(family, block):
    """One block's hook values by short name, the heads of `attn.*` on an axis of their own."""
    model = zoo.cached(family.name)
    short = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    short += ["attn.hook_v", "attn.hook_z", "attn.hook_pattern", "mlp.hook_pre", "mlp.hook_post"]
    short += ["mlp.hook_pre_linear"] if family.gated else []
    seen = record(model, zoo.tokens(model), [f"blocks.{block}.{name}" for name in short])
    return {name.split(".", 2)[2].removeprefix("attn.").removeprefix("mlp."): value for name, value in seen.items()}


@dense
def test_attention_is_rebuilt_from_the_hooks(family):
    for block in weights_of(zoo.cached(family.name)):
        seen, attention = _hooks(family, block.block), block.attention
        v, z = seen["hook_v"], seen["hook_z"]
        assert relative_error(attention.values(attention.input(seen["hook_resid_pre"])), v) < TOLERANCE
        mixed = torch.einsum("bhqk,bkhe->bqhe", seen["hook_pattern"], v.repeat_interleave(attention.group_size, dim=2))
        assert relative_error(mixed, z) < TOLERANCE
        assert relative_error(attention.output(z), seen["hook_attn_out"]) < TOLERANCE


@dense
def test_ffn_is_rebuilt_from_the_hooks(family):
    for block in weights_of(zoo.cached(family.name)):
        seen, ffn = _hooks(family, block.block), block.ffn
        entering = seen["hook_resid_pre"] if family.parallel else seen["hook_resid_pre"] + seen["hook_attn_out"]
        x = ffn.input(entering)
        # OPT's FFN works on tokens in a row.
        pre, post = (seen[name].reshape(*x.shape[:-1], -1) for name in ("hook_pre", "hook_post"))
        got_pre, got_linear = ffn.pre(x)
        assert relative_error(got_pre, pre) < TOLERANCE
        if family.gated:
            assert relative_error(got_linear, seen["hook_pre_linear"]) < TOLERANCE
        else:
            assert got_linear is None
        assert relative_error(ffn.hidden(x), post) < TOLERANCE
        assert relative_error(ffn.output(post), seen["hook_mlp_out"]) < TOLERANCE
        assert relative_error(ffn(entering), seen["hook_mlp_out"]) < TOLERANCE


@dense
def test_a_token_alone_is_answered_as_the_model_answers_it(family):
    model = zoo.cached(family.name)
    for block in weights_of(model):
        names = [f"blocks.{block.block}.{name}" for name in ("hook_resid_pre", "hook_attn_out")]
        resid, out = record(model, zoo.tokens(model, batch=3, pos=1), names).values()
        assert relative_error(block.attention.alone(resid), out) < TOLERANCE


@dense
def test_what_kind_of_block_it_is_is_read_from_the_model(family):
    for block in weights_of(zoo.cached(family.name)):
        assert block.parallel == family.parallel
        assert block.ffn.gated == family.gated
        for layer in (block.attention, block.ffn):
            assert (layer.post_norm is not None) == family.post_norm
            kinds = {norm.kind for norm in (layer.norm, layer.post_norm) if norm is not None}
            assert kinds == {"rms" if family.norm == "rms" else "layer"}
            # OLMo 2 is the one architecture whose sublayers read the stream as it is.
            assert (layer.norm is None) == ("olmo2" in family.name)


@dense
def test_weights_are_the_models_own_memory(family):
    model = zoo.cached(family.name)
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for name, tensor in weights_of(model)[1].named_tensors():
        assert not tensor.requires_grad
        if "norm.gain" in name and "gemma" in family.name and family.generation == "bridge":
            continue  # 1 + w has to be computed
        assert tensor.untyped_storage().data_ptr() in memory, name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_change_of_the_model_is_seen_through_the_weights(name):
    model = zoo.build(name)
    weights = weights_of(model)[2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    for field, tensor in weights.named_tensors():
        assert bool((tensor == 7).all()), field


@pytest.mark.parametrize("family", MOE, ids=lambda family: family.name)
def test_a_mixture_of_experts_is_refused(family):
    model = zoo.cached(family.name)
    assert is_mixture_of_experts(model)
    weights = weights_of(model)
    assert (len(weights), weights.d_model) == (zoo.BLOCKS, zoo.D_MODEL)
    with pytest.raises(ValueError, match="block 0 is a mixture of experts"):
        weights[0]


@dense
def test_block_indices(family):
    model = zoo.cached(family.name)
    weights = weights_of(model)
    assert [block.block for block in weights] == list(range(model.cfg.n_layers))
    last = model.cfg.n_layers - 1
    assert weights[-1].block == last
    assert torch.equal(weights[-1].ffn.W_out, weights[last].ffn.W_out)
    for index in (last + 1, -last - 2):
        with pytest.raises(ValueError, match=rf"block: got {index}; allowed: 0 to {last}\b"):
            weights[index]


@pytest.mark.parametrize("family", zoo.FAMILIES.values(), ids=lambda family: family.name)
def test_the_architecture_is_known_on_both_generations(family):
    assert architecture(zoo.cached(family.name)).endswith(("ForCausalLM", "LMHeadModel"))
