"""The hook points sd_lens uses: the only file that knows how TransformerLens' generations and architectures differ in them.

The block-level names below exist, and mean the same, on every decoder that `TransformerBridge` (3.9 and 4) or
`HookedTransformer` (3.9) boots: ``resid_post == resid_pre + attn_out + mlp_out`` holds at them. The hooks of sublayers
(``attn.hook_out``, ``mlp.hook_out``) do not have this property on every architecture and are not used.
"""

from __future__ import annotations

from collections.abc import Iterable


def resid_pre(block: int) -> str:
    """Residual stream entering a block."""
    return f"blocks.{block}.hook_resid_pre"


def resid_post(block: int) -> str:
    """Residual stream leaving a block."""
    return f"blocks.{block}.hook_resid_post"


def attn_out(block: int) -> str:
    """What a block's attention adds to the stream."""
    return f"blocks.{block}.hook_attn_out"


def mlp_out(block: int) -> str:
    """What a block's FFN adds to the stream."""
    return f"blocks.{block}.hook_mlp_out"


def value(block: int) -> str:
    """Value vectors, one per key-value head."""
    return f"blocks.{block}.attn.hook_v"


def mixed_values(block: int) -> str:
    """Value vectors mixed by the attention pattern, one per head (``z``)."""
    return f"blocks.{block}.attn.hook_z"


def pattern(block: int) -> str:
    """Attention pattern, (batch, head, query, key)."""
    return f"blocks.{block}.attn.hook_pattern"


def ffn_pre(block: int) -> str:
    """What the FFN's activation function is applied to."""
    return f"blocks.{block}.mlp.hook_pre"


def ffn_linear(block: int) -> str:
    """The linear branch of a gated FFN."""
    return f"blocks.{block}.mlp.hook_pre_linear"


def embed() -> str:
    """Token embedding."""
    return "hook_embed"


def embed_in() -> str:
    """Token ids entering the embedding: `TransformerBridge` only."""
    return "embed.hook_in"


def pos_embed() -> str:
    """Positional embedding, where one is added to the stream: models with rotary or no positions have no such point, or never reach it."""
    return "hook_pos_embed"


def unembed_in() -> str:
    """What the unembedding reads: the stream after the final norm."""
    return "unembed.hook_in"


def entering_ffn(block: int, *, parallel: bool) -> list[str]:
    """What adds up to the stream that a block's FFN reads, which has no hook point of its own on every architecture.

    Args:
        block: The block.
        parallel: Whether attention and FFN read the same stream (`BlockWeights.parallel`).
    """
    return [resid_pre(block)] if parallel else [resid_pre(block), attn_out(block)]


def ffn_in(block: int) -> str:
    """What an FFN reads, after its norm: `TransformerBridge` only."""
    return f"blocks.{block}.mlp.hook_in"


def ffn_norm_out(block: int) -> str:
    """What comes out of the norm before an FFN: `TransformerBridge` only."""
    return f"blocks.{block}.ln2.hook_out"


def ffn_normalized(block: int) -> str:
    """The normalised stream before the gain of the norm before an FFN."""
    return f"blocks.{block}.ln2.hook_normalized"


def ffn_stream(block: int) -> str:
    """A copy of the stream for the FFN alone, before its norm: `HookedTransformer` with ``use_hook_mlp_in`` only."""
    return f"blocks.{block}.hook_mlp_in"


def residual_points(n_blocks: int) -> list[str]:
    """The stream after the embedding and after each of the first ``n_blocks`` blocks: ``n_blocks + 1`` hook points."""
    return [resid_pre(0), *(resid_post(block) for block in range(n_blocks))]


def filter_for(points: Iterable[str]) -> str:
    """A ``names_filter`` for `run_with_cache` that keeps these hook points, as Python source.

    Names of one block are listed; those that several blocks share are kept in every block, as nobody types eighty names.
    """
    chosen = list(dict.fromkeys(points))
    endings: dict[str, list[str]] = {}
    for name in chosen:
        endings.setdefault(name.split(".", 2)[-1] if name.startswith("blocks.") else name, []).append(name)
    if len(chosen) <= 4:
        return repr(chosen)
    once = [names[0] for names in endings.values() if len(names) == 1]
    shared = [ending for ending, names in endings.items() if len(names) > 1]
    conditions = [f"name in {once!r}"] * bool(once) + [f"name.endswith({tuple(shared)!r})"] * bool(shared)
    return f"lambda name: {' or '.join(conditions)}"
