"""What repetition does to a token: its norm the first, second, n-th time in a row, beside the norm of the first token.

A token that follows nothing but copies of itself sees, through attention, nothing but itself, which is all that the first token of a
prompt sees. A model that recognises the first token by that mistakes a long run of one token for it: Yona et al. (Interpreting the
Repeated Token Phenomenon in Large Language Models, 2025, arXiv 2503.08908) find that a token repeated long enough reaches the first
token's norm and becomes an attention sink like it. One causal forward pass over the longest run shows all shorter ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, batches
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import run_batches
from sd_lens.models.tokens import decode_each
from sd_lens.tracing.arguments import require_block
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import default_prompts
from sd_lens.tracing.trace import MIN_RATIO, NormTrace, not_finite, require_ratio, stream_norms

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

REPEATS = 64
"""How often each token is repeated where the caller does not say, as far as the model's context allows."""
SAMPLE = 16
"""How many token ids are repeated where the caller names none."""
SHARES = (0.5, 0.9)
"""Shares of the first token's norm that tables say the counts for."""


@dataclass(frozen=True)
class RepeatedTokens:
    """Norms of repeated tokens after one block.

    Attributes:
        model_name: The model.
        block: The block.
        ids: The ids repeated.
        texts: They as text.
        prefix: Ids that stand before the run: what the model's conventions put before a text, often one BOS.
        norms: Norm of the first, second, ... repeat of each id.
        first_norm: Norm of the first token of each sequence: the prefix' first token's or, without a prefix, the first repeat's own.
        reference: Norm of ordinary tokens after the block: the median over the built-in prompts, their first tokens left out.
        min_ratio: Least ratio to ``reference`` of a high norm.
    """

    model_name: str
    block: int
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    prefix: tuple[int, ...]
    norms: Float[Tensor, "id count"]
    first_norm: Float[Tensor, "id"]
    reference: float
    min_ratio: float

    @property
    def ratios(self) -> Float[Tensor, "id count"]:
        """Norms relative to the first token's."""
        return self.norms / self.first_norm.unsqueeze(1)

    @property
    def first_is_high(self) -> list[bool]:
        """Per id, whether the sequence's first token has a high norm: without one there is nothing to reach."""
        return (self.first_norm >= self.min_ratio * self.reference).tolist()

    def reached(self, share: float) -> list[int | None]:
        """Per id, how many repeats it takes for one to have this share of the first token's norm.

        The first token itself does not count: without a prefix, counting starts at the second repeat.

        Args:
            share: Of the first token's norm, above 0 and up to 1.

        Returns:
            The counts; None where no repeat has it, and where the first token's norm is not high.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share: got {share}; allowed: above 0, up to 1")
        enough = self.ratios >= share
        if not self.prefix:
            enough[:, 0] = False
        found = enough.any(1).tolist()
        counts = (enough.int().argmax(1) + 1).tolist()
        return [count if there and high else None for count, there, high in zip(counts, found, self.first_is_high, strict=True)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per id and count."""
        n_ids, n = self.norms.shape
        return pd.DataFrame(
            {
                "id": torch.tensor(self.ids).repeat_interleave(n).numpy(),
                "token": [text for text in self.texts for _ in range(n)],
                "count": torch.arange(1, n + 1).repeat(n_ids).numpy(),
                "norm": self.norms.flatten().numpy(),
                "first_norm": self.first_norm.repeat_interleave(n).numpy(),
                "ratio": self.ratios.flatten().numpy(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row per id: its norm the first and the last time, the first token's, and the counts at which it has a half and 90 % of it."""
        columns: dict[str, Any] = {
            "id": self.ids,
            "token": self.texts,
            "once": self.norms[:, 0].numpy(),
            "last": self.norms[:, -1].numpy(),
            "first_norm": self.first_norm.numpy(),
            "last_ratio": self.ratios[:, -1].numpy(),
        }
        for share in SHARES:
            columns[f"reached_{share * 100:.0f}"] = pd.array(self.reached(share), dtype="Int64")
        return pd.DataFrame(columns)

    def plot(self) -> Figure:
        """Norm against the number of repeats, one line per id, beside the first token's norm."""
        from sd_lens.display.figures import repetition_curves

        return repetition_curves(self)

    def __repr__(self) -> str:
        n_ids, n = self.norms.shape
        about = f"RepeatedTokens({self.model_name}: {n_ids} tokens repeated {n} times, block {self.block}: "
        if not any(self.first_is_high):
            return about + "the first token has no high norm)"
        counts = [count for count in self.reached(SHARES[0]) if count is not None]
        if not counts:
            return f"{about}none reaches {SHARES[0]:.0%} of the first token's norm, largest ratio {self._largest():.2g})"
        return f"{about}{len(counts)} reach {SHARES[0]:.0%} of the first token's norm, the earliest after {min(counts)})"

    def _largest(self) -> float:
        return float(self.ratios[:, 0 if self.prefix else 1 :].max())


def repeated_tokens(
    model: TransformerLensModel,
    ids: Int[Tensor, "id"] | Sequence[int] | Sequence[str] | None = None,
    *,
    n: int | None = None,
    block: int | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    min_ratio: float = MIN_RATIO,
    seed: int = 0,
    progress: bool | None = None,
) -> RepeatedTokens:
    """Norms of tokens repeated up to ``n`` times in a row, against the norm of the sequence's first token.

    What stands before the run matters: without a BOS, all that any repeat ever sees is itself, so that in a model without absolute
    positions its norm is the first token's from the start.

    Args:
        model: A TransformerLens model.
        ids: The tokens: ids, or strings that are one token each; default: 16 ids of the built-in prompts, drawn at random (they are
            ordinary ones, which any id of the vocabulary need not be).
        n: How often each is repeated; default: 64, or what fits into the model's context.
        block: After which block norms are taken; default: the explosion block found on the built-in prompts, the last of several, and
            the model's last block where there is none.
        prepend_bos: Whether a BOS stands before the run; None is the model's default, and none for a model without tokenizer.
        batch_tokens: Largest number of tokens run at once.
        min_ratio: Least norm of a high-norm token, as a multiple of ordinary tokens' median.
        seed: Seeds the draw of ids.
        progress: Whether to show progress bars.

    Returns:
        The norms.

    Raises:
        ValueError: An argument is not among those allowed, a string is not one token, or the model is unusable.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> repeated = repeated_tokens(planted().model, [5, 6], n=8)
        >>> repeated
        RepeatedTokens(planted: 2 tokens repeated 8 times, block 1: 2 reach 50% of the first token's norm, the earliest after 2)
        >>> repeated.reached(0.9)
        [2, 2]
    """
    require_usable(model)
    require_ratio(min_ratio)
    n_blocks: int = model.cfg.n_layers
    if block is not None:
        require_block(block, n_blocks)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: got {batch_tokens}; allowed: at least 1")
    prefix = _prefix(model, prepend_bos)
    n = _repeats(n, model, len(prefix))
    given = None if ids is None else _require_ids(model, ids)
    stop = None if block is None else block + 1
    # Whatever stands before the runs stands before the prompts: norms are compared.
    texts = default_prompts(model, prepend_bos=prepend_bos)
    trace = trace_norms(model, texts, stop_at=stop, min_ratio=min_ratio, batch_tokens=batch_tokens, progress=progress)
    if block is None:
        block = (n_blocks - 1, *find_defects(trace, min_ratio=min_ratio).explosion_blocks)[-1]
    chosen = _sample(model, trace, prefix, seed) if given is None else given

    starts = torch.tensor(prefix, dtype=torch.long)
    sequences = [torch.cat([starts, torch.full((n,), token)]) for token in chosen]
    norms = torch.empty(len(chosen) * (len(prefix) + n))

    def reduce(batch: Batch) -> Callable[[int, Tensor], None]:
        def receive(_: int, stream: Tensor) -> None:
            norms[batch.flat] = stream_norms(stream).cpu()

        return receive

    work = batches(sequences, batch_tokens=batch_tokens)
    points = [hook_names.resid_post(block)]
    run_batches(model, work, points, reduce, stop_at=block + 1, progress=progress, label="repeats")
    table = norms.view(len(chosen), -1)
    if not bool(torch.isfinite(table).all()):
        raise not_finite(f"block {block}")
    return RepeatedTokens(
        model_name=trace.model_name,
        block=block,
        ids=tuple(chosen),
        texts=tuple(decode_each(model, chosen)),
        prefix=prefix,
        norms=table[:, len(prefix) :].clone(),
        first_norm=table[:, 0].clone(),
        reference=float(trace.reference[block + 1]),
        min_ratio=min_ratio,
    )


def _prefix(model: Any, prepend_bos: bool | None) -> tuple[int, ...]:
    """What the model's tokenisation puts before a text: what it begins with beside the same text without a BOS."""
    if getattr(model, "tokenizer", None) is None:
        if prepend_bos:
            raise ValueError("prepend_bos: got True for a model without tokenizer; allowed: None or False")
        return ()
    bare = model.to_tokens("a", prepend_bos=False)[0].tolist()
    whole = model.to_tokens("a", prepend_bos=prepend_bos)[0].tolist()
    return tuple(whole[: len(whole) - len(bare)]) if whole[-len(bare) :] == bare else ()


def _repeats(n: int | None, model: Any, n_prefix: int) -> int:
    context = getattr(model.cfg, "n_ctx", None)
    most = context - n_prefix if context else None
    if n is None:
        n = REPEATS if most is None else min(REPEATS, most)
    if n < 2 or (most is not None and n > most):
        allowed = "at least 2" if most is None else f"2 to {most}, what fits into the model's context"
        raise ValueError(f"n: got {n}; allowed: {allowed}")
    return n


def _require_ids(model: Any, ids: Tensor | Sequence[int] | Sequence[str]) -> list[int]:
    if isinstance(ids, Tensor) and (ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise ValueError(f"ids: got a tensor of shape {tuple(ids.shape)} and {ids.dtype}; allowed: integer ids in one dimension")
    given = ids.tolist() if isinstance(ids, Tensor) else [ids] if isinstance(ids, str) else list(ids)
    if not given:
        raise ValueError("ids: got none; allowed: at least one token id, or string of one token")
    chosen = [_one_token(model, token) if isinstance(token, str) else int(token) for token in given]
    bad = [token for token in chosen if not 0 <= token < model.cfg.d_vocab]
    if bad:
        raise ValueError(f"ids: got {bad[0]}; allowed: 0 to {model.cfg.d_vocab - 1}")
    return chosen


def _one_token(model: Any, text: str) -> int:
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("ids: got text for a model without tokenizer; allowed: token ids")
    tokens = model.to_tokens(text, prepend_bos=False)[0].tolist() if text else []
    if len(tokens) != 1:
        raise ValueError(f"ids: got {text!r}, which is {len(tokens)} tokens; allowed: strings of one token, or token ids")
    return tokens[0]


def _sample(model: Any, trace: NormTrace, prefix: tuple[int, ...], seed: int) -> list[int]:
    """Ids of the traced prompts without special tokens, in a random order that the seed alone decides."""
    special = {*prefix, *(getattr(getattr(model, "tokenizer", None), "all_special_ids", None) or ())}
    known = [token for token in trace.tokens.unique().tolist() if token not in special]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    return [known[place] for place in order[:SAMPLE]]
