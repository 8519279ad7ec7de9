"""Greedy generation, alike on every kind of TransformerLens model."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from sd_lens.models.loading import inference
from sd_lens.models.protocol import TransformerLensModel


def greedy(model: TransformerLensModel, sequence: Int[Tensor, "pos"], max_new_tokens: int, *, cached: bool = True) -> list[int]:
    """Token ids that a model goes on with; its hooks and mode are as before afterwards, also after an error.

    Args:
        model: A TransformerLens model.
        sequence: Token ids to go on from.
        max_new_tokens: How many tokens at most; fewer where a text ends, or the model's context does.
        cached: Whether to keep keys and values. Without a tokenizer they are not kept in any case: `HookedTransformer` then puts the whole
            text behind its cache again for every token.

    Example:
        >>> from sd_lens.models.loading import load
        >>> model = load("tiny")
        >>> len(greedy(model, model.to_tokens("Once upon a time")[0], 3))
        3
    """
    loaded: Any = model
    tokenizer = getattr(loaded, "tokenizer", None)
    with inference(loaded):
        whole = loaded.generate(
            sequence.unsqueeze(0).to(loaded.cfg.device),
            max_new_tokens=min(max_new_tokens, int(loaded.cfg.n_ctx) - len(sequence)),
            do_sample=False,
            stop_at_eos=getattr(tokenizer, "eos_token_id", None) is not None,
            use_past_kv_cache=cached and tokenizer is not None,
            verbose=False,
        )
    return whole[0, len(sequence) :].tolist()
