"""Architectures outside the zoo: what cannot be read is said, and what can be traced is traced."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sd_lens import check, find_defects, trace_norms, weights_of


def boot(family: str, **config):
    """A random model of a Hugging Face family, as a TransformerLens model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config)).eval()
        model.config.architectures = [type(model).__name__]
        return build_bridge_from_module(model, architecture=type(model).__name__, hf_config=model.config)


def test_a_multiplier_between_sublayer_and_stream_is_noticed():
    """Granite scales what its sublayers add: weights that do not know it must not pass for the block's."""
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    checked = check(boot("Granite", **sizes, num_key_value_heads=4, residual_multiplier=0.5))
    failed = {row.check for row in checked.rows if row.passed is False}
    assert failed == {"attention output", "FFN output"}
    assert checked.applies("trace_norms")
    assert not checked.applies("block_directions")


def test_a_model_without_attention_is_traced_but_not_read():
    model = boot("Mamba", vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4)
    tokens = torch.arange(20)[None]
    trace = trace_norms(model, tokens)
    _, cache = model.run_with_cache(tokens)
    assert trace.norms[2].tolist() == pytest.approx(cache["blocks.1.hook_resid_post"][0].norm(dim=-1).tolist(), rel=1e-5)
    assert not find_defects(trace).found
    with pytest.raises(ValueError, match=r"block 0 has no attn; allowed"):
        weights_of(model)[0]
    assert not check(model).applies("block_directions")
