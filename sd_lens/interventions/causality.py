"""What an explosion's subspace does, in one call: the consequences of removing it, and the FFN's answer to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sd_lens.anatomy import attempt
from sd_lens.interventions.consequences import consequences, require_options
from sd_lens.interventions.generation import BEGINNINGS, Beginnings
from sd_lens.interventions.options import require_subspace
from sd_lens.interventions.outcomes import SIDES, WHERE, Consequences, Where
from sd_lens.interventions.responses import ResponseCurve
from sd_lens.interventions.sites import Side
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.tracing.arguments import require_block, require_seed
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.trace import MIN_RATIO


@dataclass(frozen=True)
class Causality:
    """What an explosion's subspace does.

    Attributes:
        defects: The high-norm tokens and the blocks that make them.
        consequences: What removing the subspace does to the model; None where there is no subspace, or it cannot be edited.
        response: The true FFN's answer to the subspace's leading right singular vector; None likewise.
        missing: Why a result is None, by its name.
    """

    defects: Defects
    consequences: Consequences | None
    response: ResponseCurve | None
    missing: dict[str, str]

    def sentences(self) -> tuple[str, ...]:
        """What the removal does, see `Consequences.sentences`; the FFN's answer has a sentence of its own."""
        return () if self.consequences is None else self.consequences.sentences()


def causality(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    block: int | None = None,
    rank: int = 2,
    where: Sequence[Where] = WHERE,
    sides: Sequence[Side] = SIDES,
    mean: bool = True,
    controls: int = 3,
    generate: Beginnings | None = BEGINNINGS,
    max_new_tokens: int = 24,
    seed: int = 0,
    prepend_bos: bool | None = None,
    min_ratio: float = MIN_RATIO,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> Causality:
    """Removes the explosion subspace and looks at what comes of it; what does not apply to a model is left out with the reason.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: built-in texts.
        block: The block whose subspace is removed; default: the explosion block that adds most.
        rank: How many singular vectors span it.
        where: At which tokens, see `consequences`.
        sides: Where in a block, see `consequences`.
        mean: Whether to show mean ablation, too.
        controls: How many seeds of each random control.
        generate: Prompts that text is generated from; None for no text.
        max_new_tokens: How many tokens are generated at most.
        seed: Seeds the controls.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.

    Returns:
        The results.

    Raises:
        ValueError: The model, the prompts or an argument is unusable.

    Example:
        >>> import torch
        >>> from sd_lens.models.planted import planted
        >>> found = causality(planted().model, torch.arange(10).unsqueeze(0), sides=["trigger"], where=["initial"], controls=1)
        >>> found.consequences.untouched.measures.block_ratio > 1000, found.consequences.main.measures.block_ratio < 1.5
        (True, True)
    """
    require_usable(model)
    require_options(where, sides, controls, max_new_tokens)
    require_subspace(model, None, rank, controls, batch_tokens)
    require_seed(seed)
    if block is not None:
        require_block(block, int(model.cfg.n_layers))
    source = source_of(model, prompts, may_need=(), prepend_bos=prepend_bos, batch_tokens=batch_tokens, progress=progress)
    defects = find_defects(source.trace(min_ratio=min_ratio), min_ratio=min_ratio)
    missing: dict[str, str] = {}

    def editable() -> ExplosionSubspace:
        found = ExplosionSubspace.at(model, block, rank=rank, defects=defects)
        for side in sides:
            found.sites(side)
        return found

    subspace = attempt("consequences", missing, editable, block is not None or defects.found)
    if subspace is None:
        return Causality(defects, None, None, missing | {"response": missing["consequences"]})
    removal = consequences(
        model,
        source,
        subspace=subspace,
        where=where,
        sides=sides,
        mean=mean,
        controls=controls,
        generate=generate,
        max_new_tokens=max_new_tokens,
        seed=seed,
        min_ratio=min_ratio,
        prepend_bos=prepend_bos,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return Causality(defects, removal, subspace.response_curve(), missing)
