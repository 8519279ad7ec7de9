"""The two pathways side by side: which token ids of a text have a high norm, how often and where, and what each does by itself.

A first token explodes because it sees only itself; a delimiter explodes wherever it stands, by its own embedding and the FFNs, so also
where attention adds nothing (Wang et al., ICML 2025, arXiv 2502.07004, section 4). What a text shows of an id, by position and by which
occurrence in its prompt, stands here beside the id's norm alone at position 0 and its norm alone without attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts, decode_each
from sd_lens.tracing.alone import Alone
from sd_lens.tracing.arguments import require_block
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.trace import MIN_RATIO, CacheLike, NormTrace, require_ratio

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PATHWAYS = ("self", "initial", "context", "none")
"""How an id gets its high norm in a text.

``"self"``: it has it without attention too, so by its own embedding and the FFNs: delimiters, and a BOS that explodes for being the
BOS. ``"initial"``: at position 0 only, and it takes the position: without attention it has it not, or it stands at later positions
without it. ``"context"``: at later positions, and it takes attention to what stands before it (more of itself, for instance). ``"none"``:
nowhere.
"""


@dataclass(frozen=True)
class TokenPathways:
    """What a text shows of each of its token ids, and what each does alone.

    A place of an id counts as high-norm where its norm is high after *any* block, as in `find_defects`. Ratios are to ordinary tokens'
    norm at the same block: the median over the text, first tokens left out. The columns of ``rows``:

    ==========================  ==================================================================================================
    id, token                   The token id, and as text.
    n                           Places where it stands.
    n_initial, high_initial     Those at position 0, and how many of these are high-norm.
    n_later, high_later         Those at later positions, and how many of these are high-norm.
    share_later                 ``high_later / n_later``; NaN where it stands at no later position.
    n_first                     Prompts in which it stands at a later position.
    first_in_prompt_high        In how many of these the first such place is high-norm.
    n_repeat, repeat_high       Later places that are not the first of their prompt, and how many of these are high-norm.
    earliest_high_pos           Smallest position above 0 at which it is high-norm; missing where there is none.
    max_ratio                   Largest ratio anywhere in the text, after any block.
    mean_norm                   Mean norm at later positions, after ``block``.
    initial_norm, _ratio        Alone at position 0, after ``block``.
    no_attention_norm, _ratio   Alone with what attention adds set to zero in every block, at position 1 (what models add for position 0
                                can make any token explode there).
    pathway                     One of `PATHWAYS`.
    ==========================  ==================================================================================================

    Attributes:
        model_name: The model.
        block: The block after which norms of ids are taken.
        rows: One row per id of the text: those with most high-norm places first, then the most frequent.
        reference: Norm of ordinary tokens after the block.
        min_ratio: Least ratio of a high norm.
        n_tokens: Tokens of the text.
        n_prompts: Its prompts.
    """

    model_name: str
    block: int
    rows: pd.DataFrame
    reference: float
    min_ratio: float
    n_tokens: int
    n_prompts: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token id; a copy."""
        return self.rows.copy()

    def high(self) -> pd.DataFrame:
        """The rows of ids that are high-norm somewhere in the text."""
        return self.rows.query("pathway != 'none'").reset_index(drop=True)

    def sentences(self, k: int = 10) -> tuple[str, ...]:
        """One line for each of the first ``k`` ids that are high-norm somewhere."""
        if k < 1:
            raise ValueError(f"k: got {k}; allowed: at least 1")
        return tuple(_sentence(row) for row in self.high().head(k).itertuples())

    def plot(self) -> Figure:
        """The two-pathway table of the ids that are ever high-norm."""
        from sd_lens.display.figures import pathway_table_figure

        return pathway_table_figure(self)

    def __repr__(self) -> str:
        counts = self.rows.pathway.value_counts()
        found = ", ".join(f"{counts[name]} {name}" for name in PATHWAYS[:-1] if name in counts)
        return f"TokenPathways({self.model_name}: {len(self.rows)} token ids, block {self.block}: {found or 'none is high-norm'})"

    def _repr_html_(self) -> str:
        return str(self.high().to_html(index=False))


def _sentence(row: Any) -> str:
    where = []
    if row.high_initial:
        where.append(f"at position 0 of {row.high_initial} of {row.n_initial} prompts")
    if row.n_later:
        places = f"in {row.high_later} of {row.n_later} {'later ' if row.n_initial else ''}places"
        if row.n_repeat and row.high_later and not row.repeat_high:
            every = row.first_in_prompt_high == row.n_first
            places += ", only the first of each prompt" if every else ", never but the first of a prompt"
        where.append(places)
    return f"{row.token!r} is high-norm {' and '.join(where)}; without attention it has {row.no_attention_ratio:.3g} times the ordinary norm."


def token_pathways(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    cache: CacheLike | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    block: int | None = None,
    min_ratio: float = MIN_RATIO,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> TokenPathways:
    """Groups a text's positions by token id: which ids are high-norm how often and where first, beside what each does by itself.

    The text is traced once (or its cache read); then every id in it is run alone, once as it is and once without attention. Nothing
    grows with the text but one number per token and block.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: the built-in texts. With a cache: the token ids it was run on. Or a source, which several
            analyses may share.
        cache: An `ActivationCache` of these tokens with the stream around the blocks; the model is run on the single ids only.
        mask: True at real tokens of a cache, False at padding; default: what `trace_norms` takes for padding.
        block: The block after which norms of ids are taken; default: the explosion block of the text, the last of several. If it shows
            none, the block after which some id alone stands out most.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.

    Returns:
        The table.

    Raises:
        ValueError: An argument is out of range, model or prompts are unusable, every prompt has one token only, or the cache lacks hook
            points.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> tokens = torch.arange(20).reshape(2, 10)
        >>> tokens[0, 4] = tokens[0, 7] = 96
        >>> table = token_pathways(planted(pathway="embedding").model, tokens)
        >>> table
        TokenPathways(planted: 19 token ids, block 1: 1 self)
        >>> table.high().token.tolist(), table.high().share_later.tolist()
        (['<96>'], [1.0])
    """
    require_usable(model)
    require_ratio(min_ratio)
    n_blocks: int = model.cfg.n_layers
    if block is not None:
        require_block(block, n_blocks)
    source = source_of(
        model,
        prompts,
        may_need=hook_names.residual_points(n_blocks),
        cache=cache,
        mask=mask,
        prepend_bos=prepend_bos,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    if block is not None:
        source.require([hook_names.resid_post(block)])
    trace = source.trace(min_ratio=min_ratio)
    found = find_defects(trace, min_ratio=min_ratio).explosion_blocks
    ids, of_token = trace.tokens.unique(return_inverse=True)
    traced = len(trace.norms) - 1
    blocks = [block] if block is not None else [found[-1]] if found else range(traced)
    alone = _alone(model, ids, blocks, batch_tokens, progress)
    ordinary = trace.reference[[b + 1 for b in blocks]]
    at = int((torch.cat(list(alone.values()), dim=1).amax(1) / ordinary).argmax())
    columns = _in_text(trace, of_token, trace.norms[blocks[at] + 1], min_ratio)
    for name, norms in alone.items():
        columns |= {f"{name}_norm": norms[at], f"{name}_ratio": norms[at] / ordinary[at]}
    rows = pd.DataFrame({"id": ids.numpy(), "token": decode_each(model, ids.tolist())})
    rows = rows.assign(**{name: values.numpy() for name, values in columns.items()})
    earliest = rows.earliest_high_pos.astype("Int64")
    rows["earliest_high_pos"] = earliest.where(rows.high_later > 0)
    rows["pathway"] = _pathways(rows, min_ratio)
    order = np.lexsort((-rows.n, -(rows.high_initial + rows.high_later)))
    return TokenPathways(
        model_name=trace.model_name,
        block=blocks[at],
        rows=rows.iloc[order].reset_index(drop=True),
        reference=float(ordinary[at]),
        min_ratio=min_ratio,
        n_tokens=len(trace.tokens),
        n_prompts=trace.n_prompts,
    )


def _alone(
    model: TransformerLensModel, ids: Int[Tensor, "id"], blocks: Sequence[int], batch_tokens: int, progress: bool | None
) -> dict[str, Float[Tensor, "block id"]]:
    """Norms of ids by themselves."""
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    initial = Alone(model, **options).norms(ids.unsqueeze(1), blocks, label="initial")
    # Without attention no token sees another, so that what stands at position 0 makes no difference to the id after it.
    pairs = ids.unsqueeze(1).expand(-1, 2)
    no_attention = Alone(model, with_attention=False, **options).norms(pairs, blocks, label="no attention")
    return {"initial": initial[..., 0], "no_attention": no_attention[..., 1]}


def _in_text(
    trace: NormTrace, of_token: Int[Tensor, "token"], norms: Float[Tensor, "token"], min_ratio: float
) -> dict[str, Tensor]:
    """What the text shows of each id; ``of_token`` has every token's row, ``norms`` its norm after the block."""
    n_ids = int(of_token.max()) + 1
    high, later = trace.high_norm(min_ratio).any(0), trace.position > 0
    first = _first_in_prompt(trace.prompt, of_token, later)

    def count(chosen: Tensor) -> Tensor:
        return torch.bincount(of_token[chosen], minlength=n_ids)

    n_later, n_first = count(later), count(first)
    sums = torch.bincount(of_token[later], weights=norms[later].double(), minlength=n_ids)
    largest = torch.zeros(n_ids).scatter_reduce(0, of_token, trace.ratios[1:].amax(0), "amax")
    high_later = later & high
    unseen = torch.full((n_ids,), int(trace.position.max()) + 1)
    earliest = unseen.scatter_reduce(0, of_token[high_later], trace.position[high_later], "amin")
    return {
        "n": count(torch.ones_like(later)),
        "n_initial": count(~later),
        "high_initial": count(~later & high),
        "n_later": n_later,
        "high_later": count(high_later),
        "share_later": count(high_later) / n_later,
        "n_first": n_first,
        "first_in_prompt_high": count(first & high),
        "n_repeat": n_later - n_first,
        "repeat_high": count(high_later & ~first),
        "earliest_high_pos": earliest,
        "max_ratio": largest,
        "mean_norm": (sums / n_later).float(),
    }


def _first_in_prompt(
    prompt: Int[Tensor, "token"], of_token: Int[Tensor, "token"], later: Bool[Tensor, "token"]
) -> Bool[Tensor, "token"]:
    """True at the first place after position 0 of every id in every prompt."""
    places = later.nonzero().flatten()
    pair = prompt[places] * (int(of_token.max()) + 1) + of_token[places]
    # A stable sort keeps the places of a pair in their order, so the first of a run of equals is the first in its prompt.
    pair, order = pair.sort(stable=True)
    begins = torch.ones_like(pair, dtype=torch.bool)
    begins[1:] = pair[1:] != pair[:-1]
    first = torch.zeros_like(later)
    first[places[order[begins]]] = True
    return first


def _pathways(rows: pd.DataFrame, min_ratio: float) -> np.ndarray:
    later, initial = rows.high_later > 0, rows.high_initial > 0
    # An id that never stands elsewhere cannot show that it takes the position.
    by_itself = (rows.no_attention_ratio >= min_ratio) & (later | (initial & (rows.n_later == 0)))
    return np.select([by_itself, later, initial], ["self", "context", "initial"], "none")
