"""Attention with the usual positional encodings: none, sinusoidal, RoPE, ALiBi."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Positions = Literal["nope", "sinusoidal", "rope", "alibi"]
POSITIONS: dict[Positions, str] = {"nope": "NoPE", "sinusoidal": "sinusoidal", "rope": "RoPE", "alibi": "ALiBi"}
"""What encodings are called in tables and figures."""

_BASE = 10_000.0


def frequencies(width: int, *, base: float = _BASE) -> Float[Tensor, "pair"]:
    """Angles per position of each pair of dimensions, ``base^(-2i/width)``; float64.

    Args:
        width: Even width of the vectors.
        base: Sets the longest wavelength, ``2π base``.
    """
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def sinusoids(positions: Int[Tensor, "pos"], width: int, *, base: float = _BASE) -> Float[Tensor, "pos width"]:
    """The positional embeddings of Vaswani et al. (2017): sines in even dimensions, cosines in odd ones; float64.

    Args:
        positions: Positions, from 0.
        width: Even width.
        base: Sets the longest wavelength, ``2π base``.
    """
    angles = positions[:, None] * frequencies(width, base=base)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotate(
    vectors: Float[Tensor, "*rest pos width"], positions: Int[Tensor, "pos"], *, base: float = _BASE
) -> Float[Tensor, "*rest pos width"]:
    """RoPE (Su et al., 2021): every pair of neighbouring dimensions turned by its position's angle.

    Angles, sines and cosines are computed in float64; the rotation happens in the vectors' own precision, as in real models.

    Args:
        vectors: Queries or keys, of even width.
        positions: Their positions, from 0.
        base: Sets the longest wavelength, ``2π base``.
    """
    angles = positions[:, None] * frequencies(vectors.shape[-1], base=base)
    sin, cos = angles.sin().to(vectors.dtype), angles.cos().to(vectors.dtype)
    even, odd = vectors[..., 0::2], vectors[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def alibi_slopes(n_heads: int) -> Float[Tensor, "head"]:
    """Slopes of ALiBi (Press et al., 2022); float64.

    For a power of two, ``2^(-8/H)`` and its powers; for other numbers those of the next smaller power of two, and then every second one of
    the next larger's, as published.

    Args:
        n_heads: How many heads, ``H``.
    """
    whole = 2 ** int(math.log2(n_heads))
    slopes = 2.0 ** (-8.0 / whole * torch.arange(1, whole + 1, dtype=torch.float64))
    if whole == n_heads:
        return slopes
    return torch.cat([slopes, alibi_slopes(2 * whole)[0::2][: n_heads - whole]])


def attention_pattern(
    queries: Float[Tensor, "head query d_head"],
    keys: Float[Tensor, "head key d_head"],
    query_positions: Int[Tensor, "query"],
    key_positions: Int[Tensor, "key"],
    *,
    positions: Positions = "nope",
    causal: bool = True,
) -> Float[Tensor, "head query key"]:
    """Attention weights, in the precision of queries and keys.

    Sinusoids are no business of the layer: they stand in the vectors already. For RoPE queries and keys come as they are before rotation.
    Without a mask ALiBi's bias grows with the distance on both sides.

    Args:
        queries: Queries.
        keys: Keys.
        query_positions: Positions of the queries.
        key_positions: Positions of the keys.
        positions: Positional encoding.
        causal: Whether queries see no later keys.
    """
    if positions == "rope":
        queries, keys = rotate(queries, query_positions), rotate(keys, key_positions)
    return placed_pattern(queries, keys, query_positions, key_positions, alibi=positions == "alibi", causal=causal)


def placed_pattern(
    queries: Float[Tensor, "head query d_head"],
    keys: Float[Tensor, "head key d_head"],
    query_positions: Int[Tensor, "query"],
    key_positions: Int[Tensor, "key"],
    *,
    alibi: bool,
    causal: bool,
) -> Float[Tensor, "head query key"]:
    """`attention_pattern` of queries and keys that are rotated already, as a key cache holds them.

    Args:
        queries: Queries.
        keys: Keys.
        query_positions: Positions of the queries.
        key_positions: Positions of the keys.
        alibi: Whether distances count.
        causal: Whether queries see no later keys.
    """
    scores = queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[-1])
    distances = query_positions[:, None] - key_positions[None, :]
    if alibi:
        bias = alibi_slopes(len(queries))[:, None, None] * distances.abs()
        scores = scores - bias.to(scores.dtype)
    if causal:
        scores = scores.masked_fill(distances < 0, -math.inf)
    return scores.softmax(-1)
