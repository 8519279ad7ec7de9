"""Key-value caches, alike on every kind of TransformerLens model: a pass goes on from what an earlier one left, which may be kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.models.protocol import TransformerLensModel


def is_hooked(model: Any) -> bool:
    """Whether a model is a `HookedTransformer`, whose caches are TransformerLens' own."""
    return not hasattr(model, "original_model")


def empty(model: TransformerLensModel) -> Any:
    """A cache that holds nothing.

    Args:
        model: The model it is for.
    """
    loaded: Any = model
    if is_hooked(loaded):
        from transformer_lens import TransformerLensKeyValueCache as Cache  # pyright: ignore[reportAttributeAccessIssue]  # 3.9 only

        return Cache.init_cache(loaded.cfg, loaded.cfg.device, 1)
    from transformers import DynamicCache

    return DynamicCache(config=loaded.original_model.config)


def snapshot(cache: Any) -> Any:
    """The state of a cache, to go on from later; passes over the one leave the other as it is.

    Nothing is copied: both libraries append to a cache by making new tensors.

    Args:
        cache: The cache.
    """
    kept = copy.copy(cache)
    if hasattr(cache, "entries"):
        kept.entries = [copy.copy(entry) for entry in cache.entries]
    else:
        kept.layers = [copy.copy(layer) for layer in cache.layers]
    return kept


def cached_pass(
    model: TransformerLensModel, tokens: Int[Tensor, "pos"], cache: Any, *, logits: bool = False
) -> Float[Tensor, "pos d_vocab"] | None:
    """Runs tokens behind those that a cache holds, and appends them to it.

    Args:
        model: The model, with whatever hooks it has.
        tokens: Token ids.
        cache: The cache.
        logits: Whether logits are wanted.

    Returns:
        The logits, or None.
    """
    loaded: Any = model
    row = tokens.unsqueeze(0).to(loaded.cfg.device)
    if is_hooked(
        loaded
    ):  # it would ask its tokenizer which tokens are padding, and without logits it ends before the unembedding's hooks
        result = loaded(row, return_type="logits", past_kv_cache=cache, attention_mask=torch.ones_like(row))
    else:
        result = loaded(row, return_type="logits" if logits else None, past_key_values=cache)
    return result[0] if logits else None
