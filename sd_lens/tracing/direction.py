"""The defect direction: where the residual vectors of high-norm tokens point, measured in one pass and bounded memory.

Wang et al. (ICML 2025, arXiv 2502.07004), section 3: the mean of the residual vectors whose norm is above a threshold, over all
blocks and positions. Its mean pairwise angle says how much these vectors agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.linear.angles import mean_pairwise_angle


@dataclass(frozen=True)
class DefectDirection:
    """A direction, and how well it describes the vectors it is the mean of.

    Attributes:
        direction: Unit vector, float32, on the CPU.
        n_vectors: Residual vectors averaged (each high-norm token counts once for every block after which its norm is high).
        n_tokens: High-norm tokens among them.
        mean_pairwise_angle_deg: Mean acute angle between pairs of these vectors, degrees; NaN for a single vector. Over all pairs
            up to 512 vectors, over those of a seeded uniform sample of 512 beyond.
        min_ratio: What counted as a high norm.
        profiles: Mean projection of high-norm tokens on the direction, after the embedding and after every block, for
            ``"initial"`` tokens and for ``"later"`` ones where there are any.
    """

    direction: Float[Tensor, "d_model"]
    n_vectors: int
    n_tokens: int
    mean_pairwise_angle_deg: float
    min_ratio: float
    profiles: Mapping[str, tuple[float, ...]]

    def __repr__(self) -> str:
        return (
            f"DefectDirection({self.n_vectors} vectors of {self.n_tokens} tokens, mean pairwise angle "
            f"{self.mean_pairwise_angle_deg:.1f}°)"
        )


class DirectionAccumulator:
    """Sums that give a `DefectDirection`, fed with one hook point's stream at a time.

    Args:
        n_points: How many hook points the stream is seen at.
        d_model: Width of the stream.
        min_ratio: What counts as a high norm, for the record.
        sample: How many vectors the mean pairwise angle is measured on.
        seed: Seeds the choice of these.
    """

    def __init__(self, n_points: int, d_model: int, *, min_ratio: float, sample: int = 512, seed: int = 0):
        self._min_ratio = min_ratio
        self._sum = torch.zeros(d_model, dtype=torch.float64)
        self._n_vectors = 0
        self._group_sums = {group: torch.zeros(n_points, d_model, dtype=torch.float64) for group in ("initial", "later")}
        self._group_sizes = dict.fromkeys(self._group_sums, 0)
        self._sample, self._generator = sample, torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._kept = torch.empty(0, d_model)

    def add(
        self,
        point: int,
        stream: Float[Tensor, "batch pos d_model"],
        high_here: Bool[Tensor, "batch pos"],
        high_anywhere: Bool[Tensor, "batch pos"],
    ) -> None:
        """Takes in the stream at one hook point.

        Args:
            point: The hook point's number, 0 for the stream after the embedding.
            stream: The stream.
            high_here: Which tokens have a high norm at this point.
            high_anywhere: Which tokens have one at any point.
        """
        for group, columns in (("initial", slice(0, 1)), ("later", slice(1, None))):
            members = stream[:, columns][high_anywhere[:, columns].to(stream.device)]
            self._group_sums[group][point] += members.double().sum(0).cpu()
            if point == 0:
                self._group_sizes[group] += len(members)
        vectors = stream[high_here.to(stream.device)]
        if len(vectors):
            self._sum += vectors.double().sum(0).cpu()
            self._n_vectors += len(vectors)
            self._keep_some(vectors)

    def _keep_some(self, vectors: Tensor) -> None:
        """A uniform sample without knowing the total: every vector draws a number, the smallest numbers stay."""
        keys = torch.rand(len(vectors), generator=self._generator, dtype=torch.float64)
        worth = keys < (self._keys.max() if len(self._keys) >= self._sample else torch.inf)
        keys = torch.cat([self._keys, keys[worth]])
        kept = torch.cat([self._kept, vectors[worth.to(vectors.device)].float().cpu()])
        chosen = torch.argsort(keys)[: self._sample]
        self._keys, self._kept = keys[chosen], kept[chosen]

    def result(self) -> DefectDirection | None:
        """The direction; None where no vector was high, or the high ones cancel."""
        norm = torch.linalg.vector_norm(self._sum)
        if self._n_vectors == 0 or float(norm) == 0:
            return None
        direction = self._sum / norm
        profiles = {
            group: tuple((sums @ direction / self._group_sizes[group]).tolist())
            for group, sums in self._group_sums.items()
            if self._group_sizes[group]
        }
        return DefectDirection(
            direction=direction.float(),
            n_vectors=self._n_vectors,
            n_tokens=sum(self._group_sizes.values()),
            mean_pairwise_angle_deg=mean_pairwise_angle(self._kept),
            min_ratio=self._min_ratio,
            profiles=profiles,
        )
