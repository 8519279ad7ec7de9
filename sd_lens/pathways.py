"""How tokens get to a high norm, in one call: vocabulary scans, the two pathways of a text's tokens, repeats, sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sd_lens.anatomy import attempt
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.tracing.confirmation import Confirmation, confirm_in_context
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.delimiters import TokenPathways, token_pathways
from sd_lens.tracing.pathways import scan_vocabulary
from sd_lens.tracing.repetition import RepeatedTokens, repeated_tokens
from sd_lens.tracing.sinks import SinkAttention, sink_attention
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.trace import MIN_RATIO
from sd_lens.tracing.vocabulary_scan import PATHWAYS, Pathway, VocabularyScan


@dataclass(frozen=True)
class Pathways:
    """How tokens get to a high norm.

    Attributes:
        defects: The high-norm tokens of the text.
        scans: One scan of the vocabulary, or of a sample of it, per pathway.
        confirmation: The first ids that explode without attention, in a text; None where none does.
        tokens: The ids of the text, with both pathways side by side.
        repeated: What repeated tokens do.
        sinks: Attention to high-norm tokens; None where the model shows no attention pattern.
        missing: Why a result is None, by its name.
    """

    defects: Defects
    scans: tuple[VocabularyScan, ...]
    confirmation: Confirmation | None
    tokens: TokenPathways
    repeated: RepeatedTokens
    sinks: SinkAttention | None
    missing: dict[str, str]

    def sentences(self) -> tuple[str, ...]:
        """What was found, in one sentence for the scans and one for each of the text's first high-norm ids."""
        places = {"initial": "alone at position 0", "no_attention": "without attention", "second": "after another token"}
        counts = [f"{len(scan.self_exploding())} of {int(scan.trained.sum())} {places[scan.pathway]}" for scan in self.scans]
        return (f"Token ids that explode by themselves: {', '.join(counts)}.", *self.tokens.sentences(3))


def pathways(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    which: Sequence[Pathway] = PATHWAYS,
    ids: Int[Tensor, "id"] | Sequence[int] | None = None,
    block: int | None = None,
    max_ids: int | None = None,
    prepend_bos: bool | None = None,
    min_ratio: float = MIN_RATIO,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool | None = None,
) -> Pathways:
    """Runs the analyses that tell how tokens get to a high norm.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: built-in texts.
        which: Which pathways the vocabulary is scanned on.
        ids: Which token ids are scanned; default: all.
        block: The block after which norms are taken; default: the explosion block, see `scan_vocabulary`.
        max_ids: Scan no more ids than this: those of the text, and a seeded sample of the others; None for no limit.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        batch_tokens: Largest number of tokens run at once.
        seed: Seeds random embeddings, other ids and samples.
        progress: Whether to show progress bars.

    Raises:
        ValueError: The model or an argument is unusable.

    Example:
        >>> from sd_lens.models.loading import load
        >>> pathways(load("tiny")).sentences()[0]
        'Token ids that explode by themselves: 1 of 1024 alone at position 0, 1 of 1024 without attention, 1 of 1024 after another token.'
    """
    source = source_of(model, prompts, may_need=(), prepend_bos=prepend_bos, batch_tokens=batch_tokens, progress=progress)
    if ids is None and max_ids is not None:
        ids = _sample(source, int(model.cfg.d_vocab), max_ids, seed)
    defects = find_defects(source.trace(min_ratio=min_ratio), min_ratio=min_ratio)
    if block is None and defects.found:
        block = defects.explosion_blocks[-1]  # so that no scan has to look for it again
    run: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    shared: dict[str, Any] = {"block": block, "min_ratio": min_ratio, **run}
    scans = tuple(scan_vocabulary(model, pathway, ids=ids, prompts=source, seed=seed, **shared) for pathway in dict.fromkeys(which))
    missing: dict[str, str] = {}
    candidates = next((scan for scan in scans if scan.pathway == "no_attention"), scans[0])
    exploding = len(candidates.self_exploding())
    return Pathways(
        defects=defects,
        scans=scans,
        confirmation=confirm_in_context(model, candidates, k=min(exploding, 10), seed=seed, prepend_bos=prepend_bos, **run)
        if exploding
        else None,
        tokens=token_pathways(model, source, block=block, min_ratio=min_ratio, batch_tokens=batch_tokens, progress=progress),
        repeated=repeated_tokens(model, block=scans[0].block, min_ratio=min_ratio, prepend_bos=prepend_bos, seed=seed, **run),
        sinks=attempt("sinks", missing, lambda: sink_attention(model, source, min_ratio=min_ratio)),
        missing=missing | ({} if exploding else {"confirmation": "no id explodes by itself"}),
    )


def _sample(source: Source, vocabulary: int, most: int, seed: int) -> Tensor | None:
    """The ids of the text and a sample of the others; None for all, where they are not too many."""
    if vocabulary <= most:
        return None
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    in_text = torch.isin(order, torch.cat(source.sequences))
    return torch.cat([order[in_text], order[~in_text]])[:most].sort().values
