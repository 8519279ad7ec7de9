"""Attention, FFN and block as linear maps that are never written out as matrices.

A map knows how to multiply vectors (`LinearMap.mv`) and how its transpose does (`LinearMap.rmv`); solvers need nothing else.
Following Wang et al. (ICML 2025, arXiv 2502.07004), section 3, a pre-norm block is linearised at a token that attends only to
itself, with the norms' division left out:

    A = W_O W_V diag(γ1) C        attention (C: mean subtraction of a LayerNorm, the identity for an RMSNorm)
    F = W_out Ã diag(γ2) C        FFN, Ã from `sd_lens.linear.gaussian`
    L = (I + F)(I + A) = I + R    sequential block;   L = I + A + F where attention and FFN are parallel

Maps act on residual vectors in the last axis, any number of batch axes before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from sd_lens.linear.gaussian import FFNFit, Inputs, fit_ffn
from sd_lens.models.weights import AttentionWeights, BlockWeights, FFNWeights, NormWeights

_Layer = TypeVar("_Layer", AttentionWeights, FFNWeights)


class LinearMap(ABC):
    """A linear map from residual stream to residual stream, known by its products."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the residual stream."""

    @abstractmethod
    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""

    @abstractmethod
    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_model, d_model)``."""
        return self.d_model, self.d_model

    def to_dense(self) -> Float[Tensor, "d_model d_model"]:
        """The matrix ``M`` with ``mv(x) = M x`` for column vectors. For checks and small models: d_model² numbers."""
        return self.mv(torch.eye(self.d_model, dtype=self.like.dtype, device=self.like.device)).mT

    def as_linear_operator(self) -> LinearOperator:
        """The map as scipy's `LinearOperator` in float64, for any of scipy's solvers."""

        def on_columns(product: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
            def apply(columns: np.ndarray) -> np.ndarray:
                rows = torch.from_numpy(columns.reshape(self.d_model, -1).T.copy()).to(self.like)
                return product(rows).T.double().cpu().numpy().reshape(columns.shape)

            return apply

        forward, backward = on_columns(self.mv), on_columns(self.rmv)
        products: dict[str, Any] = {"matvec": forward, "rmatvec": backward, "matmat": forward, "rmatmat": backward}
        return LinearOperator(dtype="float64", shape=self.shape, **products)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(d_model={self.d_model}, dtype={self.like.dtype}, device={self.like.device})"


def _after_norm(norm: NormWeights | None, x: Tensor) -> Tensor:
    return x if norm is None else norm.center(x) * norm.gain


def _before_norm(norm: NormWeights | None, y: Tensor) -> Tensor:
    return y if norm is None else norm.center(y * norm.gain)


class AttentionMap(LinearMap):
    """``A = W_O W_V diag(γ) C``: what attention writes for a token that attends only to itself."""

    def __init__(self, weights: AttentionWeights):
        self._norm = weights.norm
        self._group = weights.group_size
        self._d_head = weights.W_V.shape[-1]
        self._W_V = rearrange(weights.W_V, "kv_heads d_model d_head -> d_model (kv_heads d_head)")
        self._W_O = rearrange(weights.W_O, "heads d_head d_model -> (heads d_head) d_model")

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self._W_O

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._W_O.shape[1]

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""
        values = _after_norm(self._norm, x) @ self._W_V
        spread = "... (kv_heads d_head) -> ... (kv_heads group d_head)"
        return repeat(values, spread, group=self._group, d_head=self._d_head) @ self._W_O

    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""
        gather = "... (kv_heads group d_head) -> ... (kv_heads d_head)"
        values = reduce(y @ self._W_O.mT, gather, "sum", group=self._group, d_head=self._d_head)
        return _before_norm(self._norm, values @ self._W_V.mT)


class FFNMap(LinearMap):
    """``F = W_out Ã diag(γ) C``, with ``Ã`` the FFN's best linear fit under Gaussian input.

    Attributes:
        fit: The fit's coefficients, two per neuron.
    """

    def __init__(self, weights: FFNWeights, fit: FFNFit):
        self.fit = fit
        self._norm, self._W_out = weights.norm, weights.W_out
        self._branches = [(weights.W_in, fit.in_coefficient)]
        if weights.W_gate is not None and fit.gate_coefficient is not None:
            self._branches.append((weights.W_gate, fit.gate_coefficient))

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self._W_out

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._W_out.shape[1]

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""
        x = _after_norm(self._norm, x)
        (weight, coefficient), *gate = self._branches
        hidden = (x @ weight) * coefficient
        for weight, coefficient in gate:
            hidden = hidden + (x @ weight) * coefficient
        return hidden @ self._W_out

    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""
        hidden = y @ self._W_out.mT
        (weight, coefficient), *gate = self._branches
        x = (hidden * coefficient) @ weight.mT
        for weight, coefficient in gate:
            x = x + (hidden * coefficient) @ weight.mT
        return _before_norm(self._norm, x)


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


class IdentityPlus(LinearMap):
    """``I + M``: a residual connection around a map."""

    def __init__(self, update: LinearMap):
        self.update = update

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self.update.like

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.update.d_model

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""
        return x + self.update.mv(x)

    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""
        return y + self.update.rmv(y)


@dataclass(frozen=True)
class BlockMap(LinearMap):
    """A block as the linear map ``L = I + R``, and the maps it is made of.

    Attributes:
        block_index: The block's index.
        attention: ``A``.
        ffn: ``F``.
        parallel: Whether ``R`` is ``A + F`` rather than ``A + F + FA``.
    """

    block_index: int
    attention: AttentionMap
    ffn: FFNMap
    parallel: bool

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


def _in_working_dtype(layer: _Layer) -> _Layer:
    """The layer with every tensor in float32, or as it is where it has float64: half precision has too few digits to iterate on."""
    stored = layer.W_out if isinstance(layer, FFNWeights) else layer.W_O
    working = torch.promote_types(stored.dtype, torch.float32)

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(working)
        if isinstance(value, NormWeights):
            return replace(value, gain=convert(value.gain), bias=None if value.bias is None else convert(value.bias))
        return value

    return replace(layer, **{field: convert(value) for field, value in vars(layer).items()})


def linearize(weights: BlockWeights, *, inputs: Inputs = "unit") -> BlockMap:
    """Linearises a pre-norm block: Wang et al. (arXiv 2502.07004), section 3, with the FFN's fit in closed form.

    Args:
        weights: The block, from `sd_lens.weights_of`.
        inputs: What the FFN is fitted to, see `sd_lens.linear.gaussian.fit_ffn`.

    Returns:
        The block's map ``L``, with ``.attention`` (``A``), ``.ffn`` (``F``) and ``.update`` (``R = L − I``). It computes in float32,
        in float64 where the weights have it.

    Raises:
        ValueError: A weight is NaN or infinite; ``inputs`` is unknown; the block has a norm after a sublayer, so that its output
            does not depend linearly on the sublayer's at any scale.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> from sd_lens.models.loading import weights_of
        >>> block = linearize(weights_of(planted().model)[1])
        >>> block.ffn.mv(torch.ones(block.d_model)).shape
        torch.Size([64])
    """
    for name, layer in (("attention", weights.attention), ("ffn", weights.ffn)):
        if layer.post_norm is not None:
            raise ValueError(
                f"weights: the {name} of block {weights.block} has a norm after the sublayer, so its output is not linear in the "
                "sublayer's; allowed: blocks whose norms stand before the sublayers"
            )
    weights.require_finite()
    attention, ffn = _in_working_dtype(weights.attention), _in_working_dtype(weights.ffn)
    return BlockMap(weights.block, AttentionMap(attention), FFNMap(ffn, fit_ffn(ffn, inputs=inputs)), weights.parallel)
