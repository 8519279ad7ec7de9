"""Attention, FFN and mixtures of experts as linear maps that are never written out as matrices.

Following Wang et al. (ICML 2025, arXiv 2502.07004), section 3, a pre-norm block is linearised at a token that attends only to
itself, with the norms' division left out:

    A = W_O W_V diag(γ1) C        attention (C: mean subtraction of a LayerNorm, the identity for an RMSNorm)
    F = W_out Ã diag(γ2) C        FFN, Ã from `sd_lens.linear.gaussian`
    F = Σ_e p_e F_e               mixture of experts, with mean router weights p_e

A norm after the sublayer multiplies its map by ``diag(γ) C / s`` from the left, with ``s`` the scale it is linearised at.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.gaussian import FFNFit
from sd_lens.linear.maps import LinearMap
from sd_lens.models.weights import AttentionWeights, FFNWeights, MoEWeights


class SublayerMap(LinearMap):
    """A sublayer between its norms: the norm's gain before it, and behind it what a norm after the sublayer does at a given scale.

    Attributes:
        post_scale: What the norm after the sublayer divides by; None where there is none.
    """

    def __init__(self, weights: AttentionWeights | FFNWeights | MoEWeights, post_scale: float | None = None):
        self._norm, self._post_norm, self._output_scale = weights.norm, weights.post_norm, weights.output_scale
        self.post_scale = post_scale

    @abstractmethod
    def inner(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map between the norms."""

    @abstractmethod
    def inner_transposed(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Its transpose."""

    @property
    @abstractmethod
    def inner_offset(self) -> Float[Tensor, "d_model"]:
        """What the biases and the fit's mean add to `inner`, the bias of the norm before it included."""

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""
        return self._behind(self.inner(x if self._norm is None else self._norm.center(x) * self._norm.gain))

    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""
        if self._output_scale != 1:
            y = y * self._output_scale
        if self._post_norm is not None and self.post_scale is not None:
            y = self._post_norm.center(y * self._post_norm.gain) / self.post_scale
        x = self.inner_transposed(y)
        return x if self._norm is None else self._norm.center(x * self._norm.gain)

    @property
    def offset(self) -> Float[Tensor, "d_model"]:
        """What is added to the map's product to make it the best affine approximation of the sublayer."""
        offset = self._behind(self.inner_offset)
        if self._post_norm is None or self._post_norm.bias is None:
            return offset
        return offset + self._output_scale * self._post_norm.bias

    def _behind(self, y: Tensor) -> Tensor:
        if self._post_norm is not None and self.post_scale is not None:
            y = self._post_norm.center(y) * self._post_norm.gain / self.post_scale
        return y if self._output_scale == 1 else y * self._output_scale


class AttentionMap(SublayerMap):
    """``A = W_O W_V diag(γ) C``: what attention writes for a token that attends only to itself."""

    def __init__(self, weights: AttentionWeights, post_scale: float | None = None):
        super().__init__(weights, post_scale)
        self._group = weights.group_size
        self._d_head = weights.W_V.shape[-1]
        self._W_V = rearrange(weights.W_V, "kv_heads d_model d_head -> d_model (kv_heads d_head)")
        self._W_O = rearrange(weights.W_O, "heads d_head d_model -> (heads d_head) d_model")
        self._b_V, self._b_O = weights.b_V, weights.b_O

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self._W_O

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._W_O.shape[1]

    def inner(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """``W_O W_V``."""
        return self._write(x @ self._W_V)

    def inner_transposed(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """``W_Vᵀ W_Oᵀ``."""
        gather = "... (kv_heads group d_head) -> ... (kv_heads d_head)"
        values = reduce(y @ self._W_O.mT, gather, "sum", group=self._group, d_head=self._d_head)
        return values @ self._W_V.mT

    @property
    def inner_offset(self) -> Float[Tensor, "d_model"]:
        """``b_O + W_O (b_V + W_V b)`` with the norm's bias ``b``."""
        values = self.like.new_zeros(self._W_V.shape[1])
        if self._norm is not None and self._norm.bias is not None:
            values = self._norm.bias @ self._W_V
        if self._b_V is not None:
            values = values + self._b_V.flatten()
        written = self._write(values)
        return written if self._b_O is None else written + self._b_O

    def _write(self, values: Tensor) -> Tensor:
        spread = "... (kv_heads d_head) -> ... (kv_heads group d_head)"
        return repeat(values, spread, group=self._group, d_head=self._d_head) @ self._W_O


class FFNMap(SublayerMap):
    """``F = W_out Ã diag(γ) C``, with ``Ã`` the FFN's best linear fit under Gaussian input.

    Attributes:
        fit: The fit ``Ã``.
    """

    def __init__(self, weights: FFNWeights, fit: FFNFit, post_scale: float | None = None):
        super().__init__(weights, post_scale)
        self.fit = fit
        self._W_out, self._b_out, self._b_hidden = weights.W_out, weights.b_out, weights.b_hidden

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self._W_out

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._W_out.shape[1]

    def inner(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """``W_out Ã``."""
        return self.fit.mv(x) @ self._W_out

    def inner_transposed(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """``Ãᵀ W_outᵀ``."""
        return self.fit.rmv(y @ self._W_out.mT)

    @property
    def inner_offset(self) -> Float[Tensor, "d_model"]:
        """``b_out + W_out (E[h] + Ã (b − E[x]))`` with the norm's bias ``b``."""
        bias = None if self._norm is None else self._norm.bias
        hidden = self.fit.mean_hidden + self.fit.mv(-self.fit.input_mean if bias is None else bias - self.fit.input_mean)
        written = (hidden if self._b_hidden is None else hidden + self._b_hidden) @ self._W_out
        return written if self._b_out is None else written + self._b_out


class MoEMap(SublayerMap):
    """A mixture of experts with its router held at mean weights: ``F = Σ_e p_e F_e``.

    Attributes:
        experts: The experts' maps, each also a map of its own from stream to stream.
        router: The mean weights ``p_e``.
        shared: The map of an expert that every token goes through, else None.
        shared_weight: The mean of its gate.
    """

    def __init__(
        self,
        weights: MoEWeights,
        experts: tuple[FFNMap, ...],
        router: Float[Tensor, "experts"],
        shared: FFNMap | None = None,
        shared_weight: float = 1.0,
        post_scale: float | None = None,
    ):
        super().__init__(weights, post_scale)
        self.experts, self.router = experts, router
        self.shared, self.shared_weight = shared, shared_weight
        self._parts = list(zip(experts, router.tolist(), strict=True))
        if shared is not None:
            self._parts.append((shared, shared_weight))

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self.experts[0].like

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.experts[0].d_model

    def inner(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The weighted sum of the experts between the norms."""
        return sum((weight * expert.inner(x) for expert, weight in self._parts), torch.zeros_like(x))

    def inner_transposed(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Its transpose."""
        return sum((weight * expert.inner_transposed(y) for expert, weight in self._parts), torch.zeros_like(y))

    @property
    def inner_offset(self) -> Float[Tensor, "d_model"]:
        """The weighted sum of the experts' offsets."""
        return sum((weight * expert.inner_offset for expert, weight in self._parts), self.like.new_zeros(self.d_model))
