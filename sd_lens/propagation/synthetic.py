"""One attention layer on random tokens: how far its last output moves when the last token is repeated.

After the synthetic tests of Barbero et al., "Transformers need glasses!" (2024): queries, keys and values are standard normal, the distance
is L1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.models.precision import PRECISIONS
from sd_lens.propagation.arguments import chosen, require_heads, whole_numbers
from sd_lens.propagation.decay import DecayFit, fit_decay
from sd_lens.propagation.mean_field import ScoreLaw, expected_distance
from sd_lens.propagation.positions import POSITIONS, Positions, alibi_slopes, placed_pattern, rotate, sinusoids
from sd_lens.tracing.arguments import require_whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class SyntheticCollapse:
    """Distances between the last outputs for a random sequence and for the same with its last token repeated once more.

    Attributes:
        lengths: Lengths of the sequence, ascending.
        positions: Positional encodings.
        distances: L1 distances, summed over all dimensions of all heads; float64.
        expected: What theory expects for the same last tokens, see `sd_lens.propagation.mean_field`; exact arithmetic.
        same: Where the two outputs are equal to the bit.
        d_model: The width.
        n_heads: Heads that it is split into.
        dtype: Precision that was computed in.
    """

    lengths: tuple[int, ...]
    positions: tuple[Positions, ...]
    distances: Float[Tensor, "positions seed length"]
    expected: Float[Tensor, "positions seed length"]
    same: Bool[Tensor, "positions seed length"]
    d_model: int
    n_heads: int
    dtype: str

    def decay(self, positions: Positions, *, start: int | None = None, expected: bool = False) -> DecayFit:
        """The exponent with which the distance falls.

        Args:
            positions: Positional encoding.
            start: Smallest length to fit; default: all.
            expected: Fit what theory expects in the distances' place.
        """
        chosen("positions", [positions], self.positions)
        values = self.expected if expected else self.distances
        return fit_decay(self.lengths, values[self.positions.index(positions)], start=start)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per encoding and length: positions, length, mean, min, max over seeds, mean expected, share that is the same to the bit."""
        rows = []
        for i, kind in enumerate(self.positions):
            for k, length in enumerate(self.lengths):
                values = self.distances[i, :, k]
                row = {"positions": kind, "length": length, "mean": float(values.mean()), "min": float(values.min())}
                row |= {"max": float(values.max()), "expected": float(self.expected[i, :, k].mean())}
                rows.append(row | {"same": float(self.same[i, :, k].double().mean())})
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Distances over the length, one line per encoding, beside what theory expects."""
        from sd_lens.display.figures import synthetic_collapse

        return synthetic_collapse(self)

    def __repr__(self) -> str:
        fits = ", ".join(f"{POSITIONS[kind]} {self.decay(kind).exponent:.2f}" for kind in self.positions)
        return f"SyntheticCollapse({self.dtype}, lengths {self.lengths[0]} to {self.lengths[-1]}, {self.distances.shape[1]} seeds; exponents: {fits})"


def synthetic_collapse(
    lengths: Sequence[int],
    *,
    positions: Sequence[Positions] = tuple(POSITIONS),
    d_model: int = 64,
    n_heads: int = 1,
    seeds: int = 5,
    dtype: torch.dtype = torch.float32,
) -> SyntheticCollapse:
    """How far the last output of one causal attention layer moves when the last token is repeated, over the length.

    A seed draws queries, keys and values from N(0, 1), in float64, and rounds them; scores are divided by ``√d_head``. The last token stays the
    same at every length and what stands before it grows, so that lengths share their tokens. Sinusoids are added to queries and keys (over
    the whole width, before it is split into heads), not to values. Only the last query is computed: time ``O(n d_model)`` per length, memory
    ``O(n d_model)`` for the longest.

    What theory says, for many tokens and ``d = d_model`` (the `expected` of the result is the same without the limit):

    - NoPE: the outputs differ by ``w (v − o)/(Z + w)``, ``w`` being the last token's weight before normalisation, ``v`` its value, ``o`` the
      first output and ``Z ~ n`` the denominator: exponent 1, ``d √(2/π)/n`` on average.
    - RoPE: the repeated token is one position further, so every weight changes by a factor of order 1, whatever the length. Of random values
      this leaves a sum that falls like ``1/√n``: exponent ½, ``d √(2/π) √(2(e^s − e^(ρs))/n)`` with ``s = ‖q‖²/d`` and ``ρs = q·Rq/d``, ``R``
      the rotation by one position.
    - sinusoidal: likewise ½ where attention spreads over all tokens. The sinusoids' own product lets attention fall with distance ``r`` like
      ``r^-γ``, ``γ = √d/(2 ln 10⁴)`` (0.43 at 64), within their wavelengths; the exponent is ½ for ``γ < ½`` (with slow corrections near it)
      and smaller above.
    - ALiBi: exponent 0. With slope ``m`` a query sees about ``1/m`` tokens, however many there are: like NoPE up to that length, then
      ``(1 − e^-m) d √(2/π)`` for one head. Its biases are unbounded, so that the softmax lemma does not hold for it.

    Args:
        lengths: Lengths of the sequence, from 2.
        positions: Positional encodings.
        d_model: Width.
        n_heads: Heads it is split into; their outputs stand side by side. Each must be left an even width.
        seeds: How many times it is drawn; seeds 0, 1, …
        dtype: Precision that is computed in.

    Returns:
        Distances, what theory expects, and where the two outputs are the same to the bit.

    Raises:
        ValueError: An argument is none of those.

    Example:
        >>> collapse = synthetic_collapse([128, 512, 2048], positions=["nope", "rope"])
        >>> round(collapse.decay("nope").exponent, 1), round(collapse.decay("rope").exponent, 1)
        (1.0, 0.5)
    """
    used = whole_numbers("lengths", lengths, 2)
    kinds = chosen("positions", positions, tuple(POSITIONS))
    chosen("dtype", [dtype], tuple(PRECISIONS.values()))
    require_heads(n_heads, d_model)
    require_whole("seeds", seeds, 1)
    shape = (len(kinds), seeds, len(used))
    distances, expected = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    same = torch.empty(shape, dtype=torch.bool)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        query, last_key, last_value = torch.randn(3, 1, d_model, generator=generator, dtype=torch.float64)
        # Token by token, so that a longer run begins with the same tokens.
        keys, values = torch.randn(used[-1] - 1, 2, d_model, generator=generator, dtype=torch.float64).unbind(1)
        for i, kind in enumerate(kinds):
            layer = _Layer(kind, n_heads, *(tensor.to(dtype) for tensor in (query, last_key, last_value, keys, values)))
            law = _Layer(kind, n_heads, query, last_key, last_value, keys, values)
            for k, n in enumerate(used):
                once, twice = layer.output(n, 1), layer.output(n, 2)
                distances[i, seed, k] = (once.double() - twice.double()).abs().sum()
                same[i, seed, k] = torch.equal(once, twice)
                expected[i, seed, k] = law.expected(n)
    return SyntheticCollapse(used, kinds, distances, expected, same, d_model, n_heads, str(dtype).removeprefix("torch."))


class _Layer:
    """One attention layer and its tokens: keys of what stands before the last token are placed once for all lengths."""

    def __init__(
        self, kind: Positions, n_heads: int, query: Tensor, last_key: Tensor, last_value: Tensor, keys: Tensor, values: Tensor
    ):
        self.kind, self.n_heads = kind, n_heads
        self.query, self.last_key = query, last_key
        self.last_value, self.values = self._heads(last_value), self._heads(values)
        self.keys = self._placed(keys, torch.arange(len(keys)))

    def _heads(self, vectors: Tensor) -> Float[Tensor, "head pos d_head"]:
        return vectors.unflatten(-1, (self.n_heads, -1)).transpose(0, 1)

    def _placed(self, vectors: Tensor, at: Tensor) -> Float[Tensor, "head pos d_head"]:
        """Vectors with their positions in them, split into heads."""
        if self.kind == "sinusoidal":
            return self._heads(vectors + sinusoids(at, vectors.shape[-1]).to(vectors.dtype))
        heads = self._heads(vectors)
        return rotate(heads, at) if self.kind == "rope" else heads

    def output(self, n: int, times: int) -> Float[Tensor, "d_model"]:
        """Output of the last query, its token standing ``times`` times at the end of ``n - 1`` others."""
        at = torch.arange(n - 1, n - 1 + times)
        own = self._placed(self.last_key.expand(times, -1), at)
        keys = torch.cat([self.keys[:, : n - 1], own], dim=1)
        values = torch.cat([self.values[:, : n - 1], self.last_value.expand(-1, times, -1)], dim=1)
        query = self._placed(self.query, at[-1:])
        pattern = placed_pattern(query, keys, at[-1:], torch.arange(n - 1 + times), alibi=self.kind == "alibi", causal=True)
        return (pattern @ values).flatten()

    def expected(self, n: int) -> float:
        """What the distance between the outputs should be, see `sd_lens.propagation.mean_field`."""
        (first, bias, own), (second, bias_long, own_long) = self._law(n, 1), self._law(n, 2)
        total = 0.0
        for head in range(self.n_heads):
            # A rotated query meets rotated keys: seen from one key, the two queries are turned against each other as they are here.
            overlap = float(first[head] @ second[head])
            short = ScoreLaw(bias[head], own[head], float(first[head] @ first[head]))
            long = ScoreLaw(bias_long[head], own_long[head], float(second[head] @ second[head]))
            total += expected_distance(short, long, overlap, self.last_value[head, 0])
        return total

    def _law(
        self, n: int, times: int
    ) -> tuple[Float[Tensor, "head d_head"], Float[Tensor, "head key"], Float[Tensor, "head last"]]:
        """Query over ``√d_head``; the part of scores that does not hang on earlier keys; scores of the last token's keys."""
        at, before = torch.arange(n - 1, n - 1 + times), torch.arange(n - 1)
        query = self._placed(self.query, at[-1:]) / math.sqrt(self.values.shape[-1])
        own = (query @ self._placed(self.last_key.expand(times, -1), at).transpose(1, 2))[:, 0]
        bias = torch.zeros(self.n_heads, n - 1, dtype=torch.float64)
        if self.kind == "sinusoidal":
            bias = (query @ self._heads(sinusoids(before, self.last_key.shape[-1])).transpose(1, 2))[:, 0]
        elif self.kind == "alibi":
            slopes = alibi_slopes(self.n_heads)[:, None]
            bias, own = -slopes * (at[-1] - before), own - slopes * (at[-1] - at)
        return query[:, 0], bias, own
