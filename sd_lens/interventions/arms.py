"""The edits that a table of consequences compares: ablation, mean ablation and random controls, for each side and place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Bool
from torch import Tensor

from sd_lens.interventions.intervention import Intervention
from sd_lens.interventions.outcomes import Kind, Where
from sd_lens.interventions.sites import Side
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.interventions.tallies import Tally
from sd_lens.tracing.source import Source


@dataclass
class Arm:
    """What a row of the table is made from.

    Attributes:
        kind: What is done.
        side: On which side of the block.
        where: At which tokens.
        interventions: One, or a control's seeds. They are of all tokens, see `only`.
        tallies: What the runs of each show.
    """

    kind: Kind
    side: Side
    where: Where
    interventions: list[Intervention]
    tallies: list[Tally] = field(default_factory=list)


def arms_of(
    subspace: ExplosionSubspace,
    source: Source,
    high: Bool[Tensor, "token"],
    sides: Sequence[Side],
    where: Sequence[Where],
    *,
    mean: bool,
    controls: int,
    seed: int,
) -> list[Arm]:
    """The rows after the first, in the table's order.

    Args:
        subspace: What is removed.
        source: Prompts that mean coefficients are taken from.
        high: Which of their tokens have a high norm, and are left out of the means.
        sides: The sides.
        where: The places.
        mean: Whether to make mean ablations.
        controls: How many seeds of each random control.
        seed: Of the first.

    Raises:
        ValueError: The model has no hook point for this, or the subspace leaves no room for controls.
    """
    ordinary: dict[str, Tensor] = {}
    if mean:
        wanted = dict.fromkeys(name for side in sides for name in (("trigger", "direction") if side == "both" else (side,)))
        ordinary = {name: subspace.coefficients(source, side=name).values[~high].mean(0) for name in wanted}  # pyright: ignore
    arms = []
    for side in sides:
        ablate = subspace.ablate(side=side)
        kinds: list[tuple[Kind, list[Intervention]]] = [("ablate", [ablate])]
        if mean:
            parts = [subspace.ablate(mean=ordinary[name], side=name) for name in ordinary if side in (name, "both")]  # pyright: ignore
            kinds.append(("mean ablate", [parts[0] if len(parts) == 1 else parts[0] + parts[1]]))
        if controls:
            kinds.append(("random control", [ablate.control(seed + number) for number in range(controls)]))
        arms += [Arm(kind, side, place, interventions) for place in where for kind, interventions in kinds]
    return arms


def only(intervention: Intervention, mask: Bool[Tensor, "batch pos"]) -> Intervention:
    """The same at some tokens of a batch.

    Args:
        intervention: Of all tokens.
        mask: Which.
    """
    return replace(intervention, edits=tuple(replace(edit, positions=mask) for edit in intervention.edits))
