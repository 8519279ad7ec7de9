"""Which tokens of a prompt stand out: those with a high norm, and attention sinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, padded
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import run_batches
from sd_lens.tracing.defects import Defects
from sd_lens.tracing.norms import trace_norms

SINK_ATTENTION = 0.1
"""An attention sink gets at least this much of the attention of a later query, on average over heads, blocks and these queries, ..."""
SINK_TIMES_EVEN = 2.0
"""... at least so many times what it would get of queries that attend to all they see alike, ..."""
SINK_QUERIES = 8
"""... and there are at least so many queries after it: of a few, one may happen to look at its neighbour."""


class Marks(NamedTuple):
    """Which tokens stand out.

    Attributes:
        high_norm: Tokens with a high norm after some block.
        sinks: Attention sinks.
        notes: What could not be told.
    """

    high_norm: Bool[Tensor, "pos"]
    sinks: Bool[Tensor, "pos"]
    notes: tuple[str, ...]


def marks_of(model: TransformerLensModel, tokens: Int[Tensor, "pos"], defects: Defects | None = None) -> Marks:
    """Which tokens of a prompt have a high norm, and which are attention sinks.

    Args:
        model: A TransformerLens model, as it is.
        tokens: Token ids of the prompt.
        defects: High-norm tokens of this prompt, where they are known.

    Raises:
        ValueError: ``defects`` are not of this one prompt.
    """
    if defects is None:
        high = trace_norms(model, [tokens], direction_prompts=0, progress=False).high_norm().any(0)
    else:
        require_same_prompt(defects, tokens)
        high = defects.mask()[0]
    n_blocks = int(model.cfg.n_layers)
    there: Any = model
    points = [name for name in map(hook_names.pattern, range(n_blocks)) if name in there.hook_dict]
    received = torch.zeros(len(tokens), dtype=torch.float64)
    seen = set[int]()

    def on_batch(batch: Batch) -> Callable[[int, Tensor], None]:
        def receive(point: int, pattern: Tensor) -> None:
            seen.add(point)
            received.add_(from_later(pattern[0].mean(0, dtype=torch.float64)).cpu() / n_blocks)

        return receive

    run_batches(model, [padded([tokens])], points, on_batch, progress=False)
    if len(seen) < n_blocks:
        note = "attention sinks are not marked: the model's attention does not show its pattern"
        return Marks(high, torch.zeros_like(high), (note,))
    return Marks(high, is_sink(received), ())


def is_sink(received: Float[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
    """Which positions are attention sinks; the rule is stated at `SINK_ATTENTION`, `SINK_TIMES_EVEN` and `SINK_QUERIES`.

    Args:
        received: What each position gets of a later query's attention, on average.
    """
    n = len(received)
    attended = 1 / torch.arange(1, n + 1, dtype=torch.float64)  # to each token, by a query that attends to all it sees alike
    later = torch.arange(n - 1, -1, -1)
    even = (attended.sum() - attended.cumsum(0)) / later.clamp(min=1)
    return (received >= SINK_ATTENTION) & (received >= SINK_TIMES_EVEN * even) & (later >= SINK_QUERIES)


def from_later(pattern: Float[Tensor, "query key"]) -> Float[Tensor, "key"]:
    """Mean attention of the queries after each key; 0 for the last key.

    Args:
        pattern: An attention pattern.
    """
    n = len(pattern)
    return pattern.tril(-1).sum(0) / torch.arange(n - 1, -1, -1, device=pattern.device).clamp(min=1)


def require_same_prompt(defects: Defects, tokens: Int[Tensor, "pos"]) -> None:
    """Raises `ValueError` unless high-norm tokens are those of one given prompt."""
    known = defects.trace.tokens
    if defects.trace.n_prompts != 1 or not torch.equal(known, tokens):
        got = f"those of {defects.trace.n_prompts} prompts" if defects.trace.n_prompts != 1 else "those of another prompt"
        raise ValueError(f"defects: got {got}; allowed: find_defects of a trace of this prompt alone")
