"""Singular vectors as a subspace takes them: of any map, with the signs that the true FFN answers to, orthonormal."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.maps import LinearMap
from sd_lens.linear.spectra import SingularTriplets, leading_singular
from sd_lens.linear.trigger import signed
from sd_lens.models.weights import BlockWeights

_ORTHONORMAL = 1e-3


def triplets_of(
    weights: BlockWeights, linear_map: LinearMap | SingularTriplets | Float[Tensor, "d_model d_model"], rank: int
) -> SingularTriplets:
    """The leading singular triplets of a map that stands for a block's FFN, in float32 on the CPU.

    Args:
        weights: The block.
        linear_map: The map, its matrix, or its triplets.
        rank: How many.

    Raises:
        ValueError: The map has another width than the block, or not so many triplets.
    """
    width, most = _sizes(linear_map)
    if width != weights.d_model:
        raise ValueError(f"linear_map: got one of width {width}; allowed: {weights.d_model}, the model's")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise ValueError(f"rank: got {rank!r}; allowed: 1 to {most}")
    found = linear_map if isinstance(linear_map, SingularTriplets) else leading_singular(linear_map, k=rank)
    found = signed(weights, SingularTriplets(found.u[:, :rank], found.s[:rank], found.v[:, :rank]))
    return SingularTriplets(*(tensor.detach().float().cpu().contiguous() for tensor in found))


def _sizes(linear_map: Any) -> tuple[int, int]:
    """A map's width, and how many singular triplets of it can be had."""
    if isinstance(linear_map, SingularTriplets):
        return len(linear_map.v), len(linear_map.s)
    if isinstance(linear_map, LinearMap):
        return linear_map.d_model, linear_map.d_model
    if isinstance(linear_map, Tensor) and linear_map.ndim == 2 and len(linear_map) == linear_map.shape[1]:
        return len(linear_map), len(linear_map)
    got = f"a tensor of shape {tuple(linear_map.shape)}" if isinstance(linear_map, Tensor) else type(linear_map).__name__
    raise ValueError(
        f"linear_map: got {got}; allowed: a LinearMap such as linearize(...).ffn, a square matrix, or SingularTriplets"
    )


def require_orthonormal(name: str, vectors: Tensor, width: int, rank: int) -> None:
    """Raises `ValueError` unless vectors are so many orthonormal columns of a width."""
    if vectors.shape != (width, rank) or not bool(vectors.isfinite().all()):
        raise ValueError(
            f"{name}: got shape {tuple(vectors.shape)}, or NaN; allowed: {rank} finite columns of {width}, the model's width"
        )
    if float((vectors.T @ vectors - torch.eye(rank)).abs().max()) > _ORTHONORMAL:
        raise ValueError(f"{name}: got columns that are not orthonormal; allowed: singular vectors")
