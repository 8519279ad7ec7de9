"""The angle between directions that have nothing to do with each other: the yardstick of a lineage.

The squared cosine of the angle between two uniformly random directions in ``d`` dimensions is ``Beta(1/2, (d − 1)/2)`` (Muirhead, *Aspects
of Multivariate Statistical Theory*, theorem 1.5.7). So the acute angle's complement ``φ`` has a density proportional to ``cos(φ)^(d − 2)``.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

Verdict = Literal["same lineage", "undecided", "unrelated", "cannot be compared"]

SAME_DEG = 30.0
"""Up to this angle two directions count as of one lineage, if chance seldom makes one so small."""
UNRELATED_DEG = 60.0
"""From this angle on they count as unrelated, if chance makes one so small often enough."""
SELDOM = 1e-3
"""How probable an angle of random directions may be at most to count as not made by chance."""


class Chance(NamedTuple):
    """Acute angle between two random directions of one width.

    Attributes:
        d_model: The width.
        mean_deg: Expectation, degrees.
        std_deg: Standard deviation, degrees.
        low_deg: A smaller angle has a probability of `SELDOM`.
    """

    d_model: int
    mean_deg: float
    std_deg: float
    low_deg: float

    @property
    def same_deg(self) -> float:
        """Up to here a pair is of one lineage."""
        return min(SAME_DEG, self.low_deg)

    @property
    def unrelated_deg(self) -> float:
        """From here on a pair is unrelated."""
        return max(UNRELATED_DEG, self.low_deg)

    def verdict(self, angle_deg: float) -> Verdict:
        """What an angle says of two models."""
        if math.isnan(angle_deg):
            return "cannot be compared"
        return "same lineage" if angle_deg <= self.same_deg else "unrelated" if angle_deg >= self.unrelated_deg else "undecided"

    def __str__(self) -> str:
        return f"{self.mean_deg:.1f}° ± {self.std_deg:.1f}°"


@functools.cache
def chance_angle(d_model: int) -> Chance:
    """What the acute angle between two random directions is.

    Args:
        d_model: Their width.

    Returns:
        Expectation and standard deviation, by numerical integration of the exact density.

    Raises:
        ValueError: The width is below 2.

    Example:
        >>> chance_angle(2).mean_deg, round(chance_angle(128).mean_deg, 2), round(chance_angle(128).std_deg, 2)
        (45.0, 85.94, 3.06)
    """
    from scipy.integrate import quad
    from scipy.special import betaincinv

    if not isinstance(d_model, int) or d_model < 2:
        raise ValueError(f"d_model: got {d_model!r}; allowed: a whole number from 2")
    end = min(math.pi / 2, 40 / math.sqrt(d_model))  # nothing measurable lies beyond, and quad must not miss the peak

    def moment(power: int) -> float:
        return quad(lambda phi: phi**power * math.cos(phi) ** (d_model - 2), 0.0, end, epsabs=0.0, epsrel=1e-12)[0]

    total = moment(0)
    mean = moment(1) / total
    variance = max(moment(2) / total - mean**2, 0.0)
    sine_squared = float(betaincinv((d_model - 1) / 2, 0.5, SELDOM))
    low = math.degrees(math.asin(math.sqrt(sine_squared)))
    return Chance(d_model, math.degrees(math.pi / 2 - mean), math.degrees(math.sqrt(variance)), low)


def chance_probability(angle_deg: float, d_model: int) -> float:
    """How probable it is that two random directions are no further apart.

    Args:
        angle_deg: An acute angle, degrees.
        d_model: Their width, at least 2.

    Returns:
        ``P(angle ≤ angle_deg)``, from the Beta distribution of the squared sine; NaN of NaN.

    Example:
        >>> round(chance_probability(45.0, 2), 9), round(chance_probability(60.0, 3), 9)
        (0.5, 0.5)
    """
    from scipy.special import betainc

    if math.isnan(angle_deg):
        return math.nan
    return float(betainc((d_model - 1) / 2, 0.5, math.sin(math.radians(angle_deg)) ** 2))
