"""The hook point at which an FFN, and nothing else, sees an edit: its values are what the docstring says on every architecture."""

from __future__ import annotations

import editing
import pytest
import torch
import zoo
from recording import record, relative_error

from sd_lens.models.ffn_input import ffn_input
from sd_lens.models.loading import weights_of

BLOCK = 1
NAMES = [f"blocks.{BLOCK}.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out")]


@pytest.mark.parametrize("family", [name for name in zoo.FAMILIES if name != "hooked_olmo2"])
def test_it_shows_the_normalised_stream_by_gain_and_bias(family):
    model = zoo.cached(family)
    weights, tokens = weights_of(model)[BLOCK], zoo.tokens(model, 2, 6)
    at = ffn_input(model, weights)
    seen = record(model, tokens, [*NAMES, at.name])
    x = editing.normalised_stream(weights, seen)
    wanted = x if at.gain is None else x * at.gain.to(x)
    wanted = wanted if at.bias is None else wanted + at.bias.to(x)
    assert relative_error(seen[at.name], wanted) < 2e-6
    assert (at.gain is None) == (weights.ffn.norm is None or family.startswith("hooked"))


@pytest.mark.parametrize("prefix", ["XGLM", "Cohere", "StableLm"])
def test_architectures_outside_the_zoo(prefix):
    """XGLM has, as OPT, no module for its FFN; the others share a norm between attention and FFN, or not."""
    options = {
        "XGLM": {"vocab_size": zoo.VOCAB, "d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
        "Cohere": zoo.SIZES,
        "StableLm": {**zoo.SIZES, "use_parallel_residual": True},
    }[prefix]
    model = zoo.boot(prefix, **options)
    weights, tokens = weights_of(model)[BLOCK], zoo.tokens(model, 2, 6)
    subspace = editing.random_subspace(model, BLOCK)
    before = record(model, tokens, NAMES)
    with subspace.ablate().attached():
        after = record(model, tokens, NAMES)
    wanted = editing.answer(weights, editing.without(subspace.right, editing.normalised_stream(weights, before)))
    assert relative_error(after[NAMES[2]], wanted) < 1e-5
    assert relative_error(before[NAMES[2]], wanted) > 0.05
    assert torch.equal(after[NAMES[1]], before[NAMES[1]])


@pytest.mark.skipif("hooked_olmo2" not in zoo.FAMILIES, reason="HookedTransformer is gone in TransformerLens 4")
def test_a_model_without_such_a_point():
    model = zoo.build("hooked_olmo2")
    weights, tokens = weights_of(model)[BLOCK], zoo.tokens(model, 2, 6)
    with pytest.raises(
        ValueError, match=r"model: no hook point shows what the FFN of block 1 alone reads; allowed: a TransformerBridge, or"
    ):
        ffn_input(model, weights)
    model.set_use_hook_mlp_in(True)
    at = ffn_input(model, weights)
    assert (at.name, at.gain, at.bias) == ("blocks.1.hook_mlp_in", None, None)
    seen = record(model, tokens, [*NAMES, at.name])
    assert torch.equal(seen[at.name], seen[NAMES[0]] + seen[NAMES[1]])
    model.set_use_hook_mlp_in(False)
    with pytest.raises(ValueError, match="no hook point"):
        ffn_input(model, weights)
