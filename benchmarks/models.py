"""Models and text for the benchmarks: no download, no tokenizer needed."""

from __future__ import annotations

from typing import Any

import torch


def random_llama(*, d_model: int, n_blocks: int, d_vocab: int = 1024, context: int = 512, seed: int = 0) -> Any:
    """A Llama with random weights, as a TransformerLens model."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=8 * d_model // 3,
        num_hidden_layers=n_blocks,
        num_attention_heads=d_model // 64,
        num_key_value_heads=d_model // 64,
        max_position_embeddings=context,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    bridge = build_bridge_from_module(model, architecture="LlamaForCausalLM", hf_config=config)
    bridge.cfg.model_name = f"random Llama, {n_blocks} blocks, d_model {d_model}"
    return bridge


def text_windows(model: Any, *, n_tokens: int, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Windows of real text (the Python documentation's topics) in the given lengths by turns, ``n_tokens`` in all.

    Tokenised by the model's tokenizer; as bytes, modulo its vocabulary, where it has none.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = getattr(model, "tokenizer", None)
    ids = list(text.encode()) if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = torch.tensor(ids) % model.cfg.d_vocab
    stream = stream.repeat(-(-n_tokens // len(stream)))[:n_tokens]
    windows, start = [], 0
    while start < n_tokens:
        length = lengths[len(windows) % len(lengths)]
        windows.append(stream[start : start + length])
        start += length
    return windows
