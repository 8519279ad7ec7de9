"""Attention sinks: how much of their attention heads pay to high-norm tokens, and how many heads pay most of it to one position.

Two measures, from the same attention patterns, which are reduced inside the hooks to a few numbers per head:

- *high-norm against other tokens*: what a query spends on the high-norm tokens before it, on the others before it, and on itself;
- *sink rate*: Gu et al., When Attention Sink Emerges in Language Models (ICLR 2025, arXiv 2410.10781), section 3, which asks for a position instead
  of for a norm. With ``A`` the pattern of head ``h`` of block ``l`` and positions counted from 1, ``α_k = Σ_{i=k..T} A_{i,k} / (T − k + 1)``,
  and a head has a sink at ``k`` where ``α_k > ε``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import require_shown
from sd_lens.models.tokens import Prompts
from sd_lens.tracing.source import PromptSource, Source, source_of
from sd_lens.tracing.trace import MIN_RATIO, CacheLike, require_ratio

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class SinkAttention:
    """Attention per block and head, averaged over the queries (or prompts) of a run.

    The first five are NaN where there is no query to average over: no high-norm token, or none with anything after it.

    Attributes:
        model_name: The model.
        to_high: What a query pays to all high-norm tokens before it together.
        to_other: What it pays to all other tokens before it together.
        to_self: What it pays to itself. The three add up to 1, unless the model's softmax has a sink of its own.
        per_high_key: What one high-norm token gets of one query after it.
        per_other_key: What one other token gets of one query after it.
        alpha: Gu et al.'s ``α`` of position ``key``, averaged over prompts.
        sink_share: In which share of the prompts ``α`` exceeds ``epsilon``.
        n_queries: Queries averaged over.
        n_high: High-norm tokens in the prompts.
        n_prompts: Prompts that ``alpha`` and ``sink_share`` are averaged over: those with a token at position ``key``.
        n_short: How many of these are shorter than ``T`` and were used as they are. In a short prompt ``α`` is larger: a query has fewer
            keys to choose from.
        epsilon: What ``α`` has to exceed.
        T: Queries after the first so many tokens of a prompt are left out of ``α``.
        key: The position, from 0.
    """

    model_name: str
    to_high: Float[Tensor, "block head"]
    to_other: Float[Tensor, "block head"]
    to_self: Float[Tensor, "block head"]
    per_high_key: Float[Tensor, "block head"]
    per_other_key: Float[Tensor, "block head"]
    alpha: Float[Tensor, "block head"]
    sink_share: Float[Tensor, "block head"]
    n_queries: int
    n_high: int
    n_prompts: int
    n_short: int
    epsilon: float
    T: int
    key: int

    @property
    def ratio(self) -> Float[Tensor, "block head"]:
        """How many times as much one high-norm token gets as one other token."""
        return self.per_high_key / self.per_other_key

    @property
    def sink_rate(self) -> float:
        """Share of heads, over all blocks, with a sink at ``key``: taken in each prompt and averaged over prompts, as Gu et al. do."""
        return float(self.sink_share.mean())

    @property
    def sink_heads(self) -> list[tuple[int, int]]:
        """The heads, as (block, head), whose mean ``alpha`` exceeds ``epsilon``."""
        return [(block, head) for block, head in (self.alpha > self.epsilon).nonzero().tolist()]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block and head."""
        blocks, heads = self.alpha.shape
        columns: dict[str, Tensor] = {
            "block": torch.arange(blocks).repeat_interleave(heads),
            "head": torch.arange(heads).repeat(blocks),
            "to_high": self.to_high,
            "to_other": self.to_other,
            "to_self": self.to_self,
            "per_high_key": self.per_high_key,
            "per_other_key": self.per_other_key,
            "ratio": self.ratio,
            "alpha": self.alpha,
            "sink_share": self.sink_share,
            "sink": self.alpha > self.epsilon,
        }
        return pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()})

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` heads that pay most to high-norm tokens; where there are none, those with the largest ``alpha``."""
        if k < 1:
            raise ValueError(f"k: got {k}; allowed: at least 1")
        by = "to_high" if self.n_queries else "alpha"
        return self.to_dataframe().sort_values(by, ascending=False, kind="stable").head(k).reset_index(drop=True)

    def plot(self) -> Figure:
        """Attention to high-norm tokens and ``alpha``, blocks against heads."""
        from sd_lens.display.figures import sink_heatmap

        return sink_heatmap(self)

    def __repr__(self) -> str:
        rate = f"sink rate {self.sink_rate:.3g} at position {self.key}"
        if not self.n_queries:
            seen = "none with tokens to compare" if self.n_high else "no high-norm token"
            return f"SinkAttention({self.model_name}: {seen}, {rate})"
        most = self.top(1).iloc[0]
        paid = f"up to {most.to_high:.0%} of attention on them (block {int(most.block)}, head {int(most['head'])})"
        return f"SinkAttention({self.model_name}: {self.n_high} high-norm tokens, {paid}, {rate})"


def sink_attention(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    cache: CacheLike | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    epsilon: float = 0.3,
    T: int = 64,
    key: int = 0,
    min_ratio: float = MIN_RATIO,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> SinkAttention:
    """Attention paid to high-norm tokens against other tokens, and the sink rate, for every head of every block.

    A token counts as high-norm everywhere if it is one after *any* block: most explode in a later block than the first ones, so that the
    rows of the blocks before show what the same tokens got before they had a large norm.

    The queries averaged over are the tokens that are not high-norm themselves and have at least one high-norm and at least one other token
    before them: those that could have chosen. (The token right after a high-norm first token could not, and a high-norm query's
    attention to itself would be neither.) Means per key are over all pairs of such a query and an earlier token. In blocks of sliding
    attention, tokens beyond the window count as well: nothing is paid to them.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: the built-in texts. With a cache: the token ids it was run on. Or a source, which several
            analyses may share.
        cache: An `ActivationCache` of these tokens with the stream around all blocks and all attention patterns.
        mask: True at real tokens of a cache, False at padding; default: what `trace_norms` takes for padding.
        epsilon: A head has a sink where ``α`` exceeds this; Gu et al. use 0.3.
        T: Their prompt length, 64. Of longer prompts the first ``T`` tokens are used, shorter ones as they are (and counted).
        key: Position whose ``α`` is taken, from 0; prompts that end before it are left out of ``α``.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.

    Returns:
        The means per head. Without any high-norm token, ``alpha`` and the sink rate are measured all the same.

    Raises:
        ValueError: A threshold is out of range, model or prompts are unusable, the cache lacks hook points, or the model's attention
            never shows its pattern.

    Example:
        >>> from sd_lens.models.loading import load
        >>> sinks = sink_attention(load("tiny"))
        >>> sinks
        SinkAttention(tiny: 6 high-norm tokens, up to 59% of attention on them (block 4, head 2), sink rate 0.278 at position 0)
        >>> bool(torch.allclose(sinks.to_high + sinks.to_other + sinks.to_self, torch.ones(6, 4)))
        True
    """
    require_usable(model)
    _require_options(epsilon, T, key)
    require_ratio(min_ratio)
    n_blocks: int = model.cfg.n_layers
    points = [hook_names.pattern(block) for block in range(n_blocks)]
    needed = [*hook_names.residual_points(n_blocks), *points]
    source = source_of(
        model,
        prompts,
        may_need=needed,
        cache=cache,
        mask=mask,
        prepend_bos=prepend_bos,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    source.require(needed)
    longest = max(map(len, source.sequences))
    if longest <= key:
        raise ValueError(f"key: got {key}; allowed: 0 to {longest - 1}, a position that some prompt has")
    if isinstance(source, PromptSource):
        require_shown(model, points, int(source.sequences[0][0]))
    trace = source.trace(min_ratio=min_ratio)
    high = trace.high_norm(min_ratio).any(0)
    counts = torch.zeros(3, dtype=torch.float64)  # queries, and pairs of one with an earlier high-norm or other token
    sums: dict[int, Tensor] = {}

    def on_batch(batch: Batch) -> Callable[[int, Tensor], None]:
        marks = _marks(batch, high)
        counts.add_(marks.counts)

        def receive(block: int, pattern: Tensor) -> None:
            _require_shape(pattern, batch.tokens, block)
            sums[block] = (
                sums.get(block, 0) + _reduce(pattern, marks, prompt_alpha(pattern, batch.mask, T, key), epsilon).cpu().double()
            )

        return receive

    source.run(points, on_batch, label="attention")
    lengths = torch.tensor([len(sequence) for sequence in source.sequences])
    n_prompts = int((lengths > key).sum())
    to_high, to_other, to_self, alpha, share = torch.stack([sums[block] for block in range(n_blocks)], dim=1).unbind()
    n_queries, pairs_high, pairs_other = counts.tolist()
    return SinkAttention(
        model_name=trace.model_name,
        to_high=_mean(to_high, n_queries),
        to_other=_mean(to_other, n_queries),
        to_self=_mean(to_self, n_queries),
        per_high_key=_mean(to_high, pairs_high),
        per_other_key=_mean(to_other, pairs_other),
        alpha=_mean(alpha, n_prompts),
        sink_share=_mean(share, n_prompts),
        n_queries=int(n_queries),
        n_high=int(high.sum()),
        n_prompts=n_prompts,
        n_short=int(((lengths > key) & (lengths < T)).sum()),
        epsilon=epsilon,
        T=T,
        key=key,
    )


@dataclass(frozen=True)
class _Marks:
    """Which keys and queries of a batch are which.

    Attributes:
        keys: 1 at high-norm tokens and, in the second column, at other tokens; 0 at padding.
        queries: The queries averaged over.
        counts: Number of queries, of pairs with an earlier high-norm token, of pairs with an earlier other token.
    """

    keys: Float[Tensor, "batch pos 2"]
    queries: Bool[Tensor, "batch pos"]
    counts: Float[Tensor, "3"]


def _marks(batch: Batch, high: Bool[Tensor, "token"]) -> _Marks:
    is_high = high[batch.flat] & batch.mask
    is_other = ~is_high & batch.mask
    keys = torch.stack([is_high, is_other], dim=-1)
    before = keys.long().cumsum(1) - keys.long()
    queries = is_other & (before > 0).all(-1)
    pairs = before[queries].sum(0)
    return _Marks(
        keys=keys.float(),
        queries=queries,
        counts=torch.tensor([queries.sum(), *pairs], dtype=torch.float64),
    )


def prompt_alpha(
    pattern: Float[Tensor, "batch head query key"], mask: Bool[Tensor, "batch query"], T: int = 64, key: int = 0
) -> Float[Tensor, "batch head"]:
    """Gu et al.'s ``α`` of a position, in each prompt; zero in prompts that end before it.

    Args:
        pattern: Attention patterns.
        mask: True where a token is the prompt's own.
        T: Queries after the first so many tokens are left out.
        key: The position, from 0.
    """
    if key >= pattern.shape[-1]:
        return pattern.new_zeros(pattern.shape[:2], dtype=torch.promote_types(pattern.dtype, torch.float32))
    position = torch.arange(mask.shape[1])
    counted = mask.cpu() & (position >= key) & (position < T)
    paid = pattern[..., key].to(torch.promote_types(pattern.dtype, torch.float32))
    weights = (counted / counted.sum(1, keepdim=True).clamp(min=1)).to(paid).unsqueeze(1)
    return (paid * weights).masked_fill(weights == 0, 0.0).sum(-1)


def _reduce(
    pattern: Float[Tensor, "batch head query key"], marks: _Marks, alpha: Float[Tensor, "batch head"], epsilon: float
) -> Float[Tensor, "5 head"]:
    """Sums over a batch: attention to high-norm tokens, to others, to oneself; then ``α`` and how often it exceeds ``epsilon``."""
    device = pattern.device
    wide = pattern.to(alpha.dtype)
    to_self = wide.diagonal(dim1=-2, dim2=-1)
    paid = wide @ marks.keys.to(device, wide.dtype).unsqueeze(1)
    # A query of those averaged over is one of the "other" tokens itself.
    paid = torch.stack([paid[..., 0], paid[..., 1] - to_self, to_self])
    paid = paid.masked_fill(~marks.queries.to(device).unsqueeze(1), 0.0).sum((1, 3))
    return torch.cat([paid, alpha.sum(0, keepdim=True), (alpha > epsilon).to(wide.dtype).sum(0, keepdim=True)])


def _mean(sums: Float[Tensor, "block head"], count: float | int) -> Float[Tensor, "block head"]:
    """NaN where nothing was counted."""
    return (sums / count if count else torch.full_like(sums, float("nan"))).float()


def _require_options(epsilon: float, T: int, key: int) -> None:
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: got {epsilon}; allowed: between 0 and 1")
    if T < 1:
        raise ValueError(f"T: got {T}; allowed: at least 1")
    if not 0 <= key < T:
        raise ValueError(f"key: got {key}; allowed: 0 to {T - 1}, a position among the first T")


def _require_shape(pattern: Tensor, tokens: Tensor, block: int) -> None:
    wanted = (tokens.shape[0], tokens.shape[1], tokens.shape[1])
    got = tuple(pattern.shape)
    if len(got) != 4 or (got[0], *got[2:]) != wanted:
        raise ValueError(
            f"model: the attention pattern of block {block} has shape {got}; allowed: (batch, head, query, key), here "
            f"({wanted[0]}, heads, {wanted[1]}, {wanted[2]})"
        )
