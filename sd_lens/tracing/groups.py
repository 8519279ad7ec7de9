"""The three kinds of tokens that analyses average over."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from sd_lens.tracing.trace import MIN_RATIO, NormTrace

GROUPS = ("initial", "delimiter", "other")
"""First tokens of their prompt; later tokens with a high norm after some block, which in trained models are delimiters; the rest."""


def group_of(trace: NormTrace, min_ratio: float = MIN_RATIO) -> Int[Tensor, "token"]:
    """The number, in `GROUPS`, of each token's group.

    Args:
        trace: The trace.
        min_ratio: Least ratio of a high-norm token.
    """
    high = trace.high_norm(min_ratio).any(0)
    group = 2 - high.long()
    group[trace.position == 0] = 0
    return group
