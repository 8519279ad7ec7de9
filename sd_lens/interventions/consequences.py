"""Consequences of removing the explosion subspace, in one table: loss, predictions, norms, sinks and text, before and after.

Every row is one forward pass per batch. What removing the subspace does is told from mere damage by a norm-matched control: the same
displacement of every token, along random directions orthogonal to the subspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.interventions.arms import arms_of, only
from sd_lens.interventions.generation import BEGINNINGS, Beginnings, Continuation, beginnings, continuations
from sd_lens.interventions.observing import observe
from sd_lens.interventions.options import require_subspace
from sd_lens.interventions.outcomes import SIDES, WHERE, Consequences, Measures, Outcome, Where
from sd_lens.interventions.sites import Side
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.interventions.tallies import Tally, deviations, means
from sd_lens.models import hook_names
from sd_lens.models.batches import batches
from sd_lens.models.ffn_input import ffn_input
from sd_lens.models.loading import require_usable, weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import not_shown
from sd_lens.models.tokens import Prompts
from sd_lens.tracing.arguments import require_seed, require_whole
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.source import PromptSource, Source, source_of
from sd_lens.tracing.trace import MIN_RATIO, require_ratio

__all__ = ["Consequences", "Measures", "Outcome", "consequences", "require_options"]


def consequences(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    subspace: ExplosionSubspace | None = None,
    rank: int = 2,
    where: Sequence[Where] = WHERE,
    sides: Sequence[Side] = SIDES,
    mean: bool = True,
    controls: int = 3,
    generate: Beginnings | None = BEGINNINGS,
    max_new_tokens: int = 24,
    epsilon: float = 0.3,
    T: int = 64,
    seed: int = 0,
    min_ratio: float = MIN_RATIO,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> Consequences:
    """What removing the explosion subspace does to a model, before and after, in one table.

    The rows: the untouched model; and for each side and place, the subspace ablated (coefficients set to zero), mean-ablated (set to their
    mean over the tokens without a high norm, at each site), and a norm-matched random control of the ablation, averaged over seeds. The
    columns are described at `Measures`; losses and divergences are means over tokens, not over prompts.

    Delimiters are the very tokens of these prompts that have a high norm and are not the first of theirs; in generated text, where norms
    are not known beforehand, the tokens of the same ids. Where there are none, rows are equal to the untouched one.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: the built-in texts. Or a source of prompts, which several analyses may share.
        subspace: What is removed; default: the leading singular vectors of the explosion block that `find_defects` finds in the prompts.
        rank: How many of them; not used with a subspace.
        where: At which tokens.
        sides: ``"trigger"``: in what the FFN reads; ``"direction"``: in the stream that the block leaves; ``"both"``.
        mean: Whether to show mean ablation, too.
        controls: How many seeds of each random control; 0 for none.
        generate: Prompts that text is generated from, greedily, with the subspace ablated on both sides (or the last of ``sides``); None or
            ``()`` for no text.
        max_new_tokens: How many tokens are generated at most.
        epsilon: A head has a sink where ``α`` exceeds this, see `sink_attention`.
        T: Queries after the first so many tokens of a prompt are left out of ``α``.
        seed: Of the first control; the others follow.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once. Logits of one such batch are kept twice.
        progress: Whether to show progress bars.

    Returns:
        The table and the texts.

    Raises:
        ValueError: No block explodes and no subspace is given, an argument is unusable, the model's weights cannot be read, or it has no
            hook point for this.

    Example:
        >>> from sd_lens.models.loading import load
        >>> found = consequences(load("tiny"), sides=["both"], where=["initial"], controls=0, generate=None)
        >>> found
        Consequences(tiny, block 2, rank 2: 3 rows; ablated (both, initial), peak ratio 13.3 -> 1.39, loss 4.497 -> 4.588)
        >>> found.to_dataframe()[["intervention", "n_tokens", "peak_ratio", "kl", "sink_rate"]].round(2)
          intervention  n_tokens  peak_ratio    kl  sink_rate
        0         none         0       13.25  0.00       0.28
        1       ablate         6        1.39  0.18       0.21
        2  mean ablate         6        1.42  0.13       0.22
    """
    require_usable(model)
    where, sides = require_options(where, sides, controls, max_new_tokens, epsilon, T)
    require_ratio(min_ratio)
    require_subspace(model, subspace, rank, controls, batch_tokens)
    require_seed(seed)
    _require_editable(model, subspace, sides)
    source = source_of(model, prompts, may_need=(), prepend_bos=prepend_bos, batch_tokens=batch_tokens, progress=progress)
    if not isinstance(source, PromptSource):
        raise ValueError("prompts: got activations of a cache; allowed: prompts, which are run anew with the subspace removed")
    work = batches(source.sequences, batch_tokens=batch_tokens)
    notes: list[str] = []
    begun = _beginnings(model, generate, prepend_bos, notes)

    trace = source.trace(min_ratio=min_ratio)
    defects = find_defects(trace, min_ratio=min_ratio)
    if subspace is None:
        subspace = ExplosionSubspace.at(model, rank=rank, defects=defects)
    high = trace.high_norm(min_ratio).any(0)
    if not bool(high.any()):
        notes.append("no token has a high norm, so that there is no peak to compare")
    marks = {"initial": trace.position == 0, "delimiters": high & (trace.position > 0), "everywhere": torch.ones_like(high)}
    if "delimiters" in where and not bool(marks["delimiters"].any()):
        notes.append("no token after the first of its prompt has a high norm, so that there are no delimiters to edit")
    points = [hook_names.pattern(block) for block in range(int(model.cfg.n_layers))]
    patterns = not not_shown(model, points, int(source.sequences[0][0]))
    if not patterns:
        notes.append("the model shows no attention patterns, so that sinks were not measured")
    looked_at: dict[str, Any] = {"norms": True, "logits": True, "alpha": patterns, "T": T}

    untouched = Tally(trace, epsilon)
    arms = arms_of(subspace, source, high, sides, where, mean=mean, controls=controls, seed=seed)
    for arm in arms:
        arm.tallies.extend(Tally(trace, epsilon) for _ in arm.interventions)
    total = len(work) * (1 + sum(len(arm.interventions) for arm in arms))
    hidden = None if progress is None else not progress
    with tqdm(total=total, desc="consequences", unit="run", delay=2.0, disable=hidden, leave=False) as bar:
        for batch in work:
            plain = observe(model, batch, **looked_at)
            untouched.add(plain, plain)
            bar.update()
            for arm in arms:
                mask = marks[arm.where][batch.flat] & batch.mask
                for intervention, tally in zip(arm.interventions, arm.tallies, strict=True):
                    # A run without any edit would show the same again.
                    edited = bool(mask.any())
                    hooks = only(intervention, mask).fwd_hooks() if edited else []
                    tally.add(observe(model, batch, hooks, **looked_at) if edited else plain, plain)
                    bar.update()

    sinks = untouched.mean_alpha() > epsilon if patterns else None

    def measured(tally: Tally) -> Measures:
        return tally.measures(high, subspace.block, min_ratio, sinks)

    rows = [Outcome("none", "none", "none", 0, measured(untouched))]
    for arm in arms:
        seen, n_tokens = [measured(tally) for tally in arm.tallies], int(marks[arm.where].sum())
        spread = deviations(seen) if arm.kind == "random control" else None
        rows.append(Outcome(arm.kind, arm.side, arm.where, n_tokens, means(seen), spread))
    return Consequences(
        model_name=trace.model_name,
        block=subspace.block,
        rank=subspace.rank,
        rows=tuple(rows),
        continuations=tuple(_texts(subspace, defects, begun, sides, where, max_new_tokens, patterns, notes)),
        n_tokens=len(high),
        n_prompts=trace.n_prompts,
        n_high=int(high.sum()),
        n_delimiters=int(marks["delimiters"].sum()),
        n_sink_heads=0 if sinks is None else int(sinks.sum()),
        controls=controls,
        min_ratio=min_ratio,
        epsilon=epsilon,
        T=T,
        notes=tuple(notes),
    )


def _beginnings(
    model: TransformerLensModel, generate: Beginnings | None, prepend_bos: bool | None, notes: list[str]
) -> list[Int[Tensor, "_"]]:
    if generate is not None and not isinstance(generate, (str, Sequence, Tensor)):
        raise ValueError(f"generate: got {generate!r}; allowed: texts or token ids to go on from, or None")
    if generate is None or (not isinstance(generate, str) and len(generate) == 0):
        return []
    built_in = isinstance(generate, tuple) and all(isinstance(text, str) and text in BEGINNINGS for text in generate)
    if built_in and getattr(model, "tokenizer", None) is None:
        notes.append("the model has no tokenizer, so that no text was generated")
        return []
    return beginnings(model, generate, prepend_bos=prepend_bos)


def _texts(
    subspace: ExplosionSubspace,
    defects: Defects,
    begun: list[Tensor],
    sides: Sequence[Side],
    where: Sequence[Where],
    max_new_tokens: int,
    cached: bool,
    notes: list[str],
) -> list[Continuation]:
    if not subspace.delimiters:
        subspace = subspace.with_delimiters([token.id for token in defects.tokens if token.pos > 0])
    side: Side = "both" if "both" in sides else sides[-1]
    if begun:
        notes.append(
            f"texts are generated greedily, with the subspace ablated on {'both sides' if side == 'both' else f'the {side} side'}"
        )
    return continuations(subspace, begun, side=side, where=where, max_new_tokens=max_new_tokens, cached=cached)


def _require_editable(model: TransformerLensModel, subspace: ExplosionSubspace | None, sides: Sequence[Side]) -> None:
    """Raises `ValueError` unless the model's weights can be read and what is to be edited has a hook point."""
    if subspace is None:
        weights = weights_of(model)[0]
        if any(side != "direction" for side in sides):
            ffn_input(model, weights)
    else:
        for side in sides:
            subspace.sites(side)


def require_options(
    where: Any, sides: Any, controls: Any, max_new_tokens: Any, epsilon: float = 0.3, T: int = 64
) -> tuple[tuple[Where, ...], tuple[Side, ...]]:
    """Raises `ValueError` unless these arguments of `consequences` are usable.

    Returns:
        Places and sides, each once.
    """
    for name, chosen, allowed in (("where", where, WHERE), ("sides", sides, SIDES)):
        if (
            not isinstance(chosen, Sequence)
            or isinstance(chosen, str)
            or not len(chosen)
            or not all(one in allowed for one in chosen)
        ):
            raise ValueError(f"{name}: got {chosen!r}; allowed: a list of {', '.join(map(repr, allowed))}")
    require_whole("controls", controls, 0)
    require_whole("max_new_tokens", max_new_tokens, 1)
    require_whole("T", T, 1)
    if not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
        raise ValueError(f"epsilon: got {epsilon!r}; allowed: between 0 and 1")
    return tuple(dict.fromkeys(where)), tuple(dict.fromkeys(sides))
