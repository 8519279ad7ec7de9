"""Lineage trees: average linkage over angles, one tree for each width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LineageTree:
    """What is nearest to what, among signatures of one width.

    Attributes:
        members: Their numbers.
        merges: Average linkage (UPGMA) as `scipy.cluster.hierarchy.linkage` writes it: a row per merge with the two clusters merged
            (members count from 0, the cluster made in row ``r`` is number ``n + r``), the mean angle between them and the number of members.
        order: The members' numbers as the tree's leaves stand, each merge's side by side.
    """

    members: tuple[int, ...]
    merges: Float[Tensor, "merge 4"]
    order: tuple[int, ...]

    def families(self, cut_deg: float) -> tuple[tuple[int, ...], ...]:
        """Clusters whose mean angles are no larger than a cut, as the leaves stand."""
        from scipy.cluster.hierarchy import fcluster

        if len(self.members) == 1:
            return (self.members,)
        cluster = dict(zip(self.members, fcluster(self.merges.numpy(), cut_deg, "distance").tolist(), strict=True))
        found: dict[int, list[int]] = {}
        for member in self.order:
            found.setdefault(cluster[member], []).append(member)
        return tuple(map(tuple, found.values()))

    def lines(self, names: Sequence[str]) -> list[str]:
        """The tree as text: a merge's mean angle above its two branches."""
        n = len(self.members)

        def branch(cluster: int) -> list[str]:
            if cluster < n:
                return [names[self.members[cluster]]]
            left, right, angle, _ = self.merges[cluster - n].tolist()
            first, second = branch(int(left)), branch(int(right))
            return [
                f"{angle:.1f}°",
                f"├── {first[0]}",
                *(f"│   {line}" for line in first[1:]),
                f"└── {second[0]}",
                *(f"    {line}" for line in second[1:]),
            ]

        return branch(n + len(self.merges) - 1)


def lineage_tree(members: Sequence[int], angles: Float[Tensor, "item item"]) -> LineageTree:
    """Average linkage over the angles between some items.

    Args:
        members: Numbers of the items.
        angles: Angles between all items; those between members are finite.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    chosen = tuple(members)
    if len(chosen) == 1:
        return LineageTree(chosen, torch.empty(0, 4, dtype=torch.float64), chosen)
    index = list(chosen)
    matrix: np.ndarray = angles[index][:, index].numpy()
    merges = linkage(squareform(matrix, checks=False), "average")
    order = tuple(chosen[leaf] for leaf in leaves_list(merges).tolist())
    return LineageTree(chosen, torch.from_numpy(merges), order)
