"""The expected distance between one attention layer's outputs for two queries, from one formula for all positional encodings.

Keys and values before the last token are independent and standard normal, the last token's query, key and value are given. A score is
``a·k + b`` with ``a`` and ``b`` fixed by query and positions (``b``: sinusoids' or ALiBi's part). The sums in the softmax's denominators
are replaced by their expectations ("mean field"), and expectations of products of weights are those of log-normal variables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScoreLaw:
    """How the scores of one query are distributed.

    Attributes:
        bias: ``b`` of each earlier key.
        own: Scores of the last token's keys, which are given.
        variance: ``‖a‖²``; the same for every key, for rotations keep lengths.
    """

    bias: Float[Tensor, "key"]
    own: Float[Tensor, "last"]
    variance: float


def expected_distance(short: ScoreLaw, long: ScoreLaw, overlap: float, value: Float[Tensor, "d_head"]) -> float:
    """Expected L1 distance of the two outputs.

    Each element of the difference is normal given the last token: its mean comes from the last token's value, whose whole weight differs,
    its variance from the earlier values, whose weights differ one by one.

    Args:
        short: Scores in the sequence.
        long: Scores in the sequence with its last token repeated.
        overlap: ``a·a'`` of the two queries at one key.
        value: The last token's value.
    """
    shift = max(float(short.bias.max()), float(long.bias.max())) if len(short.bias) else 0.0
    first, second = short.bias - shift, long.bias - shift
    own, own_long = (short.own - shift).exp(), (long.own - shift).exp()
    total = float(own.sum() + (first + short.variance / 2).exp().sum())
    total_long = float(own_long.sum() + (second + long.variance / 2).exp().sum())
    squares = (2 * first + 2 * short.variance).exp().sum() / total**2
    squares_long = (2 * second + 2 * long.variance).exp().sum() / total_long**2
    products = (first + second + (short.variance + long.variance) / 2 + overlap).exp().sum() / (total * total_long)
    spread = math.sqrt(max(float(squares + squares_long - 2 * products), 0.0))
    means = (float(own_long.sum()) / total_long - float(own.sum()) / total) * value
    return float(_mean_absolute(means, spread).sum())


def _mean_absolute(mean: Float[Tensor, "d_head"], spread: float) -> Float[Tensor, "d_head"]:
    """``E|x|`` of normal variables (the folded normal's mean)."""
    if spread == 0:
        return mean.abs()
    ratio = mean / (spread * math.sqrt(2))
    return spread * math.sqrt(2 / math.pi) * (-(ratio**2)).exp() + mean * torch.erf(ratio)
