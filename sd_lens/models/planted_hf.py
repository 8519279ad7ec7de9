"""Weights written into a Hugging Face model of a given architecture, and that booted as a TransformerLens model.

For `sd_lens.models.planted`, which decides what the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Architecture = Literal["llama", "gpt2", "gpt_neox"]


@dataclass
class Matrices:
    """One block's weights in TransformerLens' orientation, before they are written into a Hugging Face model."""

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    W_in: Tensor
    W_out: Tensor
    b_in: Tensor
    W_gate: Tensor | None
    gain1: Tensor
    gain2: Tensor


def _flat(heads: Tensor) -> Tensor:
    """(head, d_in, d_head) as one matrix (d_in, head·d_head)."""
    return heads.permute(1, 0, 2).reshape(heads.shape[1], -1)


def _copy(target: torch.nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)


def _llama(blocks: Sequence[Matrices], embedding: Tensor, positions: Tensor) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=blocks[0].W_in.shape[1],
        num_hidden_layers=len(blocks),
        num_attention_heads=len(blocks[0].W_O),
        num_key_value_heads=len(blocks[0].W_V),
        max_position_embeddings=len(positions),
        rms_norm_eps=1e-12,  # the faint trigger must not drown in it
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = _quietly(LlamaForCausalLM, config)
    for layer, block in zip(model.model.layers, blocks, strict=True):
        _copy(layer.input_layernorm.weight, block.gain1)
        _copy(layer.post_attention_layernorm.weight, block.gain2)
        for projection, weight in (("q_proj", block.W_Q), ("k_proj", block.W_K), ("v_proj", block.W_V)):
            _copy(getattr(layer.self_attn, projection).weight, _flat(weight).T)
        _copy(layer.self_attn.o_proj.weight, block.W_O.flatten(0, 1).T)
        assert block.W_gate is not None
        for projection, weight in (("gate_proj", block.W_gate), ("up_proj", block.W_in), ("down_proj", block.W_out)):
            _copy(getattr(layer.mlp, projection).weight, weight.T)
    _copy(model.model.embed_tokens.weight, embedding)
    return model


def _gpt2(blocks: Sequence[Matrices], embedding: Tensor, positions: Tensor) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=embedding.shape[0],
        n_embd=embedding.shape[1],
        n_inner=blocks[0].W_in.shape[1],
        n_layer=len(blocks),
        n_head=len(blocks[0].W_O),
        n_positions=len(positions),
        layer_norm_epsilon=1e-12,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = _quietly(GPT2LMHeadModel, config)
    for layer, block in zip(model.transformer.h, blocks, strict=True):
        _copy(layer.ln_1.weight, block.gain1)
        _copy(layer.ln_2.weight, block.gain2)
        _copy(layer.attn.c_attn.weight, torch.cat([_flat(block.W_Q), _flat(block.W_K), _flat(block.W_V)], dim=1))
        _copy(layer.attn.c_proj.weight, block.W_O.flatten(0, 1))
        _copy(layer.mlp.c_fc.weight, block.W_in)
        _copy(layer.mlp.c_fc.bias, block.b_in)
        _copy(layer.mlp.c_proj.weight, block.W_out)
        for bias in (layer.attn.c_attn.bias, layer.attn.c_proj.bias, layer.mlp.c_proj.bias):
            _copy(bias, torch.zeros_like(bias))
    _copy(model.transformer.wte.weight, embedding)
    _copy(model.transformer.wpe.weight, positions)
    return model


def _gpt_neox(blocks: Sequence[Matrices], embedding: Tensor, positions: Tensor) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=blocks[0].W_in.shape[1],
        num_hidden_layers=len(blocks),
        num_attention_heads=len(blocks[0].W_O),
        max_position_embeddings=len(positions),
        layer_norm_eps=1e-12,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = _quietly(GPTNeoXForCausalLM, config)
    for layer, block in zip(model.gpt_neox.layers, blocks, strict=True):
        _copy(layer.input_layernorm.weight, block.gain1)
        _copy(layer.post_attention_layernorm.weight, block.gain2)
        joint = torch.cat([block.W_Q, block.W_K, block.W_V], dim=-1)  # each head's query, key and value stand together
        _copy(layer.attention.query_key_value.weight, _flat(joint).T)
        _copy(layer.attention.dense.weight, block.W_O.flatten(0, 1).T)
        _copy(layer.mlp.dense_h_to_4h.weight, block.W_in.T)
        _copy(layer.mlp.dense_h_to_4h.bias, block.b_in)
        _copy(layer.mlp.dense_4h_to_h.weight, block.W_out.T)
        for bias in (layer.attention.query_key_value.bias, layer.attention.dense.bias, layer.mlp.dense_4h_to_h.bias):
            _copy(bias, torch.zeros_like(bias))
    _copy(model.gpt_neox.embed_in.weight, embedding)
    return model


_WRITERS: dict[str, Callable[..., Any]] = {"llama": _llama, "gpt2": _gpt2, "gpt_neox": _gpt_neox}


def _quietly(model_class: Any, config: Any) -> Any:
    """A Hugging Face model, built without moving the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        return model_class(config).eval()


def boot(
    architecture: Architecture, blocks: Sequence[Matrices], *, embedding: Tensor, unembedding: Tensor, positions: Tensor
) -> Any:
    """A TransformerLens model with the given weights.

    Args:
        architecture: Which architecture.
        blocks: The weights of each block.
        embedding: One row per token.
        unembedding: One row per token.
        positions: One row per position; models with rotary positions take its length as their context and ignore its values.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = _WRITERS[architecture](blocks, embedding, positions)
    _copy(model.get_output_embeddings().weight, unembedding)
    with torch.random.fork_rng(devices=[]):
        bridge = build_bridge_from_module(model, architecture=type(model).__name__, hf_config=model.config)
    bridge.cfg.model_name = "planted"
    return bridge
