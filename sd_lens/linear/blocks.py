"""A whole block as a linear map, put together from those of its sublayers.

L = (I + F)(I + A) = I + R    sequential block;   L = I + A + F where attention and FFN are parallel
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.maps import IdentityPlus, LinearMap
from sd_lens.linear.sublayers import AttentionMap, FFNMap, MoEMap


class _Composite(LinearMap):
    """A map made of an attention and an FFN map."""

    def __init__(self, attention: LinearMap, ffn: LinearMap, parallel: bool):
        self.attention, self.ffn, self.parallel = attention, ffn, parallel

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self.ffn.like

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.ffn.d_model


class UpdateMap(_Composite):
    """``R``, what a block adds to the stream: ``A + F + FA`` (sequential) or ``A + F`` (parallel)."""

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""
        attended = self.attention.mv(x)
        return attended + self.ffn.mv(x if self.parallel else x + attended)

    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""
        fed = self.ffn.rmv(y)
        return fed + self.attention.rmv(y if self.parallel else y + fed)

    @property
    def offset(self) -> Float[Tensor, "d_model"]:
        """What is added to the map's product to make it the best affine approximation of what the block adds."""
        attended = self.attention.offset
        return attended + self.ffn.offset + (0 if self.parallel else self.ffn.mv(attended))


@dataclass(frozen=True, repr=False)
class BlockMap(LinearMap):
    """A block as the linear map ``L = I + R``, and the maps it is made of.

    Attributes:
        block_index: The block's index.
        attention: ``A``.
        ffn: ``F``.
        parallel: Whether ``R`` is ``A + F`` rather than ``A + F + FA``.
        notes: What the maps rest on beside the weights: estimator, quadrature, scales of norms after the sublayers, router weights.
    """

    block_index: int
    attention: AttentionMap
    ffn: FFNMap | MoEMap
    parallel: bool
    notes: tuple[str, ...] = ()

    @cached_property
    def update(self) -> UpdateMap:
        """``R = L − I``, what the block adds to the stream."""
        return UpdateMap(self.attention, self.ffn, self.parallel)

    @cached_property
    def block(self) -> IdentityPlus:
        """``L`` itself, beside `attention` and `ffn`."""
        return IdentityPlus(self.update)

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self.ffn.like

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.ffn.d_model

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""
        return self.block.mv(x)

    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""
        return self.block.rmv(y)

    @property
    def offset(self) -> Float[Tensor, "d_model"]:
        """What is added to the map's product to make it the best affine approximation of the block."""
        return self.update.offset
