"""What a transformer without mask and positions sees of a sequence: ratios, and no numbers.

Barbero et al., "Transformers need glasses!" (2024), section 6. Attention without mask and positions averages over the tokens as a set with
shares: twice as many of everything give the same averages, in every layer. "10" and "1100" are one sequence to such a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch

from sd_lens.propagation.arguments import chosen, whole_numbers
from sd_lens.propagation.positions import POSITIONS, Positions
from sd_lens.propagation.random_transformer import RandomTransformer, digit_ids, largest_difference
from sd_lens.tracing.arguments import require_whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class CountingGap:
    """How far apart two sequences are to a model.

    Attributes:
        last: Largest absolute difference (L∞) of the last tokens' representations after the final norm, whose elements are of order 1.
        mean: The same of the representations' means over all tokens.
    """

    last: float
    mean: float


@dataclass(frozen=True)
class RatioGap:
    """The distance between a sequence and the same with every token repeated.

    Attributes:
        positions: Positional encoding.
        causal: Whether there was a causal mask.
        ones: Ones in the short sequence.
        zeros: Zeros in the short sequence, behind the ones.
        times: How many times as many of both the long one has.
        last: Largest gap of last tokens over seeds, see `CountingGap`.
        mean: Largest gap of means over seeds.
    """

    positions: Positions
    causal: bool
    ones: int
    zeros: int
    times: int
    last: float
    mean: float

    @property
    def setting(self) -> str:
        """Positions and mask in words."""
        return f"{POSITIONS[self.positions]}, {'causal mask' if self.causal else 'no mask'}"


@dataclass(frozen=True)
class RatioBlindness:
    """Which models only see ratios.

    Attributes:
        gaps: One for every setting, ratio and number of times, in this order.
        n_layers: Blocks of the models.
        n_seeds: How many models were drawn for each setting.
    """

    gaps: tuple[RatioGap, ...]
    n_layers: int
    n_seeds: int

    def blind(self, *, tolerance: float = 1e-6) -> tuple[str, ...]:
        """Settings in which every pair of sequences is the same to the model, last token and mean.

        Args:
            tolerance: Largest gap that counts as none.
        """
        settings = dict.fromkeys(gap.setting for gap in self.gaps)
        seen = {gap.setting for gap in self.gaps if max(gap.last, gap.mean) > tolerance}
        return tuple(setting for setting in settings if setting not in seen)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per setting, ratio and number of times: positions, causal, ones, zeros, times, last, mean."""
        return pd.DataFrame([vars(gap) for gap in self.gaps])

    def plot(self) -> Figure:
        """Gaps of the last token over the number of times, one line per setting."""
        from sd_lens.display.figures import ratio_blindness

        return ratio_blindness(self)

    def __repr__(self) -> str:
        settings = len({gap.setting for gap in self.gaps})
        return f"RatioBlindness({settings} settings, {self.n_layers} layers; only ratios: {'; '.join(self.blind()) or 'none'})"


def counting_gap(
    a: str,
    b: str,
    *,
    positions: Positions = "nope",
    causal: bool = False,
    n_layers: int = 3,
    d_model: int = 32,
    n_heads: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> CountingGap:
    """How far apart two sequences of digits are to a small transformer with random weights.

    Args:
        a: A sequence of digits, such as ``"10"``.
        b: Another one, such as ``"1100"``.
        positions: Positional encoding: ``"nope"``, ``"sinusoidal"``, ``"rope"`` or ``"alibi"``.
        causal: Whether there is a causal mask.
        n_layers: Blocks of the model.
        d_model: Its width.
        n_heads: Attention heads per block.
        seed: Of its weights.
        dtype: Precision that it runs in.

    Returns:
        Distance of the last tokens' representations, and of the means over tokens.

    Raises:
        ValueError: A sequence has other characters than digits or none, or the model cannot be made like this.

    Example:
        >>> gap = counting_gap("10", "1100")
        >>> gap.last < 1e-6, gap.mean < 1e-6
        (True, True)
        >>> gap = counting_gap("10", "1100", causal=True, positions="rope")
        >>> gap.last > 0.1, gap.mean > 0.1
        (True, True)
    """
    digit_ids("a", a)
    digit_ids("b", b)
    model = RandomTransformer(
        positions=positions, causal=causal, n_layers=n_layers, d_model=d_model, n_heads=n_heads, seed=seed, dtype=dtype
    )
    first, second = model(a), model(b)
    return CountingGap(largest_difference(first[-1], second[-1]), largest_difference(_mean(first), _mean(second)))


def _mean(representations: torch.Tensor) -> torch.Tensor:
    return representations.double().mean(0)


def ratio_blindness(
    ratios: Sequence[tuple[int, int]] = ((1, 1), (2, 1), (1, 3)),
    *,
    times: Sequence[int] = (2, 4, 16),
    positions: Sequence[Positions] = tuple(POSITIONS),
    causal: Sequence[bool] = (False, True),
    seeds: int = 3,
    n_layers: int = 3,
    d_model: int = 32,
    n_heads: int = 4,
    dtype: torch.dtype = torch.float64,
) -> RatioBlindness:
    """Which transformers with random weights tell a sequence from one with many times as many of everything.

    Args:
        ratios: Ones and zeros of the short sequences; all ones come first.
        times: How many times as many the long sequences have, from 2.
        positions: Positional encodings.
        causal: With a mask, without, or both.
        seeds: How many models are drawn for each setting; the largest gap is kept.
        n_layers: Their blocks.
        d_model: Their width.
        n_heads: Attention heads per block.
        dtype: Precision that they run in.

    Returns:
        A table of gaps.

    Raises:
        ValueError: An argument is none of those.

    Example:
        >>> ratio_blindness([(1, 1)], times=[2])
        RatioBlindness(8 settings, 3 layers; only ratios: NoPE, no mask)
        >>> ratio_blindness([(1, 1)], times=[2], positions=["nope"], n_layers=1).to_dataframe().round(3)[["causal", "last", "mean"]]
           causal  last   mean
        0   False   0.0  0.000
        1    True   0.0  0.148
    """
    pairs = tuple(dict.fromkeys(_ratio(ratio) for ratio in _sequence(ratios)))
    factors = whole_numbers("times", times, 2)
    require_whole("seeds", seeds, 1)
    kinds, masks = chosen("positions", positions, tuple(POSITIONS)), chosen("causal", causal, (False, True))
    gaps = []
    for kind in kinds:
        for mask in masks:
            models = [
                RandomTransformer(
                    positions=kind, causal=mask, n_layers=n_layers, d_model=d_model, n_heads=n_heads, seed=seed, dtype=dtype
                )
                for seed in range(seeds)
            ]
            for ones, zeros in pairs:
                short = [model("1" * ones + "0" * zeros) for model in models]
                for factor in factors:
                    long = [model("1" * (ones * factor) + "0" * (zeros * factor)) for model in models]
                    both = list(zip(short, long, strict=True))
                    last = max(largest_difference(x[-1], y[-1]) for x, y in both)
                    mean = max(largest_difference(_mean(x), _mean(y)) for x, y in both)
                    gaps.append(RatioGap(kind, mask, ones, zeros, factor, last, mean))
    return RatioBlindness(tuple(gaps), n_layers, seeds)


def _sequence(ratios: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    if not isinstance(ratios, Sequence) or isinstance(ratios, str) or not ratios:
        raise ValueError(f"ratios: got {ratios!r}; allowed: at least one pair of numbers of ones and zeros")
    return ratios


def _ratio(ratio: tuple[int, int]) -> tuple[int, int]:
    whole = isinstance(ratio, Sequence) and len(ratio) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in ratio)
    if not whole or min(ratio) < 0 or sum(ratio) < 1:
        raise ValueError(f"ratios: got {ratio!r}; allowed: two whole numbers from 0, not both 0")
    return ratio[0], ratio[1]
