"""Perplexity of a text, in windows that score every token exactly once.

A model reads the text in windows, each with BOS in front of it or none. Windows may overlap (``stride`` smaller than what a window holds):
a token is scored in the first window that has it as something to predict, with all of that window before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from sd_lens.models.protocol import TransformerLensModel

WINDOW = 128
"""Tokens per window where nothing else is asked for: what the shipped model was trained on. Published perplexities use 2048 and more."""

Logits = Callable[[Int[Tensor, "window pos"]], Float[Tensor, "window pos d_vocab"]]
"""What a model predicts after every token."""


@dataclass(frozen=True)
class Windows:
    """A text cut into windows.

    Attributes:
        ids: Token ids of windows of one length, BOS included where there is one.
        last: The window that the text ends with, if it is shorter; else empty.
        stride: How many tokens each window after the first adds.
        bos: The BOS that stands in front of each window; None for none.
        n_text: Tokens of the text.
    """

    ids: Int[Tensor, "window pos"]
    last: Int[Tensor, "_"]
    stride: int
    bos: int | None
    n_text: int

    @property
    def length(self) -> int:
        """Tokens per window, BOS included."""
        return self.ids.shape[1]

    @property
    def n_scored(self) -> int:
        """How many tokens are scored: all of the text's, but for the first where no BOS stands before it."""
        return self.n_text - (self.bos is None)

    def batches(self, batch_tokens: int) -> Iterator[tuple[Int[Tensor, "window pos"], list[int]]]:
        """Windows to run at once, and how many predictions at the end of each are new.

        Args:
            batch_tokens: Largest number of tokens run at once; a longer window makes a batch of its own.
        """
        rows = max(1, batch_tokens // self.length)
        for start in range(0, len(self.ids), rows):
            chosen = self.ids[start : start + rows]
            yield chosen, [self.length - 1 if start + row == 0 else self.stride for row in range(len(chosen))]
        if len(self.last):
            seen = (self.length - 1) + (len(self.ids) - 1) * self.stride
            yield self.last.unsqueeze(0), [self.n_scored - seen]


def windows_of(
    model: TransformerLensModel,
    text: str | Int[Tensor, "pos"],
    *,
    window: int | None = None,
    stride: int | None = None,
    prepend_bos: bool | None = None,
    argument: str = "text",
) -> Windows:
    """Cuts a text into windows.

    Args:
        model: A TransformerLens model, for its tokenizer and context.
        text: The text, or its token ids without BOS.
        window: Tokens per window, BOS included; default: 128, or the model's context where that is shorter.
        stride: How many tokens each window after the first adds; default: as many as fit, so that windows do not overlap.
        prepend_bos: Whether BOS stands in front of every window; default: where the model has one and its convention is to prepend it.
        argument: The caller's name for the text, for messages.

    Returns:
        The windows.

    Raises:
        ValueError: The text is shorter than a window, the window longer than the context, the stride longer than what a window adds, or
            a BOS is asked for and there is none.

    Example:
        >>> from sd_lens.models.loading import load
        >>> windows_of(load("tiny"), torch.arange(300) + 10, window=128).n_scored
        300
    """
    bos = _bos(model, prepend_bos)
    context = int(getattr(model.cfg, "n_ctx", None) or 2**31)
    window = min(context, WINDOW) if window is None else window
    if not isinstance(window, int) or not 2 <= window <= context:
        raise ValueError(f"window: got {window}; allowed: 2 to {context}, the model's context")
    adds = window - 1
    stride = adds if stride is None else stride
    if not isinstance(stride, int) or not 1 <= stride <= adds:
        raise ValueError(f"stride: got {stride}; allowed: 1 to {adds}, what a window of {window} tokens can add")
    ids = require_text(model, text, argument)
    holds = window - (bos is not None)
    if len(ids) < holds:
        raise ValueError(f"{argument}: got {len(ids)} tokens; allowed: at least {holds}, one window (or a smaller window)")
    whole = ids.unfold(0, holds, stride)
    left = len(ids) - (holds + (len(whole) - 1) * stride)
    # The last window holds as much before what it adds as the others do.
    last = ids[len(whole) * stride :] if left else ids[:0]
    if bos is not None:
        whole = functional.pad(whole, (1, 0), value=bos)
        last = functional.pad(last, (1, 0), value=bos) if left else last
    return Windows(whole, last, stride, bos, len(ids))


def mean_loss(
    logits: Logits, windows: Windows, *, batch_tokens: int = 2048, progress: bool | None = None, label: str = "perplexity"
) -> float:
    """Mean loss of the text's tokens, in nats; its exponential is the perplexity.

    Args:
        logits: What the model predicts after every token.
        windows: The text.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show a progress bar.
        label: The progress bar's.

    Returns:
        The mean over all tokens scored, summed in float64.

    Raises:
        ValueError: The predictions are not finite.

    Example:
        >>> from sd_lens.models.loading import load
        >>> windows = windows_of(load("tiny"), torch.arange(300) + 10)
        >>> round(mean_loss(lambda ids: torch.zeros(*ids.shape, 1024), windows), 4)  # of 1024 equally likely tokens
        6.9315
    """
    hidden = None if progress is None else not progress
    total, n_scored = 0.0, 0
    work = list(windows.batches(batch_tokens))
    for ids, new in tqdm(work, desc=label, unit="batch", delay=2.0, disable=hidden, leave=False):
        predicted = logits(ids)
        for row, count in enumerate(new):
            kept = predicted[row, -count - 1 : -1].float()
            losses = functional.cross_entropy(kept, ids[row, -count:].to(kept.device), reduction="none")
            total += float(losses.double().sum())
            n_scored += count
    if not math.isfinite(total):
        raise ValueError("model: its predictions hold NaN or infinite numbers; allowed: finite predictions (try another dtype)")
    assert n_scored == windows.n_scored, "every token is scored once"
    return total / n_scored


def _bos(model: Any, wanted: bool | None) -> int | None:
    tokenizer = getattr(model, "tokenizer", None)
    known = getattr(tokenizer, "bos_token_id", None)
    if wanted is None:
        wanted = known is not None and bool(getattr(model.cfg, "default_prepend_bos", True))
    if wanted and known is None:
        raise ValueError("prepend_bos: got True for a model whose tokenizer has no BOS; allowed: False")
    return int(known) if wanted and known is not None else None


def require_text(model: TransformerLensModel, text: str | Int[Tensor, "pos"], argument: str = "text") -> Int[Tensor, "pos"]:
    """Token ids of a text without BOS; `ValueError` where it is empty, or the model cannot read it."""
    if isinstance(text, str):
        if not text.strip():
            raise ValueError(f"{argument}: got an empty text; allowed: at least one window of tokens")
        tokenizer: Any = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(f"{argument}: got text for a model without tokenizer; allowed: a one-dimensional tensor of token ids")
        # The model's to_tokens would cut a text at its context, and may leave a BOS that only the tokenizer's template knows of.
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if not isinstance(text, Tensor):
        raise ValueError(f"{argument}: got {type(text).__name__}; allowed: a string, or a one-dimensional tensor of token ids")
    if text.ndim != 1 or text.is_floating_point():
        raise ValueError(
            f"{argument}: got a tensor of shape {tuple(text.shape)} and dtype {text.dtype}; allowed: one-dimensional integer token ids"
        )
    ids = text.detach().cpu().long()
    if len(ids):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= model.cfg.d_vocab:
            raise ValueError(f"{argument}: got token ids {low} to {high}; allowed: 0 to {model.cfg.d_vocab - 1}")
    return ids
