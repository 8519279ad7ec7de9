"""How far apart n and n + 1 ones are to a model, and from which n on a precision cannot tell them apart.

Barbero et al., "Transformers need glasses!" (2024), corollary 6.2: where positional encodings fade with distance, counting must fail for
long sequences at finite precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.models.precision import PRECISIONS
from sd_lens.propagation.arguments import chosen, whole_numbers
from sd_lens.propagation.decay import DecayFit, fit_decay
from sd_lens.propagation.positions import POSITIONS, Positions
from sd_lens.propagation.random_transformer import KeyValues, RandomTransformer, digit_ids, largest_difference
from sd_lens.tracing.arguments import require_whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_CHUNK = 512  # ones read in one pass: attention patterns of a chunk are what is largest in memory


@dataclass(frozen=True, eq=False)
class CountingCollapse:
    """Distances between the last tokens' representations of n and of n + 1 ones.

    Distances are the largest absolute difference (L∞) of representations after the final norm, whose elements are of order 1; float64.

    Attributes:
        counts: Numbers of ones, ascending.
        positions: Positional encodings.
        dtypes: Precisions.
        distances: As the model computes them in each precision.
        exact: The same of models with the same weights (rounded to that precision) that compute in float64.
        rounding: How far the representation of n ones is from the float64 model's; the larger of those of n and of n + 1.
        same: Where the two computed representations are equal to the bit.
        end: What stands behind the ones.
    """

    counts: tuple[int, ...]
    positions: tuple[Positions, ...]
    dtypes: tuple[str, ...]
    distances: Float[Tensor, "positions dtype seed count"]
    exact: Float[Tensor, "positions dtype seed count"]
    rounding: Float[Tensor, "positions dtype seed count"]
    same: Bool[Tensor, "positions dtype seed count"]
    end: str

    def decay(self, positions: Positions, *, dtype: str | None = None, start: int | None = None) -> DecayFit:
        """The exponent with which the exact distance falls.

        Args:
            positions: Positional encoding.
            dtype: Precision of the weights; default: the first.
            start: Smallest count to fit; default: all.
        """
        row, column = self._find(positions, dtype or self.dtypes[0])
        return fit_decay(self.counts, self.exact[row, column], start=start)

    def critical_count(self, positions: Positions, dtype: str, *, by: Literal["rounding", "bits"] = "rounding") -> int | None:
        """The first of the counts from which on n and n + 1 ones cannot be told apart, by any seed's model; None where there is none.

        Args:
            positions: Positional encoding.
            dtype: Precision.
            by: ``"rounding"``: the exact distance is below the rounding error of the run, so what difference there is says nothing of the
                count; ``"bits"``: the two computed representations are equal. The second may never happen: a sum over n equal
                terms is rounded differently from one over n + 1.
        """
        row, column = self._find(positions, dtype)
        chosen("by", [by], ("rounding", "bits"))
        lost = self.same if by == "bits" else self.exact < self.rounding
        first = None
        for count, gone in zip(reversed(self.counts), reversed(lost[row, column].all(0).tolist()), strict=True):
            if not gone:
                break
            first = count
        return first

    def _find(self, positions: Positions, dtype: str) -> tuple[int, int]:
        chosen("positions", [positions], self.positions)
        chosen("dtype", [dtype], self.dtypes)
        return self.positions.index(positions), self.dtypes.index(dtype)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per encoding, precision and count: the computed distance's mean, min and max over seeds, mean exact distance and rounding, and the share of seeds where the two are the same to the bit."""
        rows = []
        for i, kind in enumerate(self.positions):
            for j, dtype in enumerate(self.dtypes):
                for k, count in enumerate(self.counts):
                    values = self.distances[i, j, :, k]
                    row = {"positions": kind, "dtype": dtype, "count": count, "mean": float(values.mean())}
                    row |= {"min": float(values.min()), "max": float(values.max())}
                    row |= {"exact": float(self.exact[i, j, :, k].mean()), "rounding": float(self.rounding[i, j, :, k].mean())}
                    rows.append(row | {"same": float(self.same[i, j, :, k].double().mean())})
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Distances over the count, a panel per precision and a line per encoding."""
        from sd_lens.display.figures import counting_collapse

        return counting_collapse(self)

    def __repr__(self) -> str:
        return (
            f"CountingCollapse({', '.join(self.positions)}; {', '.join(self.dtypes)}; counts {self.counts[0]} to {self.counts[-1]}, "
            f"{self.distances.shape[2]} seeds)"
        )


def counting_collapse(
    counts: Sequence[int],
    *,
    positions: Sequence[Positions] = tuple(POSITIONS),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    end: str = "0",
    seeds: int = 3,
    n_layers: int = 3,
    d_model: int = 32,
    n_heads: int = 4,
) -> CountingCollapse:
    """How far apart n and n + 1 ones are to causal transformers with random weights.

    Behind a causal mask and without absolute positions every one is the same vector, whatever stands before it, so the last token reads the
    number only from the share of attention that it keeps for itself, ``w/Z``. One more adds to the denominator ``Z`` the weight of the
    furthest one. Theory, then:

    - NoPE: ``Z ~ n`` and the distance falls like ``n^-2``; RoPE likewise, up to oscillations, for its weights are bounded.
    - ALiBi, with the smallest slope ``m``: like ``1/sinh²(m n/2)``, which is ``n^-2`` at first and ``e^(-m n)`` beyond ``1/m``.
    - sinusoids added to the embeddings: not at all, for neighbouring embeddings stay equally far apart. The last token knows where it
      stands; the corollary's encodings fade with distance, and these do not.

    The ones are read once, up to the largest count, in pieces; every count's last tokens follow on the keys and values of the ones before
    them. Memory: ``n_heads · 512 · n`` scores at a time.

    Args:
        counts: Numbers of ones, from 1.
        positions: Positional encodings.
        dtypes: Precisions that the models run in.
        end: Digits behind the ones, as a question; the last one's representation is compared.
        seeds: How many models are drawn.
        n_layers: Their blocks.
        d_model: Their width.
        n_heads: Attention heads per block.

    Returns:
        The distances.

    Raises:
        ValueError: An argument is none of those.

    Example:
        >>> import torch
        >>> collapse = counting_collapse([16, 64, 256, 1024], positions=["nope"], dtypes=[torch.bfloat16], seeds=1, n_layers=2)
        >>> round(collapse.decay("nope", start=256).exponent, 1)
        1.8
        >>> collapse.critical_count("nope", "bfloat16")
        64
    """
    used = whole_numbers("counts", counts, 1)
    kinds, precisions = chosen("positions", positions, tuple(POSITIONS)), chosen("dtypes", dtypes, tuple(PRECISIONS.values()))
    require_whole("seeds", seeds, 1)
    digit_ids("end", end)
    needed = sorted({*used, *(count + 1 for count in used)})
    shape = (len(kinds), len(precisions), seeds, len(used))
    distances, exact, rounding = (torch.empty(shape, dtype=torch.float64) for _ in range(3))
    same = torch.empty(shape, dtype=torch.bool)
    for i, kind in enumerate(kinds):
        for j, dtype in enumerate(precisions):
            for seed in range(seeds):

                def model(
                    precision: torch.dtype, kind: Positions = kind, dtype: torch.dtype = dtype, seed: int = seed
                ) -> RandomTransformer:
                    return RandomTransformer(
                        positions=kind,
                        n_layers=n_layers,
                        d_model=d_model,
                        n_heads=n_heads,
                        seed=seed,
                        dtype=precision,
                        weights_like=dtype,
                    )

                computed = _last_tokens(model(dtype), needed, end)
                true = computed if dtype == torch.float64 else _last_tokens(model(torch.float64), needed, end)
                off = {n: largest_difference(computed[n], true[n]) for n in needed}
                for k, n in enumerate(used):
                    distances[i, j, seed, k] = largest_difference(computed[n], computed[n + 1])
                    exact[i, j, seed, k] = largest_difference(true[n], true[n + 1])
                    rounding[i, j, seed, k] = max(off[n], off[n + 1])
                    same[i, j, seed, k] = torch.equal(computed[n], computed[n + 1])
    names = tuple(str(dtype).removeprefix("torch.") for dtype in precisions)
    return CountingCollapse(used, kinds, names, distances, exact, rounding, same, end)


def _last_tokens(model: RandomTransformer, counts: Sequence[int], end: str) -> dict[int, Float[Tensor, "d_model"]]:
    """The last token's representation behind each number of ones."""
    past: list[KeyValues] | None = None
    for begin in range(0, counts[-1], _CHUNK):
        past = model.run("1" * min(_CHUNK, counts[-1] - begin), past)[1]
    assert past is not None
    return {n: model.run(end, [block.first(n) for block in past])[0][-1] for n in counts}
