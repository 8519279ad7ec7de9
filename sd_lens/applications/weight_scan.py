"""Which block makes the explosion, and where does it send, told from weights alone?

Of every block the map of the stream through the FFN, ``I + F``, is looked at: an explosion block's largest singular value stands out from its
second, and its left vector is the defect direction. (The FFN's map and not the whole block's: attention's singular values grow with depth and
hide what the FFN does.) A decay block's map stands out as well, but writes against what it reads, so its left and right vectors are opposite;
it is no candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.linear.angles import acute_angle
from sd_lens.linear.linearize import linearize
from sd_lens.linear.maps import IdentityPlus
from sd_lens.linear.spectra import leading_singular
from sd_lens.models.weights import ModelWeights

MIN_GAP = 1.4
"""An FFN stands out where its map's largest singular value is this many times the second. Measured: at most 1.2 in models without an
explosion, trained or random; in a model in training 1.3 where the norm ratio (5.6) is just below what counts as high and 1.7 where it is just
above (6.4); 1.5 in two models that explode over three blocks; 3.8 in the shipped model, 45 and more in planted ones."""
CLEAR_GAP = 2.0
"""Below this it stands out too little to be relied upon."""
_CANCELS = -0.5
"""Cosine between right and left vector below which a block takes away what it reads: -1 in planted decay blocks, above 0.5 in all trained
blocks that were measured."""
_TOLERANCES = (1e-6, 1e-2)
"""Of the first triplet the vector is wanted, of the second the value only."""


@dataclass(frozen=True)
class FFNStretch:
    """What one block's FFN stretches most.

    Attributes:
        block: The block.
        sigma1: Largest singular value of ``I + F``.
        sigma2: The second.
        u: Leading left singular vector, float32, on the CPU.
        cosine: Between the leading right vector and the left one: -1 where the block cancels what it reads.
        notes: What the map rests on.
    """

    block: int
    sigma1: float
    sigma2: float
    u: Float[Tensor, "d_model"]
    cosine: float
    notes: tuple[str, ...]

    @property
    def gap(self) -> float:
        """``σ1 / σ2``."""
        return self.sigma1 / self.sigma2 if self.sigma2 > 0 else float("inf")

    @property
    def stands_out(self) -> bool:
        """Whether its first singular value is far from the second."""
        return self.gap >= MIN_GAP

    @property
    def cancels(self) -> bool:
        """Whether it writes against what it reads, as a decay block does."""
        return self.cosine <= _CANCELS


def ffn_stretches(
    weights: ModelWeights,
    *,
    blocks: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> list[FFNStretch]:
    """Looks at one block after the other; never more than one of them is in memory.

    Args:
        weights: The blocks.
        blocks: Which of them; default: all.
        device: Where to compute; default: where the weights are.
        progress: Whether to show a progress bar; None shows one once the work takes seconds.

    Returns:
        One for each block, in order.

    Raises:
        ValueError: A block cannot be linearised.
    """
    hidden = None if progress is None else not progress
    chosen = range(len(weights)) if blocks is None else blocks
    return [
        _stretch(weights, block, device)
        for block in tqdm(chosen, desc="singular directions", unit="block", delay=2.0, disable=hidden, leave=False)
    ]


def _stretch(weights: ModelWeights, block: int, device: torch.device | str | None) -> FFNStretch:
    block_map = linearize(weights[block], device=device)
    k = min(2, block_map.d_model)
    u, s, v = leading_singular(IdentityPlus(block_map.ffn), k, tol=_TOLERANCES[:k])
    values: list[Any] = [*s.tolist(), 0.0]
    return FFNStretch(block, values[0], values[1], u[:, 0].float().cpu(), float(u[:, 0] @ v[:, 0]), block_map.notes)


def explosion_among(stretches: Sequence[FFNStretch]) -> FFNStretch | None:
    """The FFN that stands out most, unless it cancels; None where none does."""
    return max((one for one in stretches if one.stands_out and not one.cancels), key=lambda one: one.gap, default=None)


def beside(chosen: FFNStretch, stretches: Sequence[FFNStretch]) -> tuple[str, ...]:
    """What is to be said of other blocks that stand out: whether they speak of the same direction."""
    notes = []
    for one in stretches:
        if one.stands_out and one.block != chosen.block:
            angle = float(acute_angle(one.u, chosen.u))
            what = "takes away, as a decay block does," if one.cancels else "writes"
            notes.append(f"block {one.block}'s FFN stands out too ({one.gap:.3g}) and {what} along a direction {angle:.0f}° away")
    return tuple(notes)


def why_none(stretches: Sequence[FFNStretch]) -> str:
    """Why none of them makes an explosion."""
    loud = max(stretches, key=lambda one: one.gap)
    if loud.stands_out:
        return f"only block {loud.block}'s FFN stands out ({loud.gap:.3g}), and it cancels what it reads, as a decay block does"
    return (
        f"no FFN's largest singular value is {MIN_GAP:g} times its second (the largest ratio is {loud.gap:.3g}, in block {loud.block}); "
        "an explosion that attention makes, one expert of many, or a network early in training would not be seen here"
    )
