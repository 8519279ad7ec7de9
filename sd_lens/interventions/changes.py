"""What an intervention makes of coefficients: a constant, a multiple, or what another run has at the same place of a prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Change = Callable[[Float[Tensor, "batch pos rank"], Int[Tensor, "#batch pos"]], Float[Tensor, "batch pos rank"]]
"""New coefficients, of those that are there and the positions that they have in their prompts (negative at padding on the left)."""


def constant(values: Float[Tensor, "rank"]) -> Change:
    """The same coefficients for every token."""
    return lambda c, place: values.to(c).expand_as(c)


def scaled(factor: float) -> Change:
    """A multiple of what is there."""
    return lambda c, place: factor * c


def from_source(known: Float[Tensor, "batch pos rank"]) -> Change:
    """What another run has at the same place of the prompt; what is there where that run has nothing.

    Args:
        known: Its coefficients, NaN at padding; one row serves all rows.
    """

    def change(c: Tensor, place: Tensor) -> Tensor:
        if len(known) not in (1, len(c)):
            raise ValueError(f"source: got {len(known)} rows; allowed: {len(c)} as in the run, or 1 for all of them")
        longest = known.shape[1]
        rows = torch.arange(len(known)).unsqueeze(1)
        there = known[rows, place.clamp(0, longest - 1)].to(c)
        outside = ((place < 0) | (place >= longest)).to(c.device).unsqueeze(-1)
        return torch.where(there.isnan() | outside, c, there)

    return change
