"""Arguments that interventions, sweeps and tables share, checked before any work."""

from __future__ import annotations

from typing import Any

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.tracing.arguments import require_whole


def require_subspace(model: TransformerLensModel, subspace: Any, rank: Any, controls: Any, batch_tokens: Any) -> None:
    """Raises `ValueError` unless a subspace, or the rank of one that is to be found, is usable, with room for controls beside it.

    Args:
        model: A TransformerLens model.
        subspace: The subspace given; None for one to be found.
        rank: How many singular vectors.
        controls: How many random displacements.
        batch_tokens: Largest number of tokens run at once.
    """
    width = int(model.cfg.d_model)
    if subspace is not None and not (isinstance(subspace, ExplosionSubspace) and subspace.model is model):
        got = "one of another model" if isinstance(subspace, ExplosionSubspace) else type(subspace).__name__
        raise ValueError(f"subspace: got {got}; allowed: an ExplosionSubspace of this model")
    require_whole("rank", rank, 1, width)
    require_whole("controls", controls, 0)
    require_whole("batch_tokens", batch_tokens, 1)
    rank = rank if subspace is None else subspace.rank
    if controls and rank > width // 2 - 1:
        raise ValueError(
            f"controls: got {controls} with rank {rank}; allowed: 0, or a rank of at most {width // 2 - 1}, which leaves room for random "
            "directions beside it"
        )
