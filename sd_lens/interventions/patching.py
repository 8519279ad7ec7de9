"""Sweeps: what taking the component in an explosion subspace from another run changes, block by block and token by token (or head).

Activation patching as in Heimersheim & Nanda, How to use and interpret activation patching (2024, arXiv 2404.15255): of a clean and a corrupted
run, the corrupted one is run again with something of the clean one in its place. Here this is the component in a subspace and nothing
else: an interchange intervention (Geiger et al., Causal Abstractions of Neural Networks, NeurIPS 2021, arXiv 2106.02997).

``transformer_lens.patching.generic_activation_patch`` would run the model once for every cell, and its metrics see logits only. Here the
prompts are repeated with another cell patched in every row, and norms and attention are read inside the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from sd_lens.interventions.cells import Cell, CellRunner, Patch
from sd_lens.interventions.metrics import Answers, Metric, Score, answers_of, points_read, require_metric
from sd_lens.interventions.options import require_subspace
from sd_lens.interventions.pairs import PromptPairs
from sd_lens.interventions.patches import TokenPatch, head_patch, read_in_stream
from sd_lens.interventions.sites import direction_site, require_side, trigger_site
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.interventions.sweep import PatchSweep
from sd_lens.models import hook_names
from sd_lens.models.loading import require_usable, weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import require_shown
from sd_lens.models.tokens import Prompts
from sd_lens.tracing.arguments import require_blocks, require_seed
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.source import source_of


def patch_sweep(
    model: TransformerLensModel,
    clean: Prompts,
    corrupted: Prompts,
    *,
    subspace: ExplosionSubspace | None = None,
    blocks: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    heads: bool = False,
    side: Literal["trigger", "direction"] = "trigger",
    rank: int = 1,
    metric: Metric = "peak_norm",
    answers: Answers | None = None,
    controls: int = 5,
    seed: int = 0,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> PatchSweep:
    """The effect of taking the component in an explosion subspace from a clean run while running corrupted prompts, cell by cell.

    A cell is a block and a position, which is patched in all prompts that have it; or a block and a head. Whether an effect is the
    subspace's, or would come of displacing activations by that much along anything, is told by controls: the same displacement written
    along random directions that have none of the subspace (`Site.randomised`).

    Positions before the first token in which the prompts differ are not run: nothing differs there, so nothing is patched.

    Args:
        model: A TransformerLens model.
        clean: Prompts whose components are taken.
        corrupted: Prompts that are run: as many, of the same numbers of tokens.
        subspace: The subspace; default: on the trigger side each block's own, else that of the explosion block that `find_defects` finds in the
            clean prompts.
        blocks: Blocks to patch in; default: all.
        positions: Positions to patch, each by itself; default: all. With ``heads``: those at which heads are patched, all together.
        heads: Whether to patch, instead of activations, what each head adds to the stream along the subspace.
        side: ``"trigger"``: along right singular vectors, in what the block's FFN reads; ``"direction"``: along left ones, in the stream that
            the block leaves. With ``heads``, both in the stream that the attention adds to: right vectors less their mean, where the norm
            before the FFN subtracts it.
        rank: How many singular vectors, where no subspace is given.
        metric: One number per prompt, averaged over prompts: ``"peak_norm"``, the largest norm of any token after any block; ``"sink_rate"``,
            the share of heads with a sink at position 0 (`sink_attention`); ``"loss"``, the mean cross-entropy of the clean prompt's next
            tokens, in nats; ``"kl"``, ``KL(clean ‖ patched)`` of the predictions, in nats per token; ``"logit_diff"``, the logit of a right
            answer less that of a wrong one after the last token. Or a function of the logits (prompts, longest, d_vocab), in the prompts'
            order, that gives one number.
        answers: For ``"logit_diff"``: ids (right, wrong), or a (prompts, 2) tensor of them.
        controls: Random displacements per cell; each costs as much as the sweep without any.
        seed: Seeds them.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show a progress bar.

    Returns:
        The metric of every cell, of its controls, and of the two runs; ``to_dataframe()``, ``top()``, ``plot()``.

    Raises:
        ValueError: Prompts do not pair up, an argument is out of range, a subspace leaves no room for controls beside it, no block
            explodes in the clean run, or the model does not show what is patched or read.

    Example:
        >>> from sd_lens.models.loading import load
        >>> model = load("tiny")
        >>> clean = model.to_tokens("The cat sat on the mat.")
        >>> corrupted = clean.clone()
        >>> corrupted[:, 0] = 5  # without BOS nothing explodes
        >>> sweep = patch_sweep(model, clean, corrupted, controls=2)
        >>> sweep.over, sweep.values.shape
        ('position', torch.Size([6, 10]))
        >>> most = sweep.top(1).iloc[0]
        >>> int(most.block), int(most.position), most.clean_token
        (2, 0, '<s>')
    """
    require_usable(model)
    require_side(side, ("trigger", "direction"))
    require_metric(metric, answers)
    n_blocks = int(model.cfg.n_layers)
    rows = _chosen("blocks", blocks, n_blocks)
    require_subspace(model, subspace, rank, controls, batch_tokens)
    if subspace is not None and rank not in (1, subspace.rank):
        raise ValueError(f"rank: got {rank} with a subspace of rank {subspace.rank}; allowed: none beside a subspace")
    require_seed(seed)
    pairs = PromptPairs.of(model, clean, corrupted, prepend_bos=prepend_bos)
    places = _chosen("positions", positions, pairs.longest)
    columns = list(range(int(model.cfg.n_heads))) if heads else places
    ids = None if answers is None else answers_of(answers, pairs.n_prompts, int(model.cfg.d_vocab))
    if metric == "loss" and pairs.longest < 2:
        raise ValueError("clean: got prompts of one token with metric='loss'; allowed: some with a next token")
    require_shown(
        model,
        [*points_read(metric, n_blocks), *(map(hook_names.mixed_values, rows) if heads else ())],
        int(pairs.clean.tokens[0, 0]),
    )

    if subspace is None and (heads or side == "direction"):
        subspace = _found(model, pairs, rank, batch_tokens, progress)
    patches = [_patch(model, block, subspace, side, rank, heads=heads) for block in rows]
    score = Score(metric, pairs.clean, ids)
    runner = CellRunner(model, pairs, patches, score, batch_tokens=batch_tokens, progress=progress)
    before, after = runner.untouched()

    # Every block has seeds of its own, which depend neither on the blocks chosen nor on how many controls there are.
    seeds = torch.randint(2**31, (controls, n_blocks), generator=torch.Generator().manual_seed(seed)).T.tolist()
    along = [[patch.site, *map(patch.site.randomised, seeds[patch.site.block])] for patch in patches]
    at = torch.eye(pairs.longest, dtype=torch.bool)[places]
    cells = {
        (patch, number, column): Cell(patch, site, at.any(0) if heads else at[column], head=columns[column] if heads else 0)
        for patch, sites in enumerate(along)
        for number, site in enumerate(sites)
        for column in range(len(columns))
        if heads or places[column] >= pairs.differ_from
    }
    values = torch.full((len(rows), 1 + controls, len(columns)), after, dtype=torch.float64)
    for place, value in zip(cells, runner.patched(list(cells.values())), strict=True):
        values[place] = value
    texts = [(None, None)] * len(columns) if heads else [pairs.texts(model, position) for position in places]
    return PatchSweep(
        model_name=str(getattr(model.cfg, "model_name", "model")),
        metric=score.name,
        side=side,
        over="head" if heads else "position",
        blocks=tuple(rows),
        indices=tuple(columns),
        tokens=tuple(corrupted for _, corrupted in texts),
        clean_tokens=tuple(clean for clean, _ in texts),
        clean=before,
        corrupted=after,
        values=values[:, 0],
        control_mean=values[:, 1:].mean(1),
        control_std=values[:, 1:].std(1) if controls > 1 else torch.full_like(values[:, 0], torch.nan),
        n_controls=controls,
        n_prompts=pairs.n_prompts,
        rank=rank if subspace is None else subspace.rank,
        subspace_block=None if subspace is None else subspace.block,
    )


def _patch(
    model: TransformerLensModel, block: int, subspace: ExplosionSubspace | None, side: str, rank: int, *, heads: bool
) -> Patch:
    """What is patched in one block, whose weights are read for it and let go."""
    if side == "direction" and not heads:
        assert subspace is not None
        return TokenPatch(direction_site(block, subspace.left))
    if not heads:
        right = (ExplosionSubspace.at(model, block, rank=rank) if subspace is None else subspace).right
        return TokenPatch(trigger_site(model, weights_of(model)[block], right))
    assert subspace is not None
    attention = weights_of(model).attention(block)
    if side == "direction":
        return head_patch(block, attention, subspace.left)
    reader = subspace.weights
    centred = reader.ffn.norm is not None and reader.ffn.norm.kind == "layer"
    return head_patch(block, attention, read_in_stream(reader, subspace.right), centred=centred)


def _found(
    model: TransformerLensModel, pairs: PromptPairs, rank: int, batch_tokens: int, progress: bool | None
) -> ExplosionSubspace:
    """The subspace of the explosion block of the clean run."""
    prompts = [tokens[keep] for tokens, keep in zip(pairs.clean.tokens, pairs.clean.mask, strict=True)]
    source = source_of(model, prompts, may_need=(), batch_tokens=batch_tokens, progress=progress)
    defects = find_defects(source.trace())
    if not defects.found:
        raise ValueError(f"subspace: got none, and no block explodes in the clean run ({defects}); allowed: an ExplosionSubspace")
    return ExplosionSubspace.at(model, rank=rank, defects=defects)


def _chosen(argument: str, given: Any, n: int) -> list[int]:
    """Blocks or positions, each checked; all of them where none are given."""
    chosen = list(range(n)) if given is None else require_blocks(given, n, otherwise="each once", argument=argument)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"{argument}: got {given!r}; allowed: at least one of 0 to {n - 1}, each once")
    return chosen
