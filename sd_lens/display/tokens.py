"""Tokens as text, coloured by a value: by CircuitsVis, as written, on a log scale where the value is a norm."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import torch

from sd_lens.display.labels import visible
from sd_lens.display.visuals import View, script_bundle, view_of
from sd_lens.tracing.trace import MIN_RATIO, NormTrace

__all__ = ["colored_tokens", "peak_block", "script_bundle", "token_view"]

HIGH, LOW = "#F28E2B", "#7FB8DA"
"""Colours of large and small values: light enough for the black text that CircuitsVis writes on them."""


def token_view(tokens: Sequence[str], values: Sequence[float], *, limit: float | None = None) -> View:
    """Tokens coloured by values: white at 0, orange above, blue below.

    Args:
        tokens: The tokens, as the tokenizer gives them.
        values: One finite value each; NaN counts as 0.
        limit: Value of the full colour; default: the largest.

    Returns:
        The view, which a notebook shows and `View.save` writes as a page.

    Raises:
        ValueError: There are not as many values as tokens, or none, or one is infinite.

    Example:
        >>> token_view(["<s>", " the", "."], [2.5, 0.1, 0.3])
        View(3 coloured tokens)
    """
    if len(tokens) != len(values) or len(tokens) == 0:
        raise ValueError(
            f"values: got {len(values)} for {len(tokens)} tokens; allowed: one value per token, and at least one token"
        )
    if any(map(math.isinf, values)):
        raise ValueError("values: got an infinite one; allowed: finite values and NaN")
    from circuitsvis.tokens import colored_tokens as circuitsvis_tokens

    kept = [0.0 if math.isnan(value) else round(float(value), 3) for value in values]
    full = limit or max(map(abs, kept)) or 1.0
    rendered = circuitsvis_tokens(
        [_written(token) for token in tokens], kept, min_value=-full, max_value=full, negative_color=LOW, positive_color=HIGH
    )
    return view_of(rendered.local_src, kind="token-view", shows=f"{len(tokens)} coloured token{'s' * (len(tokens) != 1)}")


def _written(token: str) -> str:
    """A token as HTML, with a line break kept after its sign."""
    return html.escape(visible(token)).replace("↵", "↵\n" if "\n" in token else "↵")


def colored_tokens(trace: NormTrace, prompt: int = 0, block: int | None = None, *, max_ratio: float | None = None) -> View:
    """A prompt's tokens, coloured by the log10 of their norm after a block.

    The scale's zero is the other tokens' median norm, so that ordinary tokens stay white whatever the model's scale; its full
    colour is the largest of the trace after that block, and at least that of a high-norm token.

    Args:
        trace: The trace.
        prompt: Which of its prompts.
        block: After which block; default: the one after which some norm stands out most.
        max_ratio: Multiple of the median that has the full colour, for views to be compared; default: see above.

    Returns:
        The view.

    Raises:
        ValueError: There is no such prompt or block, or the ratio is not above 1.

    Example:
        >>> import sd_lens
        >>> trace = sd_lens.trace_norms(sd_lens.load("tiny"), "The cat sat.")
        >>> colored_tokens(trace)
        View(7 coloured tokens)
    """
    blocks = len(trace.norms) - 1
    if block is not None and not 0 <= block < blocks:
        raise ValueError(f"block: got {block}; allowed: 0 to {blocks - 1}, the blocks traced")
    if max_ratio is not None and not 1 < max_ratio < math.inf:
        raise ValueError(f"max_ratio: got {max_ratio}; allowed: above 1")
    point = 1 + (peak_block(trace) if block is None else block)
    norms = trace.norms[point].double()
    median = trace.reference[point].double()
    logs = (norms / (median if bool(median > 0) else norms.nanmedian())).log10()
    logs = torch.where(logs.isfinite(), logs, 0.0)
    trace.of_prompt(prompt)  # refuses a prompt that is not there
    limit = max(float(logs.max()), math.log10(MIN_RATIO)) if max_ratio is None else math.log10(max_ratio)
    return token_view(trace.texts_of(prompt), logs[trace.prompt == prompt].tolist(), limit=limit)


def peak_block(trace: NormTrace) -> int:
    """Block after which a norm of the trace stands out most from the median."""
    return int(trace.ratios[1:].nan_to_num(nan=0.0, posinf=0.0).max(1).values.argmax())
