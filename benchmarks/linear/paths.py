"""What either path from a block's weights to its numbers takes, and the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sd_lens.linear.angles import acute_angle


@dataclass(frozen=True)
class Found:
    """The numbers that both paths are after.

    Attributes:
        sigma1: Largest singular value of attention, FFN and block.
        angle_deg: Angle of the leading left singular vectors to the planted direction.
        eigenvalue: Of the eigenvector of the update nearest the planted direction.
        eigenvector_angle_deg: Its angle.
    """

    sigma1: tuple[float, ...]
    angle_deg: tuple[float, ...]
    eigenvalue: complex
    eigenvector_angle_deg: float

    @classmethod
    def of(cls, triplets: Sequence[tuple[float, Tensor]], value: complex, vector: Tensor, direction: Tensor) -> Found:
        """From singular values with their left vectors, and an eigenpair."""
        sigma1, angles = zip(*((sigma, float(acute_angle(u, direction))) for sigma, u in triplets), strict=True)
        return cls(sigma1, angles, value, float(acute_angle(vector, direction)))


@dataclass(frozen=True, kw_only=True)
class PathRun:
    """What a path took and found.

    Attributes:
        seconds: Of each stage.
        peak: Bytes beyond the weights.
        fit_error: Relative error of ``Ã``.
        cores: How many cores the path had on average.
    """

    seconds: dict[str, float]
    peak: int
    fit_error: float
    cores: float

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())
