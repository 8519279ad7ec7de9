"""Attention patterns of chosen heads: CircuitsVis' heat maps, one large, with every head to choose from."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from sd_lens.display.labels import visible
from sd_lens.display.tokens import HIGH, LOW
from sd_lens.display.visuals import View, view_of

# CircuitsVis draws as wide as it may and names small maps in letters as large as the maps.
_STYLE = (
    "<style>.attention-view{max-width:720px;font-family:sans-serif}.attention-view h3{font-size:14px}.attention-view h4{font-size:10px}"
    ".attention-view h2{font-size:16px}</style>\n"
)
_ROUNDING = 1e-3


def attention_patterns(patterns: Float[Tensor, "head query key"], tokens: Sequence[str], names: Sequence[str]) -> View:
    """Heat maps of heads' attention: queries from the top down, keys from left to right, white at 0 and full colour at 1.

    Every head has a small map with its name; the one pointed at, at first the first, is drawn large, with the tokens and their positions.

    Args:
        patterns: Attention of each query to each key, from 0 to 1.
        tokens: The tokens, as the tokenizer gives them.
        names: One name per head, such as ``L2H3``.

    Returns:
        The view, which a notebook shows and `View.save` writes as a page.

    Raises:
        ValueError: The numbers of heads, tokens and names do not fit, a value lies outside of 0 to 1, or a query attends to a later token, as in
            patterns with queries and keys swapped.

    Example:
        >>> import torch
        >>> attention_patterns(torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]), ["<s>", " the"], ["L0H0"])
        View(attention of L0H0 over 2 tokens)
    """
    _require_patterns(patterns, tokens, names)
    from circuitsvis.attention import attention_heads

    values = patterns.detach().double().cpu().clamp(0, 1)
    # The tokens are drawn on a canvas and the names are text nodes: unlike those of token views, they are not HTML.
    rendered = attention_heads(
        [[[round(value, 4) for value in row] for row in head] for head in values.tolist()],
        [visible(token) for token in tokens],
        list(names),
        max_value=1.0,
        min_value=-1.0,
        negative_color=LOW,
        positive_color=HIGH,
    )
    heads = f"{len(names)} heads" if len(names) > 3 else ", ".join(names)
    view = view_of(
        rendered.local_src, kind="attention-view", shows=f"attention of {heads} over {len(tokens)} token{'s' * (len(tokens) != 1)}"
    )
    return View(_STYLE + view.body, view.ids, view.shows)


def _require_patterns(patterns: Tensor, tokens: Sequence[str], names: Sequence[str]) -> None:
    wanted = (len(names), len(tokens), len(tokens))
    if tuple(patterns.shape) != wanted or 0 in wanted:
        raise ValueError(
            f"patterns: got shape {tuple(patterns.shape)} for {len(names)} names and {len(tokens)} tokens; allowed: (head, query, key), at least one "
            "of each"
        )
    low, high = float(patterns.min()), float(patterns.max())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(f"patterns: got values from {low:.4g} to {high:.4g}; allowed: attention after the softmax, 0 to 1")
    if float(patterns.triu(1).max()) > _ROUNDING:
        raise ValueError("patterns: got attention to later tokens; allowed: causal patterns (head, query, key)")
