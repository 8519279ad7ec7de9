"""One part of one block against a reference direction: singular values, singular direction, eigenpair."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sd_lens.linear.angles import acute_angle
from sd_lens.linear.blocks import BlockMap
from sd_lens.linear.maps import IdentityPlus, LinearMap
from sd_lens.linear.spectra import Eigenpair, eigen_nearest, leading_singular

PARTS = ("attention", "ffn", "block")
NEAR = 30.0
"""An eigenvector within so many degrees of a direction speaks about it."""


@dataclass(frozen=True)
class BlockDirection:
    """One part of one block.

    Attributes:
        block: The block.
        part: ``"attention"`` (``I + A``), ``"ffn"`` (``I + F``) or ``"block"`` (``L``).
        sigma1: Largest singular value.
        sigma2: Second largest, usually to 0.1 %, seldom worse than 1 %.
        angle_deg: Angle of the leading left singular vector to the reference direction, degrees.
        eigenvalue: Of the part without the identity (``A``, ``F``, ``R = L − I``): of the eigenvector nearest the reference.
        eigenvector_angle_deg: Angle of that eigenvector to the reference.
        residual: ``‖Mx − λx‖`` of that eigenpair.
        converged: Whether the residual is small. Where it is not, no eigenpair was resolved and the one given means nothing: as a rule
            because no eigenvector is near the reference.
        balance: ``Re λ·√d / ‖x‖`` for the measured norm of high-norm tokens entering the block: −1 where it cancels them. None
            where no norm was measured.
    """

    block: int
    part: str
    sigma1: float
    sigma2: float
    angle_deg: float
    eigenvalue: complex
    eigenvector_angle_deg: float
    residual: float
    converged: bool
    balance: float | None

    @property
    def gap(self) -> float:
        """``σ1 / σ2``: how far the leading direction stands out. Infinite for a map of rank one."""
        return self.sigma1 / self.sigma2 if self.sigma2 > 0 else float("inf")


@dataclass(frozen=True)
class Singular:
    """The singular side of one part of one block: known before there is a reference.

    Attributes:
        block: The block.
        part: See `BlockDirection`.
        sigma1: Largest singular value.
        sigma2: Second largest.
        u: Leading left singular vector.
    """

    block: int
    part: str
    sigma1: float
    sigma2: float
    u: Tensor

    @property
    def gap(self) -> float:
        """``σ1 / σ2``."""
        return self.sigma1 / self.sigma2 if self.sigma2 > 0 else float("inf")


# The first pair's vectors are shown to a tenth of a degree, which this is enough for down to gaps of half a percent; the second singular value
# is there to be compared with the first, and its vectors are not used.
_TOLERANCES = (1e-5, 1e-2)
# Eigenvectors near the reference are found within some ten products. Where the nearest candidate is far after so many, more products
# would be spent on a block that has none; where it is not, they are.
_KRYLOV, _LARGER_KRYLOV = 24, 96
_FAR = 65.0
# Of maps up to this width the whole space costs little; up to this one a dense decomposition can be afforded where it promises something.
_NARROW, _DENSE = 512, 4096
# What is left of the map's product with the direction besides the direction, relative to that: up to about this where an eigenvector is near,
# about the width's root where none is.
_PROMISING = 5.0


def _update(block_map: BlockMap, part: str) -> LinearMap:
    return {"attention": block_map.attention, "ffn": block_map.ffn, "block": block_map.update}[part]


def singular_side(block_map: BlockMap, part: str, seed: int) -> Singular:
    """The two largest singular values of ``I + M``, and where the first one sends."""
    k = min(2, block_map.d_model)
    triplets = leading_singular(IdentityPlus(_update(block_map, part)), k, tol=_TOLERANCES[:k], seed=seed)
    sigma2 = float(triplets.s[1]) if k > 1 else 0.0
    return Singular(block_map.block_index, part, float(triplets.s[0]), sigma2, triplets.u[:, 0])


def direction_row(block_map: BlockMap, singular: Singular, direction: Tensor, norm: float | None) -> BlockDirection:
    """The row of one part: its singular side and its eigenpair against a unit direction.

    Args:
        block_map: The block.
        singular: The part's singular side.
        direction: The reference, a unit vector.
        norm: Norm of the high-norm tokens entering the block, if known.
    """
    pair = _eigenpair(_update(block_map, singular.part), direction)
    return BlockDirection(
        block=singular.block,
        part=singular.part,
        sigma1=singular.sigma1,
        sigma2=singular.sigma2,
        angle_deg=float(acute_angle(singular.u, direction.to(singular.u.device))),
        eigenvalue=pair.value,
        eigenvector_angle_deg=pair.angle_deg,
        residual=pair.residual,
        converged=pair.converged,
        balance=None if norm is None else pair.balance(norm),
    )


def _eigenpair(update: LinearMap, direction: Tensor) -> Eigenpair:
    """From a Krylov space where that finds it, from the dense matrix where it does not though an eigenvector must be near.

    A Krylov space does not resolve an eigenvalue inside the cloud of the others, however near its eigenvector is.
    """
    pair = eigen_nearest(update, direction, max_krylov=_KRYLOV if update.d_model > _NARROW else update.d_model)
    if pair.converged:
        return pair
    unit = direction.to(update.like)
    product = update.mv(unit)
    along = float(product @ unit)
    if update.d_model <= _DENSE and float((product - along * unit).norm()) <= _PROMISING * abs(along):
        return eigen_nearest(update, direction, method="dense")
    return eigen_nearest(update, direction, max_krylov=_LARGER_KRYLOV) if pair.angle_deg < _FAR else pair
