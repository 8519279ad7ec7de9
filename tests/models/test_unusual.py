"""Architectures outside the zoo: what can be read is read, what cannot is said, and what can be traced is traced."""

from __future__ import annotations

import pytest
import torch
import zoo
from recording import record, relative_error

from sd_lens import check, find_defects, trace_norms, weights_of

WIDE = {"head_dim": zoo.D_HEAD_WIDE}
SLIDING = {"sliding_window": zoo.WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
GRANITE_4 = {
    "num_local_experts": 0,
    "shared_intermediate_size": 48,
    "layer_types": ["attention"] * 3,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "position_embedding_type": "rope",
}
READ = {
    "Cohere": {},  # parallel, one LayerNorm without bias for both sublayers, gated
    "StableLm": {"use_parallel_residual": True},
    "Starcoder2": {},
    "Glm4": WIDE,  # norms before and after the sublayers, gate and linear branch in one matrix
    "Exaone4": SLIDING,  # norms after the sublayers only, on 3.9 under the names of those before
    "Gemma": WIDE,
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "NanoChat": {},  # norms without gain
    "Arcee": {},
    "Apertus": {},  # an activation with parameters
    "SeedOss": WIDE,
    "GraniteMoe": {**MIXTURE, "residual_multiplier": 0.3},  # a softmax over the chosen experts only
    "GraniteMoeHybrid": {**GRANITE_4, "residual_multiplier": 0.3},
    "FlexOlmo": MIXTURE,
}


@pytest.mark.parametrize("prefix", READ)
def test_what_is_like_the_zoo_is_read(prefix):
    model = zoo.boot(prefix, **{**zoo.SIZES, **READ[prefix]})
    checked = check(model)
    assert checked.applies("block_directions"), checked.analyses()["because"].tolist()
    assert max(row.error for row in checked.rows if row.error is not None) < 1e-5
    multiplier = READ[prefix].get("residual_multiplier", 1.0)
    for block in weights_of(model):
        assert (block.attention.output_scale, block.ffn.output_scale) == (multiplier, multiplier)
        assert block.attention.norm is not None or block.attention.post_norm is not None


REFUSED = {
    "BitNet": ({}, "block 0 has a norm inside its attn, attn_sub_norm"),
    "DeepseekV2": (
        {
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
            **{"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        },
        "block 0 has a norm inside its attn, kv_a_layernorm",
    ),
    "GptOss": ({**MIXTURE, "head_dim": 8}, "block 0's mixture of experts has transposed experts"),
    "MiniMaxM2": ({**MIXTURE, "head_dim": 8}, "block 0's mixture of experts has a router that does not answer to its input alone"),
    "Glm4Moe": (
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 0},
        "block 0's mixture of experts has a router whose weights are not the largest of a softmax over all experts",
    ),
    "Mamba": ({"state_size": 4}, "block 0 has no attn"),
}


@pytest.mark.parametrize("prefix", REFUSED)
def test_what_is_read_wrongly_otherwise_is_refused_but_traced(prefix):
    options, reason = REFUSED[prefix]
    model = zoo.boot(prefix, **{**zoo.SIZES, **options})
    with pytest.raises(ValueError, match=rf"model: {reason}.*; allowed: "):
        weights_of(model)[0]
    assert not check(model).applies("weights_of")
    tokens = torch.arange(3, 23)[None]
    trace = trace_norms(model, tokens)
    seen = record(model, tokens, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"][0]
    assert trace.norms[2].tolist() == pytest.approx(seen.norm(dim=-1).tolist(), rel=1e-5)
    assert not find_defects(trace).found


def test_values_that_are_clipped_are_noticed():
    """OLMo may clip them after their hook, so nothing that hooks show one by one deviates."""
    checked = check(zoo.boot("Olmo", **zoo.SIZES, clip_qkv=0.1))
    assert {row.check for row in checked.rows if row.passed is False} == {"attention alone"}
    assert not checked.applies("linearize")
    assert checked.applies("weights_of")


def test_hooks_that_never_run_are_noticed():
    """The blocks of the first GPT end in a norm: no sum of sublayers leaves them, and the bridge has nothing to show."""
    sizes = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    checked = check(zoo.boot("OpenAIGPT", **sizes))
    assert [(row.check, row.passed) for row in checked.rows] == [("residual hooks", False)]
    assert checked.rows[0].detail.startswith("never run: blocks.0.hook_resid_post")
    assert not checked.applies("trace_norms")


@pytest.mark.parametrize("family", ["granite", "nemotron", "olmo"])
def test_what_was_once_misread_is_rebuilt(family):
    """A multiplier, an offset and a gain that are no parameters: without them the FFN is off by far more than rounding."""
    model = zoo.cached(family)
    for block in weights_of(model):
        names = [f"blocks.{block.block}.{name}" for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")]
        resid, attn_out, mlp_out = record(model, zoo.tokens(model), names).values()
        assert relative_error(block.ffn(resid + attn_out), mlp_out) < 1e-5
