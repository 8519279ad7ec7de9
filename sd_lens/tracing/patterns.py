"""The attention patterns of a few heads on one prompt, for a look at them: by default of its sinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts, decode_each
from sd_lens.tracing.arguments import require_whole
from sd_lens.tracing.sinks import sink_attention
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.trace import CacheLike

if TYPE_CHECKING:
    from sd_lens.display.visuals import View


@dataclass(frozen=True)
class HeadPatterns:
    """Attention patterns of some heads on one prompt.

    Attributes:
        model_name: The model.
        heads: The heads, as (block, head).
        patterns: Attention of each query to each key, as the model computes it, in float32.
        tokens: Token ids of the prompt.
        texts: Each token as text.
    """

    model_name: str
    heads: tuple[tuple[int, int], ...]
    patterns: Float[Tensor, "head query key"]
    tokens: Int[Tensor, "pos"]
    texts: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the heads are called: ``L2H3``."""
        return tuple(f"L{block}H{head}" for block, head in self.heads)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head, query and key up to the query: block, head, query, key, query_token, key_token, attention."""
        query, key = torch.tril_indices(len(self.texts), len(self.texts)).tolist()
        frames = [
            pd.DataFrame(
                {
                    "block": block,
                    "head": head,
                    "query": query,
                    "key": key,
                    "query_token": [self.texts[i] for i in query],
                    "key_token": [self.texts[i] for i in key],
                    "attention": pattern[query, key].numpy(),
                }
            )
            for (block, head), pattern in zip(self.heads, self.patterns, strict=True)
        ]
        return pd.concat(frames, ignore_index=True)

    def plot(self) -> View:
        """Heat maps by CircuitsVis, the first head large: a view that notebooks show and that saves itself as a page."""
        from sd_lens.display.attention import attention_patterns

        return attention_patterns(self.patterns, self.texts, self.names)

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:4]) + (f" and {len(self.heads) - 4} more" if len(self.heads) > 4 else "")
        return f"HeadPatterns({self.model_name}: {shown} on {len(self.texts)} token{'s' * (len(self.texts) != 1)})"


def head_patterns(
    model: TransformerLensModel,
    prompt: Prompts | Source,
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    k: int = 6,
    cache: CacheLike | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> HeadPatterns:
    """Attention patterns of chosen heads on one prompt; without a choice, of the heads that pay most to its first token.

    Args:
        model: A TransformerLens model.
        prompt: One prompt, as text or token ids. With a cache: the ``(1, pos)`` token ids it was run on.
        heads: The heads, as (block, head), such as `SinkAttention.sink_heads` of more prompts; default: the heads with the largest ``alpha``
            at position 0 in this prompt (see `sink_attention`), largest first.
        k: How many heads, where none are chosen.
        cache: An `ActivationCache` of this prompt; with heads chosen their patterns are all that it must hold besides the stream entering
            block 0.
        mask: True at real tokens of a cache, False at padding; default: what `trace_norms` takes for padding.
        prepend_bos: Passed to the tokenisation of a string; None is the model's default.

    Returns:
        The patterns.

    Raises:
        ValueError: There is more than one prompt, there is no such head, ``k`` is below 1, the model or the prompt is unusable, the cache
            lacks hook points, or the model's attention never shows its pattern.

    Example:
        >>> from sd_lens.models.loading import load
        >>> shown = head_patterns(load("tiny"), "The cat sat on the mat.", [(2, 3), (4, 2)])
        >>> shown
        HeadPatterns(tiny: L2H3, L4H2 on 10 tokens)
        >>> bool(torch.allclose(shown.patterns.sum(-1), torch.ones(2, 10)))
        True
    """
    _require_heads(model, heads, k)
    n_blocks = int(model.cfg.n_layers)
    blocks = list(range(n_blocks)) if heads is None else sorted({block for block, _ in heads})
    points = [hook_names.pattern(block) for block in blocks]
    needed = points if heads is not None else [*hook_names.residual_points(n_blocks), *points]
    source = source_of(model, prompt, may_need=needed, cache=cache, mask=mask, prepend_bos=prepend_bos, progress=False)
    if len(source.sequences) != 1:
        raise ValueError(f"prompt: got {len(source.sequences)}; allowed: one")
    source.require(needed)
    chosen = _largest_sinks(model, source, k) if heads is None else [(int(block), int(head)) for block, head in heads]
    kept: dict[tuple[int, int], Tensor] = {}

    def on_batch(batch: Batch) -> Callable[[int, Tensor], None]:
        real = batch.mask[0].cpu()

        def receive(point: int, pattern: Tensor) -> None:
            block = blocks[point]
            for head in {head for chosen_block, head in chosen if chosen_block == block}:
                kept[block, head] = pattern[0, head].detach().cpu()[real][:, real].float()

        return receive

    source.run(points, on_batch, stop_at=blocks[-1] + 1, label="attention")
    missing = [f"L{block}H{head}" for block, head in chosen if (block, head) not in kept]
    if missing:
        raise ValueError(
            f"model: its attention never shows the pattern of {', '.join(missing[:3])}; allowed: a model whose attention computes its pattern (a "
            "Hugging Face model with attn_implementation='eager')"
        )
    return HeadPatterns(
        model_name=str(model.cfg.model_name),
        heads=tuple(chosen),
        patterns=torch.stack([kept[head] for head in chosen]),
        tokens=source.sequences[0],
        texts=tuple(decode_each(model, source.sequences[0].tolist())),
    )


def _largest_sinks(model: TransformerLensModel, source: Source, k: int) -> list[tuple[int, int]]:
    alpha = sink_attention(model, source).alpha
    order = alpha.flatten().argsort(descending=True, stable=True)[:k].tolist()
    return [divmod(place, alpha.shape[1]) for place in order]


def _require_heads(model: TransformerLensModel, heads: Sequence[tuple[int, int]] | None, k: int) -> None:
    n_blocks, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    allowed = f"pairs of a block, 0 to {n_blocks - 1}, and a head, 0 to {n_heads - 1}, at least one"
    require_whole("k", k, 1)
    if heads is None:
        return
    if not isinstance(heads, Sequence) or isinstance(heads, str) or len(heads) == 0:
        raise ValueError(f"heads: got {heads!r}; allowed: {allowed}")
    for pair in heads:
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(number, int) for number in pair)
        if not whole or not (0 <= pair[0] < n_blocks and 0 <= pair[1] < n_heads):
            raise ValueError(f"heads: got {pair!r}; allowed: {allowed}")
