"""Block weights of live models against what the models' own hooks show."""

import pytest
import torch
import zoo
from recording import record, relative_error

from sd_lens.models.activations import KNOWN
from sd_lens.models.live import architecture
from sd_lens.models.loading import weights_of
from sd_lens.models.weights import FFNWeights, MoEWeights

DENSE = [family for family in zoo.FAMILIES.values() if not family.moe]
MOE = [family for family in zoo.FAMILIES.values() if family.moe]
TOLERANCE = 1e-5
dense = pytest.mark.parametrize("family", DENSE, ids=lambda family: family.name)
mixture = pytest.mark.parametrize("family", MOE, ids=lambda family: family.name)


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
        assert (block.attention.output_scale, block.ffn.output_scale) == (family.output_scale, family.output_scale)
        for layer in (block.attention, block.ffn):
            assert (layer.post_norm is not None) == family.post_norm
            kinds = {norm.kind for norm in (layer.norm, layer.post_norm) if norm is not None}
            assert kinds == {"rms" if family.norm == "rms" else "layer"}
            # OLMo 2 is the one architecture whose sublayers read the stream as it is.
            assert (layer.norm is None) == ("olmo2" in family.name)


@pytest.mark.parametrize("family", zoo.FAMILIES.values(), ids=lambda family: family.name)
def test_weights_are_the_models_own_memory(family):
    model = zoo.cached(family.name)
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for name, tensor in weights_of(model)[1].named_tensors():
        assert not tensor.requires_grad
        if "norm.gain" in name and not family.stored_gain:
            continue  # 1 + w, or ones, have to be made
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "nemotron"])
def test_an_offset_is_added_in_float32_or_better(name, dtype):
    model = zoo.build(name, dtype=dtype)
    layers = model.original_model.model.layers
    for block, layer in zip(weights_of(model), layers, strict=True):
        assert block.attention.norm is not None
        assert block.attention.norm.gain.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(block.attention.norm.gain.double(), (1 + layer.input_layernorm.weight.double()).detach())
        assert block.ffn.W_out.dtype == dtype


@mixture
def test_a_mixture_is_rebuilt_from_the_hooks(family):
    model = zoo.cached(family.name)
    for block in weights_of(model):
        names = [f"blocks.{block.block}.{name}" for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z")]
        seen = record(model, zoo.tokens(model, batch=6), names)
        resid, attn_out, mlp_out, z = (seen[name] for name in names)
        assert isinstance(block.ffn, MoEWeights)
        assert (len(block.ffn.experts), block.ffn.top_k) == (zoo.EXPERTS, zoo.EXPERTS_PER_TOKEN)
        assert (block.ffn.shared is not None) == (block.ffn.W_shared_gate is not None) == (family.name == "qwen2_moe")
        assert block.ffn.experts[0].activation is KNOWN[family.activation]
        assert relative_error(block.attention.output(z), attn_out) < TOLERANCE
        x = block.ffn.input(resid + attn_out)
        assert (block.ffn.route(x) > 0).any((0, 1)).all()  # else some expert would not be compared
        assert relative_error(block.ffn(resid + attn_out), mlp_out) < TOLERANCE


@mixture
def test_tokens_are_sent_where_the_models_own_router_sends_them(family):
    model = zoo.cached(family.name)
    for block in weights_of(model):
        prefix = f"blocks.{block.block}"
        names = [f"{prefix}.{name}" for name in ("hook_resid_pre", "hook_attn_out")]
        shown = [name for name in ("hook_expert_weights", "hook_expert_indices") if f"{prefix}.mlp.{name}" in model.hook_dict]
        resid, attn_out, *routing = record(model, zoo.tokens(model), [*names, *(f"{prefix}.mlp.{name}" for name in shown)]).values()
        x = block.ffn.input(resid + attn_out).flatten(0, 1)
        if not routing:  # TransformerLens 3.9 does not show a bridge's routing
            with torch.no_grad():
                _, weights, chosen = model.blocks[block.block].mlp.gate.original_component(x)
            wanted = torch.zeros(len(x), zoo.EXPERTS).scatter(-1, chosen, weights)
        elif family.generation == "bridge":
            wanted = routing[0]
        else:  # HookedTransformer shows the weights before it chooses
            wanted = torch.zeros_like(routing[0]).scatter(-1, routing[1], routing[0].gather(-1, routing[1]))
            wanted = wanted / wanted.sum(-1, keepdim=True)
        assert relative_error(block.ffn.route(x), wanted) < TOLERANCE


# What real mixtures do: Qwen3-MoE and Qwen2-MoE by default, and the others of the zoo.
@mixture
def test_whether_weights_are_renormalised_is_found_out(family):
    renormalized = {"qwen2_moe": False, "qwen3_moe": False}.get(family.name, True)
    assert weights_of(zoo.cached(family.name))[1].ffn.renormalized == renormalized


@mixture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixture_of_half_precision_is_read(family, dtype):
    block = weights_of(zoo.build(family.name, dtype=dtype))[0]
    assert {tensor.dtype for _, tensor in block.named_tensors()} == {dtype}
    assert (block.ffn.top_k, block.ffn.renormalized) == (
        zoo.EXPERTS_PER_TOKEN,
        weights_of(zoo.cached(family.name))[0].ffn.renormalized,
    )


def test_blocks_with_one_ffn_and_mixtures_may_take_turns():
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    model = zoo.boot("Qwen2Moe", **zoo.SIZES, **sizes, mlp_only_layers=[1])
    weights = weights_of(model)
    assert [type(block.ffn) for block in weights] == [MoEWeights, FFNWeights, MoEWeights]
    for block in weights:
        names = [f"blocks.{block.block}.{name}" for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")]
        resid, attn_out, mlp_out = record(model, torch.arange(3, 27).reshape(2, 12), names).values()
        assert relative_error(block.ffn(resid + attn_out), mlp_out) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo"])
def test_a_dense_model_is_no_mixture(name):
    assert all(isinstance(block.ffn, FFNWeights) for block in weights_of(zoo.cached(name)))


def _sigmoid(router):
    def forward(x):
        weights, chosen = torch.nn.functional.linear(x, router.weight).sigmoid().topk(2, dim=-1)
        return x, weights / weights.sum(-1, keepdim=True), chosen

    return forward


def _of_half_of_the_experts(router):
    def forward(x):
        scores = torch.nn.functional.linear(x, router.weight)
        weights, chosen = scores[:, :2].softmax(-1).topk(2, dim=-1)
        return scores, weights, chosen

    return forward


def _apply_clamped(gate_up):
    gate, linear = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.clamp(max=7)) * linear.clamp(-7, 7)


def _apply_interleaved(gate_up):
    return torch.nn.functional.silu(gate_up[..., ::2]) * gate_up[..., 1::2]


STRANGE = {
    "a buffer": (lambda moe: moe.register_buffer("e_score_correction_bias", torch.zeros(4)), "e_score_correction_bias"),
    "a parameter": (
        lambda moe: moe.experts.register_parameter("down_proj_bias", torch.nn.Parameter(torch.zeros(4, 32))),
        r"experts\.down_proj_bias",
    ),
    "another layout": (lambda moe: setattr(moe.experts, "is_transposed", True), "transposed experts"),
    "experts one by one": (lambda moe: setattr(moe, "experts", torch.nn.ModuleList()), "experts without gate_up_proj"),
    "no router": (lambda moe: delattr(moe, "gate"), "no router that is called gate"),
    "sigmoid scores": (
        lambda moe: setattr(moe.gate.original_component, "forward", _sigmoid(moe.gate.original_component)),
        "a router whose weights are not the largest of a softmax",
    ),
    "groups": (
        lambda moe: setattr(moe.gate.original_component, "forward", _of_half_of_the_experts(moe.gate.original_component)),
        "a router whose weights are not the largest of a softmax",
    ),
    "a router with more inputs": (
        lambda moe: setattr(moe.gate.original_component, "forward", lambda x, groups: x),
        "a router that does not answer to its input alone",
    ),
    "a router that gives scores": (
        lambda moe: setattr(moe.gate.original_component, "forward", lambda x: x),
        "a router that does not say which experts it chooses",
    ),
    "clamped experts": (lambda moe: setattr(moe.experts, "_apply_gate", _apply_clamped), "experts whose branches"),
    "interleaved experts": (lambda moe: setattr(moe.experts, "_apply_gate", _apply_interleaved), "experts whose branches"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_mixture_of_another_kind_is_refused_for_what_it_has(what):
    change, named = STRANGE[what]
    model = zoo.build("mixtral")
    change(model.blocks[1].mlp.original_component)
    weights = weights_of(model)
    assert isinstance(weights[0].ffn, MoEWeights)
    with pytest.raises(ValueError, match=rf"model: block 1's mixture of experts has {named}.*; allowed: a softmax router"):
        weights[1]


@pytest.mark.skipif("hooked_mixtral" not in zoo.FAMILIES, reason="TransformerLens 4 has no HookedTransformer")
def test_a_mixture_with_biases_is_refused_of_a_hooked_transformer_too():
    model = zoo.build("hooked_mixtral")
    model.blocks[1].mlp.experts[2].W_in.bias = torch.nn.Parameter(torch.zeros(zoo.D_FF))
    with pytest.raises(ValueError, match=r"block 1's mixture of experts has a W_in that is no projection without bias; allowed"):
        weights_of(model)[1]


def test_a_change_of_an_expert_is_seen_through_the_weights():
    model = zoo.build("qwen2_moe")
    weights = weights_of(model)[2]
    with torch.no_grad():
        for parameter in model.original_model.parameters():
            parameter.fill_(7)
    for field, tensor in weights.named_tensors():
        assert bool((tensor == 7).all()), field


def test_reading_a_mixture_leaves_random_state_and_gradients_alone():
    model = zoo.build("mixtral")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights_of(model)[0]
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@dense
def test_block_indices(family):
    model = zoo.cached(family.name)
    weights = weights_of(model)
    assert [block.block for block in weights] == list(range(model.cfg.n_layers))
    last = model.cfg.n_layers - 1
    assert weights[-1].block == last
    assert torch.equal(weights[-1].ffn.W_out, weights[last].ffn.W_out)
    assert weights.name == str(model.cfg.model_name)
    for index in (last + 1, -last - 2):
        with pytest.raises(ValueError, match=rf"block: got {index}; allowed: 0 to {last}\b"):
            weights[index]


@pytest.mark.parametrize("family", zoo.FAMILIES.values(), ids=lambda family: family.name)
def test_the_architecture_is_known_on_both_generations(family):
    assert architecture(zoo.cached(family.name)).endswith(("ForCausalLM", "LMHeadModel"))
